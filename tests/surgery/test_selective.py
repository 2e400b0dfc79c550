"""Calibration, gradient maps and bad input of selective layers."""

import copy
import random

import numpy as np
import pytest
import torch
from selective_models import COMMON, HEADS, IDS, OWN, STOCK, make
from torch import nn
from torch.utils.data import DataLoader

from hf_compressm import compress, from_stock, state_sizes
from hf_compressm.surgery import CutSettings, ReductionError, Snapshot, find_mixers, gather_statistics, make_plan
from hf_compressm.surgery.optimizer import carried_state
from hf_compressm.surgery.refit import TOKENS, Recording, refit

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2"])
BATCHES = [{"input_ids": IDS}]


def loss_of(model):
    return model(IDS, labels=IDS).loss


def test_gathering_disturbs_nothing():
    model = make(STOCK, "mamba").train()
    model.backbone.norm_f = nn.Sequential(model.backbone.norm_f, nn.Dropout(0.5))
    model.backbone.layers[1].eval()
    loss_of(model).backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    draws = []
    for gather in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if gather:
            gather_statistics(model, [{"input_ids": IDS, "labels": IDS}])
        draws.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert draws[0] == draws[1] and modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[0][key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(old, p.grad) for old, p in zip(before[1], model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@KINDS
def test_statistics_add_up_over_batches_and_padding_does_not_count(kind):
    model = make(STOCK, kind)
    mask = torch.ones_like(IDS)
    whole = gather_statistics(model, BATCHES)
    parts = gather_statistics(model, [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    padded = torch.nn.functional.pad(IDS, (0, 8), value=3), torch.nn.functional.pad(mask, (0, 8))
    masked = gather_statistics(model, {"input_ids": padded[0], "attention_mask": padded[1]})
    for name, expected in whole.items():
        for found in (parts[name], masked[name]):
            assert torch.allclose(found.states, expected.states, rtol=1e-4, atol=1e-9)
            assert torch.allclose(found.read_outs, expected.read_outs, rtol=1e-4)
            assert (found.tokens, found.looked) == (expected.tokens, expected.looked) == (40, 18)


def test_accumulators_and_recordings_do_not_grow():
    model, sizes = make(STOCK, "mamba"), []
    for count in (1, 50):
        recordings = {}
        found = gather_statistics(
            model, ({"input_ids": torch.randint(1, 50, (8, 64))} for _ in range(count)), recordings
        )
        one = next(iter(found.values()))
        sizes.append(one.states.numel() + one.read_outs.numel() + one.drives.numel())
    assert sizes[0] == sizes[1] and next(iter(recordings.values())).tokens <= TOKENS


def twins():
    """A Mamba whose states come in pairs with equal inputs and decays, so that half of them can go at no loss."""
    model = make(OWN, "mamba")
    for site in find_mixers(model):
        mixer, rank = site.mixer, site.mixer.dt_proj.weight.shape[1]
        with torch.no_grad():
            mixer.A_log[:, 1::2] = mixer.A_log[:, ::2]
            mixer.x_proj.weight[rank : rank + 8][1::2] = mixer.x_proj.weight[rank : rank + 8][::2]
    return model


def test_redundant_states_go_at_no_loss_and_gradients_follow_exactly():
    model = twins()
    full = loss_of(model)
    full.backward()
    plan = make_plan(model, calibration=BATCHES)
    assert [layer.new_size for layer in plan.layers] <= [4, 4, 4]
    plan = make_plan(model, settings=CutSettings(compress_to(4)), calibration=BATCHES)
    sites = find_mixers(model)
    old = {site.name: {name: p.grad.clone() for name, p in site.parameters().items()} for site in sites}
    compress(model, BATCHES, policy=compress_to(4), refit_steps=0)
    model.zero_grad()
    small = loss_of(model)
    assert torch.allclose(small, full, atol=1e-5)
    small.backward()
    for site, layer in zip(find_mixers(model), plan.layers, strict=True):
        for name, change in layer.reduction.changes.items():
            mapped, true = change.map_first(old[site.name]), site.mixer.get_parameter(name).grad
            assert torch.allclose(mapped, true, atol=2e-3 * true.abs().max().item()), name


def compress_to(order):
    from hf_compressm import Fraction

    return Fraction(order / 8)


@KINDS
def test_own_mamba2_reaches_the_bound_of_its_singular_values(kind):
    model = make(OWN, kind)
    record = compress(model, BATCHES, target=4, refit_steps=0)
    for layer in record["layers"]:
        squares = torch.tensor(layer["singular_values"]).square()
        if kind == "mamba2":  # two groups, whose values are combined in the record
            assert layer["residual"] < 0.2
        else:
            assert layer["residual"] >= float(squares[layer["new_size"] :].sum() / squares.sum()) - 1e-4


def test_new_matrices_join_the_optimizer_where_a_fresh_one_would_put_them():
    model = make(OWN, "mamba2").train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    loss_of(model).backward()
    optimizer.step(), optimizer.zero_grad()
    snapshot = Snapshot.take(model, optimizer)
    for target in (6, 3):
        compress(model, BATCHES, target=target, optimizer=optimizer)
        expected = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]
        for group, parameters in zip(optimizer.param_groups, expected, strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
        before = [p.clone() for p in model.parameters()]
        loss_of(model).backward()
        optimizer.step(), optimizer.zero_grad()
        assert all(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))
        assert all(p in optimizer.state for p in model.parameters())
    snapshot.restore(model, optimizer)
    assert state_sizes(model) == [8, 8, 8] and all("read_" not in name for name, _ in model.named_parameters())
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    loss_of(model).backward()
    optimizer.step()


def test_second_cut_of_mamba2_carries_the_matrices_moments():
    model = make(OWN, "mamba2")
    compress(model, BATCHES, target=6)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step(), optimizer.zero_grad()
    plan = make_plan(model, settings=CutSettings(compress_to(3)), calibration=BATCHES)
    site, change = find_mixers(model)[0], plan.layers[0].reduction.changes["read_in"]
    old = {name: dict(optimizer.state[p]) for name, p in site.parameters().items()}
    state = carried_state(change, old, old["read_in"], torch.optim.AdamW)
    expected = change.gradient[0].left.float() @ old["read_in"]["exp_avg"]
    assert torch.allclose(state["exp_avg"], expected, atol=1e-7) and (state["exp_avg_sq"] >= 0).all()


def test_a_refit_that_does_not_help_is_dropped():
    model = make(STOCK, "mamba")
    recordings = {}
    gather_statistics(model, BATCHES, recordings)
    plan = make_plan(model, settings=CutSettings(compress_to(4)), calibration=BATCHES)
    site, reduction = find_mixers(model)[0], plan.layers[0].reduction
    recording = next(iter(recordings.values()))
    outputs = [torch.zeros_like(output) for output in recording.outputs]
    nothing = Recording(recording.inputs, outputs, recording.masks, recording.tokens)
    assert refit(site, reduction, recording, 20) is not reduction
    reduction.changes["x_proj.weight"].value[:] = 0  # puts out what is asked for, D u aside
    before = {name: change.value.clone() for name, change in reduction.changes.items()}
    kept = refit(site, reduction, nothing, 1)
    assert all(change.value.isfinite().all() for change in kept.changes.values())
    assert all(torch.equal(before[name], change.value) for name, change in reduction.changes.items())


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (None, ValueError, "pass calibration batches"),
        ([], ValueError, "empty: it yielded no batch"),
        (
            [{"input_ids": IDS[:1, :2]}],
            ValueError,
            "too short: 2 real tokens cannot rank the 8 states of backbone.layers.0",
        ),
        (
            [{"attention_mask": IDS}],
            ValueError,
            "there is no input for MambaForCausalLM.forward, which takes input_ids",
        ),
        ([IDS], TypeError, "must be a mapping from names to tensors; got Tensor"),
    ],
)
def test_bad_calibration_data_is_refused_and_changes_nothing(batches, error, message):
    model = make(STOCK, "mamba")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compress(model, batches, target=4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_labels_are_not_needed_and_a_data_loader_will_do():
    model = make(STOCK, "mamba")
    loader = DataLoader([{"input_ids": row, "labels": row} for row in IDS], batch_size=1)
    compress(model, loader, target=4)
    assert state_sizes(model) == [4, 4, 4]


def test_nan_weights_leave_the_model_as_it_was():
    model = make(STOCK, "mamba2")
    model.backbone.layers[1].mixer.in_proj.weight.data[-1, 0] = float("nan")
    with pytest.raises(ReductionError, match="backbone.layers.1.mixer: .*NaN"):
        compress(model, BATCHES, target=4)
    assert state_sizes(model) == [8, 8, 8]


def test_stability_compares_leading_choices():
    model = make(STOCK, "mamba")
    adapter = find_mixers(model)[0].adapter
    first = adapter.measure(None, next(iter(gather_statistics(model, BATCHES).values())))
    again = adapter.load_measurement(first.state_dict())
    assert first.agreement(again, 4) == 1.0 and again.spectrum().equal(first.spectrum())
    other = make(STOCK, "mamba", seed=3)
    changed = adapter.measure(None, next(iter(gather_statistics(other, BATCHES).values())))
    assert 0 <= changed.agreement(first, 4) < 1


def test_target_and_policy_together_are_refused():
    from hf_compressm import Energy

    with pytest.raises(ValueError, match="give one of tau, target and policy"):
        compress(make(STOCK, "mamba"), BATCHES, target=4, policy=Energy())
    with pytest.raises(ValueError, match="refit_steps must be at least 0"):
        compress(make(STOCK, "mamba"), BATCHES, target=4, refit_steps=-1)


def test_conversion_then_uneven_compression():
    model = from_stock(make(STOCK, "mamba2"))
    compress(model, BATCHES, target=5)
    assert sum(state_sizes(model)) == 15 and COMMON["state_size"] == 8 and HEADS


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refit_works_in_half_precision(kind, dtype):
    errors = []
    for steps in (0, 30):
        model = make(STOCK, kind)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():  # initial values make all states alike
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        model = model.to(dtype)
        full = model(IDS).logits.detach().float()
        compress(model, BATCHES, target=3, refit_steps=steps)
        assert {p.dtype for p in model.parameters()} == {dtype}
        errors.append((model(IDS).logits.detach().float() - full).square().mean())
    assert errors[1] < 0.6 * errors[0]
