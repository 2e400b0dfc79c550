"""Reduction of LRU layers: values, stability, and the maps that carry gradients."""

import math

import pytest
import torch
from random_systems import KINDS, random_system

from hf_compressm.layers.lru import LRU
from hf_compressm.surgery import (
    ReductionError,
    find_mixers,
    register_refusal,
    register_subclass,
    state_sizes,
)
from hf_compressm.surgery.adapters import base as adapters
from hf_compressm.surgery.adapters.base import supported_mixers
from hf_compressm.surgery.adapters.lru import LRUAdapter

adapter = LRUAdapter()


def layer_from(system, dtype=torch.float32) -> LRU:
    """An LRU layer with the given poles and matrices."""
    layer = LRU(system.B.shape[1], system.order).to(torch.float64)
    modulus, phase = system.poles.abs(), system.poles.angle() % (2 * math.pi)
    with torch.no_grad():
        layer.nu_log.copy_((-modulus.clamp(min=1e-12).log()).log())
        layer.theta_log.copy_(phase.clamp(min=1e-9).log())
        gamma = (1 - modulus.square()).sqrt()
        layer.gamma_log.copy_(gamma.log())
        layer.B_re.copy_(system.B.real / gamma[:, None])
        layer.B_im.copy_(system.B.imag / gamma[:, None])
        layer.C_re.copy_(system.C.real)
        layer.C_im.copy_(system.C.imag)
    return layer.to(dtype)


def reduced_layer(layer: LRU, changes) -> LRU:
    small = LRU(layer.D.shape[0], changes["nu_log"].value.shape[0]).to(layer.D.dtype)
    with torch.no_grad():
        small.D.copy_(layer.D)
        for name, change in changes.items():
            getattr(small, name).copy_(change.value)
    return small


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [0.9, 0.999])
def test_states_that_cannot_matter_leave_the_output_alone(kind, radius):
    layer = layer_from(random_system(kind, 36, 5, radius, torch.Generator().manual_seed(1)))
    measured = adapter.measure(layer)
    order = min(measured.balancing.rank, 35)
    reduction = adapter.reduce(layer, measured, order)
    assert all(torch.isfinite(change.value).all() for change in reduction.changes.values())
    small = reduced_layer(layer, reduction.changes)
    u = torch.randn(2, 200, 5)
    before, after = layer(u)[0], small(u)[0]
    slack = reduction.bound * u.norm(dim=(1, 2)).max()
    assert (before - after).abs().max() <= 1e-5 * before.abs().max() + slack


@pytest.mark.parametrize("order", [1, 4, 11])
def test_output_error_is_below_the_bound(order):
    layer = layer_from(random_system("plain", 24, 3, 0.99, torch.Generator().manual_seed(0)), torch.float64)
    reduction = adapter.reduce(layer, adapter.measure(layer), order)
    u = torch.randn(3, 400, 3, dtype=torch.float64)
    gap = layer(u)[0] - reduced_layer(layer, reduction.changes)(u)[0]
    assert 0 < gap.norm() <= reduction.bound * u.norm()


@pytest.mark.parametrize("kind", ["real_poles", "zero_poles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_and_zero_poles_survive_the_parameterisation_and_train_on(kind, dtype):
    layer = layer_from(random_system(kind, 16, 3, 0.95, torch.Generator().manual_seed(2)), dtype)
    reduction = adapter.reduce(layer, adapter.measure(layer), 6)
    small = reduced_layer(layer, reduction.changes)
    small(torch.randn(2, 30, 3, dtype=dtype))[0].square().sum().backward()
    for parameter in small.parameters():
        assert torch.isfinite(parameter).all() and torch.isfinite(parameter.grad).all()
    assert (small.system()[0].abs() < 1).all()


def test_normalised_input_rows_keep_their_typical_size():
    layer = LRU(16, 64, r_min=0.5, r_max=0.99)
    changes = adapter.reduce(layer, adapter.measure(layer), 12).changes
    rows = torch.complex(changes["B_re"].value, changes["B_im"].value).norm(dim=1)
    typical = torch.complex(layer.B_re, layer.B_im).abs().square().sum(1).mean().sqrt()
    assert torch.allclose(rows, typical.double().expand_as(rows), rtol=1e-5)


def gradients(layer: LRU, u, target) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    (layer(u)[0] * target).sum().backward()
    return {name: p.grad for name, p in layer.named_parameters() if name != "D"}


@pytest.mark.parametrize("kind", ["zero_rows", "unobservable"])
def test_gradients_follow_their_map_exactly_where_nothing_is_lost(kind):
    """Both kinds lose whole modes, so the kept poles are old poles and even their gradients are exact."""
    layer = layer_from(random_system(kind, 20, 4, 0.9, torch.Generator().manual_seed(4)), torch.float64)
    measured = adapter.measure(layer)
    changes = adapter.reduce(layer, measured, measured.balancing.rank).changes
    u, target = torch.randn(2, 40, 4, dtype=torch.float64), torch.randn(2, 40, 4, dtype=torch.float64)
    old = gradients(layer, u, target)
    wanted = gradients(reduced_layer(layer, changes), u, target)
    for name, change in changes.items():
        assert torch.allclose(change.map_first(old), wanted[name], rtol=1e-6, atol=1e-8), name


def test_gradients_of_matrices_follow_their_map_exactly_under_a_true_change_of_basis():
    """Repeated poles merge, so bases mix; B, C and gamma still follow exactly."""
    layer = layer_from(random_system("repeated_poles", 18, 1, 0.9, torch.Generator().manual_seed(5)), torch.float64)
    measured = adapter.measure(layer)
    assert measured.balancing.rank < 18
    changes = adapter.reduce(layer, measured, measured.balancing.rank).changes
    u, target = torch.randn(2, 40, 1, dtype=torch.float64), torch.randn(2, 40, 1, dtype=torch.float64)
    old, wanted = gradients(layer, u, target), gradients(reduced_layer(layer, changes), u, target)
    for name in ("B_re", "B_im", "C_re", "C_im", "gamma_log"):
        scale = wanted[name].abs().max()
        assert (changes[name].map_first(old) - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_second_moments_follow_the_squared_entries():
    layer = layer_from(random_system("plain", 10, 2, 0.9, torch.Generator().manual_seed(6)), torch.float64)
    changes = adapter.reduce(layer, adapter.measure(layer), 4).changes
    shapes = adapter.parameter_shapes(layer, 10)
    draws = {name: torch.randn(20000, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    moments = {name: draw.square().mean(0) for name, draw in draws.items()}
    for name, change in changes.items():
        mapped = torch.stack([change.map_first({k: d[i] for k, d in draws.items()}) for i in range(4000)])
        expected = mapped.square().mean(0)
        assert torch.allclose(change.map_second(moments), expected, rtol=0.15), name


@pytest.mark.parametrize("selection", ["smallest", "random"])
def test_controls_keep_other_states(selection):
    layer = LRU(4, 24, r_min=0.5, r_max=0.99)
    measured = adapter.measure(layer)
    best = adapter.reduce(layer, measured, 6)
    other = adapter.reduce(layer, measured, 6, selection, torch.Generator().manual_seed(0))
    assert other.bound > best.bound


def test_nan_in_weights_is_reported():
    layer = LRU(4, 8)
    with torch.no_grad():
        layer.B_re[0, 0] = math.nan
    with pytest.raises(ReductionError, match="B holds NaN"):
        adapter.measure(layer)


def test_a_model_without_compressible_layers_is_refused_with_the_list_of_supported_ones():
    with pytest.raises(ValueError, match="no layer that can be compressed.*LRU.*register_adapter"):
        find_mixers(torch.nn.Linear(2, 2))
    assert any(name.endswith(".LRU") for name in supported_mixers())


def test_a_subclass_of_a_supported_mixer_is_named_until_it_is_registered(monkeypatch):
    class Mine(LRU):
        pass

    # Private: an adapter or a refusal that is registered cannot be taken back.
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))
    monkeypatch.setattr(adapters, "_REFUSED", dict(adapters._REFUSED))
    model = torch.nn.ModuleList([LRU(4, 6), Mine(4, 8), LRU(4, 10)])
    told = r"the class .*\.Mine, a subclass of hf_compressm.layers.lru.LRU.*register_subclass\(Mine\)"
    with pytest.raises(ValueError, match=told):
        find_mixers(model)
    register_subclass(Mine)
    assert state_sizes(model) == [6, 8, 10]
    assert len({id(site.adapter) for site in find_mixers(model)}) == 1
    with pytest.raises(ValueError, match="Linear is a subclass of none of the supported"):
        register_subclass(torch.nn.Linear)


def test_a_subclass_that_is_refused_is_left_alone(monkeypatch):
    class Mine(LRU):
        pass

    # Private: see above.
    monkeypatch.setattr(adapters, "_REFUSED", dict(adapters._REFUSED))
    register_refusal(Mine, "it is for this test only.")
    assert state_sizes(torch.nn.ModuleList([LRU(4, 6), Mine(4, 8)])) == [6]
