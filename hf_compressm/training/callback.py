"""The Trainer callback: decides when to cut, and reports. Everything it does can be called by hand; see `compress`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import logging

from ..surgery import (
    ReductionError,
    apply_plan,
    check_parameters,
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
)
from .calibration import Batches, calibration_batches
from .checkpoint import STATE_NAME, ResizeOnLoad, checkpoint_folder, load_callback_state, save_callback_state
from .config import CompressionConfig
from .distributed import (
    decided_by_rank_0,
    find_ddp,
    gather_together,
    plan_together,
    processes,
    raise_recompile_limit,
    rebuild_reducer,
    refuse_unsupported,
    verify_replicas,
)
from .records import CutLoss, keep_spectra
from .reporting import mean_size, report_attempt, report_undo
from .rollback import Rollback
from .stability import StabilityTracker
from .timing import StepTimer, Stopwatch
from .trainer_log import log_to_trackers, resumed_checkpoint, running_trainer
from .verification import check_history, pending_work, read_exported

logger = logging.get_logger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Truncates the states of a state-space model while an unmodified `transformers.Trainer` trains it.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=..., callbacks=[CompreSSMCallback(tau=0.1)])
    ```

    After the optimizer step of each attempt, Hankel singular values are computed for every layer and, where enough
    states can go, parameters, optimizer state and config are replaced by smaller ones. State sizes and the history
    of cuts are in `model.config`, so that every checkpoint has them. Resuming with a model of the original size,
    `load_best_model_at_end` across cuts, and `save_total_limit` work; pass the callback to the Trainer's constructor
    (`add_callback` comes too late to prepare the model for loading).

    Args:
        config: settings; defaults follow arXiv 2510.02823 (tau 0.1, four attempts in the first 10% of training).
        **settings: fields of `CompressionConfig`, as an alternative to `config` or to override it.

    Raises:
        ValueError: settings out of range; when training starts: no compressible layer, a frozen or shared parameter,
            a window that holds no step, a target above the present size, a rollback metric without evaluation.
        TypeError: unknown settings; when training starts: an optimizer whose state cannot be carried.
        NotImplementedError: when training starts with sharded parameters (FSDP, DeepSpeed, tensor parallelism).
        RuntimeError: if ranks differ after a cut.
    """

    def __init__(self, config: CompressionConfig | None = None, **settings: Any):
        known = {field.name for field in dataclasses.fields(CompressionConfig)}
        if unknown := settings.keys() - known:
            raise TypeError(f"unknown settings {sorted(unknown)}; allowed are {sorted(known)}")
        self.config = dataclasses.replace(config or CompressionConfig(), **settings)
        self.timer = StepTimer()
        self._model: nn.Module | None = None
        self._loader: ResizeOnLoad | None = None
        self._attempts: list[int] = []
        self._tracker: StabilityTracker | None = None
        self._rollback = Rollback(self.config)

    # The Trainer saves this with every checkpoint and hands it back in `state.stateful_callbacks`.
    def state(self) -> dict[str, Any]:
        """Arguments, the compression history and the state of a pending rollback, JSON-ready."""
        records = [] if self._model is None else history(self._model)
        return {
            "args": dataclasses.asdict(self.config),
            "attributes": {"saved": {"history": records, "judging": self._rollback.pending}},
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._attach(kwargs["model"], kwargs.get("optimizer"))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ):
        refuse_unsupported(args, model)
        check_parameters(model, optimizer)
        find_ddp(running_trainer(), model)  # what a cut will need is missed now, not then
        self._attach(model, optimizer)
        exported: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # a dict once training runs
        # A checkpoint written without this callback has no entry, and the Trainer's next save would fail without one.
        saved = exported.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self._resume(args, state, model, optimizer, saved)
        self._attempts = self.config.attempt_steps(state.max_steps)
        self._check_settings(args, model)
        if args.torch_compile:
            raise_recompile_limit(len(self._attempts))
        self.timer = StepTimer()
        if self.config.trigger == "stability" and self._tracker is None:
            self._tracker = StabilityTracker(self.config.stability_threshold)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ):
        # Not in on_evaluate: the checkpoint of that step must hold the model that its metric was measured on.
        if self._rollback.due:
            self.timer.close_segment(state.global_step, mean_size(state_sizes(model)))
            record = self._rollback.undo(state.global_step, model, optimizer)
            _follow(model, optimizer, Stopwatch())
            report_undo(state, record)
        self.timer.begin_step()

    # After the optimizer step gradients are gone, and logging, evaluation and saving of this step are still to come:
    # they all see the model at its new size.
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ):
        self.timer.end_step()
        if state.global_step in self._attempts and self._may_cut(model):
            self._attempt(args, state, model, optimizer, kwargs.get("train_dataloader"))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ):
        self._rollback.judge(state.global_step, metrics)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ):
        tensors: dict[str, Any] = {}
        if has_tuners(model):  # the Trainer saves adapters only, and cuts change the weights that these are around
            tensors["mixers"] = mixer_state(model)
        if self._rollback.snapshot is not None:
            tensors["snapshot"] = vars(self._rollback.snapshot)
        if self._tracker is not None:
            tensors["tracker"] = self._tracker.state_dict()
        if tensors and state.is_world_process_zero:
            save_callback_state(checkpoint_folder(args, state), tensors)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # Of a checkpoint, Trainer pushes weights and config, but not the modelling code that the config names.
        config: Any = kwargs["model"].config
        if state.is_world_process_zero and hasattr(config, "save_code"):
            config.save_code(args.output_dir)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ):
        if args.load_best_model_at_end and state.best_model_checkpoint and has_tuners(model):
            self._load_mixers(model, load_callback_state([state.best_model_checkpoint]))
        self.timer.close_segment(state.global_step, mean_size(state_sizes(model)))
        if self.config.trigger == "stability" and not history(model):
            logger.warning(
                "The ranking of Hankel singular values never settled within the window, so nothing was cut. Lower "
                f"stability_threshold ({self.config.stability_threshold}) or widen the window."
            )

    def _attach(self, model: nn.Module, optimizer: Any) -> None:
        if self._loader is None or self._model is not model:
            find_mixers(model)
            if self._loader is not None:
                self._loader.remove()
            self._model, self._loader = model, ResizeOnLoad(model)
        assert self._loader is not None
        self._loader.optimizer = optimizer

    def _load_mixers(self, model: nn.Module, tensors: dict[str, Any] | None, optimizer: Any = None) -> None:
        """Bring back the weights beneath the adapters that a checkpoint of adapters belongs to."""
        if tensors is not None and "mixers" in tensors:
            restore_mixer_state(model, tensors["mixers"], optimizer)
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
        check_history(records, state_sizes(model))
        if records:
            set_history(model, records)
        snapshot, tracker = pending_work(tensors or {}, model, STATE_NAME)
        self._rollback.resume(judging, snapshot)
        if tracker is not None:
            tracker.threshold = self.config.stability_threshold
            self._tracker = tracker

    def _check_settings(self, args: TrainingArguments, model: nn.Module) -> None:
        config, sizes = self.config, state_sizes(model)
        target = config.target_state_size
        if target is not None and not history(model) and target >= mean_size(sizes):
            raise ValueError(
                f"target_state_size is {target:g}, but the model has only {mean_size(sizes):g} states per layer "
                f"({sizes}). Choose a smaller target, or a larger model."
            )
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
        if self._rollback.pending is not None:
            return False
        records = history(model)
        if any(record["event"] == "undo" for record in records):
            return False
        return not (self.config.trigger == "stability" and records)

    def _attempt(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Any,
    ) -> None:
        step, config = state.global_step, self.config
        seed = config.selection_seed * 1_000_003 + step
        batches, watch = None, Stopwatch()
        if needs_calibration(model):
            with watch("statistics"):
                batches = calibration_batches(
                    train_dataloader, config.calibration_batches, seed, args.process_index, processes()
                )
        try:
            if self._tracker is not None and not self._settled(model, batches):
                return
            left = 1 if self._tracker else sum(attempt >= step for attempt in self._attempts)
            plan = plan_together(
                model,
                batches,
                config.refit_steps,
                watch,
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
            self._rollback.keep(state, model, optimizer)
        self.timer.close_segment(step, mean_size([layer.old_size for layer in plan.layers]))
        with watch("loss"):
            loss = CutLoss(batches, train_dataloader, config.calibration_batches, seed, args.process_index)
            loss.measure("compression/loss_before", model)
        with watch("surgery"):
            apply_plan(model, optimizer, plan, step)
        _follow(model, optimizer, watch)
        with watch("loss"):
            loss.measure("compression/loss_after", model)
        if self.timer.segments:
            loss.values["compression/steps_per_second_before"] = self.timer.segments[-1].steps_per_second
        report_attempt(state, plan, watch, loss.values, config.min_change)

    def _settled(self, model: nn.Module, batches: Batches | None) -> bool:
        statistics = gather_together(model, batches)
        return decided_by_rank_0(lambda: self._track(model, statistics))

    def _track(self, model: nn.Module, statistics: dict[str, Any]) -> bool:
        assert self._tracker is not None
        measured = measure_mixers(model, statistics)
        names, spectra = list(measured), [m.spectrum() for m in measured.values()]
        orders = self.config.order_policy().orders(spectra, original_sizes(model), self.config.constraints())
        score = self._tracker.update(measured, dict(zip(names, orders, strict=True)))
        keep_spectra(dict(zip(names, spectra, strict=True)))
        if score is not None:
            log_to_trackers({"compression/rank_stability": score})
        return self._tracker.streak >= self.config.stability_patience


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
