"""Refit a reduced mixer to the outputs of the full one on calibration data, before it goes into the model.

Few parameters are fitted, those of the states, to a target that the data already gives: no labels and no pass through
the rest of the model. It recovers most where the read-out cannot be corrected in closed form, as in stock Mamba-2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.automatic import by_fast_ops
from .adapters.base import MixerReduction, MixerSite, ReductionError
from .adapters.selective import real_tokens
from .resize import replace_parameters

STEPS = 60
"""Optimizer steps of a refit by default."""
TOKENS = 8192
"""Tokens per mixer that are kept to refit on, at most: memory must not grow with the calibration data."""
BATCH_TOKENS = 1024
"""Tokens per step of the refit, at least one sequence."""
RATE = 0.05
"""First step size relative to the root mean square of the parameter; it falls linearly to zero."""


@dataclass
class Recording:
    """Inputs and outputs of one mixer on calibration data, on the CPU; the first `TOKENS` tokens.

    Attributes:
        inputs, outputs: per batch, (B, L, H).
        masks: per batch, (B, L), False at padding, or None.
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    tokens: int = 0

    def add(self, hidden_states: Tensor, output: Tensor, mask: Tensor | None) -> None:
        """Add inputs and outputs (B, L, H) and a mask (B, L), whole sequences while there is room, but at least one."""
        batch, length = hidden_states.shape[:2]
        if mask is not None:
            mask = real_tokens(mask, hidden_states)
            rows = mask.any(1)
            hidden_states, output, mask, batch = hidden_states[rows], output[rows], mask[rows], int(rows.sum())
        room = batch if not self.tokens else min(batch, (TOKENS - self.tokens) // length)
        room = min(room, max(TOKENS // length, 1))
        if room > 0:
            self.inputs.append(hidden_states[:room].detach().cpu())
            self.outputs.append(output[:room].detach().cpu())
            self.masks.append(None if mask is None else mask[:room].cpu())
            self.tokens += room * length

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs (B, L, H), outputs (B, L, H) and masks (B, L) in portions of about `BATCH_TOKENS` tokens."""
        portions = []
        for inputs, outputs, mask in zip(self.inputs, self.outputs, self.masks, strict=True):
            size = max(BATCH_TOKENS // inputs.shape[1], 1)
            for start in range(0, len(inputs), size):
                part = slice(start, start + size)
                portions.append((inputs[part], outputs[part], None if mask is None else mask[part]))
        return portions


def refit(
    site: MixerSite, reduction: MixerReduction, recording: Recording, steps: int, fast_ops: bool = True
) -> MixerReduction:
    """The reduction with the values of state parameters refitted by `steps` steps of Adam on the recorded outputs.

    The error is measured before and after over the whole recording; a refit that does not lower it is dropped. All of
    it is in float32 whatever the mixer's dtype: Adam's second moments vanish in float16.

    Args:
        site: the mixer before the cut; it is left alone. What is its `frozen_read_out` keeps its value.
        reduction: its parameters after the cut.
        recording: inputs and outputs of the mixer before the cut.
        steps: optimizer steps, >= 1.
        fast_ops: let a stock mixer run by this package's ops meanwhile, where that is exact.

    Raises:
        ValueError: if a quantised layer in the mixer cannot be copied.
        ReductionError: if the reduced mixer puts out NaN or infinite values.
    """
    try:
        mixer = copy.deepcopy(site.mixer).eval().float().requires_grad_(False)
    except RuntimeError as error:
        raise ValueError(
            f"{site.name} cannot be copied to refit it ({error}). Give refit_steps=0, or load the model unquantised."
        ) from error
    reduced = MixerSite(site.name, mixer, site.adapter)
    values = {name: change.value.clone() for name, change in reduction.changes.items()}
    replace_parameters([reduced], {site.name: values})
    frozen = site.frozen_read_out
    read_out = None if frozen else site.adapter.read_out
    rows = {name: part for name, part in site.adapter.refitted(mixer).items() if name != frozen}
    fitted = {name: mixer.get_parameter(name).requires_grad_() for name in rows}
    portions = recording.batches()
    with torch.enable_grad(), by_fast_ops(mixer, fast_ops):
        before = _error(mixer, portions)
        if not before.isfinite():
            raise ReductionError("the reduced layer puts out NaN or infinite values on the calibration data")
        solve_read_out(mixer, read_out, portions)
        _descend(mixer, fitted, rows, portions, steps)
        solve_read_out(mixer, read_out, portions)
        after = _error(mixer, portions)
    if not after < before:
        return reduction
    changes = dict(reduction.changes)
    if read_out is not None:
        name = f"{read_out}.weight"
        changes[name] = replace(changes[name], value=mixer.get_parameter(name).detach().to(changes[name].value))
    for name, parameter in fitted.items():
        value = changes[name].value.clone()
        value[rows[name]] = parameter.detach()[rows[name]].to(value)
        changes[name] = replace(changes[name], value=value)
    return replace(reduction, changes=changes)


@torch.no_grad()
def solve_read_out(mixer: nn.Module, name: str | None, portions: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Change the weight of a mixer's last linear layer, in place, so that it fits the recorded outputs best.

    Ridge regression towards the present weight W: with X the layer's inputs on the T recorded tokens and E what is
    missing in its outputs, W + E^T X (X^T X + r I)^-1, where r is the mean of the diagonal of X^T X times (number of
    inputs) / T, so that few tokens move the weight little.

    Args:
        mixer: takes the recorded inputs (B, L, H).
        name: of the layer, or None to do nothing.
        portions: recorded inputs, outputs (B, L, H) and masks (B, L).
    """
    if name is None:
        return
    layer = mixer.get_submodule(name)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        moments = missed = torch.zeros((), dtype=torch.float64)
        tokens = 0
        for inputs, outputs, mask in portions:
            seen.clear()
            device: Any = layer.weight.device
            found = called(mixer, inputs.to(device).float(), None if mask is None else mask.to(device))
            real = torch.ones_like(inputs[..., 0], dtype=torch.bool) if mask is None else mask
            real = real.flatten().to(device)
            X = seen[0].reshape(len(real), -1)[real].double()
            E = (outputs.to(device).float() - found).flatten(0, 1)[real].double()
            moments, missed, tokens = moments.to(X) + X.T @ X, missed.to(X) + E.T @ X, tokens + len(X)
    finally:
        handle.remove()
    ridge = moments.diagonal().mean() * len(moments) / max(tokens, 1)
    inner = moments + ridge.clamp(min=1e-30) * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    layer.weight += torch.linalg.solve(inner, missed.T).T.to(layer.weight)


def _descend(
    mixer: nn.Module,
    fitted: Mapping[str, Tensor],
    rows: Mapping[str, slice],
    portions: list[tuple[Tensor, Tensor, Tensor | None]],
    steps: int,
) -> None:
    rates = {name: RATE * float(p.detach()[rows[name]].float().square().mean().sqrt()) for name, p in fitted.items()}
    optimizer = torch.optim.Adam([{"params": [p], "lr": rates[name]} for name, p in fitted.items()])
    for step in range(steps):
        optimizer.zero_grad()
        miss, scale = _miss(mixer, *portions[step % len(portions)])
        (miss / scale.clamp(min=1e-30)).backward()
        for (name, parameter), group in zip(fitted.items(), optimizer.param_groups, strict=True):
            assert parameter.grad is not None
            kept = torch.zeros_like(parameter.grad)
            kept[rows[name]] = parameter.grad[rows[name]]
            parameter.grad = kept
            group["lr"] = rates[name] * (1 - step / steps)
        optimizer.step()


def called(mixer: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """A mixer's output (B, L, H) for hidden states (B, L, H) and a mask (B, L), which only some mixers take."""
    return output_of(mixer(inputs) if mask is None else mixer(inputs, attention_mask=mask))


def output_of(returned: Any) -> Tensor:
    """The hidden states (B, L, H) in what a mixer returns, which may be a tuple with a state behind them."""
    return returned[0] if isinstance(returned, tuple) else returned


def _miss(mixer: nn.Module, inputs: Tensor, outputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of squares, over real tokens, of the deviation from the recorded outputs and of these outputs."""
    device = next(mixer.parameters()).device
    inputs, outputs = inputs.to(device).float(), outputs.to(device).float()
    mask = None if mask is None else mask.to(device)
    miss = called(mixer, inputs, mask) - outputs
    if mask is not None:
        miss, outputs = miss * mask[..., None], outputs * mask[..., None]
    return miss.square().sum(), outputs.square().sum()


@torch.no_grad()
def _error(mixer: nn.Module, portions: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """Relative error over all portions together: one with few real tokens weighs little."""
    misses, scales = zip(*(_miss(mixer, *portion) for portion in portions), strict=True)
    return torch.stack(misses).sum() / torch.stack(scales).sum().clamp(min=1e-30)
