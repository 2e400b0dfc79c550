"""The LRU against a dense simulation in double precision, its initialisation, dtypes and change of size."""

import math

import pytest
import torch
from torch import nn

from hf_compressm.layers import LRU

H = 5
SHAPES = {
    "nu_log": ("N",),
    "theta_log": ("N",),
    "gamma_log": ("N",),
    "B_re": ("N", "H"),
    "B_im": ("N", "H"),
    "C_re": ("H", "N"),
    "C_im": ("H", "N"),
    "D": ("H",),
}


def dense_simulation(layer, u, state=None):
    """The same system with full matrices and one state vector per step, written from the equations."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    A = torch.diag(torch.exp(-p["nu_log"].exp() + 1j * p["theta_log"].exp()))
    B = torch.diag(p["gamma_log"].exp()).to(A.dtype) @ (p["B_re"] + 1j * p["B_im"])
    C, D = p["C_re"] + 1j * p["C_im"], torch.diag(p["D"])
    h = torch.zeros(u.shape[0], A.shape[0], dtype=A.dtype) if state is None else state
    outputs = []
    for x in u.double().unbind(1):
        h = h @ A.T + x.to(A.dtype) @ B.T
        outputs.append((h @ C.T).real + x @ D.T)
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("N, L", [(1, 1), (3, 17), (6, 63)])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "zero"])
def test_matches_dense_simulation(N, L, with_state):
    layer = LRU(H, N).double()
    u = torch.randn(3, L, H, dtype=torch.float64)
    state = torch.randn(3, N, dtype=torch.complex128) if with_state else None
    y, final = layer(u, state)
    expected, h = dense_simulation(layer, u, state)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, h, rtol=1e-12, atol=1e-12)


def test_parameters_and_gradients():
    layer = LRU(H, 3).double()
    assert {name: p.shape for name, p in layer.named_parameters()} == {
        name: torch.Size({"N": 3, "H": H}[letter] for letter in shape) for name, shape in SHAPES.items()
    }

    def run(u, *values):
        return torch.func.functional_call(layer, dict(zip(SHAPES, values, strict=True)), (u,))

    u = torch.randn(2, 4, H, dtype=torch.float64, requires_grad=True)
    values = [getattr(layer, name).detach().clone().requires_grad_() for name in SHAPES]
    assert torch.autograd.gradcheck(run, (u, *values))


@pytest.mark.parametrize("r_min, r_max, max_phase", [(0.0, 1.0, 2 * math.pi), (0.9, 0.999, 0.3), (0.0, 1e-5, 1e-5)])
def test_initialisation(r_min, r_max, max_phase):
    layer = LRU(8, 4000, r_min, r_max, max_phase)
    poles, B, C = layer.system()
    modulus, phase = poles.abs(), layer.theta_log.double().exp()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert (modulus > 0).all() and (modulus < 1).all()
    assert modulus.min() >= r_min - 1e-6 and modulus.max() <= r_max + 1e-6
    assert (phase > 0).all() and (phase <= max_phase * (1 + 1e-6)).all()
    # A mean of 4000 uniform samples is within 5 standard errors, 5 * 0.289 / 63 of the range, of the middle.
    squared = (modulus**2 - r_min**2) / (r_max**2 - r_min**2)
    assert abs(squared.mean() - 0.5) < 0.025 and abs((phase / max_phase).mean() - 0.5) < 0.025
    torch.testing.assert_close(layer.gamma_log.double().exp() ** 2, 1 - modulus**2, rtol=1e-3, atol=1e-6)
    for tensor, variance in [
        (layer.B_re, 1 / 16),
        (layer.B_im, 1 / 16),
        (layer.C_re, 1 / 4000),
        (layer.C_im, 1 / 4000),
    ]:
        assert tensor.var().item() == pytest.approx(variance, rel=0.1)


class Extremes(torch.overrides.TorchFunctionMode):
    """Makes torch.rand return its least or greatest value."""

    def __init__(self, value):
        self.value = value

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return torch.full_like(result, self.value) if function is torch.rand else result


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24])
def test_initialisation_at_the_boundaries(value):
    with Extremes(value):
        layer = LRU(H, 3)
    assert all(p.isfinite().all() for p in layer.parameters())
    poles = layer._poles()  # In float32, as forward has them; those of `system` are in float64.
    assert (poles.abs() > 0).all() and (poles.abs() < 1).all()


def test_generator_makes_initialisation_reproducible():
    layer = LRU(H, 3)
    first, second = (layer.initial_values(torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    layer.reset_parameters(torch.Generator().manual_seed(7))
    assert all(torch.equal(first[name], getattr(layer, name)) for name in SHAPES)


def test_sequence_equals_single_steps():
    layer = LRU(H, 4)
    u = torch.randn(2, 12, H)
    y, final = layer(u)
    state, outputs = None, []
    for k in range(12):
        out, state = layer(u[:, k : k + 1], state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", ["float", "same"])
def test_dtypes(dtype, parameters):
    layer = LRU(H, 4)
    u = torch.randn(2, 30, H)
    expected, _ = dense_simulation(layer, u)
    if parameters == "same":
        layer = layer.to(dtype)
    y, final = layer(u.to(dtype), None)
    assert y.dtype == dtype
    double = dtype == torch.float64 and parameters == "same"
    assert final.dtype == (torch.complex128 if double else torch.complex64)
    # Sums of about 2 * (N + H) products of numbers near 1, rounded to the dtype.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=50 * max(torch.finfo(dtype).eps, 1e-7))


def test_autocast_keeps_the_recurrence_in_float32(monkeypatch):
    import hf_compressm.ops.diag_system.cpu as module

    seen = []

    def spy(kernel, *tensors):
        seen.append({tensor.dtype for tensor in tensors})
        run(kernel, *tensors)

    run = module.run
    monkeypatch.setattr(module, "run", spy)
    layer, u = LRU(H, 4), torch.randn(2, 30, H, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = layer(u)
    assert seen == [{torch.float32}] and y.dtype == u.dtype and final.dtype == torch.complex64
    torch.testing.assert_close(y.double(), dense_simulation(layer, u)[0], rtol=0, atol=0.2)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in (u, *layer.parameters()))


def test_state_size_follows_replaced_parameters():
    layer, small = LRU(H, 6), LRU(H, 2)
    for name in set(SHAPES) - {"D"}:
        setattr(layer, name, nn.Parameter(getattr(small, name).detach().clone()))
    assert layer.state_size == 2 and "state_size=2" in repr(layer)
    small.D = layer.D
    u = torch.randn(2, 9, H)
    assert torch.equal(layer(u)[0], small(u)[0])
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())


def test_system_is_detached_double_and_includes_gamma():
    layer = LRU(H, 3)
    poles, B, C = layer.system()
    assert all(t.dtype == torch.complex128 and not t.requires_grad for t in (poles, B, C))
    assert poles.shape == (3,) and B.shape == (3, H) and C.shape == (H, 3)
    impulse = torch.zeros(1, 6, H)
    impulse[0, 0, 2] = 1
    response = layer(impulse)[0][0].double()
    for k in range(1, 6):
        torch.testing.assert_close(response[k], (C @ (poles**k * B[:, 2])).real, rtol=1e-5, atol=1e-5)


def test_errors():
    for arguments, message in [
        ((0, 3), "hidden_size and state_size"),
        ((3, 0), "hidden_size and state_size"),
        ((3, 3, 0.9, 0.9), "r_min < r_max"),
        ((3, 3, -0.1, 0.9), "r_min < r_max"),
        ((3, 3, 0.1, 1.1), "r_min < r_max"),
        ((3, 3, 0.0, 1.0, 0.0), "max_phase"),
        ((3, 3, 0.0, 1.0, 7.0), "max_phase"),
    ]:
        with pytest.raises(ValueError, match=message):
            LRU(*arguments)
    with pytest.raises(ValueError, match="H = 5"):
        LRU(H, 3)(torch.randn(2, 4, H + 1))
    with pytest.raises(ValueError, match="initial_state must have shape"):
        LRU(H, 3)(torch.randn(2, 4, H), torch.zeros(2, 4, dtype=torch.complex64))
