"""The gated delta rule against its recurrence in float64, with all gradients, and transformers' own functions."""

import importlib.util
import sys
from types import ModuleType

import interpreter
import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5

from hf_compressm.ops import backends
from hf_compressm.ops.gated_delta_scan import (
    delta_state_gramian,
    gated_delta_scan,
    gated_delta_step,
    naive_delta_state_gramian,
    naive_gated_delta_scan,
)

BACKENDS = ["naive", "cpu"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of the largest entry. bfloat16: inputs, output and gradients are rounded to it, to 2^-8 of each entry."""
SIZES = [
    (1, 1, 1, 1, 12, 5),
    (3, 63, 2, 4, 33, 32),
    (1, 65, 1, 3, 12, 5),
    (1, 130, 2, 2, 12, 32),
    (2, 130, 2, 4, 33, 5),
]
"""(B, L, G, H, K, V)"""


def inputs(batch, length, groups, heads, channels, width, dtype=torch.float64, per_channel=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def keys():
        return F.normalize(draw(batch, length, groups, channels), dim=-1)

    decays = (batch, length, heads, channels) if per_channel else (batch, length, heads)
    tensors = {
        "q": keys(),
        "k": keys(),
        "v": draw(batch, length, heads, width),
        "g": -(draw(*decays) - 2).exp(),
        "beta": draw(batch, length, heads).sigmoid(),
        "erase": keys(),
        "initial_state": draw(batch, heads, channels, width),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def outputs_and_gradients(function, tensors, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    o, final = function(**leaves, **options)
    weights = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)
    loss = (o.double() * weights).sum() + (final.double() * final.detach().double().cos()).sum()
    return {"o": o, "final": final} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def compare(tensors, tolerance, backend, **options):
    """Compare a backend in the dtypes of `tensors` with the recurrence in float64."""
    wide = {name: value.double() for name, value in tensors.items()}
    expected = outputs_and_gradients(naive_gated_delta_scan, wide, **options)
    with interpreter.poisoned():
        found = outputs_and_gradients(gated_delta_scan, tensors, backend=backend, **options)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        worst = (found[name].double() - value).abs().max()
        assert worst <= tolerance * value.abs().max().clamp(min=1.0), (name, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
@pytest.mark.parametrize("sizes", SIZES)
def test_scan_equals_the_recurrence_with_all_gradients(backend, per_channel, sizes):
    compare(inputs(*sizes, per_channel=per_channel), TOLERANCE[torch.float64], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left_out", [("erase",), ("initial_state",), ("erase", "initial_state")])
def test_optional_arguments(backend, left_out):
    tensors = {name: value for name, value in inputs(2, 70, 2, 4, 12, 5).items() if name not in left_out}
    compare(tensors, TOLERANCE[torch.float64], backend)
    compare(tensors, TOLERANCE[torch.float64], backend, scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
def test_float32_is_close_to_float64(backend, per_channel):
    compare(inputs(1, 150, 2, 4, 20, 24, torch.float32, per_channel), TOLERANCE[torch.float32], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_keeps_states_in_float32(backend):
    tensors = inputs(2, 70, 2, 4, 12, 8, torch.bfloat16)
    compare(tensors, TOLERANCE[torch.bfloat16], backend)
    tensors |= {name: tensors[name].float() for name in ("g", "beta", "initial_state")}
    found = outputs_and_gradients(gated_delta_scan, tensors, backend=backend)
    assert found["o"].dtype == torch.bfloat16 and found["final"].dtype == torch.float32
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
def test_strong_decay_and_large_beta(backend, per_channel):
    tensors = inputs(1, 70, 2, 4, 12, 5, torch.float32, per_channel)
    tensors |= {"g": tensors["g"] * 300, "beta": 2 * tensors["beta"]}
    compare(tensors, TOLERANCE[torch.float32], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(1, 0, 39, 26, 4), (64, 128), (5,), (70, 1)])
def test_packed_sequences_are_separate(backend, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = inputs(1, sum(lengths), 2, 4, 12, 5)
    tensors["initial_state"] = torch.randn(len(lengths), 4, 12, 5, dtype=torch.float64)
    compare(tensors, TOLERANCE[torch.float64], backend, cu_seqlens=bounds)
    o, final = gated_delta_scan(**tensors, cu_seqlens=bounds, backend=backend)
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = tensors["initial_state"][n : n + 1]
        if begin == end:
            assert torch.equal(final[n : n + 1], state)
            continue
        alone = {name: value[:, begin:end] for name, value in tensors.items()} | {"initial_state": state}
        expected, last = gated_delta_scan(**alone, backend=backend)
        assert torch.allclose(o[:, begin:end], expected, atol=1e-12)
        assert torch.allclose(final[n : n + 1], last, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [32, 12])
def test_equals_transformers(backend, channels):
    tensors = inputs(2, 130, 2, 6, channels, 16, torch.float32)
    del tensors["erase"]
    q, k, v, g, beta, state = tensors.values()
    arguments = {"g": g, "beta": beta, "initial_state": state, "output_final_state": True}
    functions = modeling_qwen3_5.torch_chunk_gated_delta_rule, modeling_qwen3_5.torch_recurrent_gated_delta_rule
    found = gated_delta_scan(q, k, v, g, beta, initial_state=state, backend=backend)
    for function in functions:
        for mine, theirs in zip(found, function(q, k, v, **arguments), strict=True):
            assert torch.allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    tensors = inputs(3, 20, 2, 4, 12, 7)
    strided = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in tensors.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    results = [outputs_and_gradients(gated_delta_scan, x, backend=backend) for x in (tensors, strided)]
    for name, expected in results[0].items():
        assert torch.allclose(results[1][name], expected, atol=1e-12)
    one = tensors["k"][:1, :1].expand(3, 20, 2, 12).requires_grad_()
    found = gated_delta_scan(**(tensors | {"k": one}), backend=backend)
    assert torch.allclose(found[0], naive_gated_delta_scan(**(tensors | {"k": one}))[0], atol=1e-12)
    found[0].sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_final_state_has_a_gradient(backend):
    tensors = {name: value.requires_grad_() for name, value in inputs(2, 70, 2, 4, 12, 5).items() if name != "q"}
    q, results = torch.randn(2, 70, 2, 12, dtype=torch.float64), []
    for function, options in ((naive_gated_delta_scan, {}), (gated_delta_scan, {"backend": backend})):
        _, final = function(q=q, **tensors, **options)
        results.append(torch.autograd.grad(final.sin().sum(), list(tensors.values())))
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
def test_gradcheck(backend, per_channel):
    tensors = inputs(1, 19, 1, 2, 3, 2, per_channel=per_channel)

    def scan(*values):
        return gated_delta_scan(**dict(zip(tensors, values, strict=True)), backend=backend)

    torch.autograd.gradcheck(scan, [value.requires_grad_() for value in tensors.values()], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optional", [False, True])
def test_custom_ops(backend, optional):
    tensors = [value.requires_grad_() for value in inputs(1, 9, 2, 4, 3, 2, torch.float32).values()]
    bounds = torch.tensor([0, 4, 9]) if optional else None
    tensors[5:] = [tensors[5], torch.randn(2, 4, 3, 2)] if optional else [None, None]
    settings = (bounds, 0.5, backend)
    torch.library.opcheck(torch.ops.hf_compressm.gated_delta_scan.default, (*tensors, *settings))
    detached = [None if value is None else value.detach() for value in tensors]
    o, final, *kept = torch.ops.hf_compressm.gated_delta_scan(*detached, *settings)
    gradients = torch.randn_like(o), torch.randn_like(final) if optional else None
    backward = torch.ops.hf_compressm.gated_delta_scan_backward.default
    torch.library.opcheck(backward, (*gradients, *kept, *detached, *settings))


def test_compiles_without_graph_breaks():
    tensors = {name: value.requires_grad_() for name, value in inputs(2, 19, 2, 4, 3, 2, torch.float32).items()}

    def loss(**tensors):
        o, final = gated_delta_scan(**tensors)
        return o.sin().sum() + final.cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pairs = [torch.autograd.grad(f(**tensors), list(tensors.values())) for f in (loss, compiled)]
    for expected, found in zip(*pairs, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    tensors = inputs(2, 130, 2, 4, 20, 24, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(gated_delta_scan, tensors, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("groups", "channels", "width"), [(2, 12, 5), (4, 33, 32), (1, 16, 48)])
def test_single_steps_make_up_the_scan(per_channel, dtype, groups, channels, width):
    tensors = inputs(2, 9, groups, 4, channels, width, dtype, per_channel)
    state = tensors.pop("initial_state")
    o, final = naive_gated_delta_scan(**tensors, initial_state=state, scale=0.3)
    for t in range(9):
        token = {name: value[:, t] for name, value in tensors.items()}
        assert torch.allclose(gated_delta_step(**token, state=state, scale=0.3), o[:, t], atol=TOLERANCE[dtype])
    assert torch.allclose(state, final, atol=TOLERANCE[dtype])


def test_step_with_any_strides_and_without_erase_keys():
    tensors = {name: value[:, 0] for name, value in inputs(3, 1, 2, 4, 20, 24).items() if name != "initial_state"}
    del tensors["erase"]
    state = torch.randn(3, 4, 20, 24, dtype=torch.float64)
    strided, before = state.transpose(2, 3).contiguous().transpose(2, 3), state.clone()
    expected = gated_delta_step(**tensors, state=state)
    turned = {name: value.transpose(0, 1).contiguous().transpose(0, 1) for name, value in tensors.items()}
    assert torch.allclose(gated_delta_step(**turned, state=strided), expected, atol=1e-12)
    assert torch.allclose(strided, state, atol=1e-12) and not torch.equal(state, before)
    half = gated_delta_step(**{name: value.bfloat16() for name, value in tensors.items()}, state=before)
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.03 * expected.abs().max()


def test_step_equals_transformers():
    tensors = inputs(2, 1, 2, 6, 32, 16, torch.float32)
    q, k, v, g, beta, _, state = tensors.values()
    arguments = {"g": g, "beta": beta, "initial_state": state.clone(), "output_final_state": True}
    o, final = modeling_qwen3_5.torch_recurrent_gated_delta_rule(q, k, v, **arguments)
    found = gated_delta_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)
    assert torch.allclose(found, o[:, 0], atol=1e-6) and torch.allclose(state, final, atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
@pytest.mark.parametrize("sizes", SIZES)
def test_gramian_equals_sums_over_states(per_channel, sizes):
    tensors = inputs(*sizes, per_channel=per_channel)
    del tensors["q"], tensors["initial_state"]
    weights = torch.rand(sizes[:2], dtype=torch.float64) * (torch.rand(sizes[:2]) < 0.2)
    expected = naive_delta_state_gramian(**tensors, weights=weights)
    assert expected.dtype == torch.float64 and expected.shape == (sizes[2], sizes[4], sizes[4])
    assert torch.allclose(delta_state_gramian(**tensors, weights=weights), expected, atol=1e-10)
    single = {name: value.float() for name, value in tensors.items()}
    found = delta_state_gramian(**single, weights=weights.float())
    assert found.dtype == torch.float64 and torch.allclose(found, expected, atol=2e-5 * expected.abs().max().item())
    del tensors["erase"]
    expected = naive_delta_state_gramian(**tensors, weights=weights)
    assert torch.allclose(delta_state_gramian(**tensors, weights=weights), expected, atol=1e-10)


def test_gramian_checks_its_arguments():
    tensors = {name: value for name, value in inputs(2, 9, 2, 4, 3, 5).items() if name not in ("q", "initial_state")}
    with pytest.raises(ValueError, match=r"weights must be \(2, 9\)"):
        delta_state_gramian(**tensors, weights=torch.ones(9, 2))
    with pytest.raises(ValueError, match=r"beta \(2, 9, 4\)"):
        delta_state_gramian(**(tensors | {"beta": torch.ones(2, 9)}), weights=torch.ones(2, 9))


def test_without_numba_plain_pytorch_runs(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    backends.announce.cache_clear()  # The warning comes once per process.
    tensors = inputs(2, 9, 2, 4, 3, 5)
    for mine, plain in zip(gated_delta_scan(**tensors), gated_delta_scan(**tensors, backend="naive"), strict=True):
        assert torch.equal(mine, plain)
    assert "numba is not installed" in caplog.text
    with pytest.raises(ValueError, match="numba is not installed"):
        gated_delta_scan(**tensors, backend="cpu")


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_COMPRESSM_GATED_DELTA_SCAN", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        gated_delta_scan(**inputs(2, 9, 2, 4, 3, 5))


def chunk_gated_delta_rule(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, cu_seqlens=None,
):  # fmt: skip
    """As in fla.ops.gated_delta_rule, which runs on CUDA devices only."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and output_final_state and not use_qk_l2norm_in_kernel
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return naive_gated_delta_scan(q, k, v, g, beta, **options)


def test_backend_of_fla(monkeypatch):
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    for path in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "find_obstacle", lambda *ignored: None)  # fla does not run on the CPU.
    tensors = inputs(1, 30, 2, 4, 12, 5, torch.float32)
    erase, tensors["initial_state"] = tensors.pop("erase"), torch.randn(2, 4, 12, 5)
    bounds = torch.tensor([0, 11, 30])
    results = [gated_delta_scan(**tensors, cu_seqlens=bounds, backend=name) for name in ("fla", "naive")]
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="without erase keys, decays per key channel and float64"):
        gated_delta_scan(**tensors, erase=erase, cu_seqlens=bounds, backend="fla")


def test_arguments_are_checked():
    tensors = inputs(2, 9, 2, 4, 3, 5)
    for name, wrong, message in [
        ("k", torch.zeros(2, 9, 3, 3), "G a divisor of 4"),
        ("q", torch.zeros(2, 9, 2, 4), r"q must have the shape of k, \(2, 9, 2, 3\)"),
        ("erase", torch.zeros(2, 9, 2, 4), r"erase must have the shape of k, \(2, 9, 2, 3\)"),
        ("v", torch.zeros(2, 0, 4, 5), "all >= 1"),
        ("v", torch.zeros(2, 9, 4), "all >= 1"),
        ("g", torch.zeros(2, 9, 4, 5), r"g must be \(2, 9, 4\), .* or \(2, 9, 4, 3\)"),
        ("beta", torch.zeros(2, 9), r"beta must be \(2, 9, 4\)"),
        ("initial_state", torch.zeros(2, 4, 16, 5), r"initial_state must be \(2, 4, 3, 5\).*before a cut"),
        ("beta", torch.zeros(2, 9, 4, device="meta"), "q is on cpu and beta on meta"),
        ("g", torch.zeros(2, 9, 4, dtype=torch.int64), "floating-point"),
        ("cu_seqlens", torch.tensor([0, 9]), "a batch of 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_delta_scan(**(tensors | {name: wrong}) | ({"initial_state": None} if name == "cu_seqlens" else {}))
    one = {name: value[:1] for name, value in tensors.items() if name != "initial_state"}
    for bounds, message in [([0, 8], "rise from 0 to L = 9"), ([0, 5, 4, 9], "without decreasing"), ([1, 9], "rise")]:
        with pytest.raises(ValueError, match=message):
            gated_delta_scan(**one, cu_seqlens=torch.tensor(bounds))
    token = {name: value[:, 0] for name, value in tensors.items() if name != "initial_state"}
    for state in (torch.zeros(2, 4, 16, 5), torch.zeros(2, 4, 3, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"float32 or float64 \(2, 4, 3, 5\)"):
            gated_delta_step(**token, state=state)
    with pytest.raises(ValueError, match=r"g must be \(2, 4\)"):
        gated_delta_step(**(token | {"g": torch.zeros(2)}), state=torch.zeros(2, 4, 3, 5))
