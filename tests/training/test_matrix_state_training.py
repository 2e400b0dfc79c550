"""The callback on layers with matrix-valued states, in an unmodified Trainer and with LoRA."""

import copy

import pytest
import torch
from datasets import Dataset
from delta_models import make, with_lora
from helpers import arguments
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import CompreSSMCallback, compress, state_sizes
from hf_compressm.surgery import history
from hf_compressm.training import verify_checkpoint

IDS = torch.randint(2, 64, (16, 12), generator=torch.Generator().manual_seed(0))


def trainer_of(family, folder, model=None, **settings):
    callback = CompreSSMCallback(policy="fraction", keep_fraction=0.5, cut_steps=[3, 5], refit_steps=2)
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()}).with_format("torch")
    args = arguments(folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, **settings)
    model = make(family) if model is None else model
    return Trainer(model.train(), args, train_dataset=data, callbacks=[callback])


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "olmo_hybrid"])
def test_keys_go_while_it_trains_and_resuming_across_a_cut_is_exact(family, tmp_path):
    whole = trainer_of(family, tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    assert state_sizes(whole.model) == [8, 8] and whole.model.config.linear_key_head_dim == 8
    assert [record["step"] for record in history(whole.model)] == [3, 5]
    verify_checkpoint(tmp_path / "checkpoint-4")
    resumed = trainer_of(family, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    whole.save_model(tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert torch.equal(loaded(IDS).logits, whole.model.eval()(IDS).logits)


def test_a_model_with_fewer_value_channels_trains_is_cut_and_resumes(tmp_path):
    model = make("qwen3_next")
    compress(model, {"input_ids": IDS}, value_size=4, refit_steps=0)
    fresh = copy.deepcopy(model)
    whole = trainer_of("qwen3_next", tmp_path, model, save_strategy="steps", save_steps=2)
    whole.train()
    assert [record["event"] for record in history(whole.model)] == ["value_cut", "cut", "cut"]
    verify_checkpoint(tmp_path / "checkpoint-4")
    resumed = trainer_of("qwen3_next", tmp_path, fresh)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert state_sizes(resumed.model) == [8, 8] and resumed.model.config.linear_value_head_dim == 4
    assert history(resumed.model) == history(whole.model)
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    larger = trainer_of("qwen3_next", tmp_path)
    with pytest.raises(ValueError, match=r"norm.weight has shape \(4,\), this model wants \(8,\)"):
        larger.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_adapters_follow_a_cut():
    model = with_lora(make("qwen3_5"), "in_proj_qkv", "out_proj")
    merged = copy.deepcopy(model).merge_and_unload()
    for cut in (model, merged):
        compress(cut, {"input_ids": IDS}, target=8, refit_steps=0)
    assert state_sizes(model) == [8, 8]
    assert torch.allclose(model.eval()(IDS).logits, merged.eval()(IDS).logits, atol=1e-4)
