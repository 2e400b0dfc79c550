"""Forecast electricity demand: full, compressed and from scratch, beside the seasonal naive forecast and NHITS.

    pip install -c constraints.txt -e ".[forecasting]"
    python scripts/benchmarks/forecasting.py --output outputs/forecasting
    python scripts/benchmarks/forecasting.py --methods naive full compressed scratch --seeds 0

The data are Taylor's (2003): demand of England and Wales in each half hour of twelve weeks, 4032 values in MW, which
pmdarima carries. Every method forecasts the same windows: the next day (48 steps), every 12 steps of the last fifth.
What is learnt is learnt on the first 70%; the 10% between are not used.

- `naive`: the value one week before. Plain indexing, no model.
- `full`: MimoSSM with --states in each layer, no cut.
- `compressed`: the same, cut to a quarter of the states in the first part of training.
- `scratch`: new, with the sizes of each layer that `compressed` ended with.
- `nhits`: neuralforecast's NHITS, made small, for as many steps of as many windows.

What trains reads two days of the change against one week before, and forecasts that change: added to the value one week
before it is a forecast of the demand, with the same error. So all begin where `naive` is.

Errors are of the median, in MW; MASE is over the error of the value one week before within the training part; the
pinball loss is the mean over the quantiles .1, .5 and .9, which `naive` does not have. Mean and standard deviation over
seeds. `results.jsonl` in --output has a line for each run, with the seconds that it took.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from common import machine_line
from transformers import EvalPrediction

from hf_compressm.data import Task, load_task
from hf_compressm.report.text_tables import markdown_table, mean_and_deviation
from hf_compressm.runs.pretraining import build_model, build_trainer, parse_run
from hf_compressm.surgery import state_sizes

CONTEXT, HORIZON, WEEK, STRIDE = 96, 48, 7 * 48, 12
QUANTILES = [0.1, 0.5, 0.9]
OPTIONS = {"kind": "forecasting", "time": "step", "context": CONTEXT, "horizon": HORIZON, "stride": STRIDE,
           "quantiles": QUANTILES, "validation_percent": 10, "test_percent": 20}  # fmt: skip
RUN = {
    "task": "series",
    "model_type": "mimo_ssm",
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "r_min": 0.5, "r_max": 0.99},
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 4e-3,
    "ssm_learning_rate": 2e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "policy": "target",
}
OWN = ("full", "compressed", "scratch")
NAMES = {
    "naive": "seasonal naive (a week before)",
    "nhits": "NHITS (neuralforecast)",
    "full": "full size",
    "compressed": "**compressed while training**",
    "scratch": "from scratch at that size",
}


class Bench:
    """The data, as tasks and as numbers, and the errors of forecasts of the test windows.

    Args:
        demand: (L,), one value for each step.
        options: of the command line.
    """

    def __init__(self, demand: np.ndarray, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.output / "demand.csv"
        self.before, self.demand = demand[:-WEEK], demand[WEEK:]
        self.change = self.demand - self.before
        rows = zip(range(len(self.demand)), self.demand, self.change, strict=True)
        self.file.write_text("step,demand,change\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
        self.options_of_change = OPTIONS | {"files": str(self.file), "target": "change"}
        self.task: Task = load_task("series", **self.options_of_change)
        self.scored = load_task("series", **OPTIONS, files=str(self.file), target="demand", season=WEEK)
        steps, windows = len(self.demand), len(self.task.test)
        self.origins = [steps - HORIZON - STRIDE * place for place in range(windows)][::-1]
        self.train_end = steps - steps * OPTIONS["test_percent"] // 100 - steps * OPTIONS["validation_percent"] // 100

    def windows(self, values: np.ndarray) -> np.ndarray:
        """The test windows (n, P) of values (L,)."""
        return np.stack([values[origin : origin + HORIZON] for origin in self.origins])

    def scores(self, changes: np.ndarray) -> dict[str, float]:
        """Errors of forecast changes (n, Q, P) in MW."""
        extractor = self.scored.feature_extractor
        found = changes + self.windows(self.before)[:, None]
        scaled = [
            (part[..., None] - extractor.target_mean) / extractor.target_std
            for part in (found, self.windows(self.demand))
        ]
        return self.scored.compute_metrics(EvalPrediction(*scaled))


def naive(bench: Bench, seed: int) -> dict:
    """The value one week before: no change."""
    found = bench.scores(np.zeros((len(bench.origins), len(QUANTILES), HORIZON)))
    return {name: found[name] for name in ("mae", "mase")}


def nhits(bench: Bench, seed: int) -> dict:
    """A network that pools its context at several rates, here with layers of 64 features."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import NHITS

    model = NHITS(
        h=HORIZON,
        input_size=CONTEXT,
        max_steps=bench.options.steps,
        windows_batch_size=RUN["per_device_train_batch_size"],
        loss=MQLoss(quantiles=QUANTILES),
        mlp_units=3 * [[64, 64]],
        scaler_type="standard",
        random_seed=seed,
        accelerator="cpu",
        alias="found",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    steps = len(bench.change)
    tested = steps - bench.origins[0]
    table = NeuralForecast(models=[model], freq=1).cross_validation(
        df=pd.DataFrame({"unique_id": "change", "ds": np.arange(steps), "y": bench.change}),
        test_size=tested,
        val_size=steps - tested - bench.train_end,
        step_size=STRIDE,
        n_windows=None,
    )
    columns = [next(c for c in table if c.startswith("found") and part in c) for part in ("-lo", "-median", "-hi")]
    rows = table.sort_values(["cutoff", "ds"])
    if rows["cutoff"].unique().tolist() != [origin - 1 for origin in bench.origins]:
        raise RuntimeError("neuralforecast made other windows than those of the task")
    found = rows[columns].to_numpy().reshape(len(bench.origins), HORIZON, len(QUANTILES)).transpose(0, 2, 1)
    return {**bench.scores(found), "parameters": sum(p.numel() for p in model.parameters())}


def own(bench: Bench, seed: int, method: str, sizes: list[int]) -> dict:
    """Train a MimoSSM of some state sizes; `compressed` to a quarter of them."""
    fields = {
        **RUN,
        "task_options": bench.options_of_change,
        "model": {**RUN["model"], "state_sizes": sizes},
        "output_dir": str(bench.options.output / "run"),
        "max_steps": bench.options.steps,
        "seed": seed,
        "target_state_size": max(1, bench.options.states // 4),
    }
    file = bench.options.output / "run.json"
    file.write_text(json.dumps(fields))
    run = parse_run([str(file), *([] if method == "compressed" else ["--no_compress"])])
    model = build_model(run, bench.task)
    trainer, _ = build_trainer(run, bench.task, model)
    trainer.train()
    found = trainer.predict(bench.task.test, ignore_keys=["cache", "past_key_values"]).predictions
    changes = bench.task.feature_extractor.denormalise(found)[..., 0]
    return {**bench.scores(changes), "sizes": state_sizes(model), "parameters": model.num_parameters()}


def rows_of(bench: Bench, method: str, seed: int, done: list[dict]) -> dict:
    """Run one method with one seed."""
    others: dict[str, Callable[[Bench, int], dict]] = {"naive": naive, "nhits": nhits}
    begin = time.perf_counter()
    if method in others:
        found = others[method](bench, seed)
    else:
        sizes = [bench.options.states] * RUN["model"]["num_hidden_layers"]
        if method == "scratch":
            sizes = next(row["sizes"] for row in done if row["method"] == "compressed" and row["seed"] == seed)
        found = own(bench, seed, method, sizes)
    return {"method": method, "seed": seed, "seconds": time.perf_counter() - begin, **found}


def table_of(done: list[dict]) -> str:
    """A line for each method: means and standard deviations over seeds."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in done):
        rows = [row for row in done if row["method"] == method]
        cells = [mean_and_deviation([row[key] for row in rows], digits) if key in rows[0] else "-"
                 for key, digits in (("mae", 0), ("mase", 3), ("pinball", 0))]  # fmt: skip
        states = f"{np.mean([row['sizes'] for row in rows]):.1f}" if "sizes" in rows[0] else "-"
        parameters = f"{np.mean([row['parameters'] for row in rows]):,.0f}" if "parameters" in rows[0] else "-"
        lines.append([NAMES[method], *cells, states, parameters])
    head = ["method", "MAE, MW", "MASE", "pinball, MW", "states per layer", "parameters"]
    return markdown_table(head, lines)


def libraries() -> str:
    """Versions of what is not among the package's requirements, where it is installed."""
    found = ""
    for name in ("neuralforecast", "pmdarima"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found += f", {name} {importlib.metadata.version(name)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--states", type=int, default=64, help="of each layer at full size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/forecasting"), help="folder for the results")
    options = parser.parse_args()
    if "scratch" in options.methods and "compressed" not in options.methods:
        parser.error("scratch takes its sizes from compressed: add it to --methods")
    try:
        from pmdarima.datasets import load_taylor
    except ImportError:
        parser.error("the data are in pmdarima: pip install 'hf-compressm[forecasting]'")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    bench, done = Bench(np.asarray(load_taylor(), dtype=np.float64), options), []
    methods = [name for name in NAMES if name in options.methods]
    with (options.output / "results.jsonl").open("w") as file:
        for method in methods:
            for seed in options.seeds if method in (*OWN, "nhits") else options.seeds[:1]:
                done.append(rows_of(bench, method, seed, done))
                print(json.dumps(done[-1]), file=file, flush=True)
    counts = f"{options.steps} steps, {len(options.seeds)} seed(s), {len(bench.origins)} windows"
    print(f"{counts}; {machine_line()}{libraries()}\n")
    print(table_of(done))


if __name__ == "__main__":
    main()
