"""The Triton kernels of Mamba-2's scan: numerically in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

import aot
import interpreter
from test_ssd_scan import inputs

from hf_compressm.ops.ssd_scan import ssd_scan

SIZES = [(2, 63, 4, 3, 2, 5), (1, 1, 2, 1, 1, 1), (1, 130, 2, 70, 1, 12), (1, 20, 2, 4, 2, 130)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest entry. Half precision: what is multiplied is rounded to it, as the inputs are."""


def outputs_and_gradients(tensors, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y, final = ssd_scan(**leaves, dt_softplus=True, dt_limit=(0.01, 2.0), return_final_state=True, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    loss = (y.double() * weights).sum() + (final.double() * final.detach().double().cos()).sum()
    return {"y": y, "final": final} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def compare(tensors, tolerance, **options):
    expected = outputs_and_gradients({name: value.double() for name, value in tensors.items()}, backend="naive")
    with interpreter.poisoned():
        found = outputs_and_gradients(tensors, backend="triton", **options)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        worst = (found[name].double() - value).abs().max()
        assert worst <= tolerance * value.abs().max().clamp(min=1.0), name


@interpreter.interpreted
@pytest.mark.parametrize(("dtype", "sizes"), [*((torch.float64, sizes) for sizes in SIZES), (torch.float32, SIZES[2])])
def test_kernels_equal_the_reference_with_all_gradients(dtype, sizes):
    compare(inputs(*sizes, dtype=dtype), TOLERANCE[dtype])


@interpreter.interpreted
@pytest.mark.parametrize("chunk", [1, 40, 1000])
def test_chunks_do_not_matter(chunk):
    compare(inputs(2, 75, 4, 3, 2, 5), TOLERANCE[torch.float64], chunk_size=chunk)


@interpreter.interpreted
def test_several_heads_per_program(monkeypatch):
    from hf_compressm.ops.ssd_scan import triton as kernels

    for programs in (1, 7):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        compare(inputs(1, 40, 10, 3, 2, 5), TOLERANCE[torch.float64])


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_states_in_float32(dtype):
    tensors = inputs(2, 70, 4, 9, 2, 12, torch.float32)
    half = {name: value.to(dtype) if name in ("x", "dt", "B", "C") else value for name, value in tensors.items()}
    compare(half, TOLERANCE[dtype])


@interpreter.interpreted
def test_strides_optional_arguments_and_strong_decay():
    tensors = inputs(3, 20, 4, 5, 2, 7)
    for name in ("x", "B", "C"):
        tensors[name] = tensors[name].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    tensors["dt"] = tensors["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["initial_state"] = tensors["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    compare(tensors, TOLERANCE[torch.float64])
    tensors["x"] = torch.cat([tensors["x"]] * 2, -1)[..., 5:]
    tensors["A"] = tensors["A"] * 1e4
    compare({name: tensors[name] for name in ("x", "dt", "A", "B", "C")}, TOLERANCE[torch.float64])


@interpreter.interpreted
def test_only_the_final_state_has_a_gradient():
    tensors = {k: v.requires_grad_() for k, v in inputs(2, 21, 4, 5, 2, 7).items() if k not in ("C", "D")}
    C, results = torch.randn(2, 21, 2, 7, dtype=torch.float64), []
    for backend in ("naive", "triton"):
        _, final = ssd_scan(**tensors, C=C, return_final_state=True, backend=backend)
        results.append(torch.autograd.grad(final.sin().sum(), list(tensors.values())))
    for wanted, given in zip(*results, strict=True):
        assert torch.allclose(given, wanted, atol=1e-11)


@interpreter.interpreted
def test_custom_ops():
    tensors = [v.requires_grad_() for v in inputs(2, 9, 4, 2, 2, 3, torch.float32).values()]
    settings = (True, 0.0, float("inf"), 64, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_compressm.ssd_scan.default, (*tensors, *settings), test_utils=tests)
    detached = [v.detach() for v in tensors]
    y, final, states = torch.ops.hf_compressm.ssd_scan(*detached, *settings)
    arguments = (torch.randn_like(y), torch.randn_like(final), states, *detached[:7], None, *settings)
    torch.library.opcheck(torch.ops.hf_compressm.ssd_scan_backward.default, arguments, test_utils=tests)


@interpreter.compiled
@pytest.mark.slow
@pytest.mark.parametrize(("cc", "name"), [*aot.COMPILED, (90, "fp64")])
def test_kernels_compile_without_spills(cc, name):
    from hf_compressm.ops.ssd_scan import triton as launches

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}[name]
    state = "*fp64" if name == "fp64" else "*fp32"
    types = dict.fromkeys(("x", "matrix", "B", "C", "y", "dy", "dx"), f"*{name}")
    wide = "weight out states sums start end before products step D costates dB dC per_step pairs"
    types |= dict.fromkeys(wide.split(), state)
    T = launches.chunk_length(512, 256, dtype)
    tiles = launches.tiles(64, 128, T, dtype)  # the largest, which need most registers
    cases = []
    for name in ("outer", "fwd", "bwd_x", "bwd_pairs", "bwd_bc"):
        kernel = getattr(launches, f"ssd_scan_{name}_kernel")
        options = tiles | launches.LAUNCH | (launches.PAIRS if name == "bwd_pairs" else {})
        launch = {key: options[key] for key in launches.LAUNCH}
        cases.append((kernel, {key: value for key, value in options.items() if key in kernel.arg_names}, launch))
    cases += [
        (launches.ssd_scan_pass_kernel, {"T": T, "BLOCK": launches.PASS_BLOCK, "REVERSE": reverse}, {})
        for reverse in (False, True)
    ]
    for kernel, constants, launch in cases:
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        resources = aot.compile_kernel(kernel, signature, constants, cc, **launch)
        assert resources.spills == 0, (kernel.__name__, resources)
