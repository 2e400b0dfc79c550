"""Plain PyTorch functions that replace this package's ops in the code that saved models carry; the same signatures.

Arguments, shapes and results as in the op of the same name, without a choice of backends and without checks.
"""

from __future__ import annotations

from typing import Any

from ..ops.causal_conv.naive import naive_causal_conv
from ..ops.diag_system.naive import naive_diag_system
from ..ops.gated_delta_scan.naive import naive_gated_delta_scan, naive_gated_delta_step
from ..ops.selective_scan.naive import naive_selective_scan
from ..ops.ssd_scan.naive import naive_ssd_scan

causal_conv = naive_causal_conv
diag_system = naive_diag_system
gated_delta_scan = naive_gated_delta_scan


def selective_scan(*tensors: Any, return_final_state: bool = False, **options: Any) -> Any:
    """Selective scan of Mamba: y (B, L, H), and the final state (B, H, N) if it is asked for."""
    y, final = naive_selective_scan(*tensors, **options)
    return (y, final) if return_final_state else y


def ssd_scan(*tensors: Any, return_final_state: bool = False, **options: Any) -> Any:
    """Scan of Mamba-2: y (B, L, H, P), and the final state (B, H, P, N) if it is asked for."""
    y, final = naive_ssd_scan(*tensors, **options)
    return (y, final) if return_final_state else y


def gated_delta_step(*tensors: Any, erase: Any = None, scale: float | None = None) -> Any:
    """One token of the gated delta rule: o (B, H, V); the state (B, H, K, V), last of the tensors, is updated."""
    state, dtype = tensors[-1], tensors[2].dtype
    wide = (tensor.to(state.dtype) for tensor in tensors)
    o, after = naive_gated_delta_step(*wide, erase=None if erase is None else erase.to(state.dtype), scale=scale)
    state.copy_(after)
    return o.to(dtype)


class CarriesCode:
    """Nothing to do: transformers itself copies this file when a model that was loaded with it is saved."""


class CarriesExtractorCode:
    """Nothing to do, as for a model."""
