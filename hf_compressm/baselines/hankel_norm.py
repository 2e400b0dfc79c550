"""Hankel nuclear-norm regularisation: the sum of Hankel singular values in the loss, at every step.

Shapes: N states, H inputs, M outputs; any batch dimensions in front. Sources: the rival of arXiv 2510.02823 (table 6)
and arXiv 2510.22951, which cuts after such a training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..layers.lru import LRU
from ..reduction import controllability_gramian, observability_gramian
from ..training.trainer_log import log_to_trackers, running_trainer
from .loss_hook import LossHookCallback

JITTER = 1e-13
"""Added to the unit diagonal of a scaled Gramian, so that Cholesky's method gets through where it is singular."""
SMALLEST = 1e-7
"""Singular values below this share of the largest are rounding noise, as roots of eigenvalues, and get no gradient."""


def hankel_nuclear_norm(poles: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Sum of the Hankel singular values of h_k = diag(poles) h_{k-1} + B u_k, y_k = C h_k, differentiable.

    With the Gramians P and Q and the map T to balanced coordinates, T P T^H = T^-H Q T^-1 = Sigma, the differential is
    d tr(Sigma) = tr(T^H T dP) / 2 + tr(T^-1 T^-H dQ) / 2. No gap between singular values is divided by, so repeated
    ones do no harm. In float64: one Cholesky factor of P and one eigendecomposition of order N.

    Args:
        poles: complex (..., N), |poles| < 1.
        B: complex (..., N, H).
        C: complex (..., M, N).

    Returns:
        float64 (...), >= 0.

    Raises:
        ValueError: if a pole is not inside the unit circle, or an entry is not finite.
    """
    poles, B, C = (tensor.to(torch.complex128) for tensor in (poles, B, C))
    if not float(poles.detach().abs().max()) < 1:
        raise ValueError(f"all poles must lie inside the unit circle; the largest is {float(poles.abs().max()):.17g}")
    return sum_of_singular_values(controllability_gramian(poles, B), observability_gramian(poles, C))


def sum_of_singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """tr((P Q)^(1/2)) of two Gramians, differentiable; see `hankel_nuclear_norm`.

    Args:
        P, Q: complex128 (..., N, N), Hermitian positive semidefinite up to rounding.

    Returns:
        float64 (...), >= 0.
    """
    result: Tensor = _SumOfSingularValues.apply(P, Q)
    return result


class _SumOfSingularValues(torch.autograd.Function):
    """tr((P Q)^(1/2)) of Hermitian positive semidefinite matrices (..., N, N)."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, Q: Tensor) -> Tensor:
        L = _cholesky(P)
        squares, vectors = torch.linalg.eigh(L.mH @ Q @ L)
        values = squares.clamp(min=0).sqrt()
        kept = values > SMALLEST * values[..., -1:]
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
        right = (L @ vectors) * inverse.sqrt()[..., None, :]  # T^-1
        ctx.save_for_backward(right, (Q @ right) * inverse[..., None, :])
        return values.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        right, left = ctx.saved_tensors
        weight = grads[0][..., None, None] / 2
        return weight * (left @ left.mH), weight * (right @ right.mH)


def _cholesky(P: Tensor) -> Tensor:
    """A factor L with L L^H = P up to `JITTER`, in the scale of P's own diagonal.

    By Cholesky's method, or where rounding has made an eigenvalue more negative than the jitter, by the slower `eigh`.
    """
    scale = P.diagonal(dim1=-2, dim2=-1).real.clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1), 0)
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    scaled = P * inverse[..., :, None] * inverse[..., None, :]
    if not torch.view_as_real(scaled).isfinite().all():
        raise ValueError("a Gramian holds NaN or infinite values; the training diverged")
    factor, failed = torch.linalg.cholesky_ex(scaled + JITTER * eye)
    if failed.any():
        values, vectors = torch.linalg.eigh(scaled)
        factor = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return scale[..., :, None] * factor


def layer_systems(layers: list[LRU]) -> tuple[Tensor, Tensor, Tensor]:
    """Poles (K, N), B (K, N, H) and C (K, H, N) of K layers of one size, complex128, all poles above the real axis."""
    parts = {name: torch.stack([getattr(layer, name).double() for layer in layers]) for name in _PARAMETERS}
    poles = torch.exp(torch.complex(-parts["nu_log"].exp(), parts["theta_log"].exp()))
    # y = Re(C h) cannot tell a mode from its conjugate; see `upper_half_plane`.
    sign = torch.where(poles.imag < 0, -1.0, 1.0).to(poles.real)
    poles = torch.complex(poles.real, sign * poles.imag)
    B = parts["gamma_log"].exp()[..., None] * torch.complex(parts["B_re"], sign[..., None] * parts["B_im"])
    return poles, B, torch.complex(parts["C_re"], sign[..., None, :] * parts["C_im"])


_PARAMETERS = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im")


class HankelNormCallback(LossHookCallback):
    """Adds weight * the sum of all Hankel singular values of all `LRU` layers to the loss of every optimizer step.

    ```python
    Trainer(model, args, train_dataset=..., callbacks=[HankelNormCallback(1e-3)]).train()
    compress(model, target=16)  # afterwards
    ```

    The sum itself is logged as `hankel_norm` with the Trainer's other logs.

    Args:
        weight: factor of the sum, > 0.

    Raises:
        ValueError: on a weight that is not positive; when training starts, if the model has no `LRU` layer, since
            selective layers have no Gramian in closed form; and as `LossHookCallback`.
    """

    def __init__(self, weight: float):
        super().__init__()
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of the Hankel norm must be a positive number; got {weight}")
        self.weight = weight

    def prepare(self, model: nn.Module, args: TrainingArguments) -> _Penalty:
        """Find the layers.

        Raises:
            ValueError: if the model has no `LRU` layer.
        """
        layers = [module for module in model.modules() if isinstance(module, LRU)]
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no LRU layer; the Hankel norm of selective layers has no closed form"
            )
        ranks = args.world_size if args.average_tokens_across_devices else 1
        return _Penalty(layers, share=1 / ranks)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (run := self.of_run(state)) is not None:
            run.due = True

    def new_loss(self, model: nn.Module, inputs: dict[str, Any], output: Any, run: _Penalty) -> Tensor:
        """The model's loss plus the penalty, once for each optimizer step, a scalar tensor ()."""
        if not run.due:  # once a step, in the first of the batches that are accumulated
            return output.loss
        run.due = False
        norm = run.norm()
        run.last = norm.detach()
        if inputs.get("num_items_in_batch") is not None:
            factor = run.share
        else:
            trainer: Any = running_trainer()
            factor = float(trainer.current_gradient_accumulation_steps)
        return output.loss + (self.weight * factor * norm).to(output.loss.dtype)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        run = self.of_run(state)
        if run is not None and run.last is not None:
            value, run.last = float(run.last), None
            log_to_trackers(running_trainer(), {"hankel_norm": value})


@dataclass
class _Penalty:
    """One training's penalty.

    Attributes:
        layers: those whose singular values are summed.
        share: what the Trainer multiplies a loss by that is a share of all devices' tokens.
        due: whether the running step has not had it yet.
        last: the sum, since the last log.
    """

    layers: list[LRU]
    share: float
    due: bool = False
    last: Tensor | None = None

    def norm(self) -> Tensor:
        by_shape: dict[Any, list[LRU]] = {}
        for layer in self.layers:
            by_shape.setdefault(layer.B_re.shape, []).append(layer)
        sums = [hankel_nuclear_norm(*layer_systems(layers)).sum() for layers in by_shape.values()]
        return torch.stack(sums).sum()
