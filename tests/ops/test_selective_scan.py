"""The selective scan's CPU kernels against the plain reference, and the single step against the scan."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.ops import backends
from hf_compressm.ops.selective_scan import naive_selective_scan, selective_scan, selective_state_update

# Sums of up to N = 128 products in another order.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def inputs(batch=2, length=63, channels=5, size=3, dtype=torch.float64, seed=0, everything=True, step=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "u": draw(batch, length, channels),
        "delta": draw(batch, length, channels),
        "A": -step * draw(channels, size).exp(),
        "B": draw(batch, length, size),
        "C": draw(batch, length, size),
    }
    if everything:
        tensors |= {
            "D": draw(channels),
            "z": draw(batch, length, channels),
            "delta_bias": draw(channels),
            "initial_state": draw(batch, channels, size),
        }
    return tensors


def outputs_and_gradients(function, tensors, softplus=True, **options):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y, final = function(**leaves, delta_softplus=softplus, **options)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    loss = (y * weights[0]).sum() + (final * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "final": final} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_alike(found, expected, tolerance):
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert ((found[name].to(value) - value).abs().max() / scale).item() < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 63, 5, 3), (1, 65, 33, 16), (2, 32, 17, 17), (2, 33, 16, 128), (1, 200, 2, 1)]
)
@pytest.mark.parametrize("everything", [True, False])
def test_cpu_kernels_equal_the_reference_with_all_gradients(dtype, sizes, everything):
    tensors = inputs(*sizes, dtype=dtype, everything=everything)
    expected = outputs_and_gradients(naive_selective_scan, {k: v.double() for k, v in tensors.items()})
    found = outputs_and_gradients(selective_scan, tensors, return_final_state=True, backend="cpu")
    assert_alike(found, expected, TOLERANCE[dtype])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_random_sizes(batch, length, channels, size, seed):
    tensors = inputs(batch, length, channels, size, seed=seed)
    expected = outputs_and_gradients(naive_selective_scan, tensors)
    assert_alike(outputs_and_gradients(selective_scan, tensors, return_final_state=True), expected, 1e-11)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_gradients_are_those_of_finite_differences(backend):
    tensors = inputs(1, 4, 2, 2)

    def scan(*values):
        named = dict(zip(tensors, values, strict=True))
        return selective_scan(**named, delta_softplus=True, return_final_state=True, backend=backend)

    torch.autograd.gradcheck(scan, [tensor.requires_grad_() for tensor in tensors.values()])


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_strong_decay_underflows_without_nan_and_strides_do_not_matter(backend):
    tensors = inputs(2, 40, 6, 4, dtype=torch.float32, step=1e4)
    found = outputs_and_gradients(selective_scan, tensors, return_final_state=True, backend=backend)
    assert all(value.isfinite().all() for value in found.values())
    strided = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2) if value.ndim == 3 else value
        for name, value in tensors.items()
    }
    again = outputs_and_gradients(selective_scan, strided, return_final_state=True, backend=backend)
    assert_alike(again, found, 1e-5)


def test_exponential_is_accurate_over_its_range():
    # One step from a state of ones with nothing coming in shows exp(dt A) itself.
    rates = torch.linspace(-80, 0, 4001, dtype=torch.float32)[:, None]
    one = torch.ones(1, 1, len(rates))
    _, final = selective_scan(
        0 * one, one, rates, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1),
        initial_state=torch.ones(1, len(rates), 1), return_final_state=True, backend="cpu",
    )  # fmt: skip
    exact = rates.double().exp()
    # The exponent is rounded to float32 in base 2, so the error grows with it, as that of dt A does anyway.
    assert ((final[0].double() - exact).abs() / exact / (1 + rates.double().abs())).max() < 1.3e-7


def test_nan_is_not_swallowed():
    for name in ("u", "delta", "B", "C"):
        tensors = inputs(1, 8, 3, 4, dtype=torch.float32, everything=False)
        tensors[name][0, 2, 1] = float("nan")
        assert selective_scan(**tensors, backend="cpu").isnan().any(), name


def test_half_precision_keeps_states_in_float32():
    tensors = {
        k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs(dtype=torch.float32).items()
    }
    y, final = selective_scan(**tensors, delta_softplus=True, return_final_state=True)
    expected, state = naive_selective_scan(**{k: v.double() for k, v in tensors.items()}, delta_softplus=True)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (y.double() - expected).abs().max() / expected.abs().max() < 1e-2
    assert (final.double() - state).abs().max() / state.abs().max() < 1e-5


def test_results_do_not_depend_on_the_number_of_threads():
    tensors, threads = inputs(3, 50, 40, 7, dtype=torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(selective_scan, tensors, return_final_state=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_single_steps_make_up_the_scan():
    tensors = inputs(2, 9, 5, 4)
    y, final = selective_scan(**tensors, delta_softplus=True, return_final_state=True)
    state = tensors["initial_state"].clone()
    fixed = {name: tensors[name] for name in ("A", "D", "delta_bias")}
    for t in range(9):
        moving = {name: tensors[name][:, t] for name in ("u", "delta", "B", "C", "z")}
        step = selective_state_update(state, **moving, **fixed, delta_softplus=True)
        assert torch.allclose(step, y[:, t], atol=1e-12)
    assert torch.allclose(state, final, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype):
    half = ("u", "delta", "B", "C", "z")
    tensors = {k: v.to(dtype) if k in half else v for k, v in inputs(2, 40, 19, 6, dtype=torch.float32).items()}
    expected = outputs_and_gradients(naive_selective_scan, {k: v.double() for k, v in tensors.items()})
    found = outputs_and_gradients(selective_scan, tensors, return_final_state=True, backend="cpu")
    assert all(found[f"d{name}"].dtype == value.dtype for name, value in tensors.items())
    # A rounding of what comes in and one of what goes out.
    assert_alike(found, expected, {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype])


def test_slices_expanded_and_transposed_tensors():
    tensors = inputs(2, 40, 18, 4)
    tensors["B"] = tensors["B"][:, :1].expand(-1, 40, -1)
    expected = outputs_and_gradients(naive_selective_scan, tensors)
    views = dict(tensors)
    views["u"], views["z"] = torch.cat([tensors["u"], tensors["z"]], -1).chunk(2, -1)
    views["delta"] = tensors["delta"].mT.contiguous().mT
    views["C"] = torch.cat([tensors["C"]] * 3, -1)[..., 4:8]
    views["A"] = tensors["A"].t().contiguous().t()
    y, final = selective_scan(**views, delta_softplus=True, return_final_state=True, backend="cpu")
    assert_alike({"y": y, "final": final}, {name: expected[name] for name in ("y", "final")}, 1e-11)
    leaves = {name: value.requires_grad_() for name, value in views.items()}
    y = selective_scan(**leaves, delta_softplus=True, backend="cpu")
    reference = naive_selective_scan(**leaves, delta_softplus=True)[0]
    for pair in zip(
        *(torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (y, reference)), strict=True
    ):
        assert torch.allclose(*pair, rtol=1e-10, atol=1e-10)


def test_only_what_needs_a_gradient_gets_one():
    tensors = inputs(everything=False)
    tensors["B"].requires_grad_()
    _, final = selective_scan(**tensors, delta_softplus=True, return_final_state=True, backend="cpu")
    final.sum().backward()
    expected = torch.autograd.grad(naive_selective_scan(**tensors, delta_softplus=True)[1].sum(), tensors["B"])[0]
    assert torch.allclose(tensors["B"].grad, expected) and tensors["u"].grad is None
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(
            selective_scan(**tensors, backend="cpu").square().sum(), tensors["B"], create_graph=True
        )
        grad.sum().backward()


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 33, 5, 3)])
def test_custom_ops_obey_their_contract(sizes, everything):
    tensors = inputs(*sizes, dtype=torch.float32, everything=everything)
    arguments = [tensors.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")]
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in arguments]
    torch.library.opcheck(torch.ops.hf_compressm.selective_scan, (*leaves, True, "cpu"))
    fixed = [None if tensor is None else tensor.detach() for tensor in arguments]
    y, final, kept = torch.ops.hf_compressm.selective_scan(*fixed, True, "cpu")
    torch.library.opcheck(
        torch.ops.hf_compressm.selective_scan_backward,
        (y, final, kept, *fixed[:8], None, True, "cpu"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_in_one_graph_and_again_only_for_another_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=False)
    def run(tensors):
        return selective_scan(**tensors, delta_softplus=True, return_final_state=True)

    for size, count in ((4, 1), (4, 1), (3, 2), (3, 2)):
        tensors = inputs(size=size, dtype=torch.float32, seed=count)
        y, _ = run(tensors)
        assert len(frames) == count
        assert torch.allclose(y, selective_scan(**tensors, delta_softplus=True))


def test_compiled_gradients():
    torch._dynamo.reset()
    tensors = inputs(2, 20, 5, 3)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(compiled, tensors, return_final_state=True)
    assert_alike(found, outputs_and_gradients(naive_selective_scan, tensors), 1e-11)


def test_without_numba_the_reference_runs_with_one_warning(monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))
    backends.announce.cache_clear()
    tensors = inputs(everything=False)
    for _ in range(2):
        y = selective_scan(**tensors, delta_softplus=True)
    assert torch.equal(y, naive_selective_scan(**tensors, delta_softplus=True)[0])
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "numba is not installed" in warnings[0].getMessage()
    with pytest.raises(ValueError, match="'cpu' of selective_scan cannot run: numba is not installed"):
        selective_scan(**tensors, backend="cpu")
    backends.announce.cache_clear()


def test_backends_that_cannot_run_here_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'mamba_ssm' of selective_scan cannot run: the tensors are on cpu"):
        selective_scan(**inputs(), backend="mamba_ssm")
    with pytest.raises(ValueError, match="'triton' of selective_scan cannot run: "):
        selective_scan(**inputs(), backend="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"u": torch.randn(2, 0, 5)}, "B, L, H >= 1"),
        ({"A": torch.randn(5, 0)}, "N >= 1"),
        ({"delta": torch.randn(2, 63, 1)}, "delta must be"),
        ({"D": torch.randn(4)}, "D must be"),
        ({"z": torch.randn(2, 62, 5)}, "z must be"),
        ({"delta_bias": torch.randn(5, 1)}, "delta_bias must be"),
        ({"initial_state": torch.randn(2, 3, 5)}, "initial_state must be"),
        ({"C": torch.randn(2, 63, 3, dtype=torch.complex64)}, "C must be of a real"),
        ({"C": torch.randn(2, 63, 3, device="meta")}, "C on meta"),
    ],
)
def test_bad_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(inputs(dtype=torch.float32) | change))


def test_a_backend_can_be_forced_and_nonsense_is_refused(monkeypatch):
    tensors = inputs(everything=False)
    monkeypatch.setenv("HF_COMPRESSM_SELECTIVE_SCAN", "typo")
    with pytest.raises(ValueError, match="unknown backend 'typo'.*naive, cpu, triton, mamba_ssm"):
        selective_scan(**tensors)
    monkeypatch.delenv("HF_COMPRESSM_SELECTIVE_SCAN")
    with pytest.raises(ValueError, match=r"B must be \(2, 63, 3\), \(B, L, N\)"):
        selective_scan(**(tensors | {"B": tensors["B"][:, :-1]}))
    with pytest.raises(ValueError, match="A must have shape"):
        selective_scan(**(tensors | {"A": tensors["A"][:-1]}))


def test_a_device_without_a_kernel_of_its_own_takes_the_reference_with_one_warning(caplog):
    backends.announce.cache_clear()
    with caplog.at_level("WARNING"):
        chosen = [backends.choose_backend("causal_conv", None, "cuda", ("naive", "cpu")) for _ in range(2)]
    backends.announce.cache_clear()
    assert chosen == ["naive", "naive"] and caplog.text.count("there is no kernel of triton") == 1
