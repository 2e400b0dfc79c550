"""The backends of mamba-ssm and causal-conv1d: what they get and what becomes of their results.

Both packages run on CUDA devices only, so functions with their signatures stand in for them here, which compute by this
package's references in the layout that theirs have.
"""

import sys
from types import ModuleType

import pytest
import torch

from hf_compressm.ops import backends
from hf_compressm.ops.causal_conv import causal_conv, naive_causal_conv
from hf_compressm.ops.selective_scan import naive_selective_scan, selective_scan
from hf_compressm.ops.ssd_scan import ssd_scan


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """(B, H, L) and (B, N, L), as in mamba_ssm.ops.selective_scan_interface."""
    rows = [None if tensor is None else tensor.transpose(1, 2) for tensor in (u, delta, B, C, z)]
    y, _ = naive_selective_scan(rows[0], rows[1], A, rows[2], rows[3], D, rows[4], delta_bias, delta_softplus)
    return y.transpose(1, 2)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    """As in mamba_ssm.ops.triton.ssd_combined."""
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_state": return_final_states}
    options |= {"initial_state": initial_states, "chunk_size": chunk_size}
    return ssd_scan(x, dt, A, B, C, D, dt_bias, **options, backend="naive")


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """(B, C, L), as in causal_conv1d."""
    assert activation == "silu"
    return naive_causal_conv(x.transpose(1, 2), weight, bias).transpose(1, 2)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    for path, function in (
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
        ("causal_conv1d", causal_conv1d_fn),
    ):
        module = ModuleType(path)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, path, module)
        for parent in (path.rsplit(".", cut)[0] for cut in range(1, path.count(".") + 1)):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr(backends, "find_obstacle", lambda *ignored: None)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_selective_scan():
    u, B, row, A = draw(2, 9, 5), draw(2, 9, 3), draw(5), -draw(5, 3).exp()
    found, expected = (
        selective_scan(u, u, A, B, B, row, u, row, True, backend=name) for name in ("mamba_ssm", "naive")
    )
    assert torch.allclose(found, expected, atol=1e-6)
    for more in ({"initial_state": draw(2, 5, 3)}, {"return_final_state": True}):
        with pytest.raises(ValueError, match="without initial_state, return_final_state and float64"):
            selective_scan(u, u, A, B, B, **more, backend="mamba_ssm")


def test_ssd_scan():
    x, dt, A, B, row = draw(2, 9, 4, 3), draw(2, 9, 4), -draw(4).exp(), draw(2, 9, 2, 5), draw(4)
    options = {"initial_state": draw(2, 4, 3, 5), "return_final_state": True, "dt_softplus": True, "dt_limit": (0.1, 1)}
    results = [ssd_scan(x, dt, A, B, B, row, row, **options, backend=name) for name in ("mamba_ssm", "naive")]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*results, strict=True))
    with pytest.raises(ValueError, match="does not run in float64"):
        ssd_scan(x.double(), dt, A, B, B, backend="mamba_ssm")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_causal_conv(how, monkeypatch):
    x, weight, bias = draw(2, 9, 5), draw(5, 4), draw(5)
    if how == "environment":
        monkeypatch.setenv("HF_COMPRESSM_CAUSAL_CONV", "causal_conv1d")
    called = []
    monkeypatch.setattr(
        sys.modules["causal_conv1d"],
        "causal_conv1d_fn",
        lambda *args, **kw: called.append(1) or causal_conv1d_fn(*args, **kw),
    )
    found = causal_conv(x, weight, bias, backend="causal_conv1d" if how == "argument" else None)
    assert torch.allclose(found, naive_causal_conv(x, weight, bias)) and called
