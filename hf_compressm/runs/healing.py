"""Heal a cut model: put LoRA around its projections and train that."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, default_data_collator, set_seed

from ..data import Task
from ..models.fast_ops import has_stock_mixers
from ..surgery import find_mixers
from ..surgery.sharded import whole_copy
from ..surgery.shards import is_sharded
from .early_checks import import_peft
from .pretraining import CACHES

if TYPE_CHECKING:
    from .finetuning import FinetuneRun

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "sequence_pair_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "forecasting": None,  # PEFT has no type of it
}
UNCALLED = ("dt_proj", "conv1d")
"""Layers of mixers whose weights transformers uses without calling the layer, so that LoRA around them does nothing."""


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that LoRA goes around.

    These are the projections of the mixers, where PEFT allows it, or if mixers have none all other linear layers but
    the head.

    Raises:
        ValueError: if no layer of the model can be compressed.
    """
    own = type(model).__module__.startswith("hf_compressm.")
    names = {
        name.rpartition(".")[2]
        for site in find_mixers(model)
        for name, module in site.mixer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not names:
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        names -= {"score", "lm_head"}
    return sorted(names - set(UNCALLED) - (set() if own else {"out_proj"}))


def add_lora(model: nn.Module, task: Task, settings: Mapping[str, Any]) -> Any:
    """Put LoRA around a model, of rank 16 with alpha 32 unless told otherwise.

    Args:
        model: the model, which is changed.
        task: what it is trained on.
        settings: fields of peft.LoraConfig.

    Returns:
        The model of peft around it.

    Raises:
        ImportError: without peft.
        ValueError: if a layer is targeted that transformers' own mixers use without calling it: there the saved adapter
            would do nothing.
    """
    peft = import_peft()
    defaults: dict[str, Any] = {"r": 16, "lora_alpha": 32, "task_type": TASK_TYPES[task.problem]}
    suited = default_targets(model)
    defaults |= {} if "target_modules" in settings else {"target_modules": suited}
    defaults |= {"modules_to_save": ["score"]} if task.problem == "forecasting" else {}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(defaults | dict(settings))))
    for site in find_mixers(adapted):
        for name in UNCALLED if has_stock_mixers(site.mixer) else ():
            if hasattr(getattr(site.mixer, name, None), "lora_A"):
                raise ValueError(
                    f"transformers uses the weight of {name} in {site.name} without calling the layer, so LoRA around "
                    f"it would do nothing there. Take {name} out of target_modules; suited are {', '.join(suited)}."
                )
    return adapted


@contextmanager
def loaded_by_each_rank() -> Iterator[None]:
    """A block in which every rank loads the weights of a model: all score it and cut it before FSDP shards it.

    With `fsdp_cpu_ram_efficient_loading` transformers gives them to rank 0 only, and random ones to the others.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def unshard(trainer: Trainer) -> None:
    """If FSDP2 shards a trained model, give the Trainer a whole copy, on every rank: it is scored, merged and saved."""
    trained: Any = trainer.model
    if is_sharded(trained):
        model = trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
        trainer.model = trainer.model_wrapped = whole_copy(model)


def heal(model: nn.Module, task: Task, run: FinetuneRun) -> tuple[Trainer, dict[str, float]]:
    """Train LoRA around a model by a plain Trainer.

    Returns:
        The Trainer, whose model has the adapters, and its training metrics.
    """
    set_seed(run.training.seed)
    trainer = Trainer(
        model=add_lora(model, task, run.lora),
        args=run.training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator or default_data_collator,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
    )
    resumed = run.training.resume_from_checkpoint
    return trainer, trainer.train(resume_from_checkpoint=resumed, ignore_keys_for_eval=CACHES).metrics
