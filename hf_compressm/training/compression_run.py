"""One training with `CompreSSMCallback`: its attempts, the cut that may be undone, the ranking's record, its timer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import logging

from ..compatibility import raise_recompile_limit
from ..models.automatic import switch_back, switch_on
from ..surgery import (
    ReductionError,
    apply_plan,
    find_mixers,
    has_tuners,
    history,
    measure_mixers,
    mixer_state,
    needs_calibration,
    original_sizes,
    restore_mixer_state,
    set_history,
    state_sizes,
    with_ties,
)
from ..surgery import record_keys as keys
from ..surgery.policies import check_target
from .calibration import Batches, TrainingData
from .checkpoints.resume import checkpoint_folder, load_callback_state, save_callback_state
from .checkpoints.verification import check_history, exported_state, pending_work, read_exported
from .config import CompressionConfig
from .distributed import (
    decided_by_rank_0,
    find_ddp,
    gather_together,
    plan_together,
    processes,
    rebuild_reducer,
    verify_replicas,
)
from .records import CutLoss, keep_spectra
from .reporting import mean_size, report_attempt, report_undo
from .rollback import Rollback
from .stability import StabilityTracker
from .timing import StepTimer, Stopwatch
from .trainer_log import log_to_trackers, resumed_checkpoint, running_trainer

logger = logging.get_logger(__name__)


class CompressionRun:
    """What one training needs beyond the model, its config and the number of steps; the callback only forwards to it.

    Made when training starts, fresh or resumed, and dropped when it ends.

    Args:
        config: the callback's settings.
        args, state, model, optimizer: of the training.
        train_dataloader: what the Trainer iterates over.
        exported: what the callback exported into the checkpoint, if training is resumed.

    Raises:
        ValueError: a window that holds no step, settings that do not fit the model or the arguments, a checkpoint that
            is inconsistent.
    """

    def __init__(
        self,
        config: CompressionConfig,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        optimizer: Any = None,
        exported: Any = None,
        train_dataloader: Any = None,
    ):
        self.config, self.timer, self.rollback = config, StepTimer(), Rollback(config)
        self.tracker = StabilityTracker(config.stability_threshold) if config.trigger == "stability" else None
        if exported is not None:
            self._resume(args, state, model, optimizer, exported)
        self._attempts = config.attempt_steps(state.max_steps)
        self._check_settings(args, model)
        if args.torch_compile:
            raise_recompile_limit(len(self._attempts))
        self._lent = switch_on(model, config.fast_ops)
        self.data = TrainingData(train_dataloader, config.calibration_batches, args.process_index, processes())
        self.data.follow(model, self._seed(self._attempts[0] if self._attempts else 0))

    def begin_step(self, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Undo a cut that was found to hurt, before the step's first forward pass."""
        # Not in on_evaluate: the checkpoint of that step must hold the model that its metric was measured on.
        if self.rollback.due:
            self.timer.close_segment(state.global_step, mean_size(state_sizes(model)))
            record = self.rollback.undo(state.global_step, model, optimizer)
            _follow(model, optimizer, Stopwatch())
            report_undo(state, record)
        self.timer.begin_step()

    def end_step(self, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Cut, or measure, if an attempt is due after this optimizer step."""
        self.timer.end_step()
        if state.global_step in self._attempts and self._may_cut(model):
            self._attempt(state, model, optimizer)

    def save(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Write into the checkpoint of this step what its other files lack."""
        tensors: dict[str, Any] = {}
        if has_tuners(model):  # the Trainer saves adapters only, and cuts change the weights that these are around
            tensors[keys.MIXERS] = mixer_state(model)
        if self.rollback.snapshot is not None:
            tensors[keys.SNAPSHOT] = vars(self.rollback.snapshot)
        if self.tracker is not None:
            tensors[keys.TRACKER] = self.tracker.state_dict()
        if tensors and state.is_world_process_zero:
            save_callback_state(checkpoint_folder(args, state), tensors)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module, name: str) -> None:
        """Call when training has ended, and the best model is loaded if that was asked for.

        Args:
            name: under which the callback's state is in a checkpoint.
        """
        self.data.leave()
        switch_back(self._lent)
        self.timer.close_segment(state.global_step, mean_size(state_sizes(model)))
        if args.load_best_model_at_end and state.best_model_checkpoint:
            if has_tuners(model):
                self._load_mixers(model, load_callback_state([state.best_model_checkpoint]))
            exported = exported_state(state.best_model_checkpoint, name)
            if exported is not None:  # later cuts are not in that model
                set_history(model, read_exported(exported)[0])
        self._tell_unfinished(model)

    def _tell_unfinished(self, model: nn.Module) -> None:
        pending, records = self.rollback.pending, history(model)
        if pending is not None and records and records[-1]["step"] == pending["step"]:
            metric = self.config.rollback_metric
            found = (
                f"made {metric} worse" if pending["undo"] else f"was not judged, since no {metric} was reported since"
            )
            logger.warning(
                f"The cut at step {pending['step']} {found}, and training ended before it could be undone. The cut "
                "stays. Evaluate more often, or end the window of the cuts earlier."
            )
        if self.config.trigger == "stability" and not records:
            logger.warning(
                "The ranking of Hankel singular values never settled within the window, so nothing was cut. Lower "
                f"stability_threshold ({self.config.stability_threshold}) or widen the window."
            )

    def _load_mixers(self, model: nn.Module, tensors: dict[str, Any] | None, optimizer: Any = None) -> None:
        """Bring back the weights beneath the adapters that a checkpoint of adapters belongs to."""
        if tensors is not None and keys.MIXERS in tensors:
            restore_mixer_state(model, tensors[keys.MIXERS], optimizer)
        elif any(
            not parameter.isfinite().all() for site in find_mixers(model) for parameter in site.mixer.parameters()
        ):
            raise ValueError(
                "the checkpoint holds adapters for other state sizes than the model has, but not the weights that they "
                "belong to, since it was written without this callback. Build the model from the base that they were "
                "saved with (save_base_model)."
            )

    def _resume(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any, exported: Any
    ) -> None:
        """Take history and pending work from the checkpoint, and check the history against the weights."""
        records, judging = read_exported(exported)
        needs_tensors = judging is not None or self.config.trigger == "stability" or has_tuners(model)
        tensors = load_callback_state(_resumed_folders(args, state)) if needs_tensors else None
        if has_tuners(model):
            self._load_mixers(model, tensors, optimizer)
        check_history(records, model)
        if records or history(model):  # of the model: what came after the checkpoint, if it was trained before
            set_history(model, records)
        snapshot, tracker = pending_work(tensors or {}, model, keys.STATE_FILE)
        self.rollback.resume(judging, snapshot)
        if tracker is not None:
            tracker.threshold = self.config.stability_threshold
            self.tracker = tracker

    def _check_settings(self, args: TrainingArguments, model: nn.Module) -> None:
        config, sizes = self.config, state_sizes(model)
        with_ties(model, config.constraints())  # refuses sizes that the model's configs cannot hold
        if not history(model):
            check_target(config.order_policy(), sizes)
        if config.uniform and len(set(sizes)) > 1:
            raise ValueError(f"uniform=True needs layers of one common size; the model has {sizes}")
        if config.min_state_size > min(sizes) and not history(model):
            raise ValueError(f"min_state_size is {config.min_state_size}, but a layer has only {min(sizes)} states")
        if config.rollback and args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "rollback=True judges a cut by the next evaluation, but eval_strategy is 'no'. Set eval_strategy to "
                "'steps' or 'epoch', and eval_on_start=True if the first cut comes before the first evaluation."
            )

    def _may_cut(self, model: nn.Module) -> bool:
        if self.rollback.pending is not None:
            return False
        records = history(model)
        if any(record["event"] == "undo" for record in records):
            return False
        return not (self.config.trigger == "stability" and records)

    def _seed(self, step: int) -> int:
        return self.config.selection_seed * 1_000_003 + step

    def _attempt(self, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        step, config = state.global_step, self.config
        seed = self._seed(step)
        batches, watch = None, Stopwatch()
        if needs_calibration(model):
            with watch("statistics"):
                batches = self.data.batches(seed)
        try:
            if self.tracker is not None and not self._settled(model, batches):
                return
            left = 1 if self.tracker else sum(attempt >= step for attempt in self._attempts)
            plan = plan_together(
                model,
                batches,
                config.refit_steps,
                watch,
                fast_ops=config.fast_ops,
                policy=config.order_policy(),
                constraints=config.constraints(),
                selection=config.selection,
                generator=torch.Generator().manual_seed(seed),
                attempts_left=left,
            )
        except ReductionError as error:
            logger.warning(f"Step {step}: no cut, and training goes on at the present size: {error}")
            return
        if not plan.cuts:
            keep_spectra({layer.name: layer.singular_values for layer in plan.layers})
            report_attempt(state, plan, watch, {}, config.min_change)
            return
        if config.rollback:
            self.rollback.keep(state, model, optimizer)
        self.timer.close_segment(step, mean_size([layer.old_size for layer in plan.layers]))
        with watch("loss"):
            loss = CutLoss(lambda: self.data.batches(seed) if batches is None else batches)
            loss.measure(keys.LOSS_BEFORE, model)
        with watch("surgery"):
            apply_plan(model, optimizer, plan, step)
        _follow(model, optimizer, watch)
        with watch("loss"):
            loss.measure(keys.LOSS_AFTER, model)
        if self.timer.segments:
            loss.values[keys.SPEED_BEFORE] = self.timer.segments[-1].steps_per_second
        report_attempt(state, plan, watch, loss.values, config.min_change)

    def _settled(self, model: nn.Module, batches: Batches | None) -> bool:
        statistics = gather_together(model, batches, fast_ops=self.config.fast_ops)
        return decided_by_rank_0(lambda: self._track(model, statistics))

    def _track(self, model: nn.Module, statistics: dict[str, Any]) -> bool:
        assert self.tracker is not None
        measured = measure_mixers(model, statistics)
        names, spectra = list(measured), [m.spectrum() for m in measured.values()]
        orders = self.config.order_policy().orders(spectra, original_sizes(model), self.config.constraints())
        score = self.tracker.update(measured, dict(zip(names, orders, strict=True)))
        keep_spectra(dict(zip(names, spectra, strict=True)))
        if score is not None:
            log_to_trackers({keys.RANK_STABILITY: score})
        return self.tracker.streak >= self.config.stability_patience


def _follow(model: nn.Module, optimizer: Any, watch: Stopwatch) -> None:
    """Let what trains the model on several processes know of new parameters, and check that all ranks have the same."""
    ddp = find_ddp(running_trainer(), model)
    if ddp is not None:
        with watch("rebuild"):
            rebuild_reducer(ddp)
        with watch("verification"):
            verify_replicas(model, optimizer)


def _resumed_folders(args: TrainingArguments, state: TrainerState) -> list[Any]:
    """Folders in which the checkpoint that was resumed from may lie; the Trainer does not tell which it was."""
    given = [folder for folder in (resumed_checkpoint(), args.resume_from_checkpoint) if isinstance(folder, str)]
    return [*given, Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"]
