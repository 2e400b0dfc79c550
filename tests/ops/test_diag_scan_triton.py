"""The Triton kernels of the diagonal scan: in the interpreter against the reference, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

import aot
import interpreter

from hf_compressm.ops.diag_scan import diag_scan, naive_diag_scan
from hf_compressm.ops.diag_scan import triton as kernels
from hf_compressm.ops.diag_system import diag_system

SIZES = [(1, 1, 1), (2, 63, 3), (5, 40, 30)]
TOLERANCE = {torch.complex128: 1e-11, torch.complex64: 1e-4}
"""complex64: sums over up to 200 steps and 5 sequences of numbers up to 10."""


def inputs(B, L, N, dtype):
    lam = torch.polar(torch.rand(N, dtype=torch.float64) * 0.9 + 0.1, 6.28 * torch.rand(N, dtype=torch.float64))
    tensors = lam, torch.randn(B, L, N, dtype=torch.complex128), torch.randn(B, N, dtype=torch.complex128)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@interpreter.interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("doublings", [None, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("B, L, N", SIZES)
def test_matches_reference(monkeypatch, B, L, N, doublings, dtype):
    if doublings is not None:
        monkeypatch.setattr(kernels, "chunk_doublings", lambda *sizes: doublings)
    tensors = inputs(B, L, N, dtype)
    gradients = torch.randn(B, L, N, dtype=dtype), torch.randn(B, N, dtype=dtype)
    with interpreter.poisoned():
        mine = diag_scan(*tensors, backend="triton")
        mine = *mine, *torch.autograd.grad(mine, tensors, gradients)
    exact = [tensor.detach().to(torch.complex128).requires_grad_() for tensor in tensors]
    reference = naive_diag_scan(*exact)
    reference = *reference, *torch.autograd.grad(reference, exact, [g.to(torch.complex128) for g in gradients])
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@interpreter.interpreted
@pytest.mark.parametrize("doublings", [20, 3], ids=["whole", "chunks"])
def test_strides_and_missing_gradients(monkeypatch, doublings):
    monkeypatch.setattr(kernels, "chunk_doublings", lambda *sizes: doublings)
    lam, u, _ = inputs(2, 21, 5, torch.complex128)
    layouts = u.transpose(0, 1).contiguous().transpose(0, 1), u[:1, :1].expand(2, 21, 5), u[:, ::2, 1:4], u.conj()
    for layout in layouts:
        poles = lam[: layout.shape[2]]
        for use in (0, 1):
            results = []
            for backend in ("triton", "naive"):
                outputs = diag_scan(poles, layout, backend=backend)
                gradients = torch.autograd.grad(outputs[use].sum().real, (lam, u))
                results.append((*outputs, *gradients))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@interpreter.interpreted
def test_system_on_the_scan():
    u, D = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    lam = inputs(1, 1, 3, torch.complex128)[0].detach()
    weight_in, weight_out = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    results = [diag_system(u, lam, weight_in, weight_out, D, backend=backend) for backend in ("triton", "cpu")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@interpreter.compiled
def test_chunks_only_where_lanes_are_few(monkeypatch):
    class Device:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    device = torch.device("cuda")
    assert 1 << kernels.chunk_doublings(256 * 132, 4096, device) >= 4096
    chunk = 1 << kernels.chunk_doublings(50 * 256, 784, device)
    assert 64 <= chunk < 784
    assert 1 << kernels.chunk_doublings(1, 1 << 20, device) < 1 << 12


KERNELS = {
    "diag_scan_fwd_kernel": ("lam u start ends states final", "SPLIT"),
    "diag_scan_bwd_kernel": ("lam states initial grad start ends adjoint dlam dinitial", "SPLIT"),
    "diag_scan_ends_kernel": ("lam x ends", "REVERSE"),
}


@interpreter.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("cc", "dtype"), [(80, "fp32"), (90, "fp64"), (100, "fp32")])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_spills(name, cc, dtype):
    pointers, flag = KERNELS[name]
    sizes = {"N": "i32", "lanes": "i32", "length": "i32", "doublings": "i32"}
    strides = {"stride_b": "i64", "stride_t": "i32", "stride_n": "i32"}
    constants = {flag: True, "LANES": kernels.LANES, "TILE": kernels.TILE}
    signature = {f"{pointer}_ptr": f"*{dtype}" for pointer in pointers.split()} | sizes | strides
    resources = aot.compile_kernel(getattr(kernels, name), signature, constants, cc, num_warps=kernels.LANES // 32)
    assert resources.spills == 0 and resources.registers <= 255
