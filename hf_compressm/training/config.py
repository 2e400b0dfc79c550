"""The settings of `CompreSSMCallback`: when and how much to cut. Usable with `transformers.HfArgumentParser`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..models.runtimes import RUNTIMES, check_runtime
from ..reduction import SizeConstraints
from ..surgery import CutSettings, Policy
from ..surgery.policies import choose_policy


@dataclass
class CompressionConfig:
    """Settings of `CompreSSMCallback`. The defaults follow arXiv 2510.02823.

    Lengths of time (`window_start`, `window_end`, `stability_interval`) are shares of the whole training if they
    are at most 1, else optimizer steps.

    Raises:
        ValueError: on a value out of range, or settings that contradict each other.
    """

    policy: Literal["energy", "target", "fraction"] = field(
        default="energy",
        metadata={"help": "energy: cut by tau; target: reach target_state_size; fraction: keep keep_fraction."},
    )
    tau: float = field(
        default=0.1,
        metadata={"help": "Share of a layer's sum of Hankel singular values that may go at each cut, in (0, 1)."},
    )
    target_state_size: float | None = field(
        default=None,
        metadata={"help": "With policy=target: mean number of states per layer at the end, >= 1."},
    )
    keep_fraction: float | None = field(
        default=None,
        metadata={"help": "With policy=fraction: share of every layer's states to keep, in (0, 1)."},
    )
    attempts: int = field(
        default=4,
        metadata={"help": "Number of equidistant attempts to cut within the window, the last at its end."},
    )
    window_start: float = field(default=0.0, metadata={"help": "Start of the window (share of training, or step)."})
    window_end: float = field(default=0.1, metadata={"help": "End of the window (share of training, or step)."})
    cut_steps: list[int] | None = field(
        default=None,
        metadata={"help": "Explicit optimizer steps at which to cut, instead of attempts in a window."},
    )
    trigger: Literal["schedule", "stability"] = field(
        default="schedule",
        metadata={
            "help": "schedule: at fixed steps; stability: once, when the ranking of singular values has settled."
        },
    )
    stability_threshold: float = field(
        default=0.95,
        metadata={"help": "Rank stability between two measurements, in (0, 1], from which a ranking is settled."},
    )
    stability_patience: int = field(
        default=2, metadata={"help": "Number of settled measurements in a row before the cut, >= 1."}
    )
    stability_interval: float = field(
        default=0.01, metadata={"help": "Time between two measurements (share of training, or steps)."}
    )
    min_state_size: int = field(default=1, metadata={"help": "Fewest states that a layer may be left with, >= 1."})
    multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "State sizes are rounded up to a multiple of this, >= 1. Default: what the layers' kernels want, "
            "which is 1 for most and 16 for delta-rule layers."
        },
    )
    sizes_for: str | None = field(
        default=None,
        metadata={
            "help": f"Runtime that is to run the result: {', '.join(RUNTIMES)}. State sizes are those that it takes; a "
            "target is rounded down to one. In place of multiple_of."
        },
    )
    uniform: bool | None = field(
        default=None,
        metadata={"help": "Cut all layers to one common size. Default: only where the model's class needs it."},
    )
    min_change: float = field(
        default=0.05,
        metadata={"help": "Cut a layer only if at least this share of its states goes, in [0, 1)."},
    )
    calibration_batches: int = field(
        default=2,
        metadata={
            "help": "Training batches on which the states of selective layers are ranked at each attempt, >= 1. They "
            "are drawn apart from the training's own."
        },
    )
    refit_steps: int = field(
        default=0,
        metadata={
            "help": "Steps in which each reduced selective layer is refitted to the outputs of the full one, >= 0. "
            "Training itself does the same soon after."
        },
    )
    selection: Literal["largest", "smallest", "random"] = field(
        default="largest",
        metadata={"help": "Which balanced states stay. smallest and random are controls for experiments."},
    )
    selection_seed: int = field(default=0, metadata={"help": "Seed of selection=random."})
    rollback: bool = field(
        default=False,
        metadata={
            "help": "Undo a cut, and stop cutting, if rollback_metric is worse at the first evaluation in a later step "
            "than at the last one before the cut."
        },
    )
    rollback_metric: str = field(default="eval_loss", metadata={"help": "Evaluation metric that rollback watches."})
    rollback_tolerance: float = field(
        default=0.0, metadata={"help": "How much worse the metric may get, in its own units, >= 0."}
    )
    rollback_greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether a higher metric is better. Default: yes unless its name ends in 'loss'."},
    )
    fast_ops: bool = field(
        default=True,
        metadata={
            "help": "Run stock selective mixers by this package's ops while training, where that is exact; "
            "fast_ops=False, or --no_fast_ops, keeps transformers' own."
        },
    )

    def __post_init__(self) -> None:
        if self.policy not in ("energy", "target", "fraction"):
            raise ValueError(f"policy must be energy, target or fraction; got {self.policy!r}")
        if self.policy == "target" and self.target_state_size is None:
            raise ValueError("policy='target' needs target_state_size, the mean number of states per layer at the end")
        if self.policy == "fraction" and self.keep_fraction is None:
            raise ValueError("policy='fraction' needs keep_fraction, the share of the states to keep")
        if self.policy != "target" and self.target_state_size is not None:
            raise ValueError(f"target_state_size is used by policy='target' only; policy is {self.policy!r}")
        if self.policy != "fraction" and self.keep_fraction is not None:
            raise ValueError(f"keep_fraction is used by policy='fraction' only; policy is {self.policy!r}")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau must lie strictly between 0 and 1; got {self.tau}")
        if self.trigger not in ("schedule", "stability"):
            raise ValueError(f"trigger must be schedule or stability; got {self.trigger!r}")
        if self.trigger == "stability" and self.cut_steps is not None:
            raise ValueError("trigger='stability' chooses the step itself; leave cut_steps out")
        if self.cut_steps is not None and (not self.cut_steps or min(self.cut_steps) < 1):
            raise ValueError(f"cut_steps must be optimizer steps >= 1, at least one; got {self.cut_steps}")
        if self.attempts < 1 or self.stability_patience < 1:
            raise ValueError(
                f"attempts and stability_patience must be >= 1; got {self.attempts} and {self.stability_patience}"
            )
        if not 0 <= self.window_start < self.window_end:
            raise ValueError(
                f"the window needs 0 <= window_start < window_end; got {self.window_start} and {self.window_end}"
            )
        if not 0 < self.stability_threshold <= 1 or self.stability_interval <= 0:
            raise ValueError(
                "stability_threshold must lie in (0, 1] and stability_interval be positive; got "
                f"{self.stability_threshold} and {self.stability_interval}"
            )
        if self.selection not in ("largest", "smallest", "random"):
            raise ValueError(f"selection must be largest, smallest or random; got {self.selection!r}")
        if self.calibration_batches < 1 or self.refit_steps < 0:
            raise ValueError(
                "calibration_batches must be >= 1 and refit_steps >= 0; got "
                f"{self.calibration_batches} and {self.refit_steps}"
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number; got {value}")
        if self.rollback_tolerance < 0:
            raise ValueError(f"rollback_tolerance must be >= 0; got {self.rollback_tolerance}")
        self.order_policy()
        self.constraints()

    def order_policy(self) -> Policy:
        """The order policy that these settings describe."""
        tau = self.tau if self.policy == "energy" else None
        chosen = choose_policy(tau, self.target_state_size, self.keep_fraction)
        assert chosen is not None  # it is one of the three, and has its number
        return chosen

    def constraints(self) -> SizeConstraints:
        """The constraints on state sizes that these settings describe."""
        if self.sizes_for is not None:
            check_runtime(self.sizes_for)
        return SizeConstraints(
            self.min_state_size, self.multiple_of, self.uniform, self.min_change, sizes_for=self.sizes_for
        )

    def cut_settings(self, generator: torch.Generator) -> CutSettings:
        """What `make_plan` needs of these settings; the CPU generator is for selection="random"."""
        return CutSettings(
            self.order_policy(), self.constraints(), self.selection, generator, self.refit_steps, self.fast_ops
        )

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher `rollback_metric` is better."""
        if self.rollback_greater_is_better is not None:
            return self.rollback_greater_is_better
        return not self.rollback_metric.endswith("loss")

    def window(self, max_steps: int) -> tuple[int, int]:
        """First step that is not yet in the window, and the last that is, in optimizer steps."""
        return _as_steps(self.window_start, max_steps), _as_steps(self.window_end, max_steps)

    def attempt_steps(self, max_steps: int) -> list[int]:
        """Optimizer steps after which a cut, or with trigger='stability' a measurement, is due.

        Args:
            max_steps: total number of optimizer steps of the training, >= 1.

        Raises:
            ValueError: if max_steps is unknown (< 1), or no step falls into the window.
        """
        if max_steps < 1:
            raise ValueError(
                "the number of training steps is unknown, so the window of the cuts is too. Set max_steps in the "
                "TrainingArguments, or give cut_steps."
            )
        if self.cut_steps is not None:
            if max(self.cut_steps) > max_steps:
                raise ValueError(f"cut_steps {self.cut_steps} reach beyond the last training step, {max_steps}")
            return sorted(set(self.cut_steps))
        start, end = self.window(max_steps)
        if start >= min(end, max_steps):
            raise ValueError(
                f"the window from {self.window_start} to {self.window_end} of {max_steps} training steps holds no "
                "step. Widen window_end, train longer, or give cut_steps."
            )
        if self.trigger == "stability":
            interval = max(_as_steps(self.stability_interval, max_steps), 1)
            return list(range(start + interval, end + 1, interval))
        count = min(self.attempts, end - start)
        return [start + math.ceil((end - start) * k / count) for k in range(1, count + 1)]


def _as_steps(time: float, max_steps: int) -> int:
    return math.floor(time * max_steps + 1e-9) if time <= 1 else int(time)
