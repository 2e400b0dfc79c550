"""Cuts of this package's MiniMax: a new basis for the states of each head, in any sizes, again and again."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import arguments
from own_minimax_models import IDS, KEYS, PURE, own, stock
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import CompreSSMCallback, compress, from_stock, state_sizes
from hf_compressm.reduction import low_rank_basis
from hf_compressm.surgery import find_mixers, gather_statistics, history, measure_model
from hf_compressm.training import verify_checkpoint

BATCH = {"input_ids": torch.randint(1, 50, (4, 40), generator=torch.Generator().manual_seed(1))}


def error(model, expected):
    return float((model(IDS).logits - expected).square().mean().detach() / expected.detach().square().mean())


@pytest.mark.parametrize("fields", [{}, {"state_sizes": [6, 5]}], ids=["full", "cut"])
def test_statistics_are_those_of_the_recurrence(fields, monkeypatch):
    monkeypatch.setattr("hf_compressm.surgery.adapters.lightning.look_weights", lambda real: real.float())
    model = own(**fields)
    mask = torch.ones_like(BATCH["input_ids"])
    mask[0, :13], mask[1, 30:], mask[2, 7:9] = 0, 0, 0
    site = find_mixers(model)[0]
    found = gather_statistics(model, BATCH | {"attention_mask": mask})[site.name]
    expected = torch.zeros_like(found.sums)
    hidden = model.backbone.layers[0].input_layernorm(model.backbone.embed_tokens(BATCH["input_ids"]))
    decay = site.mixer.log_decay().double().exp()[:, None, None]
    with torch.no_grad():
        for row, real in zip(hidden, mask.bool(), strict=True):
            q, k, v, _ = site.mixer.recurrence_inputs(row[real][None])
            state = 0
            q, k = site.mixer.to_state_basis(q, k)
            for query, key, value in zip(q[0], k[0], v[0], strict=True):
                state = decay * state + (key[..., None] * value[:, None]).double()
                pairs = (query[..., None], key[..., None], state)
                expected += torch.stack([part.double() @ part.double().mT for part in pairs])
    assert found.tokens == int(mask.sum())
    assert torch.allclose(found.sums, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("fields", [{}, PURE], ids=["hybrid", "pure"])
def test_cuts_of_any_size_reload_and_generate(fields, tmp_path):
    model = own(**fields)
    others = {n: p.clone() for n, p in model.named_parameters() if "read_" not in n and "out_proj" not in n}
    for target in (5, 3, 1):
        record = compress(model, BATCH, target=target, refit_steps=0)
        assert all((layer["residual"] or 0) >= 0 for layer in record["layers"])
        assert state_sizes(model) == model.config.state_sizes
    assert max(state_sizes(model)) < KEYS and len(history(model)) == 3
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in others.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(*(loaded.generate(IDS[:, :5], use_cache=use, **settings) for use in (True, False)))


def test_at_full_rank_the_basis_is_exact():
    model = own(**PURE)
    expected = model(IDS).logits
    for name, measurement in measure_model(model, BATCH).items():
        mixer = model.get_submodule(name)
        bases = [low_rank_basis(P, Q, KEYS) for Q, P in zip(measurement.Q, measurement.P, strict=True)]
        mixer.read_in, mixer.read_out = (
            torch.nn.Parameter(torch.stack(parts).float()) for parts in zip(*bases, strict=True)
        )
    assert error(model, expected) < 1e-10


def test_states_that_nothing_needs_cost_nothing():
    model = own(**PURE)
    with torch.no_grad():
        for site in find_mixers(model):  # queries and keys of half the channels are nearly zero
            rows = site.mixer.qkv_proj.weight.unflatten(0, (4, 3, KEYS))
            rows[:, :2, ::2] *= 1e-4
    expected = model(BATCH["input_ids"]).logits
    compress(model, BATCH, target=KEYS // 2, refit_steps=0)
    assert set(state_sizes(model)) == {KEYS // 2}
    assert torch.allclose(model(BATCH["input_ids"]).logits, expected, atol=1e-3)


def test_a_second_cut_is_in_the_basis_of_the_first():
    model = own(**PURE)
    compress(model, BATCH, target=6, refit_steps=0)
    site = find_mixers(model)[0]
    measured = measure_model(model, BATCH)[site.name]
    changes = site.adapter.reduce(site.mixer, measured, 3).changes
    for head, (Q, P) in enumerate(zip(measured.Q, measured.P, strict=True)):
        L, R = low_rank_basis(P, Q, 3)
        assert torch.allclose(changes["read_in"].value[head], L @ site.mixer.read_in[head].double())
        assert torch.allclose(changes["read_out"].value[head], R @ site.mixer.read_out[head].double())


def test_the_choice_and_the_refit_lower_the_error():
    errors = {}
    for selection, steps in (("largest", 0), ("smallest", 0), ("largest", 20)):
        model = own(**PURE)
        full = model(IDS).logits.detach()
        compress(model, BATCH, target=3, refit_steps=steps, selection=selection)
        errors[selection, steps] = error(model, full)
    assert errors["largest", 20] < errors["largest", 0] < errors["smallest", 0]


def test_single_states_can_be_kept():
    model = own(**PURE)
    site = find_mixers(model)[0]
    changes = site.adapter.keep(site.mixer, [[0, 2], [1, 7], [3, 4], [5, 6]])
    assert changes["read_in"].value[1].argmax(-1).tolist() == [1, 7] and changes["read_out"].value.sum() == 8


def test_lora_follows_a_cut():
    model = get_peft_model(own(), LoraConfig(r=4, target_modules=["qkv_proj", "out_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    merged = copy.deepcopy(model.eval()).merge_and_unload()
    for each in (model, merged):
        compress(each, BATCH, target=3, refit_steps=0)
    assert state_sizes(model) == state_sizes(merged) and max(state_sizes(model)) < KEYS
    assert torch.allclose(model(input_ids=IDS).logits, merged(IDS).logits, atol=1e-4)
    compress(model, BATCH, target=2, refit_steps=5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def trainer_of(folder, **settings):
    callback = CompreSSMCallback(policy="target", target_state_size=3, cut_steps=[3, 5], refit_steps=2)
    data = Dataset.from_dict({"input_ids": BATCH["input_ids"].tolist()} | {"labels": BATCH["input_ids"].tolist()})
    args = arguments(folder, max_steps=7, learning_rate=1e-3, **settings)
    model = from_stock(stock()).train()
    return Trainer(model, args, train_dataset=data.with_format("torch"), callbacks=[callback])


def test_states_go_while_it_trains_and_resuming_across_a_cut_is_exact(tmp_path):
    whole = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    assert max(state_sizes(whole.model)) < KEYS and [record["step"] for record in history(whole.model)] == [3, 5]
    verify_checkpoint(tmp_path / "checkpoint-4")
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name
