"""What `CompreSSMCallback` keeps and does during one training: attempts to cut, rollback, ranking, timer."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
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
    CompressionPlan,
    ReductionError,
    apply_plan,
    find_mixers,
    has_tuners,
    history,
    make_plan,
    mixer_state,
    needs_calibration,
    original_sizes,
    restore_mixer_state,
    set_history,
    state_sizes,
    with_ties,
)
from ..surgery import record_keys as keys
from ..surgery.parameters import is_unloaded
from ..surgery.policies import check_target
from ..surgery.processes import processes
from ..surgery.runtime_sizes import check_sizes_for
from ..surgery.shards import is_sharded
from .calibration import TrainingData
from .checkpoints.contents import (
    checkpoint_folder,
    exported_state,
    load_callback_state,
    read_exported,
    save_callback_state,
    save_missing_config,
    save_record,
)
from .checkpoints.verification import check_history, pending_work
from .config import CompressionConfig
from .distributed import TrainingTeam, settle
from .records import CutLoss, keep_spectra
from .reporting import mean_size, report_attempt, report_undo
from .rollback import Rollback
from .stability import NotSettledError, StabilityTracker
from .timing import StepTimer, Stopwatch
from .trainer_log import log_to_trackers, resumed_checkpoint

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Training:
    """A training that begins, as the Trainer's event tells of it.

    Attributes:
        args, state, model, optimizer: of the training.
        dataloader: what the Trainer iterates over.
        trainer: the Trainer; None if the event was called by hand.
    """

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    optimizer: Any = None
    dataloader: Any = None
    trainer: Any = None


class CompressionRun:
    """One training with the callback, which only forwards its events to here.

    Made when training starts, fresh or resumed, and dropped when it ends.

    Args:
        config: the callback's settings.
        training: the training.
        exported: the callback's entry in the checkpoint, if training is resumed.

    Raises:
        ValueError: a window that holds no step, settings that do not fit the model or the arguments, a checkpoint that
            is inconsistent.
    """

    def __init__(self, config: CompressionConfig, training: Training, exported: Any = None):
        args, model = training.args, training.model
        # Weak: what a training leaves that an error ended must not keep its Trainer alive.
        self._trainer = (lambda: None) if training.trainer is None else weakref.ref(training.trainer)
        self.config, self.rollback = config, Rollback(config)
        self.timer = StepTimer(first_step=training.state.global_step)
        self.tracker = StabilityTracker(config.stability_threshold) if config.trigger == "stability" else None
        if exported is not None:
            self._resume(training, exported)
        self._attempts = config.attempt_steps(training.state.max_steps)
        self._check_settings(args, model)
        if args.torch_compile:
            raise_recompile_limit(len(self._attempts))
        self._lent = switch_on(model, config.fast_ops)
        self.data = TrainingData(training.dataloader, config.calibration_batches, args.process_index, processes())
        self.data.follow(training.trainer, model, self._seed(self._attempts[0] if self._attempts else 0))

    def begin_step(self, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Undo a cut that was found to hurt, before the step's first forward pass."""
        # Not in on_evaluate: the checkpoint of that step must hold the model that its metric was measured on.
        if self.rollback.due:
            self.timer.close_segment(state.global_step, mean_size(state_sizes(model)))
            record = self.rollback.undo(state.global_step, model, optimizer)
            settle(self._trainer(), model, optimizer, Stopwatch())
            report_undo(self._trainer(), state, record)
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
        folder = checkpoint_folder(self._trainer(), args, state)
        if tensors and state.is_world_process_zero:
            save_callback_state(folder, tensors)
        if args.should_save and folder.is_dir():
            self._save_record(folder, model)
            if is_sharded(model):
                save_missing_config(folder, model)

    def _save_record(self, folder: Path, model: nn.Module) -> None:
        if records := history(model):
            save_record(folder, dataclasses.asdict(self.config), records)

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
        if args.should_save and (folder := Path(str(args.output_dir))).is_dir():
            self._save_record(folder, model)  # for the model that is saved there; no event tells when
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
        """Restore the base weights that belong to a checkpoint of PEFT's adapters."""
        if tensors is not None and keys.MIXERS in tensors:
            restore_mixer_state(model, tensors[keys.MIXERS], optimizer)
        elif any(is_unloaded(parameter) for site in find_mixers(model) for parameter in site.mixer.parameters()):
            raise ValueError(
                "the checkpoint holds adapters for other state sizes than the model has, but not the weights that they "
                "belong to, since it was written without this callback. Build the model from the base that they were "
                "saved with (save_base_model)."
            )

    def _resume(self, training: Training, exported: Any) -> None:
        """Take history and pending work from the checkpoint, and check the history against the weights."""
        model = training.model
        records, judging = read_exported(exported)
        needs_tensors = judging is not None or self.config.trigger == "stability" or has_tuners(model)
        tensors = load_callback_state(_resumed_folders(training.args, training.state)) if needs_tensors else None
        if has_tuners(model):
            self._load_mixers(model, tensors, training.optimizer)
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
            check_sizes_for(model, config.constraints(), config.order_policy())
        if config.uniform and len(set(sizes)) > 1:
            raise ValueError(f"uniform=True needs layers of one common size; the model has {sizes}")
        if config.min_state_size > min(sizes) and not history(model):
            raise ValueError(f"min_state_size is {config.min_state_size}, but a layer has only {min(sizes)} states")
        if config.rollback and is_sharded(model):
            raise ValueError(
                "rollback=True keeps a copy of the model, which is not done for parameters that FSDP2 shards. Set "
                "rollback=False, or train with DDP."
            )
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
        return not (self.config.trigger == "stability" and any(record["event"] == "cut" for record in records))

    def _seed(self, step: int) -> int:
        return self.config.selection_seed * 1_000_003 + step

    def _attempt(self, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Measure, and cut if enough states can go."""
        step, config, watch = state.global_step, self.config, Stopwatch()
        team = TrainingTeam(self._trainer(), watch, lambda measured: self._check_settled(model, measured))
        seed = self._seed(step)
        batches = None
        if needs_calibration(model):
            with watch("statistics"):
                batches = self.data.batches(seed)
        try:
            plan = make_plan(
                model,
                settings=config.cut_settings(torch.Generator().manual_seed(seed)),
                calibration=batches,
                attempts_left=1 if self.tracker else sum(attempt >= step for attempt in self._attempts),
                team=team,
            )
        except NotSettledError:
            return
        except ReductionError as error:
            logger.warning(f"Step {step}: no cut, and training goes on at the present size: {error}")
            return
        if not plan.cuts:
            keep_spectra(self._trainer(), {layer.name: layer.singular_values for layer in plan.layers})
            report_attempt(self._trainer(), state, plan, watch, {}, config.min_change)
            return
        loss = CutLoss(self._trainer(), lambda: self.data.batches(seed) if batches is None else batches, team)
        self._cut(state, model, optimizer, plan, team, loss)
        report_attempt(self._trainer(), state, plan, watch, loss.values, config.min_change)

    def _cut(
        self,
        state: TrainerState,
        model: nn.Module,
        optimizer: Any,
        plan: CompressionPlan,
        team: TrainingTeam,
        loss: CutLoss,
    ) -> None:
        """Apply a plan, with a copy of the model before it if it may be undone, and with the loss before and after."""
        watch = team.watch
        if self.config.rollback:
            self.rollback.keep(state, model, optimizer)
        self.timer.close_segment(state.global_step, mean_size([layer.old_size for layer in plan.layers]))
        with watch("loss"):
            loss.measure(keys.LOSS_BEFORE, model)
        with watch("surgery"):
            apply_plan(model, optimizer, plan, state.global_step, team)
        settle(self._trainer(), model, optimizer, watch)
        with watch("loss"):
            loss.measure(keys.LOSS_AFTER, model)
        if self.timer.segments and keys.is_timed(self.timer.segments[-1].steps):
            loss.values[keys.SPEED_BEFORE] = self.timer.segments[-1].steps_per_second

    def _check_settled(self, model: nn.Module, measured: Mapping[str, Any]) -> None:
        """Raise NotSettledError while the stability trigger waits. Rank 0 asks for all."""
        if self.tracker is None:
            return
        names, spectra = list(measured), [m.spectrum() for m in measured.values()]
        orders = self.config.order_policy().orders(spectra, original_sizes(model), self.config.constraints())
        score = self.tracker.update(measured, dict(zip(names, orders, strict=True)))
        keep_spectra(self._trainer(), dict(zip(names, spectra, strict=True)))
        if score is not None:
            log_to_trackers(self._trainer(), {keys.RANK_STABILITY: score})
        if self.tracker.streak < self.config.stability_patience:
            raise NotSettledError


def _resumed_folders(args: TrainingArguments, state: TrainerState) -> list[Any]:
    """Folders in which the checkpoint that was resumed from may lie; the Trainer does not tell which it was."""
    given = [folder for folder in (resumed_checkpoint(), args.resume_from_checkpoint) if isinstance(folder, str)]
    return [*given, Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"]
