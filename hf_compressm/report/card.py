"""Write the model card of a run from the run's own files, with metadata that the hub understands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from .environment import hardware_line
from .loading import loading, problem_of
from .page import duration, templates
from .record import RunRecord, read_run
from .spectra import spectra_overview
from .speed import speed_change
from .svg import number, stack
from .tables import cuts_table, scores_table
from .text_tables import markdown_table

CARD_NAME = "README.md"
PLOT_NAME = "singular_values.svg"
HUB_METRICS = ("accuracy", "perplexity")
"""Metrics that the hub knows by the same name."""


def write_card(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    name: str | None = None,
    full_size: str | Path | None = None,
    base_model: str | None = None,
) -> Path:
    """Write the card of a run, `README.md`, and beside it the plot that it shows.

    Args:
        folder: what the run wrote; see `read_run`.
        output: folder for the card. Default: the run's own, so that it is pushed with the model.
        name: of the model, as on the hub. Default: the folder's.
        full_size: folder of the same run without compression, to compare with.
        base_model: the model that this one was made from, as on the hub.

    Returns:
        The card's file.

    Raises:
        FileNotFoundError: if a folder holds no run; the message says what was looked for.
        ValueError: on a file of a run that is not what it should be, or a full-size run of another task or model.
    """
    run = read_run(folder)
    full = None if full_size is None else read_run(full_size)
    target = Path(folder if output is None else output)
    plot = spectra_overview(run)
    card = render_card(run, name=name, full=full, base_model=base_model, plot=PLOT_NAME if plot else None)
    target.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        (target / PLOT_NAME).write_text(stack([plot]), encoding="utf-8")
    (target / CARD_NAME).write_text(str(card), encoding="utf-8")
    return target / CARD_NAME


def keep_card(trainer: Trainer) -> None:
    """Make a Trainer write this card where it would write its own, in `create_model_card` and `push_to_hub`.

    The Trainer saves its log first, because the card is made from files.
    """

    def create_model_card(*args: Any, model_name: str | None = None, tags: Any = None, **kwargs: Any) -> None:
        if trainer.is_world_process_zero():
            trainer.save_state()
            write_card(
                str(trainer.args.output_dir),
                name=trainer.args.hub_model_id or model_name,
                base_model=kwargs.get("finetuned_from"),
            )

    trainer.create_model_card = create_model_card  # type: ignore[method-assign]


def render_card(
    run: RunRecord,
    *,
    name: str | None = None,
    full: RunRecord | None = None,
    base_model: str | None = None,
    plot: str | None = None,
) -> ModelCard:
    """Make the card of a run.

    Args:
        run: the run.
        name, base_model: as for `write_card`.
        full: the same run without compression, to compare with.
        plot: name of the plot's file; None for a card without a plot.

    Raises:
        ValueError: on a full-size run of another task or model.
    """
    if full is not None and _kind(full) != _kind(run):
        raise ValueError(f"the full-size run is of {_kind(full)}, this one of {_kind(run)}; they do not compare")
    name = name or run.name
    after, measured = run.sizes_after(), full.tested() if full else {}
    results = [(key.replace("_", " "), value, measured.get(key)) for key, value in _results(run)]
    text = (
        templates()
        .get_template("model_card.md.jinja")
        .render(
            card_data="{{ card_data }}",
            run=run,
            full=full,
            plot=plot,
            kind=run.config.get("model_type"),
            before=run.sizes_before(),
            after=after,
            task=_task(run) or None,
            sizes=_sizes_table(run) if run.layers() else None,
            results=results if run.tested() else [],
            scores=_scores_table(run.scores) if run.scores else None,
            **_about_cuts(run),
            **_about_training(run),
            **loading(run.config, name, after, _task(run).get("problem"), run.adapter),
            number=number,
            duration=duration,
        )
    )
    # The text is finished; jinja must not read it again, and huggingface_hub fills in nothing but the metadata.
    text = re.sub(r"\n{3,}", "\n\n", text)
    literal = "{% raw %}" + text.replace("{{ card_data }}", "{% endraw %}{{ card_data }}{% raw %}", 1) + "{% endraw %}"
    return ModelCard.from_template(_card_data(run, name, base_model), template_str=literal)


def _about_cuts(run: RunRecord) -> dict[str, Any]:
    """What the template is told about the cuts."""
    undone, table = set(run.undone), cuts_table(run) if run.cuts else None
    lasting = [cut for cut in run.cuts if cut["step"] not in undone]
    return {
        "cuts": markdown_table(table.columns, table.rows) if table else None,
        "losses": table is not None and any("before" in column for column in table.columns),
        "bounded": any(layer.get("bound") is not None for cut in lasting for layer in cut["layers"]),
        "ranked": bool(lasting) and all(map(_is_ranked, lasting)),
        "in_training": all(cut["step"] is not None for cut in lasting),
    }


def _about_training(run: RunRecord) -> dict[str, Any]:
    """What the template is told about the training, or whatever else made the model."""
    facts = run.facts
    counts = ("parameters_before", "parameters_after")
    return {
        "training": facts.get("training") or {},
        "versions": facts.get("versions") or {},
        "resumed": facts.get("resumed", False),
        "parameters": [facts[count] for count in counts] if counts[0] in facts else None,
        "made": run.trained or "hardware" in facts or "versions" in facts,
        "speed": speed_change(run.speed, run.sizes_before(), run.sizes_after()),
        "hardware": hardware_line(facts["hardware"]) if "hardware" in facts else None,
    }


def _sizes_table(run: RunRecord) -> str:
    before = run.cut_sizes[0] if run.cut_after_training and run.cut_sizes else run.sizes_before()
    rows = [(f"`{layer.name}`", size, layer.sizes[-1][1]) for layer, size in zip(run.layers(), before, strict=True)]
    return markdown_table(["layer", "before", "after"], rows)


def _scores_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    table = scores_table(scores)
    return markdown_table(["", *table.columns[1:]], table.rows)


def _is_ranked(cut: Mapping[str, Any]) -> bool:
    """Whether a cut kept the states with the largest singular values: rivals and controls keep others."""
    unmeasured = any(layer.get("singular_values") == [] for layer in cut["layers"])
    return not unmeasured and cut.get("selection", "largest") == "largest" and cut.get("policy") != "score"


def _task(run: RunRecord) -> dict[str, Any]:
    """What the run read, without a data set of the hub where it is not known to be that."""
    task = {"hub_dataset": None, "options": {}, **(run.facts.get("task") or {})}
    if "name" not in task:
        return {}
    # Earlier versions gave the hub's name to files of one's own that its reader had read.
    known = task.get("local") is False or task["hub_dataset"] is None
    return {"local": False, **task, "known": known, "hub_dataset": task["hub_dataset"] if known else None}


def _card_data(run: RunRecord, name: str, base_model: str | None) -> ModelCardData:
    task, pipeline = _task(run), _pipeline(run)
    base = run.base["name"] if run.base and run.base["on_hub"] else None
    results = []
    if task and task["known"] and not task["local"] and pipeline:
        results = [
            EvalResult(
                task_type=pipeline,
                dataset_type=task.get("hub_dataset") or task["name"],
                dataset_name=task["name"],
                dataset_split="test",
                metric_type=key,
                metric_name=key.replace("_", " "),
                metric_value=round(value, 6),
            )
            for key, value in _results(run)
        ]
    metrics = [key for key, _ in _results(run) if key in HUB_METRICS]
    return ModelCardData(
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag=pipeline,
        tags=["state-space-model", "hf_compressm", *([run.config["model_type"]] if "model_type" in run.config else [])],
        datasets=[task["hub_dataset"]] if task.get("hub_dataset") else None,
        metrics=metrics or None,
        base_model=base_model or base,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _results(run: RunRecord) -> list[tuple[str, float]]:
    tested = run.tested() or (list(run.scores.values())[-1] if run.scores else {})
    return [(key, float(value)) for key, value in tested.items() if isinstance(value, int | float)]


def _kind(run: RunRecord) -> str:
    task = run.facts.get("task") or {}
    return f"{run.config.get('model_type')} on {task.get('name')}"


def _pipeline(run: RunRecord) -> str | None:
    problem = problem_of(run.config, _task(run).get("problem"))
    if problem == "causal_lm":
        return "text-generation"
    if problem != "sequence_classification":  # pipelines do not take pairs apart
        return None
    pixels = (run.facts.get("task") or {}).get("input") == "pixels"
    return "image-classification" if pixels else "text-classification"
