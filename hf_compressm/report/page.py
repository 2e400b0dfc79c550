"""Write the report of a run: one HTML page with charts, for any screen, without scripts, that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..surgery import record_keys as keys
from .environment import hardware_line
from .figures import metric_figure, sizes_figure, speed_figure, stability_figure
from .record import RunRecord, read_run
from .spectra import spectrum_figure
from .speed import speed_change, timed
from .svg import THEME, number
from .tables import Figure, cuts_table, layers_table, scores_table

REPORT_NAME = "report.html"
WIDE = 26
"""Letters of a tile's value beyond which it is two columns wide."""
MOST_TILES = 7
"""Columns of the tiles at most."""


def templates() -> Environment:
    """Return the package's templates. Values that are put into HTML are escaped."""
    return Environment(
        loader=PackageLoader("hf_compressm.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        folder: what the run wrote; see `read_run`.
        output: the file. Default: `report.html` in the folder.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: if the folder holds no run; the message says what was looked for.
        ValueError: on a file of the run that is not what it should be.
    """
    page = render_report(read_run(folder))
    target = Path(output) if output is not None else Path(folder) / REPORT_NAME
    target.write_text(page, encoding="utf-8")
    return target


def render_report(run: RunRecord) -> str:
    """Return the page's HTML."""
    layers = run.layers()
    spectra = [(index, layer, spectrum_figure(layer, index)) for index, layer in enumerate(layers)]
    metrics = [metric_figure(run, name) for name in run.evaluations() or ["eval_loss"]]
    if "eval_loss" not in run.evaluations():
        metrics = [metric_figure(run, "eval_loss"), *metrics] if run.evaluations() else metrics
    style = (Path(__file__).parent / "templates" / "report.css").read_text()
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            run=run,
            style=Markup(THEME + style),
            status=_status(run),
            facts=(facts := _facts(run)),
            tile_columns=_tile_columns([value for _, value in facts]),
            stability_wanted=run.settings.get("trigger") == "stability",
            sizes=_shown(sizes_figure(run)),
            spectra=[(index, layer.name, _shown(figure)) for index, layer, figure in spectra if figure],
            unmeasured=[layer.name for _, layer, figure in spectra if figure is None],
            metrics=[_shown(figure) for figure in metrics if figure],
            speed=_shown(speed_figure(run)),
            wide=WIDE,
            untimed=len(run.speed) - len(timed(run.speed)),
            least_timed=keys.LEAST_TIMED_STEPS,
            cuts=cuts_table(run) if run.cuts else None,
            scores=scores_table(run.scores) if run.scores else None,
            cut_layers=[layers_table(run, cut) for cut in run.cuts],
            stability=_shown(stability_figure(run)),
            settings=_settings(run),
            versions=run.facts.get("versions") or {},
        )
    )


def _shown(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {"svg": Markup(figure.svg), "title": figure.chart.title, "table": figure.table}


def _status(run: RunRecord) -> str:
    of = f" of {number(run.max_steps)}" if run.max_steps else ""
    if run.finished:
        return f"Finished: {number(run.step)}{of} steps."
    if run.step:
        return f"Not finished: this shows the newest checkpoint, step {number(run.step)}{of}."
    if run.cut_after_training and run.base:
        return f"Cut from {run.base['name']} after its training."
    return "No log of the training was found; what is shown comes from the model's config."


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return name and value of the figures at the top of the page. Unknown ones are left out."""
    facts = []
    if before := run.sizes_before():
        after = run.sizes_after()
        cut = f" → {_mean(after)} ({sum(after) / sum(before):.0%}\u00a0kept)" if before != after else ""
        facts.append(("States, mean per layer", _mean(before) + cut))
    if run.cuts:
        undone = f", {len(run.undone)} undone" if run.undone else ""
        facts.append(("Cuts", f"{len(run.cuts)}{undone}"))
    facts += [(f"Test {name.replace('_', ' ')}", number(value, 4)) for name, value in run.tested().items()]
    if change := speed_change(run.speed, before, run.sizes_after()):
        first, last = change
        facts.append(("Steps per second", f"{number(first)} → {number(last)} ({last / first:.2f}×)"))
    if (runtime := run.metrics.get("train_runtime")) is not None:
        since = " since the last resume" if run.facts.get("resumed") else ""
        facts.append((f"Training time{since}", duration(runtime)))
    if "parameters_before" in run.facts:
        numbers = (run.facts["parameters_before"], run.facts["parameters_after"])
        facts.append(("Parameters", " → ".join(f"{value:,}" for value in dict.fromkeys(numbers))))
    if "hardware" in run.facts:
        facts.append(("Hardware", hardware_line(run.facts["hardware"])))
    return facts


def _tile_columns(values: Sequence[str]) -> int:
    """Columns of the tiles on a wide screen, so that the rows are about equally long; long values take two."""
    places = sum(1 + (len(value) > WIDE) for value in values)
    return max(2, math.ceil(places / math.ceil(places / MOST_TILES))) if places else 2


def _settings(run: RunRecord) -> list[tuple[str, str]]:
    training = run.facts.get("training") or {}
    task = run.facts.get("task") or {}
    pairs = {"task": task.get("name"), "model_type": run.config.get("model_type"), **training, **run.settings}
    return [(name, str(value)) for name, value in pairs.items() if value is not None]


def _mean(sizes: list[int]) -> str:
    return number(sum(sizes) / len(sizes))


def duration(seconds: float) -> str:
    """Return seconds, >= 0, in the units that people use: "42.0 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
