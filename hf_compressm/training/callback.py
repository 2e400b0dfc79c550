"""The Trainer callback: it decides when to cut. `compress` does the same by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..surgery import check_parameters, find_mixers, history
from ..surgery import record_keys as keys
from .checkpoints.resume import attach_resizing, detach_resizing, resize_every_load
from .columns import refuse_lost_inputs
from .compression_run import CompressionRun, Training
from .config import CompressionConfig
from .distributed import find_wrapper, refuse_optimizer, refuse_unsupported
from .run_state import PerRun
from .smoothing import refuse_unshifted_labels
from .switching import switch_back_at_the_end
from .timing import StepTimer
from .trainer_log import running_trainer


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Truncates the states of a state-space model while an unmodified `transformers.Trainer` trains it.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=..., callbacks=[CompreSSMCallback(tau=0.1)])
    ```

    After the optimizer step of each attempt, Hankel singular values are computed for every layer and, where enough
    states can go, parameters, optimizer state and config are replaced by smaller ones. State sizes and the history
    of cuts are in `model.config`, or in the config within it that the layers belong to, so that every checkpoint has
    them; without a config the history is in the Trainer's state. Resuming with a model of the original size,
    `load_best_model_at_end` across cuts, and `save_total_limit` work.

    Pass the callback to the Trainer's constructor, or give it the Trainer before adding it:

    ```python
    trainer.add_callback(CompreSSMCallback(tau=0.1, trainer=trainer))
    ```

    A callback without a given Trainer finds it on the call stack, and may serve several trainings, after each other or
    at once: they share nothing but the settings.

    Args:
        config: settings; defaults follow arXiv 2510.02823 (tau 0.1, four attempts in the first 10% of training).
        trainer: the Trainer that the callback will serve, and no other; the attribute `trainer` can be set later.
        **settings: fields of `CompressionConfig`, as an alternative to `config` or to override it.

    Attributes:
        timer: speed of the training that began last, by segments between cuts.

    Raises:
        ValueError: settings out of range; when training starts: no compressible layer, a frozen or shared parameter,
            a window that holds no step, a target above the present size, a rollback metric without evaluation, another
            Trainer than the given one.
        TypeError: unknown settings; when training starts: an optimizer whose state cannot be carried.
        NotImplementedError: when training starts with parameters that are sharded by other means than FSDP2 (FSDP1,
            DeepSpeed, tensor parallelism), or by FSDP2 with transformers' Adafactor.
        RuntimeError: if ranks differ after a cut.
    """

    def __init__(
        self, config: CompressionConfig | None = None, *, trainer: Trainer | None = None, **settings: Any
    ) -> None:
        known = {field.name for field in dataclasses.fields(CompressionConfig)}
        if unknown := settings.keys() - known:
            raise TypeError(f"unknown settings {sorted(unknown)}; allowed are {sorted(known)}")
        self.config = dataclasses.replace(config or CompressionConfig(), **settings)
        self.timer = StepTimer()
        self._runs: PerRun[CompressionRun] = PerRun()
        self._trainer: Trainer | None = None
        if trainer is not None:
            self.trainer = trainer

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer that this callback was given, if any. Setting it prepares the Trainer's model for loading."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        if trainer is not None:
            _prepare(trainer, trainer.model)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_trainer": None}  # a copy of the callback is not one of the Trainer

    # The Trainer saves this with every checkpoint and hands it back in `state.stateful_callbacks`.
    def state(self) -> dict[str, Any]:
        """Arguments, and the compression history and a pending rollback of the Trainer's model, JSON-ready."""
        trainer: Any = self._trainer or running_trainer()
        run = self._runs.of(getattr(trainer, "state", None))
        return keys.exported_entry(
            settings=dataclasses.asdict(self.config),
            history=[] if trainer is None else history(trainer.model),
            judging=None if run is None else run.rollback.pending,
        )

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        _prepare(self._trainer or running_trainer(), kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        trainer, model = self._trainer_of(state), kwargs["model"]
        training = Training(args, state, model, kwargs.get("optimizer"), kwargs.get("train_dataloader"), trainer)
        refuse_unsupported(args, model)
        refuse_optimizer(model, training.optimizer)
        check_parameters(model, training.optimizer)
        find_wrapper(trainer, model)  # fail now, not at the first cut
        refuse_unshifted_labels(trainer, model)
        refuse_lost_inputs(trainer, model)
        attach_resizing(model)
        exported: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # a dict once training runs
        # A checkpoint written without this callback has no entry, and the Trainer's next save would fail without one.
        saved = exported.setdefault(type(self).__name__, self.state())
        resumed = saved if state.global_step > 0 else None
        run = self._runs.begin(state, CompressionRun(self.config, training, resumed))
        self.timer = run.timer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if (run := self._runs.of(state)) is not None:
            run.begin_step(state, kwargs["model"], kwargs.get("optimizer"))

    # After the optimizer step gradients are gone, and logging, evaluation and saving of this step are still to come:
    # they all see the model at its new size.
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if (run := self._runs.of(state)) is not None:
            run.end_step(state, kwargs["model"], kwargs.get("optimizer"))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if (run := self._runs.of(state)) is not None:
            run.rollback.judge(state.global_step, kwargs["metrics"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if (run := self._runs.of(state)) is not None:
            run.save(args, state, kwargs["model"])

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # Of a checkpoint, Trainer pushes weights and config, but not the modelling code that the config names.
        config: Any = getattr(kwargs["model"], "config", None)
        if state.is_world_process_zero and hasattr(config, "save_code"):
            config.save_code(args.output_dir)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        detach_resizing(kwargs["model"])
        if (run := self._runs.end(state)) is not None:
            run.finish(args, state, kwargs["model"], type(self).__name__)

    def _trainer_of(self, state: TrainerState) -> Trainer | None:
        """The Trainer whose training this state belongs to."""
        if self._trainer is None:
            return running_trainer()
        if self._trainer.state is not state:
            raise ValueError(
                "this CompreSSMCallback was given another Trainer than the one that trains. Give each Trainer a "
                "callback of its own, or leave out trainer."
            )
        return self._trainer


def _prepare(trainer: Trainer | None, model: Any) -> None:
    """Let a model, and every later one of the Trainer, take checkpoints of other sizes."""
    if model is not None:  # None before `model_init` is called
        find_mixers(model)
        attach_resizing(model)
    if trainer is not None:
        resize_every_load(trainer)
        switch_back_at_the_end(trainer)
