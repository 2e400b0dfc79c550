"""Compress a saved model: what `scripts/compress.py` and `hf-compressm compress` call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Task
from ..files import check_output, new_folder, write_json
from ..models import CompreSSMMambaForCausalLM, to_stock
from ..models.automatic import by_fast_ops
from ..models.saved import copy_feature_extractor, is_stock, load_model, load_tokenizer
from ..moved import old_names
from ..reduction import SizeConstraints
from ..report import describe_environment, write_card
from ..report.text_tables import aligned_table
from ..surgery import (
    Policy,
    check_parameters,
    check_value_size,
    compress,
    history,
    state_sizes,
    with_details,
    with_ties,
)
from ..surgery import record_keys as keys
from ..surgery.policies import check_target, describe_policy
from ..surgery.refit import STEPS
from ..surgery.runtime_sizes import check_sizes_for
from .arguments import DataSource
from .data_source import draw_calibration, evaluate, load_data
from .description import describe_base, public, saved_records, task_facts
from .early_checks import check_saved_model, check_source

__getattr__ = old_names(__name__)


@dataclass(frozen=True, kw_only=True)
class CompressionJob:
    """What to compress, how much and where to.

    Attributes:
        model: folder or hub name of a causal language model or sequence classifier.
        output: folder for the result.
        policy, constraints, refit_steps, value_size: as in `compress`; one of policy and value_size must be given.
        data: needed by models with selective layers, and to evaluate.
        device: as torch names it, or "auto" for a GPU if there is one.
        stock: write a plain transformers model; see `to_stock`.
        evaluate: measure the loss on held-out data before and after.
        overwrite: replace a model that `output` already holds.
        fast_ops: let stock mixers run by this package's ops meanwhile; see `compress`.
    """

    model: str
    output: Path
    policy: Policy | None
    constraints: SizeConstraints = SizeConstraints()
    data: DataSource | None = None
    refit_steps: int = STEPS
    device: str = "auto"
    stock: bool = False
    evaluate: bool = False
    overwrite: bool = False
    fast_ops: bool = True
    value_size: int | None = None


@dataclass(frozen=True)
class CompressionResult:
    """What a job did.

    Attributes:
        record: of the cut, as `compress` returns it.
        sizes_before, sizes: state sizes of the model, and of the saved one.
        saved_class: name of its class.
        positions: sequence positions that were calibrated on.
        before, after: loss and metrics on held-out data, empty if not evaluated.
    """

    record: dict[str, Any]
    sizes_before: list[int]
    sizes: list[int]
    saved_class: str
    positions: int
    before: dict[str, float]
    after: dict[str, float]


def compress_saved_model(job: CompressionJob) -> CompressionResult:
    """Load, rank, cut and save: model, config, tokenizer, `compression.json`, `run.json` and a model card.

    The output folder appears when everything in it is complete, and not at all on an error.

    Raises:
        ValueError: on settings that contradict each other, the model or the data, and if there is nothing to cut.
        OSError: if the model or data cannot be found, or the output folder cannot be written or is in use.
    """
    output = _check(job)
    model = _load(job)
    tokenizer = load_tokenizer(job.model)
    task = None if job.data is None else load_data(job.data, model, tokenizer)
    batches = draw_calibration(model, job.data, task)
    before, sizes = _losses(job, model, task), state_sizes(model)
    record = compress(
        model,
        batches,
        policy=job.policy,
        constraints=job.constraints,
        refit_steps=job.refit_steps,
        fast_ops=job.fast_ops,
        value_size=job.value_size,
    )
    if not any(layer["new_size"] < layer["old_size"] for part in _parts(record) for layer in part["layers"]):
        raise ValueError(
            f"nothing to cut: no layer would lose {job.constraints.minimum_change:.0%} of its states, which are "
            f"{state_sizes(model)}. Choose a larger tau, or a smaller target, fraction, minimum or multiple."
        )
    after = _losses(job, model, task)
    records = with_details(history(model), saved_records(job.model))
    if job.stock and not is_stock(model):
        model = _as_stock(model)
    positions = 0 if batches is None else sum(_positions(batch) for batch in batches)
    result = CompressionResult(record, sizes, state_sizes(model), type(model).__name__, positions, before, after)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_feature_extractor(job.model, folder)
        write_json(folder / keys.RECORD_FILE, _content(job, result, records))
        write_json(folder / "run.json", _describe(job, task))
        write_card(folder, name=output.name)
    return result


def _check(job: CompressionJob) -> Path:
    """Find out before the work what cannot be; gives the full path of the output."""
    if job.policy is None and job.value_size is None:
        raise ValueError("there is nothing to do: give a policy or a value_size")
    if job.evaluate and job.data is None:
        raise ValueError("there is nothing to evaluate on: give --data")
    check_source(job.data)
    check_saved_model(job.model, job.policy, job.constraints.minimum)
    return check_output(job.output, job.model, job.overwrite)


def _load(job: CompressionJob) -> Any:
    model = load_model(job.model, job.device)
    check_parameters(model)
    if job.stock and not is_stock(model) and not isinstance(model, CompreSSMMambaForCausalLM):
        # What has no stock class is refused here. A Mamba-2 mixes states when it is cut, which stock ones cannot.
        model = _as_stock(model)
    sizes, constraints = state_sizes(model), with_ties(model, job.constraints)
    constraints.apply(sizes, sizes)
    check_target(job.policy, sizes, constraints.minimum)
    check_sizes_for(model, job.constraints, job.policy)
    if job.value_size is not None:
        check_value_size(model, job.value_size, job.constraints)
    return model


def _content(job: CompressionJob, result: CompressionResult, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What `compression.json` holds. No path of this machine, which would be pushed with it."""
    policy = None if job.policy is None else describe_policy(job.policy)
    return {
        "settings": public(dataclasses.asdict(job) | {"policy": policy}),
        "sizes_before": result.sizes_before,
        "sizes_after": result.sizes,
        "history": records,
        "evaluation": {"before": result.before, "after": result.after} if job.evaluate else None,
    }


def _describe(job: CompressionJob, task: Task | None) -> dict[str, Any]:
    """What `run.json` holds: the model that was cut, on what, and by what."""
    found: dict[str, Any] = {"base": describe_base(job.model)}
    if task is not None and job.data is not None:
        found["task"] = task_facts(task, job.data.options, job.data.data_dir)
    return found | describe_environment()


def summary(result: CompressionResult) -> str:
    """Return tables for a terminal: per layer the sizes before and after and what was lost; and the losses."""
    lines = [_table(part) for part in _parts(result.record)]
    if result.positions:
        lines.append(f"calibrated on {result.positions} positions")
    for name, value in result.before.items():
        lines.append(f"held-out {name.replace('_', ' ')}: {value:.4f} -> {result.after[name]:.4f}")
    if result.record["event"] == "cut" and result.sizes != [layer["new_size"] for layer in result.record["layers"]]:
        lines.append(f"written as {result.saved_class}, every layer padded to {result.sizes[0]} states")
    return "\n".join(lines)


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of each cut in what `compress` returned."""
    return [record, record["values"]] if "values" in record else [record]


def _table(record: dict[str, Any]) -> str:
    layers = record["layers"]
    rows = []
    for layer in layers:
        lost = [f"{kind} {layer[kind]:.4g}" for kind in ("residual", "bound") if layer[kind] is not None]
        rows.append([layer["name"], layer["old_size"], layer["new_size"], ", ".join(lost) or "-"])
    before, after = (sum(layer[size] for layer in layers) for size in ("old_size", "new_size"))
    rows.append(["total", before, after, f"{after / before:.1%} kept"])
    what = "states" if record["event"] == "cut" else "values"
    return aligned_table(["layer", f"{what} before", "after", "lost"], rows)


def _losses(job: CompressionJob, model: Any, task: Task | None) -> dict[str, float]:
    if not job.evaluate or task is None or job.data is None:
        return {}
    with by_fast_ops(model, job.fast_ops):
        return evaluate(model, task, job.data.batch_size)


def _as_stock(model: Any) -> Any:
    try:
        return to_stock(model)
    except TypeError as error:
        raise ValueError(f"{error} Leave --to-stock out.") from error


def _positions(batch: Mapping[str, Any]) -> int:
    values = batch["input_ids"] if "input_ids" in batch else batch["input_values"]
    return values.shape[0] * values.shape[1]
