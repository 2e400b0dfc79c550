"""Cuts of this package's Gated DeltaNet: a new basis for the states of each key head, in any sizes, again and again."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import arguments
from own_delta_models import IDS, KEYS, PURE, own
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import CompreSSMCallback, compress, state_sizes
from hf_compressm.ops.gated_delta_scan import naive_gated_delta_scan
from hf_compressm.reduction import low_rank_basis
from hf_compressm.reduction.key_channels import leading_rotation
from hf_compressm.surgery import find_mixers, gather_statistics, history, measure_model

BATCH = {"input_ids": torch.randint(1, 50, (4, 40), generator=torch.Generator().manual_seed(1))}


def close(found, expected, tolerance=1e-5):
    return (found - expected).detach().abs().max() <= tolerance * expected.detach().abs().max().clamp(min=1)


def covariances(rank, seed=0):
    """Q, K, P float64 (K, K), of some rank."""
    rows = torch.randn(3, KEYS, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.mT


@pytest.mark.parametrize("fields", [{}, {"state_sizes": [6, 5]}], ids=["full", "cut"])
def test_statistics_are_those_of_the_recurrence(fields, monkeypatch):
    monkeypatch.setattr("hf_compressm.surgery.adapters.gated_delta_own.look_weights", lambda real: real.float())
    model = own(**fields)
    site = find_mixers(model)[0]
    mask = torch.ones_like(BATCH["input_ids"])
    mask[0, :13], mask[1, 30:], mask[2, 7:9] = 0, 0, 0
    found = gather_statistics(model, BATCH | {"attention_mask": mask})[site.name]
    expected = torch.zeros_like(found.sums)
    hidden = model.backbone.layers[0].input_layernorm(model.backbone.embed_tokens(BATCH["input_ids"]))
    with torch.no_grad():
        for row, real in zip(hidden, mask.bool(), strict=True):
            q, k, v, g, beta = (part.double() for part in site.mixer.recurrence_inputs(row[real][None]))
            q, k, erase = site.mixer.to_state_basis(q, k)
            erased = k if erase is None else erase
            expected[0] += torch.einsum("lgm,lgn->gmn", q[0], q[0])
            expected[1] += torch.einsum("lgm,lgn->gmn", erased[0], erased[0])
            for t in range(1, k.shape[1] + 1):
                parts = [part[:, :t] for part in (q, k, v, g, beta)]
                _, S = naive_gated_delta_scan(*parts, erase=None if erase is None else erase[:, :t])
                expected[2] += (S @ S.mT)[0].unflatten(0, (2, 2)).sum(1)
    assert found.tokens == int(mask.sum())
    assert close(found.sums, expected, 1e-4)


@pytest.mark.parametrize("fields", [{}, PURE], ids=["hybrid", "pure"])
def test_cuts_of_any_size_reload_and_generate(fields, tmp_path):
    model = own(**fields)
    others = {n: p.clone() for n, p in model.named_parameters() if "read_" not in n and "out_proj" not in n}
    sizes = []
    for target in (5, 3, 1):
        record = compress(model, BATCH, target=target, refit_steps=0)
        assert all((layer["residual"] or 0) >= 0 for layer in record["layers"])
        sizes.append(model.config.state_sizes)
        assert state_sizes(model) == sizes[-1]
    assert max(sizes[0]) <= 7 and max(sizes[2]) < KEYS and sum(sizes[0]) > sum(sizes[1]) > sum(sizes[2])
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in others.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    settings = {"max_new_tokens": 8, "do_sample": False}
    with_cache, without = (loaded.generate(IDS[:, :5], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_states_that_nothing_needs_cost_nothing():
    model = own(**PURE)
    with torch.no_grad():
        for site in find_mixers(model):  # queries and keys of half the channels are nearly zero
            for weight in (site.mixer.in_proj_qkv.weight, site.mixer.conv1d.weight):
                rows = weight[: 4 * KEYS].unflatten(0, (4, KEYS))
                rows[:, ::2] *= 1e-4
    full = model(BATCH["input_ids"]).logits
    compress(model, BATCH, target=KEYS // 2, refit_steps=0)
    assert max(state_sizes(model)) <= KEYS
    assert close(model(BATCH["input_ids"]).logits, full, 1e-3)


def test_a_second_cut_is_in_the_basis_of_the_first():
    model = own(**PURE)
    site = find_mixers(model)[0]
    adapter, mixer = site.adapter, site.mixer
    for order in (6, 3):
        measured = measure_model(model, BATCH)[site.name]
        old = None if mixer.read_in is None else (mixer.read_in.detach().double(), mixer.read_out.detach().double())
        changes = adapter.reduce(mixer, measured, order).changes
        L, R = changes["read_in"].value, changes["read_out"].value
        assert L.shape == R.shape == (2, order, KEYS)
        if old is None:
            mixer.read_in, mixer.read_out = (torch.nn.Parameter(rows.float()) for rows in (L, R))
            continue
        for head, (Q, K, P) in enumerate(zip(measured.Q, measured.K, measured.P, strict=True)):
            first, second = low_rank_basis(P, Q, order)
            best = torch.allclose(L[head], first @ old[0][head]) and torch.allclose(R[head], second @ old[1][head])
            assert best or torch.allclose(L[head], leading_rotation(Q, K, P, order) @ old[0][head])
    gradient = changes["read_in"].map_first({"read_in": torch.ones(2, 6, KEYS)})
    assert gradient.shape == (2, 3, KEYS)


def test_what_could_let_a_state_grow_is_replaced_by_a_rotation(caplog):
    model = own(**PURE)
    site = find_mixers(model)[0]
    measured = measure_model(model, BATCH)[site.name]
    sample = measured.transitions
    assert len(sample.write) == 160 and sample.strength.shape == sample.decay.shape == (160, 4)
    assert torch.allclose(sample.write.norm(dim=-1), torch.ones(160, 2), atol=1e-3)
    identity = torch.eye(KEYS)
    assert sample.largest(0, identity, identity) <= 1 and sample.largest(1, identity, -identity) > 1
    # States that lie where no query looks make the balancing basis oblique.
    Q, K, P = covariances(2)
    odd = type(measured)(*(part.expand(2, -1, -1) for part in (Q, K, P)), sample)
    L, R = low_rank_basis(P, Q, 2)
    changes = site.adapter.reduce(site.mixer, odd, 2).changes
    for head in range(2):
        found = changes["read_in"].value[head], changes["read_out"].value[head]
        if sample.largest(head, L, R) > 1:
            assert torch.equal(*found) and torch.allclose(found[0], leading_rotation(Q, K, P, 2))
            assert torch.allclose(found[0] @ found[0].T, torch.eye(2, dtype=torch.float64))
        else:
            assert torch.equal(found[0], L) and torch.equal(found[1], R)
        assert sample.largest(head, *found) <= 1 + 1e-6
    assert max(sample.largest(head, L, R) for head in range(2)) > 1  # so the first branch was taken


def test_the_choice_and_the_refit_lower_the_error():
    errors = {}
    for selection, steps in (("largest", 0), ("smallest", 0), ("largest", 20)):
        model = own(**PURE)
        full = model(IDS).logits.detach()
        compress(model, BATCH, target=4, refit_steps=steps, selection=selection)
        errors[selection, steps] = (model(IDS).logits - full).square().mean().item()
    assert errors["largest", 20] < errors["largest", 0] < errors["smallest", 0]


def test_adapters_on_projections_stay_as_they_are():
    model = get_peft_model(own(), LoraConfig(r=4, target_modules=["in_proj_qkv", "out_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    plain = copy.deepcopy(model).merge_and_unload()
    for each in (model, plain):
        compress(each, BATCH, target=4, refit_steps=0)
    assert state_sizes(model) == state_sizes(plain) and max(state_sizes(model)) < KEYS
    assert close(model(input_ids=IDS).logits, plain(IDS).logits)
    compress(model, BATCH, target=2, refit_steps=5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def data(count=64, length=16):
    start = torch.randint(1, 50, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + 3 * torch.arange(length)) % 49 + 1
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")


def test_resuming_across_cuts_is_bit_identical(tmp_path):
    finals = []
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    for resume in (None, str(tmp_path / "checkpoint-6")):
        callback = CompreSSMCallback(policy="target", target_state_size=3, cut_steps=[5, 8])
        trainer = Trainer(own().train(), arguments(tmp_path, **settings), train_dataset=data(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        finals.append(trainer)
    assert max(state_sizes(finals[0].model)) < KEYS
    assert [record["step"] for record in history(finals[0].model)] == [5, 8]
    for (name, first), second in zip(finals[0].model.named_parameters(), finals[1].model.parameters(), strict=True):
        assert torch.equal(first, second), name
    assert all(torch.tensor([entry.get("loss", 0.0) for entry in finals[0].state.log_history]).isfinite())


def test_bad_orders_are_refused():
    with pytest.raises(ValueError, match="cannot rank the 8 states"):
        compress(own(), {"input_ids": IDS[:1, :5]}, target=4)
