"""The selective scan's Triton kernels: numerically in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

import aot
import interpreter
from test_selective_scan import TOLERANCE, assert_alike, inputs, outputs_and_gradients

from hf_compressm.ops.selective_scan import naive_selective_scan, selective_scan


def compare(tensors, tolerance, softplus=True):
    expected = outputs_and_gradients(naive_selective_scan, {k: v.double() for k, v in tensors.items()}, softplus)
    with interpreter.poisoned():
        found = outputs_and_gradients(selective_scan, tensors, softplus, return_final_state=True, backend="triton")
    assert_alike(found, expected, tolerance)


@interpreter.interpreted
@pytest.mark.parametrize(
    "dtype, everything, sizes",
    [
        (torch.float64, True, (1, 1, 1, 1)),
        (torch.float64, False, (2, 63, 5, 3)),
        (torch.float64, True, (2, 130, 33, 5)),
        (torch.float32, True, (1, 64, 33, 12)),
    ],
)
def test_kernels_equal_the_reference_with_all_gradients(dtype, everything, sizes):
    tensors = inputs(*sizes, dtype=dtype, everything=everything)
    if not everything:
        tensors["delta"] = tensors["delta"].abs()
    compare(tensors, TOLERANCE[dtype], softplus=everything)


@interpreter.interpreted
def test_several_blocks_of_channels_per_program(monkeypatch):
    from hf_compressm.ops.selective_scan import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    compare(inputs(2, 70, 90, 3), TOLERANCE[torch.float64])


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_states_in_float32(dtype):
    tensors = {
        name: value.to(dtype) if name in ("u", "delta", "B", "C", "z") else value
        for name, value in inputs(2, 70, 9, 5, dtype=torch.float32).items()
    }
    compare(tensors, {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])


@interpreter.interpreted
def test_strides_and_strong_decay():
    tensors = inputs(2, 66, 6, 4, dtype=torch.float32, step=1e4)
    tensors["u"] = tensors["u"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["z"] = torch.cat([tensors["z"]] * 2, -1)[..., 6:]
    tensors["B"] = tensors["B"][:1].expand(2, -1, -1)
    tensors["C"] = tensors["C"].mT.contiguous().mT
    compare(tensors, 1e-4)


@interpreter.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("cc", "dtype"), aot.COMPILED)
def test_kernels_compile_without_spills(cc, dtype):
    from hf_compressm.ops.selective_scan import triton as kernels

    types = dict.fromkeys(["u", "delta", "z", "y", "dy", "du", "ddelta", "dz"], f"*{dtype}")
    types |= dict.fromkeys(
        ["A", "B", "C", "D", "bias", "checkpoints", "between", "costates", "dA", "dB", "dC", "dD", "dbias"], "*fp32"
    )
    for kernel, options in (
        (kernels.selective_scan_fwd_kernel, kernels.FORWARD),
        (kernels.selective_scan_bwd_kernel, kernels.BACKWARD),
    ):
        constants = {"SOFTPLUS": True, "TERMS": 8, "CHUNK": kernels.CHUNK}
        constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        launch = {name: value for name, value in options.items() if name not in constants}
        resources = aot.compile_kernel(kernel, signature, constants, cc, **launch)
        assert resources.spills == 0, (kernel.__name__, resources)
