"""Plot time against the number of states."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(path: Path, title: str, panels: list[dict[str, Any]]) -> None:
    """Plot time against state size, one panel each: {"title", "curves": [{"label", "N", "times", "line"}], "log"}.

    `times` are dicts of `spread`, whose percentiles become a band; `line` is drawn dashed, in milliseconds, or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, curve in enumerate(panel["curves"]):
            low, middle, high = ([t[key] for t in curve["times"]] for key in ("p10_ms", "median_ms", "p90_ms"))
            axis.plot(curve["N"], middle, "o-", color=f"C{number}", markersize=3, linewidth=1, label=curve["label"])
            axis.fill_between(curve["N"], low, high, color=f"C{number}", alpha=0.2, linewidth=0)
            if curve["line"] is not None:
                axis.plot(curve["N"], curve["line"], "--", color=f"C{number}", linewidth=0.8)
        axis.set(title=panel["title"], xlabel="states N", ylabel="ms")
        if panel["log"]:
            axis.set(xscale="log", yscale="log")
        else:
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper left")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
