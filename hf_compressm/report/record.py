"""Read what a run's folder says about the run, for its report and its card. Reads JSON only; changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..surgery import merged
from ..surgery import record_keys as keys
from .svg import number

SOURCES = f"trainer_state.json, compression.json, checkpoint-*/trainer_state.json, a config.json with a {keys.HISTORY}"

TIMINGS = ("_runtime", "_per_second", "_preparation_time")
"""Endings of what an evaluation reports about itself."""

_WITHIN = ("text_config", "decoder", "generator")
"""Names under which a composite config holds that of its language model."""


@dataclass(frozen=True)
class Spectrum:
    """Hankel singular values of one layer at one step.

    Attributes:
        step: optimizer step.
        states: number of states of the layer.
        total: sum of all its singular values.
        ranks, values: some of the values, descending, and their ranks, counted from 1.
        kept: number of states that the cut at this step kept; None if there was no cut.
        moment: when it was measured, in words.
    """

    step: int
    states: int
    total: float
    ranks: list[int]
    values: list[float]
    kept: int | None = None
    moment: str = ""


@dataclass(frozen=True)
class Layer:
    """One layer over the run: its name, its sizes as (step, states), and its spectra, oldest first."""

    name: str
    sizes: list[tuple[int, int]]
    spectra: list[Spectrum]


@dataclass
class RunRecord:
    """A run as its folder describes it. What was not recorded is None or empty.

    Attributes:
        name: of the folder.
        log: entries of the Trainer's log, each with its step.
        events: the compression history, records of cuts and undone cuts.
        config: the model's config.
        facts: run.json, what was run on what: task, training arguments, base, versions, hardware.
        settings: of the compression.
        speed: segments between cuts, as `SpeedSegment`.
        metrics: final training and test metrics.
        step, max_steps: optimizer steps done and planned.
        logging_steps: optimizer steps between two entries of the training loss in the log; None if unknown.
        finished: whether training came to its end.
        base: the model that this one was cut from after training: `name`, and whether it is `on_hub`; None if none.
        cut_sizes: state sizes before and after that cut.
        scores: loss and metrics on held-out data by moment: "before" and "after" a cut; or "before", "cut", "healed".
        adapter: whether the folder holds an adapter of PEFT, with its base beside it.
    """

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    max_steps: int | None = None
    logging_steps: float | None = None
    finished: bool = False
    base: dict[str, Any] | None = None
    cut_sizes: tuple[list[int], list[int]] | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    adapter: bool = False

    @property
    def trained(self) -> bool:
        """Whether the folder has a log of training."""
        return self.step > 0

    @property
    def cut_after_training(self) -> bool:
        """Whether the model was cut from one that had been trained before."""
        return self.base is not None and self.cut_sizes is not None

    @property
    def cuts(self) -> list[dict[str, Any]]:
        """Records of the cuts, including those that were undone."""
        return [event for event in self.events if event["event"] == "cut"]

    @property
    def undone(self) -> dict[int, dict[str, Any]]:
        """Step of each undone cut -> the record of how it was undone."""
        return {event["cut_step"]: event for event in self.events if event["event"] == "undo"}

    @property
    def end(self) -> int:
        """The last step that is known of: of the training, of a cut, or of an entry of the log."""
        steps = [event["step"] or 0 for event in self.events]
        return max([self.step, *steps, *(entry["step"] for entry in self.log)])

    def place(self, event: Mapping[str, Any]) -> int:
        """Return the step of a cut; for one without a step, the beginning of training that followed, or the end."""
        step = event["step"]
        return step if step is not None else (0 if self.cut_after_training and self.trained else self.end)

    def moment(self, cut: Mapping[str, Any]) -> str:
        """Say when a cut was made: its step, or what is known where it has none."""
        if cut["step"] is not None:
            return f"at step {number(cut['step'])}"
        if not self.cut_after_training:
            return "outside training"
        return "before step 1" if self.trained else "after training"

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) where the log has a finite number under this key; the last value of each step."""
        found = {entry["step"]: entry[key] for entry in self.log if isinstance(entry.get(key), int | float)}
        return [(step, float(value)) for step, value in sorted(found.items()) if abs(value) < float("inf")]

    def evaluations(self) -> list[str]:
        """Return the names of the evaluations' metrics, the loss first."""
        names = {key for entry in self.log for key in entry if key.startswith("eval_") and not key.endswith(TIMINGS)}
        return sorted(names, key=lambda name: (name != "eval_loss", name))

    def tested(self) -> dict[str, float]:
        """Return the metrics on the test split, without the prefix `test_`."""
        return {
            key.removeprefix("test_"): value
            for key, value in self.metrics.items()
            if key.startswith("test_") and not key.endswith(TIMINGS)
        }

    def layers(self) -> list[Layer]:
        """Return every layer with its sizes and spectra, in model order."""
        names, first, measured = self._layer_names(), self._first_sizes(), list(self._measurements())
        sizes = {name: [(0, states)] for name, states in zip(names, first, strict=True)}
        spectra: dict[str, dict[tuple[int, int], Spectrum]] = {name: {} for name in names}
        for step, order, entry, kept, moment in measured:
            if entry["name"] in spectra:
                spectra[entry["name"]][step, order] = _spectrum(step, entry, kept, moment)
        for event in self.events:
            for layer in event["layers"]:
                sizes[layer["name"]].append((self.place(event), layer["new_size"]))
        return [Layer(name, sizes[name], [spectra[name][step] for step in sorted(spectra[name])]) for name in names]

    def sizes_before(self) -> list[int]:
        """Return the state sizes at the start of training; empty if unknown."""
        return [layer.sizes[0][1] for layer in self.layers()]

    def sizes_after(self) -> list[int]:
        """Return the state sizes at the last recorded step; empty if unknown."""
        return [layer.sizes[-1][1] for layer in self.layers()]

    def around(self, step: int, key: str) -> tuple[float | None, float | None]:
        """Return the last value of a series before a cut, and the first value from the cut's step on.

        An evaluation in the step of a cut comes after the cut. A value is None if another cut lies between it and this
        one, since it would then show the effect of both.
        """
        others = [cut["step"] or 0 for cut in self.cuts]
        earliest = max((other for other in others if other < step), default=0)
        latest = min((other for other in others if other > step), default=float("inf"))
        values = self.series(key)
        before = [value for at, value in values if earliest <= at < step]
        after = [value for at, value in values if step <= at < latest]
        return (before[-1] if before else None), (after[0] if after else None)

    def at(self, step: int, key: str) -> float | None:
        """Return the value of a series at a step; None if there is none."""
        return dict(self.series(key)).get(step)

    def _measurements(self) -> Iterator[tuple[int, int, Mapping[str, Any], int | None, str]]:
        """Step, order at it, layer, kept states and moment of each; a cut comes in place of the log's."""
        for entry in self.log:
            for layer in entry.get(keys.SPECTRA) or []:
                yield entry["step"], 0, layer, None, f"at step {number(entry['step'])}"
        stepless = [cut for cut in self.cuts if cut["step"] is None]
        for cut in self.cuts:
            order = next((place for place, other in enumerate(stepless, 1) if other is cut), 0)
            which = f", cut {order} of {len(stepless)}" if order and len(stepless) > 1 else ""
            for layer in cut["layers"]:
                if layer.get("singular_values"):  # configs keep none, and a cut by another score measures none
                    yield self.place(cut), order, layer, layer["new_size"], self.moment(cut) + which

    def _layer_names(self) -> list[str]:
        if self.events:
            return list(dict.fromkeys(layer["name"] for event in self.events for layer in event["layers"]))
        measured = next((entry[keys.SPECTRA] for entry in self.log if keys.SPECTRA in entry), None)
        if measured:
            return [layer["name"] for layer in measured]
        return [f"layer {index}" for index in range(len(config_sizes(self.config)))]

    def _first_sizes(self) -> list[int]:
        if self.events:
            layers = [layer for event in reversed(self.events) for layer in event["layers"]]
            first = {layer["name"]: layer["old_size"] for layer in layers}
            return [first[name] for name in self._layer_names()]
        measured = next((entry[keys.SPECTRA] for entry in self.log if keys.SPECTRA in entry), None)
        return [layer["states"] for layer in measured] if measured else config_sizes(self.config)


def read_run(folder: str | Path) -> RunRecord:
    """Read the folder of a run that `scripts/pretrain.py` or any Trainer wrote, finished or not.

    If training has not ended, the newest checkpoint is read instead of the folder itself.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no run; the message says what was looked for.
        ValueError: on a file that is not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    newest = max(folder.glob("checkpoint-*/trainer_state.json"), key=_checkpoint_step, default=None)
    final, latest = _read(folder / "trainer_state.json"), _read(newest) if newest else {}
    at_end = final.get("global_step", -1) >= latest.get("global_step", 0)
    state = final if at_end else latest
    config = _read(folder / "config.json") or _read(folder / "base" / "config.json")
    config = config if at_end or newest is None else _read(newest.parent / "config.json")
    record = _read(folder / "compression.json") if at_end or not latest else {}
    exported, events = _exported(state, keys.saved_in).get("history") or [], _config_events(config)
    recorded = record.get("history") or _read(folder / "finetuning.json").get("history")
    events = recorded or (exported if len(exported) >= len(events) else events)
    events = [event for event in events if event["event"] in ("cut", "undo")]  # the others are not about states
    if not (state or record or events):
        raise FileNotFoundError(f"{folder} holds no run: there is none of {SOURCES}")
    results = [_read(folder / f"{split}_results.json") for split in ("train", "test")] if at_end or not latest else []
    after = _after_training(folder, facts := _read(folder / "run.json"), record)
    step, most = state.get("global_step", 0), state.get("max_steps")
    log = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict) and "step" in entry]
    return RunRecord(
        name=folder.resolve().name,
        log=log,
        events=events,
        config=config,
        facts=facts,
        settings=record.get("settings") or _exported(state, keys.settings_of),
        speed=record.get("speed") or _logged_speed(log, events),
        metrics=after.pop("metrics") | {key: value for result in results for key, value in result.items()},
        step=step,
        max_steps=most,
        logging_steps=state.get("logging_steps"),
        finished=bool(state) and (step >= (most or 0) or bool(results and results[0])),
        adapter=(folder / "adapter_config.json").is_file(),
        **after,
    )


def _after_training(folder: Path, facts: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a record about a cut of a trained model, from what compressing and fine-tuning write."""
    healed = _read(folder / "finetuning.json")
    scores = healed.get("scores") or record.get("evaluation") or {}
    source = healed or (record if "evaluation" in record else {})
    base = facts.get("base")
    if base is None and (name := (source.get("settings") or {}).get("model")):
        base = {"name": Path(name).name, "on_hub": False}  # earlier versions did not say whether it is on the hub
    sizes = (source["sizes_before"], source["sizes_after"]) if source and source["sizes_before"] else None
    if sizes is not None and sizes[0] == sizes[1]:
        sizes = None
    return {"base": base, "cut_sizes": sizes, "scores": scores, "metrics": dict(healed.get("metrics") or {})}


def _checkpoint_step(path: Path) -> int:
    suffix = path.parent.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it may have been cut off while it was written") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def _spectrum(step: int, entry: Mapping[str, Any], kept: int | None, moment: str) -> Spectrum:
    values = entry["singular_values"]
    ranks = entry.get("ranks") or list(range(1, len(values) + 1))
    total = entry.get("sum", sum(values))
    return Spectrum(step, entry.get("states", len(values)), total, ranks, values, kept, moment)


def _config_events(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The compression history in a config; in a composite one, the histories in the configs within it, joined."""
    if own := config.get(keys.HISTORY):
        return list(own)
    parts = {name: _config_events(part) for name, part in config.items() if isinstance(part, dict)}
    parts = {name: events for name, events in parts.items() if events}
    if len(parts) < 2:
        return next(iter(parts.values()), [])
    for name, events in parts.items():
        parts[name] = [
            {**event, "layers": [{**layer, "name": f"{name}.{layer['name']}"} for layer in event["layers"]]}
            for event in events
        ]
    return merged(list(parts.values()))


def config_sizes(config: Mapping[str, Any]) -> list[int]:
    """Return the states of each layer that a config names; empty if it names none."""
    config = next((part for name in _WITHIN if isinstance(part := config.get(name), dict)), config)
    sizes = config.get("state_sizes")
    if isinstance(sizes, list):
        return sizes
    size = sizes if isinstance(sizes, int) else config.get("state_size")
    return [size] * config.get("num_hidden_layers", 1) if isinstance(size, int) else []


def _exported(state: Mapping[str, Any], read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A part of what the compression callback left in the Trainer's state; empty if there is nothing."""
    try:
        return read((state.get("stateful_callbacks") or {})[keys.CALLBACK]) or {}
    except (LookupError, TypeError):
        return {}


def _logged_speed(log: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments of a run that has not ended, from what was logged at its cuts; the last segment is still open."""
    first, segments = 0, []
    logged = {entry["step"]: entry[keys.SPEED_BEFORE] for entry in log if keys.SPEED_BEFORE in entry}
    for event in events:
        step, old = event["step"] or 0, [layer["old_size"] for layer in event["layers"]]
        if step in logged:
            segment = {"first_step": first, "mean_state_size": sum(old) / len(old), "steps": step - first}
            segments.append({**segment, "steps_per_second": logged[step]})
        first = step
    return segments
