"""The diagonal complex scan against its reference, in float64, at awkward sizes, for all gradients."""

import pytest
import torch

from hf_compressm.ops.diag_scan import diag_scan, loop, naive_diag_scan

SIZES = [
    (1, 1, 1),
    (2, 1, 3),
    (1, 2, 1),
    (3, 15, 2),
    (2, 16, 1),
    (2, 17, 5),
    (3, 63, 4),
    (1, 64, 7),
    (2, 99, 3),
]


def inputs(B, L, N, dtype=torch.complex128, radius=0.9):
    lam = torch.polar(torch.rand(N, dtype=torch.float64) * radius + 0.1, 6.28 * torch.rand(N, dtype=torch.float64))
    tensors = lam, torch.randn(B, L, N, dtype=torch.complex128), torch.randn(B, N, dtype=torch.complex128)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.fixture(params=["chunked", "stepwise"])
def path(request, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_BELOW_ON_CPU", 1 << 30 if request.param == "chunked" else 0)


def outputs_and_gradients(scan, tensors, weights, use_states=True, use_final=True):
    states, final = scan(*tensors)
    loss = 0
    if use_states:
        loss = loss + (states * weights[0]).sum().real + (states.abs() ** 2 * weights[0].imag).sum()
    if use_final:
        loss = loss + (final * weights[1]).sum().imag
    given = [tensor for tensor in tensors if tensor is not None]
    return states, final, *torch.autograd.grad(loss, given)


@pytest.mark.parametrize("initial", [True, False], ids=["initial", "zero"])
@pytest.mark.parametrize("B, L, N", SIZES)
def test_matches_reference(path, B, L, N, initial):
    lam, u, state = inputs(B, L, N)
    tensors = [lam, u, state if initial else None]
    weights = torch.randn(B, L, N, dtype=u.dtype), torch.randn(B, N, dtype=u.dtype)
    mine = outputs_and_gradients(diag_scan, tensors, weights)
    reference = outputs_and_gradients(naive_diag_scan, tensors, weights)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_states, use_final", [(True, False), (False, True)])
def test_gradient_through_one_output_only(path, use_states, use_final):
    tensors = inputs(2, 19, 3)
    weights = torch.randn_like(tensors[1]), torch.randn_like(tensors[2])
    mine = outputs_and_gradients(diag_scan, tensors, weights, use_states, use_final)
    reference = outputs_and_gradients(naive_diag_scan, tensors, weights, use_states, use_final)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck(path):
    assert torch.autograd.gradcheck(diag_scan, inputs(2, 18, 2))


@pytest.mark.parametrize("needed", range(3))
def test_single_gradient(needed):
    tensors = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs(2, 17, 3))]
    diag_scan(*tensors)[0].abs().square().sum().backward()
    assert [t.grad is not None for t in tensors] == [i == needed for i in range(3)]


def test_second_order_is_refused():
    lam, u, _ = inputs(1, 3, 2)
    (gradient,) = torch.autograd.grad(diag_scan(lam, u)[0].abs().square().sum(), lam, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.abs().sum().backward()


def test_long_sequence_in_single_precision(path):
    # 784 steps next to the unit circle; single precision carries about 1e-7 * sqrt(steps) per unit of state.
    lam, u, state = inputs(4, 784, 6, radius=0.899)
    exact, _ = naive_diag_scan(lam, u, state)
    states, final = diag_scan(*(t.to(torch.complex64) for t in (lam, u, state)))
    assert states.dtype == final.dtype == torch.complex64
    torch.testing.assert_close(states.to(exact.dtype), exact, rtol=1e-4, atol=1e-4)


def test_splitting_a_sequence_changes_nothing():
    lam, u, state = inputs(2, 40, 3)
    states, final = diag_scan(lam, u, state)
    head, middle = diag_scan(lam, u[:, :23], state)
    tail, end = diag_scan(lam, u[:, 23:], middle)
    torch.testing.assert_close(torch.cat([head, tail], 1), states, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, final, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone_and_strides_do_not_matter(path):
    lam, u, state = (t.detach() for t in inputs(3, 20, 4))
    copies = [t.clone() for t in (lam, u, state)]
    states, final = diag_scan(lam, u, state)
    final.zero_()
    assert all(torch.equal(a, b) for a, b in zip((lam, u, state), copies, strict=True))
    torch.testing.assert_close(diag_scan(lam, u.transpose(0, 1).contiguous().transpose(0, 1), state)[0], states)
    torch.testing.assert_close(diag_scan(lam.conj(), u.conj(), state.conj())[0], states.conj())
    torch.testing.assert_close(states[:, -1], naive_diag_scan(lam, u, state)[1], rtol=1e-12, atol=1e-12)


def test_errors():
    lam, u, state = (t.detach() for t in inputs(2, 5, 3))
    for arguments, message in [
        ((lam.real, u), "complex64 or complex128"),
        ((lam[None], u), "lam must have shape"),
        ((lam[:2], u), "N = 2"),
        ((lam, u[0]), "u must have shape"),
        ((lam, u[:, :0]), "L >= 1"),
        ((lam, u.to(torch.complex64)), "u must have lam's dtype"),
        ((lam, u, state[:1]), "initial_state must have shape"),
        ((lam, u, state.to(torch.complex64)), "initial_state must have lam's dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            diag_scan(*arguments)
