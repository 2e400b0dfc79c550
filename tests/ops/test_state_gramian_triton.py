"""The state Gramian's Triton kernel: numerically in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

import aot
import interpreter

from hf_compressm.ops.state_gramian import naive_state_gramian, state_gramian

TOLERANCE = 1e-5
"""Of the largest entry: sums of some thousand terms in float32."""


def draws(batch, length, channels, groups, size, shared=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length + size)
    u = torch.randn(batch, length, channels, generator=generator).to(dtype)
    dt = torch.rand(batch, length, channels, generator=generator).to(dtype)
    A = -torch.rand(channels, 1 if shared else size, generator=generator)
    B = torch.randn(batch, length, groups, size, generator=generator).to(dtype)
    weights = torch.randint(0, 9, (batch, length), generator=generator)
    return u, dt, A, B, weights * (torch.rand(batch, length, generator=generator) > 0.3)


def compare(u, dt, A, B, weights=None):
    expected = naive_state_gramian(u, dt, A, B, weights)
    with interpreter.poisoned():
        found = state_gramian(u, dt, A, B, weights, backend="triton")
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert torch.equal(found, found.mT)
    # Not of a single largest entry: each group must be right.
    error, largest = (x.abs().amax((1, 2)) for x in (found - expected, expected))
    assert (error <= TOLERANCE * largest).all(), error / largest


@interpreter.interpreted
@pytest.mark.parametrize("size", [1, 12, 70])
@pytest.mark.parametrize(("shared", "groups"), [(False, 1), (True, 2), (False, 2)])
def test_kernel_equals_the_reference(size, shared, groups):
    *tensors, weights = draws(2, 31 if size < 64 else 9, 5 * groups, groups, size, shared)
    compare(*tensors, weights if shared == (groups == 1) else None)


@interpreter.interpreted
@pytest.mark.parametrize("size", [130])
def test_all_pairs_of_tiles(size):
    compare(*draws(1, 5, 3, 1, size))


@interpreter.interpreted
@pytest.mark.parametrize(("length", "every"), [(1, 1), (70, 3), (131, 1000), (260, 3)])
def test_lengths_and_looks(length, every):
    *tensors, weights = draws(1, length, 18, 1, 4)
    compare(*tensors, weights * (torch.arange(1, length + 1) % every == 0))


@interpreter.interpreted
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_nothing_to_sum(batch, length):
    from hf_compressm.ops.state_gramian import triton as kernels
    from hf_compressm.ops.state_gramian.op import Inputs

    found = kernels.forward(Inputs(*draws(batch, length, 4, 2, 3), "triton"))
    assert torch.equal(found, torch.zeros(2, 3, 3, dtype=torch.float64))


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    *tensors, counts = draws(2, 11, 6, 2, 5, dtype=dtype)
    for weights in (counts.bool(), torch.rand(2, 11, dtype=dtype)):
        compare(*tensors, weights)
    u, dt, A, B = tensors
    compare(u, dt.float(), A.to(dtype), B.double())


@interpreter.interpreted
@pytest.mark.parametrize("shared", [False, True])
def test_strides(shared):
    u, dt, A, B, weights = draws(2, 9, 6, 2, 70, shared)
    u = u.mT.contiguous().mT
    dt = dt[..., :1].expand(-1, -1, 6)
    A = A.t().contiguous().t()
    compare(u, dt, A, B[:1].expand(2, -1, -1, -1), weights.t().contiguous().t())
    compare(torch.cat([u] * 2, -1)[..., 6:], dt, A[:1].expand(6, -1), B.mT.contiguous().mT, weights[:1].expand(2, -1))
    compare(u[:, ::2], dt[:, ::2], A[:, :3], B[:, ::2, :1, :1].expand(-1, -1, 2, 3), weights[:, ::2])


@interpreter.interpreted
@pytest.mark.parametrize("warps", [1, 6])
def test_several_blocks_of_channels_per_program(monkeypatch, warps):
    from hf_compressm.ops.state_gramian import triton as kernels

    monkeypatch.setattr(kernels, "WARPS", warps)
    compare(*draws(2, 20, 2 * 40, 2, 3))
    compare(*draws(2, 6, 40, 1, 70))


@interpreter.interpreted
def test_growing_states():
    u, dt, A, B, weights = draws(1, 63, 5, 1, 3)
    compare(u, dt, -0.5 * A, B, weights)


@interpreter.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("cc", "dtype"), aot.COMPILED)
@pytest.mark.parametrize(
    "size, diagonal, shared, weights",
    [(32, True, True, "*i1"), (256, True, False, None), (256, False, False, "*fp32")],
)
def test_kernel_compiles_without_spills_or_tensor_cores(cc, dtype, size, diagonal, shared, weights):
    from hf_compressm.ops.state_gramian import triton as kernels

    kernel, tile = kernels.state_gramian_fwd_kernel, kernels.tile_of(size)
    types = dict.fromkeys(["u", "dt", "B"], f"*{dtype}") | {"A": "*fp32", "weights": weights, "sums": "*fp64"}
    constants = {"DIAGONAL": diagonal, "SHARED": shared, "TILES": -(-size // tile), "TILE": tile, **kernels.SCHEDULE}
    # As a launch makes them of strides of one.
    constants |= dict.fromkeys(["u_h", "dt_h", "B_n"], 1) | ({} if weights else {"weights": None})
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    resources = aot.compile_kernel(kernel, signature, constants, cc, **kernels.options(tile))
    assert resources.spills == 0 and not resources.tensor_cores, resources
