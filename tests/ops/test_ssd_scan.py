"""The scan of Mamba-2 against a recurrence in float64, with all gradients, and its single step."""

import importlib.util

import pytest
import torch
from ops import interpreter

from hf_compressm.ops import backends
from hf_compressm.ops.ssd_scan import ssd_scan, ssd_state_update

BACKENDS = ["naive", "cpu"]


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state, limit):
    """Step by step, as the equations stand."""
    step = torch.nn.functional.softplus(dt + dt_bias).clamp(*limit)
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        drive = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = (step[:, t] * A).exp()[..., None, None] * state + drive
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def inputs(batch, length, heads, width, groups, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": draw(batch, length, heads, width),
        "dt": draw(batch, length, heads),
        "A": -draw(heads).exp(),
        "B": draw(batch, length, groups, size),
        "C": draw(batch, length, groups, size),
        "D": draw(heads),
        "dt_bias": draw(heads),
        "initial_state": draw(batch, heads, width, size),
    }


SIZES = [
    (2, 63, 4, 3, 2, 5),
    (1, 1, 2, 1, 1, 1),
    (2, 65, 3, 8, 3, 17),
    (1, 7, 6, 5, 2, 3),
    (2, 63, 4, 5, 1, 12),
    (3, 64, 2, 4, 1, 128),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("backend", "chunk"), [("naive", 1), ("naive", 7), ("naive", 64), ("naive", 100), ("cpu", 64)])
def test_scan_equals_the_recurrence_with_all_gradients(sizes, backend, chunk):
    results = []
    for function in (recurrence, ssd_scan):
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs(*sizes).items()}
        if function is recurrence:
            y, final = recurrence(*leaves.values(), (0.01, 2.0))
        else:
            options = {"dt_softplus": True, "dt_limit": (0.01, 2.0), "chunk_size": chunk}
            with interpreter.poisoned():
                y, final = ssd_scan(**leaves, **options, return_final_state=True, backend=backend)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        loss = (y * weights).sum() + (final * final.detach().cos()).sum()
        with interpreter.poisoned():
            results.append([y, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-10, rtol=1e-9)


def test_single_steps_make_up_the_scan():
    tensors = inputs(2, 9, 4, 3, 2, 5)
    y, final = ssd_scan(**tensors, dt_softplus=True, return_final_state=True)
    state = tensors["initial_state"].clone()
    fixed = {name: tensors[name] for name in ("A", "D", "dt_bias")}
    for t in range(9):
        moving = {name: tensors[name][:, t] for name in ("x", "dt", "B", "C")}
        assert torch.allclose(ssd_state_update(state, **moving, **fixed, dt_softplus=True), y[:, t], atol=1e-12)
    assert torch.allclose(state, final, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_strong_decay(backend):
    tensors = inputs(2, 40, 4, 8, 1, 16, torch.float32)
    tensors["A"] = tensors["A"] * 1e4
    wide = ssd_scan(**tensors, dt_softplus=True, backend=backend)
    assert wide.isfinite().all()
    half = {k: (v.bfloat16() if k in ("x", "dt", "B", "C") else v).requires_grad_() for k, v in tensors.items()}
    found, final = ssd_scan(**half, dt_softplus=True, return_final_state=True, backend=backend)
    assert found.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (found.float() - wide).abs().max() / wide.abs().max() < 0.05
    found.float().square().sum().backward()
    assert all(v.grad.dtype == v.dtype and v.grad.isfinite().all() for v in half.values())


@pytest.mark.parametrize("with_state", [False, True])
def test_float32_is_close_to_float64(with_state):
    # 1e-5 of the largest entry: sums of some hundred terms in float32.
    results = []
    for dtype in (torch.float64, torch.float32):
        tensors = {k: v.requires_grad_() for k, v in inputs(2, 150, 4, 6, 2, 20, dtype).items()}
        if not with_state:
            del tensors["initial_state"]
        y = ssd_scan(**tensors, dt_softplus=True, backend="cpu")
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_optional_arguments_equal_their_neutral_values():
    tensors = inputs(2, 21, 4, 5, 2, 7)
    neutral = tensors | {"D": torch.zeros(4), "dt_bias": torch.zeros(4), "initial_state": torch.zeros(2, 4, 5, 7)}
    bare = {name: tensors[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")}
    for options in ({"dt_softplus": True}, {"dt_limit": (-1.0, 0.5)}):
        expected = ssd_scan(**(neutral | bare), **options, backend="naive")
        found = ssd_scan(**bare, **options, backend="cpu")
        assert torch.allclose(found, expected, atol=1e-12)
        pairs = [torch.autograd.grad(y.sin().sum(), list(bare.values())) for y in (expected, found)]
        for wanted, given in zip(*pairs, strict=True):
            assert torch.allclose(given, wanted, atol=1e-11)


def test_only_the_final_state_has_a_gradient():
    tensors = {k: v.requires_grad_() for k, v in inputs(2, 21, 4, 5, 2, 7).items()}
    results = []
    for backend in BACKENDS:
        _, final = ssd_scan(**tensors, return_final_state=True, backend=backend)
        leaves = [v for k, v in tensors.items() if k not in ("C", "D")]
        results.append(torch.autograd.grad(final.sin().sum(), leaves))
    for wanted, given in zip(*results, strict=True):
        assert torch.allclose(given, wanted, atol=1e-11)


def test_strides_do_not_matter():
    tensors = inputs(3, 20, 4, 5, 2, 7)
    strided = dict(tensors)
    for name in ("x", "B", "C"):
        strided[name] = tensors[name].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    strided["dt"] = tensors["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["A"] = tensors["A"].repeat_interleave(2)[::2]
    assert torch.equal(ssd_scan(**strided, backend="cpu"), ssd_scan(**tensors, backend="cpu"))
    one = tensors["B"][:1, :1].expand(3, 20, 2, 7).requires_grad_()
    y = ssd_scan(**(tensors | {"B": one}), backend="cpu")
    y.sum().backward()
    assert torch.allclose(y, ssd_scan(**(tensors | {"B": one}), backend="naive"), atol=1e-11)


def test_gradcheck():
    tensors = [v.requires_grad_() for v in inputs(2, 19, 4, 2, 2, 3).values()]

    def scan(x, dt, A, B, C, D, dt_bias, initial_state):
        options = {"dt_softplus": True, "return_final_state": True, "backend": "cpu"}
        return ssd_scan(x, dt, A, B, C, D, dt_bias, initial_state=initial_state, **options)

    torch.autograd.gradcheck(scan, tensors, fast_mode=True)


@pytest.mark.parametrize("optional", [False, True])
def test_custom_ops(optional):
    tensors = [v.requires_grad_() for v in inputs(2, 9, 4, 2, 2, 3, torch.float32).values()]
    if not optional:
        tensors[5:] = [None] * 3
    settings = (True, 0.0, float("inf"), 64, "cpu")
    torch.library.opcheck(torch.ops.hf_compressm.ssd_scan.default, (*tensors, *settings))
    detached = [None if v is None else v.detach() for v in tensors]
    y, final, checkpoints = torch.ops.hf_compressm.ssd_scan(*detached, *settings)
    arguments = (torch.randn_like(y), torch.randn_like(final) if optional else None, checkpoints, *detached[:7], None)
    torch.library.opcheck(torch.ops.hf_compressm.ssd_scan_backward.default, (*arguments, *settings))


def test_compiles_without_graph_breaks():
    tensors = {k: v.requires_grad_() for k, v in inputs(2, 19, 4, 2, 2, 3, torch.float32).items()}

    def loss(**tensors):
        y, final = ssd_scan(**tensors, dt_softplus=True, return_final_state=True)
        return y.sin().sum() + final.cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pairs = [torch.autograd.grad(f(**tensors), list(tensors.values())) for f in (loss, compiled)]
    for wanted, given in zip(*pairs, strict=True):
        assert torch.allclose(given, wanted, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    tensors = {k: v.requires_grad_() for k, v in inputs(2, 50, 20, 5, 2, 7, torch.float32).items()}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ssd_scan(**tensors, dt_softplus=True, backend="cpu")
            results.append([y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_without_numba_the_reference_runs(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    backends.announce.cache_clear()
    tensors = inputs(2, 9, 4, 3, 2, 5)
    assert torch.equal(ssd_scan(**tensors), ssd_scan(**tensors, backend="naive"))
    assert "numba is not installed" in caplog.text
    with pytest.raises(ValueError, match="numba is not installed"):
        ssd_scan(**tensors, backend="cpu")


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_COMPRESSM_SSD_SCAN", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ssd_scan(**inputs(2, 9, 4, 3, 2, 5))


def test_shapes_are_checked():
    tensors = inputs(2, 9, 4, 3, 2, 5)
    with pytest.raises(ValueError, match="G a divisor of 4"):
        ssd_scan(**(tensors | {"B": torch.zeros(2, 9, 3, 5), "C": torch.zeros(2, 9, 3, 5)}))
    for name, wrong, message in [
        ("dt", torch.zeros(2, 9, 3), r"dt must be \(2, 9, 4\)"),
        ("A", torch.zeros(3), r"A must be \(4,\)"),
        ("D", torch.zeros(4, 3), r"D must be \(4,\)"),
        ("x", torch.zeros(2, 0, 4, 3), "all >= 1"),
        ("initial_state", torch.zeros(2, 4, 5, 3), r"initial_state must be \(2, 4, 3, 5\)"),
        ("A", torch.zeros(4, device="meta"), "x is on cpu and A on meta"),
        ("dt_bias", torch.zeros(4, dtype=torch.int64), "floating-point"),
    ]:
        with pytest.raises(ValueError, match=message):
            ssd_scan(**(tensors | {name: wrong}))
    with pytest.raises(ValueError, match="N >= 1"):
        ssd_scan(**(tensors | {"B": torch.zeros(2, 9, 2, 0), "C": torch.zeros(2, 9, 2, 0)}))
    with pytest.raises(ValueError, match="chunk_size"):
        ssd_scan(**tensors, chunk_size=0)
