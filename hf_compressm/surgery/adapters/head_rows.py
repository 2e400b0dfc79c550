"""Rows of projections and convolutions, head by head: which of them a cut of key or value channels removes.

A projection's segments say in their order what its rows make: (KEY, g) are the channels of key head g, (VALUE, h) those
of value head h, of values or of a gate on them.

Source: the modelling code of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.plain import innermost
from ..changes import ParameterChange, Term

KEY, VALUE = "key", "value"
Segments = Mapping[str, Sequence[tuple[str, int]]]
"""Name of a layer in the mixer -> what its rows make."""


def heads_of(mixer: Any) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """A mixer's key heads and value heads, as segments."""
    return [(KEY, head) for head in range(mixer.num_k_heads)], [(VALUE, head) for head in range(mixer.num_v_heads)]


def flat_segments(mixer: Any) -> dict[str, list[tuple[str, int]]]:
    """What the rows make where one projection has q|k|v, as in Qwen3.5, and another the gate."""
    heads, values = heads_of(mixer)
    return {"in_proj_qkv": [*heads, *heads, *values], "in_proj_z": values}


def with_convolution(mixer: Any, segments: Segments) -> Segments:
    """Projections, and the convolution of q|k|v behind them."""
    heads, values = heads_of(mixer)
    return {**segments, "conv1d": [*heads, *heads, *values]}


def with_kind(segments: Segments, kind: str) -> dict[str, Sequence[tuple[str, int]]]:
    """Those of the layers that have rows of a kind."""
    return {name: parts for name, parts in segments.items() if any(part == kind for part, _ in parts)}


def row_shapes(mixer: Any, segments: Segments, sizes: Mapping[str, int]) -> dict[str, torch.Size]:
    """Shapes of weights and biases by name, for heads of these sizes by kind."""
    shapes = {}
    for name, parts in segments.items():
        rows = sum(sizes[kind] for kind, _ in parts)
        layer = innermost(getattr(mixer, name))
        if layer.weight is not None:
            tail = (1, *layer.kernel_size) if name == "conv1d" else (layer.in_features,)
            shapes[f"{name}.weight"] = torch.Size([rows, *tail])
        if layer.bias is not None:
            shapes[f"{name}.bias"] = torch.Size([rows])
    return shapes


def size_from_rows(rows: int, parts: Sequence[tuple[str, int]], kind: str, others: int) -> int:
    """Size of the heads of a kind in a layer with this many rows, where heads of the other kind have size `others`."""
    count = [found for found, _ in parts].count(kind)
    return (rows - (len(parts) - count) * others) // count


def picked_rows(
    mixer: Any, segments: Segments, sizes: Mapping[str, int], kind: str, kept: Sequence[Sequence[int]]
) -> dict[str, ParameterChange]:
    """Changes that keep channels of the heads of one kind, and all of the other.

    Args:
        mixer: the mixer.
        segments: of the layers that change.
        sizes: present size of the heads, by kind.
        kind: KEY or VALUE.
        kept: for each head of the kind, indices of the channels that stay, in their new order.
    """
    changes = {}
    for name in row_shapes(mixer, segments, sizes):
        rows, start = [], 0
        for found, head in segments[name.partition(".")[0]]:
            rows += [start + channel for channel in (kept[head] if found == kind else range(sizes[found]))]
            start += sizes[found]
        picked = Term(name, rows=torch.tensor(rows))
        changes[name] = ParameterChange(picked(_cpu(mixer.get_parameter(name))), (picked,), rows=picked)
    return changes


def fit_sizes(mixer: Any, segments: Segments) -> None:
    """Bring the sizes that layers speak of in line with the rows of their weights."""
    for name in segments:
        layer = getattr(mixer, name)
        if name == "conv1d":
            layer.in_channels = layer.out_channels = layer.groups = layer.weight.shape[0]
        else:
            layer.out_features = layer.weight.shape[0]


def _cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu()
