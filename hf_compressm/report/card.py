"""Write the model card of a run from the run's own files, with metadata that the hub understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from ..models.heads import CLASS_ENDINGS, HEADS
from .environment import hardware_line
from .page import duration, templates
from .record import RunRecord, read_run
from .spectra import spectra_overview
from .speed import speed_change
from .svg import number, stack
from .tables import cuts_table
from .text_tables import markdown_table

CARD_NAME = "README.md"
PLOT_NAME = "singular_values.svg"
HUB_METRICS = ("accuracy", "perplexity")
"""Metrics that the hub knows by the same name."""
OWN_TYPES = ("mimo_ssm", "compressm_gated_deltanet", "compressm_mamba", "compressm_mamba2", "compressm_minimax")
STOCK_FORM = ("compressm_mamba",)
"""Those of them that can always be converted to a model of transformers itself."""


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
    facts, kind = run.facts, run.config.get("model_type")
    before, after = run.sizes_before(), run.sizes_after()
    undone, reference = set(run.undone), full.tested() if full else {}
    bounded = [c for c in run.cuts if c["step"] not in undone and any(x.get("bound") is not None for x in c["layers"])]
    text = (
        templates()
        .get_template("model_card.md.jinja")
        .render(
            card_data="{{ card_data }}",
            run=run,
            name=name,
            task={"hub_dataset": None, "options": {}, **facts["task"]} if "task" in facts else None,
            training=facts.get("training") or {},
            versions=facts.get("versions") or {},
            resumed=facts.get("resumed", False),
            parameters=(facts["parameters_before"], facts["parameters_after"])
            if "parameters_before" in facts
            else None,
            kind=kind,
            head=_head(run),
            own=kind in OWN_TYPES,
            stock=kind in STOCK_FORM and _head(run) == HEADS["causal_lm"].__name__,
            plot=plot,
            sizes=_sizes_table(run) if run.layers() else None,
            before=before,
            after=after,
            results=[(key.replace("_", " "), value, reference.get(key)) for key, value in _results(run)],
            full=full,
            cuts=_cuts_text(run) if run.cuts else None,
            bounded=bool(bounded),
            speed=speed_change(run.speed, before, after),
            hardware=hardware_line(facts["hardware"]) if "hardware" in facts else None,
            number=number,
            duration=duration,
        )
    )
    # The text is finished; jinja must not read it again, and huggingface_hub fills in nothing but the metadata.
    literal = "{% raw %}" + text.replace("{{ card_data }}", "{% endraw %}{{ card_data }}{% raw %}", 1) + "{% endraw %}"
    return ModelCard.from_template(_card_data(run, name, base_model), template_str=literal)


def _sizes_table(run: RunRecord) -> str:
    rows = [(f"`{layer.name}`", layer.sizes[0][1], layer.sizes[-1][1]) for layer in run.layers()]
    return markdown_table(["layer", "before", "after"], rows)


def _cuts_text(run: RunRecord) -> str:
    table = cuts_table(run)
    return markdown_table(table.columns, table.rows)


def _card_data(run: RunRecord, name: str, base_model: str | None) -> ModelCardData:
    task = run.facts.get("task") or {}
    pipeline = _pipeline(run)
    results = []
    if task and pipeline:
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
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["state-space-model", "hf_compressm", *([run.config["model_type"]] if "model_type" in run.config else [])],
        datasets=[task["hub_dataset"]] if task.get("hub_dataset") else None,
        metrics=metrics or None,
        base_model=base_model,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _results(run: RunRecord) -> list[tuple[str, float]]:
    return [(key, float(value)) for key, value in run.tested().items() if isinstance(value, int | float)]


def _kind(run: RunRecord) -> str:
    task = run.facts.get("task") or {}
    return f"{run.config.get('model_type')} on {task.get('name')}"


def _problem(run: RunRecord) -> str | None:
    """Which kind of head the model has; None if neither run nor config says."""
    problem = (run.facts.get("task") or {}).get("problem")
    if problem in HEADS:
        return problem
    names = tuple(str(name) for name in run.config.get("architectures") or [])
    return next((kind for kind, ending in CLASS_ENDINGS.items() if any(n.endswith(ending) for n in names)), None)


def _head(run: RunRecord) -> str | None:
    """Name of the Auto class that loads the model."""
    problem = _problem(run)
    return None if problem is None else HEADS[problem].__name__


def _pipeline(run: RunRecord) -> str | None:
    problem = _problem(run)
    if problem == "causal_lm":
        return "text-generation"
    if problem != "sequence_classification":  # pipelines do not take pairs apart
        return None
    pixels = (run.facts.get("task") or {}).get("input") == "pixels"
    return "image-classification" if pixels else "text-classification"
