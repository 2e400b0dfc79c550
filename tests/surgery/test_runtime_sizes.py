"""Cuts to the state sizes that a runtime takes, by hand and in training."""

import pytest
import torch
from selective_models import IDS, STOCK, make, own
from transformers import Trainer, TrainingArguments

from hf_compressm import CompressionConfig, CompreSSMCallback, Fraction, SizeConstraints, compress, state_sizes

BATCH = {"input_ids": IDS}
WIDE = {"hidden_size": 64, "state_size": 40}
FOR = SizeConstraints(sizes_for="llama.cpp")


def cut(model, constraints=FOR, **amount):
    compress(model, BATCH, constraints=constraints, refit_steps=0, **amount)
    return state_sizes(model)


def test_targets_are_rounded_down_to_what_the_runtime_takes():
    assert cut(make(STOCK, "mamba", **WIDE), target=20) == [16] * 3
    assert cut(own("mamba", state_sizes=[40, 24, 20], **WIDE), target=20) == [16] * 3
    heads = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 24}
    assert cut(make(STOCK, "mamba2", **heads), SizeConstraints(sizes_for="mamba_ssm"), target=20) == [16] * 3


def test_other_amounts_are_rounded_up_and_a_layer_waits_until_a_size_is_reached():
    assert cut(own("mamba", state_sizes=[40, 24, 20], **WIDE), policy=Fraction(0.5)) == [40, 16, 16]
    assert cut(make(STOCK, "mamba", **WIDE), policy=Fraction(0.3)) == [16] * 3


@pytest.mark.parametrize(
    ("constraints", "amount", "message"),
    [
        ({"sizes_for": "lama.cpp"}, {}, "unknown runtime 'lama.cpp'; did you mean 'llama.cpp'"),
        ({"sizes_for": "llama.cpp"}, {"target": 3}, "target_state_size is 3, but sizes_for='llama.cpp' allows 16"),
        ({"sizes_for": "llama.cpp", "minimum": 17}, {}, "none is below the present 40 and at least the minimum 17"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_anything_is_changed(constraints, amount, message):
    model = make(STOCK, "mamba", **WIDE)
    with pytest.raises(ValueError, match=message):
        cut(model, SizeConstraints(**constraints), **amount)
    assert state_sizes(model) == [40] * 3


def test_models_that_have_no_such_size_or_no_such_form_are_refused():
    with pytest.raises(ValueError, match="none is below the present 16"):
        cut(make(STOCK, "mamba", hidden_size=64, state_size=16), tau=0.5)
    with pytest.raises(ValueError, match="compressm_mamba2 mixes states in matrices that llama.cpp does not have"):
        cut(own("mamba2"))
    with pytest.raises(ValueError, match="sizes_for='llama.cpp' says which .* multiple_of=8 has no place beside it"):
        SizeConstraints(sizes_for="llama.cpp", multiple_of=8)
    with pytest.raises(ValueError, match="has no place beside it"):
        CompressionConfig(sizes_for="vllm", multiple_of=8)
    with pytest.raises(ValueError, match="unknown runtime 'vlm'; did you mean 'vllm'"):
        CompressionConfig(sizes_for="vlm")


def trainer(tmp_path, model, **settings):
    callback = CompreSSMCallback(cut_steps=[1, 2], sizes_for="llama.cpp", **settings)
    args = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    return Trainer(model, args, train_dataset=rows, callbacks=[callback])


def test_the_callback_cuts_to_such_sizes_at_once(tmp_path):
    model = make(STOCK, "mamba", **WIDE)
    trainer(tmp_path, model, policy="target", target_state_size=20).train()
    assert state_sizes(model) == [16] * 3
    assert model.config.compression_history[-1]["layers"][0]["old_size"] == 40


def test_the_callback_refuses_before_the_first_step(tmp_path):
    model = make(STOCK, "mamba", hidden_size=64, state_size=12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="of which none is below the present 12"):
        trainer(tmp_path, model).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
