"""The diagonal system (projection, scan, read-out) on the CPU against its definition, and the products it uses."""

import pytest
import torch
from torch.library import opcheck

from hf_compressm.layers import LRU
from hf_compressm.ops import threads
from hf_compressm.ops.diag_system import cpu, diag_system, op

SIZES = [(1, 1, 1, 1), (2, 12, 3, 3), (3, 63, 5, 2), (5, 11, 70, 3), (1, 31, 12, 7)]


def inputs(B, L, N, H, dtype=torch.float64):
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    lam = torch.polar(torch.rand(N, dtype=torch.float64) * 0.9 + 0.1, 6.28 * torch.rand(N, dtype=torch.float64))
    real = [torch.randn(*shape, dtype=torch.float64) for shape in ((B, L, H), (2 * N, H), (H, 2 * N), (H,))]
    u, weight_in, weight_out, D = (x.to(dtype) for x in real)
    state = torch.randn(B, N, dtype=torch.complex128).to(complex_dtype)
    return [x.requires_grad_() for x in (u, lam.to(complex_dtype), weight_in, weight_out, D, state)]


def outputs_and_gradients(tensors, weights, backend, use_y=True, use_final=True):
    y, final = diag_system(*tensors, backend=backend)
    loss = (y * weights[0]).sum() * use_y + (final * weights[1]).sum().real * use_final
    given = [tensor for tensor in tensors if tensor is not None]
    return y, final, *torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)


@pytest.fixture(params=["states", "checkpoints"])
def tiny_tiles(request, monkeypatch):
    """Several groups of sequences and several chunks of time, with either thing kept for the backward pass."""
    monkeypatch.setattr(op, "RECOMPUTE_UP_TO", 0 if request.param == "states" else 64)
    monkeypatch.setattr(cpu, "CHUNK", 5)
    monkeypatch.setattr(cpu, "TILE_BYTES", 512)


@pytest.mark.parametrize("initial", [True, False], ids=["initial", "zero"])
@pytest.mark.parametrize("B, L, N, H", SIZES)
def test_matches_the_definition(tiny_tiles, B, L, N, H, initial):
    tensors = inputs(B, L, N, H)
    tensors[5] = tensors[5] if initial else None
    weights = torch.randn(B, L, H, dtype=torch.float64), torch.randn(B, N, dtype=torch.complex128)
    results = [outputs_and_gradients(tensors, weights, backend) for backend in ("cpu", "naive")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("use_y, use_final", [(True, False), (False, True)])
def test_gradient_through_one_output_only(tiny_tiles, use_y, use_final):
    tensors = inputs(2, 12, 3, 4)
    weights = torch.randn_like(tensors[0]), torch.randn_like(tensors[5])
    results = [outputs_and_gradients(tensors, weights, backend, use_y, use_final) for backend in ("cpu", "naive")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradcheck(tiny_tiles):
    assert torch.autograd.gradcheck(diag_system, inputs(2, 6, 2, 2))


def test_threads_for_whole_tiles(tiny_tiles):
    """As many groups of sequences as it takes for threads to share them; the caller's own thread count stays."""
    tensors, before = inputs(8, 12, 3, 4), torch.get_num_threads()
    weights = torch.randn_like(tensors[0]), torch.randn_like(tensors[5])
    try:
        torch.set_num_threads(3)
        mine = outputs_and_gradients(tensors, weights, "cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for a, b in zip(mine, outputs_and_gradients(tensors, weights, "naive"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not any(t.requires_grad for t in threads.map_calls(lambda t: 2 * t, [tensors[0]] * 8))


def test_strides_and_inference_keeping_nothing(tiny_tiles):
    tensors = [t.detach() for t in inputs(3, 12, 4, 3)]
    u, lam, weight_in, weight_out, D, state = tensors
    y, final = diag_system(*tensors)
    moved = u.transpose(0, 1).contiguous().transpose(0, 1), lam, weight_in.t().contiguous().t()
    again, end = diag_system(*moved, torch.stack([weight_out, D[:, None] + weight_out], 2)[..., 0], D, state)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, final, rtol=1e-12, atol=1e-12)
    same = u[:1, :1].expand(u.shape)
    expected = diag_system(same, *tensors[1:], backend="naive")[0]
    torch.testing.assert_close(diag_system(same, *tensors[1:])[0], expected, rtol=1e-12, atol=1e-12)
    assert torch.ops.hf_compressm.diag_system(*tensors, "nothing")[2].numel() == 0


@pytest.mark.parametrize("keep", ["states", "checkpoints", "nothing"])
def test_opcheck(keep):
    tensors = inputs(2, 7, 3, 4)
    if keep == "nothing":
        tensors = [t.detach() for t in tensors]
    opcheck(torch.ops.hf_compressm.diag_system.default, (*tensors, keep))
    if keep != "nothing":
        detached = [t.detach() for t in tensors]
        kept = torch.ops.hf_compressm.diag_system(*detached, keep)[2]
        backward = torch.ops.hf_compressm.diag_system_backward.default
        opcheck(backward, (torch.randn_like(detached[0]), None, kept, *detached, keep))


def test_compiled_layer_recompiles_for_a_change_of_states_only():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = LRU(5, 6).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)

    def check(B, L):
        u = torch.randn(B, L, 5, dtype=torch.float64, requires_grad=True)
        for run in (compiled, layer):
            run(u)[0].square().sum().backward()
        results = [torch.autograd.grad(run(u)[0].square().sum(), (u, *layer.parameters())) for run in (compiled, layer)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    for B, L in ((2, 7), (3, 12), (4, 19)):
        check(B, L)
    assert counter.frame_count == 1
    small = LRU(5, 3).double()
    for name, value in small.named_parameters():
        setattr(layer, name, torch.nn.Parameter(value.detach().clone()))
    for B, L in ((2, 7), (5, 9)):
        check(B, L)
    assert counter.frame_count == 2


def test_errors():
    u, lam, weight_in, weight_out, D, state = (t.detach() for t in inputs(2, 5, 3, 4))
    for arguments, message in [
        ((u, lam.real, weight_in, weight_out, D), "complex64 or complex128"),
        ((u, lam[:0], weight_in, weight_out, D), "N >= 1"),
        ((u[:, :0], lam, weight_in, weight_out, D), "u must have shape"),
        ((u, lam, weight_in[:3], weight_out, D), r"B must have shape \(6, 4\) for N = 3 and H = 4"),
        ((u, lam, weight_in, weight_out.t(), D), r"C must have shape \(4, 6\)"),
        ((u, lam, weight_in, weight_out, D[:2]), r"D must have shape \(4,\)"),
        ((u.float(), lam, weight_in, weight_out, D), "B must have u's dtype"),
        ((u, lam, weight_in, weight_out, D, state[:1]), "initial_state must have shape"),
        ((u, lam, weight_in, weight_out, D, state.to(torch.complex64)), "initial_state must have lam's dtype"),
        ((u.to("meta"), lam, weight_in, weight_out, D), "one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            diag_system(*arguments)
