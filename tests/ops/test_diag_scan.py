"""The diagonal complex scan against its reference, in float64, at awkward sizes, for all gradients."""

import logging
import multiprocessing

import pytest
import torch
from torch.library import opcheck

from hf_compressm.ops import backends, threads
from hf_compressm.ops.diag_scan import cpu, diag_scan, naive_diag_scan

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
    (2, 9, 64),
    (3, 7, 131),
]


def inputs(B, L, N, dtype=torch.complex128, radius=0.9):
    lam = torch.polar(torch.rand(N, dtype=torch.float64) * radius + 0.1, 6.28 * torch.rand(N, dtype=torch.float64))
    tensors = lam, torch.randn(B, L, N, dtype=torch.complex128), torch.randn(B, N, dtype=torch.complex128)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


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
def test_matches_reference(B, L, N, initial):
    lam, u, state = inputs(B, L, N)
    tensors = [lam, u, state if initial else None]
    weights = torch.randn(B, L, N, dtype=u.dtype), torch.randn(B, N, dtype=u.dtype)
    mine = outputs_and_gradients(diag_scan, tensors, weights)
    reference = outputs_and_gradients(naive_diag_scan, tensors, weights)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_states, use_final", [(True, False), (False, True)])
def test_gradient_through_one_output_only(use_states, use_final):
    tensors = inputs(2, 19, 3)
    weights = torch.randn_like(tensors[1]), torch.randn_like(tensors[2])
    mine = outputs_and_gradients(diag_scan, tensors, weights, use_states, use_final)
    reference = outputs_and_gradients(naive_diag_scan, tensors, weights, use_states, use_final)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    assert torch.autograd.gradcheck(diag_scan, inputs(2, 18, 2))


@pytest.mark.parametrize("needed", range(3))
def test_single_gradient(needed):
    tensors = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs(2, 17, 3))]
    diag_scan(*tensors)[0].abs().square().sum().backward()
    assert [t.grad is not None for t in tensors] == [i == needed for i in range(3)]


def test_second_order_is_refused():
    lam, u, _ = inputs(1, 3, 2)
    (gradient,) = torch.autograd.grad(diag_scan(lam, u)[0].abs().square().sum(), lam, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.abs().sum().backward()


@pytest.mark.parametrize("initial", [True, False], ids=["initial", "zero"])
def test_opcheck(initial):
    lam, u, state = inputs(2, 7, 3)
    opcheck(torch.ops.hf_compressm.diag_scan.default, (lam, u, state if initial else None, "cpu"))
    states, final = (t.detach() for t in diag_scan(lam, u, state))
    tensors = u.detach(), None, lam.detach(), states, state.detach() if initial else None, "cpu"
    opcheck(torch.ops.hf_compressm.diag_scan_backward.default, tensors)


def test_results_do_not_depend_on_the_number_of_threads():
    lam, u, state = inputs(3, 50, 150, torch.complex64)
    weights = torch.randn_like(u), torch.randn_like(state)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(diag_scan, [lam, u, state], weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _scan_in_child(queue, lam, u):
    torch.set_num_threads(2)
    queue.put(diag_scan(lam, u)[1].numpy())


@pytest.mark.multi_process
def test_a_forked_process_has_threads_of_its_own():
    lam, u, _ = (t.detach() for t in inputs(2, 5, 70))
    threads.thread_pool().submit(int).result()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_scan_in_child, args=(queue, lam, u))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(queue.get()), naive_diag_scan(lam, u)[1], rtol=1e-12, atol=1e-12)


def test_naive_backend_by_argument_and_environment(monkeypatch):
    lam, u, state = inputs(2, 5, 3)
    monkeypatch.setattr(cpu, "run", lambda *tensors: pytest.fail("the Numba kernels ran"))
    expected = naive_diag_scan(lam, u, state)[0]
    assert torch.equal(diag_scan(lam, u, state, backend="naive")[0], expected)
    monkeypatch.setenv("HF_COMPRESSM_DIAG_SCAN", "naive")
    assert torch.equal(diag_scan(lam, u, state)[0], expected)


def test_without_numba_one_warning_and_the_reference(monkeypatch, caplog):
    lam, u, state = inputs(2, 5, 3)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu, "run", lambda *tensors: pytest.fail("the Numba kernels ran"))
    backends.announce.cache_clear()
    with caplog.at_level(logging.WARNING):
        states = [diag_scan(lam, u, state)[0] for _ in range(2)]
    backends.announce.cache_clear()
    assert torch.equal(states[1], naive_diag_scan(lam, u, state)[0])
    assert [r.message for r in caplog.records if "diag_scan" in r.message] == [
        "diag_scan on cpu: numba is not installed, so the slower backend 'naive' is used"
    ]
    with pytest.raises(ValueError, match="'cpu' of diag_scan cannot run: numba is not installed"):
        diag_scan(lam, u, state, backend="cpu")


def test_forced_backends_that_cannot_run(monkeypatch):
    lam, u, _ = inputs(2, 5, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="unknown backend 'fast' of diag_scan; allowed are naive, cpu, triton"):
        diag_scan(lam, u, backend="fast")
    with pytest.raises(ValueError, match="'triton' of diag_scan cannot run"):
        diag_scan(lam, u, backend="triton")


def test_compiles_without_breaks_for_any_batch_and_length():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(diag_scan, fullgraph=True, dynamic=True, backend=counter)
    for B, L in ((2, 5), (3, 9), (4, 17)):
        tensors = inputs(B, L, 3)
        weights = torch.randn_like(tensors[1]), torch.randn_like(tensors[2])
        mine = outputs_and_gradients(compiled, tensors, weights)
        for a, b in zip(mine, outputs_and_gradients(naive_diag_scan, tensors, weights), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_long_sequence_in_single_precision():
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


def test_inputs_are_left_alone_and_strides_do_not_matter():
    lam, u, state = (t.detach() for t in inputs(3, 20, 4))
    copies = [t.clone() for t in (lam, u, state)]
    states, final = diag_scan(lam, u, state)
    final.zero_()
    assert all(torch.equal(a, b) for a, b in zip((lam, u, state), copies, strict=True))
    torch.testing.assert_close(diag_scan(lam, u.transpose(0, 1).contiguous().transpose(0, 1), state)[0], states)
    torch.testing.assert_close(diag_scan(lam.conj(), u.conj(), state.conj())[0], states.conj())
    torch.testing.assert_close(states[:, -1], naive_diag_scan(lam, u, state)[1], rtol=1e-12, atol=1e-12)
    wide = torch.stack([u, -u], 3).flatten(2)
    torch.testing.assert_close(diag_scan(lam, wide[..., ::2], state)[0], states)
    same = u[:1, :1].expand(3, 20, 4)
    torch.testing.assert_close(diag_scan(lam, same, state)[0], naive_diag_scan(lam, same, state)[0])


def test_expanded_gradients():
    tensors = inputs(2, 9, 3)
    gradients = [torch.autograd.grad(scan(*tensors)[0].sum().real, tensors) for scan in (diag_scan, naive_diag_scan)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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
