"""Rows of any length, padded in any way, are ranked by their real tokens alone."""

import copy

import pytest
import torch
from selective_models import OWN, STOCK, make
from short_rows import check_equal, one_by_one, padded, rows_of
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM

from hf_compressm import compress, state_sizes
from hf_compressm.ops.state_gramian import state_gramian
from hf_compressm.surgery import find_mixers, gather_statistics, selective_signals
from hf_compressm.surgery.adapters.selective import SelectiveMeasurement, look_weights
from hf_compressm.surgery.policies import Energy
from hf_compressm.surgery.refit import Recording

LENGTHS = [6, 1, 20, 3, 7, 8, 9, 2]
MODELS = pytest.mark.parametrize("table", [STOCK, OWN], ids=["stock", "own"])
KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


@MODELS
@KINDS
@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_a_padded_batch_counts_as_its_rows_one_by_one(table, kind, side):
    model, rows = make(table, kind), rows_of(LENGTHS)
    expected = gather_statistics(model, one_by_one(rows))
    assert next(iter(expected.values())).tokens == sum(LENGTHS)
    check_equal(gather_statistics(model, padded(rows, side, 33)), expected)
    mixed = [padded(rows[:3], side), padded(rows[3:4], side, 32), padded(rows[4:][::-1], side)]
    check_equal(gather_statistics(model, mixed), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.uint8])
def test_dtypes_of_masks_and_rows_without_a_token(dtype):
    model, rows = make(STOCK, "mamba"), rows_of(LENGTHS)
    batch = padded([*rows, rows[0][:0]], "right", 24, dtype)
    check_equal(gather_statistics(model, batch), gather_statistics(model, one_by_one(rows)))


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_family(family, side):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    if side == "left" and "mamba2" in family:
        for site in find_mixers(model):  # its in_proj has a bias, which the convolution sees at padding on the left
            torch.nn.init.zeros_(site.mixer.in_proj.bias)
    rows = rows_of(LENGTHS)
    check_equal(gather_statistics(model, padded(rows, side, 24)), gather_statistics(model, one_by_one(rows)))


@KINDS
@pytest.mark.parametrize("side", ["right", "left"])
def test_short_rows_keep_what_they_keep_without_padding(kind, side):
    """64 rows of 6 tokens in 32 columns, no multiple of eight among the real positions."""
    model, rows = make(STOCK, kind, state_size=16), rows_of([6] * 64)
    whole = copy.deepcopy(model)
    compress(model, [padded(rows, side, 32)], policy=Energy(tau=0.1), refit_steps=0)
    compress(whole, [{"input_ids": torch.stack(rows)}], policy=Energy(tau=0.1), refit_steps=0)
    assert state_sizes(model) == state_sizes(whole) and min(state_sizes(model)) > 1
    ids = torch.stack(rows)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 8, 15, 64, 301])
def test_looks_weigh_as_many_tokens_as_they_stand_for(length):
    weights = look_weights(torch.ones(2, length, dtype=torch.bool))
    assert torch.equal(weights[0], weights[1]) and weights[0].sum() == length and weights.max() <= 8
    assert weights[0].count_nonzero() <= length / 8 + 7
    holes = torch.rand(3, 2 * length + 40, generator=torch.Generator().manual_seed(0)) < 0.6
    for row, found in zip(holes, look_weights(holes), strict=True):
        alone = look_weights(torch.ones(1, int(row.sum()), dtype=torch.bool))
        assert torch.equal(found[row], alone[0]) and not found[~row].any()


def test_every_place_within_a_stretch_is_as_likely_as_another():
    places = look_weights(torch.ones(1, 8 * 401, dtype=torch.bool))[0].view(-1, 8)[2:].argmax(1)
    counts = torch.bincount(places, minlength=8)
    assert counts.min() >= 48 and counts.max() <= 52


@KINDS
@pytest.mark.parametrize("lengths", [[4] * 200, [6] * 200, [8] * 200, [3, 11, 30, 70] * 16, [200] * 8])
def test_looks_are_close_to_all_states(kind, lengths):
    model = make(STOCK, kind, state_size=16)
    rows, seen = rows_of(lengths), {}
    site = find_mixers(model)[1]
    site.mixer.register_forward_pre_hook(
        lambda mixer, args, kwargs: seen.update(kwargs, hidden_states=(args or [kwargs["hidden_states"]])[0]),
        with_kwargs=True,
    )
    found = SelectiveMeasurement.of(gather_statistics(model, padded(rows, "right"))[site.name])
    signals = selective_signals(site.mixer, seen["hidden_states"], seen["attention_mask"])
    weights = padded(rows, "right")["attention_mask"]
    every = state_gramian(signals.u, signals.dt, signals.A, signals.B, weights) / sum(lengths)
    exact = SelectiveMeasurement(every, found.W, found.drives)
    assert abs(found.G.diagonal(0, 1, 2).sum() / every.diagonal(0, 1, 2).sum() - 1) <= 0.08
    assert (found.G - every).norm() <= 0.25 * every.norm()
    assert torch.allclose(found.spectrum(), exact.spectrum(), rtol=0.12)


@pytest.mark.parametrize("real", [0, 7])
def test_too_few_real_tokens_are_refused(real):
    model, batch = make(STOCK, "mamba"), padded(rows_of([32, 32]), "right")
    batch["attention_mask"] = (torch.arange(64) < real).view(2, 32).long()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{real} real tokens cannot rank the 8 states.*longer batches"):
        compress(model, [batch], policy=Energy(tau=0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masks_that_do_not_fit_are_refused():
    model = make(OWN, "mamba")
    mixer = find_mixers(model)[0].mixer
    with pytest.raises(ValueError, match=r"attention mask \(2, 1, 5, 5\); it must be \(2, 5\), zero at padding"):
        find_mixers(model)[0].adapter.statistics(mixer).observe(mixer, torch.randn(2, 5, 32), torch.ones(2, 1, 5, 5))


def test_a_mask_for_earlier_tokens_too_and_one_for_all_rows():
    model, hidden = make(OWN, "mamba"), torch.randn(2, 12, 32)
    site, found = find_mixers(model)[0], []
    mask = torch.tensor([[0.0] * 3 + [1.0] * 9])
    for given in (mask.expand(2, -1), mask, torch.cat([torch.ones(2, 4), mask.expand(2, -1)], 1)):
        found.append(site.adapter.statistics(site.mixer))
        found[-1].observe(site.mixer, hidden, given)
    assert found[0].tokens == 18
    for other in found[1:]:
        check_equal({"": other}, {"": found[0]})


def test_recordings_hold_no_rows_of_padding():
    recording = Recording()
    hidden, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    recording.add(hidden, 2 * hidden, mask)
    ((inputs, outputs, kept),) = recording.batches()
    assert torch.equal(inputs, hidden[[0, 2]]) and torch.equal(outputs, 2 * inputs)
    assert torch.equal(kept, mask[[0, 2]].bool())


def test_a_mask_that_is_passed_by_position():
    model, rows = make(OWN, "mamba"), rows_of(LENGTHS)
    block = model.backbone.layers[0]

    def forward(hidden_states, cache_params=None, attention_mask=None, **kwargs):
        return hidden_states + block.mixer(block.norm(hidden_states), cache_params, attention_mask)

    expected = gather_statistics(model, one_by_one(rows))
    block.forward = forward
    check_equal(gather_statistics(model, padded(rows, "right")), expected)
