"""The Triton kernels of the gated delta rule: numerically in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

import aot
import interpreter
from test_gated_delta_scan import compare, inputs

from hf_compressm.ops.gated_delta_scan import gated_delta_scan, naive_gated_delta_scan

SIZES = [(1, 1, 1, 1, 12, 5), (2, 35, 1, 2, 33, 18), (1, 65, 1, 3, 12, 5), (1, 33, 2, 2, 48, 33)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Of the largest entry. Half precision: what is multiplied is rounded to it, as the inputs are."""


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_equal_the_recurrence_with_all_gradients(dtype, sizes):
    compare(inputs(*sizes, dtype=dtype), TOLERANCE[dtype], "triton")


@interpreter.interpreted
@pytest.mark.parametrize("left_out", [("erase",), ("initial_state",), ("erase", "initial_state")])
def test_optional_arguments(left_out):
    tensors = {name: value for name, value in inputs(1, 35, 2, 4, 12, 5).items() if name not in left_out}
    compare(tensors, TOLERANCE[torch.float64], "triton", scale=0.7)


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_states_in_float32(dtype):
    tensors = inputs(1, 40, 2, 4, 12, 8, torch.float32)
    half = {name: value.to(dtype) if name in ("q", "k", "v", "erase") else value for name, value in tensors.items()}
    compare(half, TOLERANCE[dtype], "triton")


@interpreter.interpreted
@pytest.mark.parametrize("lengths", [(1, 0, 39, 26), (32, 33), (5,)])
def test_packed_sequences(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = inputs(1, sum(lengths), 2, 4, 12, 5)
    tensors["initial_state"] = torch.randn(len(lengths), 4, 12, 5, dtype=torch.float64)
    compare(tensors, TOLERANCE[torch.float64], "triton", cu_seqlens=bounds)


@interpreter.interpreted
def test_strides_and_strong_decay():
    tensors = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in inputs(3, 20, 2, 4, 12, 7).items()
    }
    compare(tensors, TOLERANCE[torch.float64], "triton")
    compare(tensors | {"g": tensors["g"] * 300}, TOLERANCE[torch.float64], "triton")


@interpreter.interpreted
def test_only_the_final_state_has_a_gradient():
    tensors = {name: value.requires_grad_() for name, value in inputs(1, 40, 2, 4, 12, 5).items() if name != "q"}
    q, results = torch.randn(1, 40, 2, 12, dtype=torch.float64), []
    for function, options in ((naive_gated_delta_scan, {}), (gated_delta_scan, {"backend": "triton"})):
        _, final = function(q=q, **tensors, **options)
        results.append(torch.autograd.grad(final.sin().sum(), list(tensors.values())))
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-11)


@interpreter.interpreted
def test_custom_ops():
    tensors = [value.requires_grad_() for value in inputs(1, 9, 2, 4, 3, 2, torch.float32).values()]
    tensors[6], settings = torch.randn(2, 4, 3, 2), (torch.tensor([0, 4, 9]), 0.5, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_compressm.gated_delta_scan.default, (*tensors, *settings), test_utils=tests)
    detached = [value.detach() for value in tensors]
    o, final, *kept = torch.ops.hf_compressm.gated_delta_scan(*detached, *settings)
    arguments = (torch.randn_like(o), torch.randn_like(final), *kept, *detached, *settings)
    torch.library.opcheck(torch.ops.hf_compressm.gated_delta_scan_backward.default, arguments, test_utils=tests)


KERNELS = ("pairs", "fwd", "output", "bwd", "bwd_pairs", "bwd_keys")


@interpreter.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("cc", "name"), [*aot.COMPILED, (100, "fp32"), (90, "fp64")])
def test_kernels_compile_without_spills(cc, name):
    from hf_compressm.ops.gated_delta_scan import triton as launches

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}[name]
    half, state = f"*{name}", "*fp64" if dtype == torch.float64 else "*fp32"
    types = dict.fromkeys(("q", "k", "e", "v", "output", "doutput"), half)
    wide = "sums beta raw mixed inverse written states final costates dinitial dx dbeta into_raw into_mixed flow flows"
    types |= dict.fromkeys((*wide.split(), "dq", "dk", "de"), state)
    types |= {"table": "*i64", "ranges": "*i64", "scale": "fp32"}
    options = launches.tiles(128, 128, dtype) | {"PACKED": True}
    for which in KERNELS:
        kernel = getattr(launches, f"gated_delta_scan_{which}_kernel")
        constants = {key: value for key, value in options.items() if key in kernel.arg_names}
        signature = {key: types.get(key, "i32") for key in kernel.arg_names if key not in constants}
        launch = launches.LAUNCH_BACKWARD if which == "bwd" else launches.LAUNCH
        resources = aot.compile_kernel(kernel, signature, constants, cc, **launch)
        assert resources.spills == 0, (kernel.__name__, resources)
        assert resources.shared <= 160 * 1024
