"""Measure how much the loss rises when states are removed after training, by this package and by published scores.

    python scripts/benchmarks/selection.py configs/runs/stdlib_mamba.yaml --state-size 32 --orders 16 8 4 2 --seeds 3
    python scripts/benchmarks/selection.py configs/runs/stdlib_mamba2.yaml --state-size 64 --orders 32 16 8 --seeds 3

For every seed the config's model is trained at full size (or read from --models), then each method removes states from
a copy of it, with the same calibration batches of training data, and the test loss is measured without further
training. Options after `--` override the config. Rows: this package's closed form ("subset + read-out", or for Mamba-2
"L and R"), the same refitted on the calibration data, and the rivals of `hf_compressm.baselines`. For Mamba-2, rivals
and "stock" rows act on the stock class, which cannot carry a read-in and read-out.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, default_collate

from hf_compressm import compress, to_stock
from hf_compressm.baselines import METHODS, gather_rival_statistics, rival_cut
from hf_compressm.data import load_task
from hf_compressm.report.text_tables import markdown_table, mean_and_deviation
from hf_compressm.runs.pretraining import parse_run, run_pretraining


def trained(config: str, size: int, seed: int, folder: Path, overrides: list[str]):
    """The model trained at full size; kept in the folder, so that it is trained once."""
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as output:
            options = ["--no_compress", "--seed", str(seed), "--output_dir", output, "--save_strategy", "no"]
            options += ["--model", json.dumps({"state_size": size}), "--eval_strategy", "no", "--disable_tqdm", "true"]
            run_pretraining(parse_run([config, *options, *overrides])).model.save_pretrained(folder)  # type: ignore[operator]
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def loss_of(model, batches: list[dict]) -> float:
    return statistics.mean(float(model(**batch).loss) for batch in batches)


def refitted(model, batches: list[dict], order: int, steps: int):
    reduced = copy.deepcopy(model)
    compress(reduced, batches, target=order, refit_steps=steps)
    return reduced


def rises(model, calibration: list[dict], test: list[dict], orders: list[int], seed: int, steps: int) -> list[dict]:
    """One row per method and order: the rise of the test loss."""
    mamba2 = model.config.model_type.endswith("2")
    full, rows = loss_of(model, test), []
    plain = to_stock(model) if mamba2 else model
    own = {"L and R" if mamba2 else "subset + read-out": (model, 0), "refitted": (model, steps)}
    if mamba2:
        own |= {"stock: subset": (plain, 0), "stock: subset, refitted": (plain, steps)}
    began = time.perf_counter()
    found = gather_rival_statistics(plain, calibration)
    print(f"rival statistics: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    generator = torch.Generator().manual_seed(seed)
    for order in orders:
        for name, (base, count) in own.items():
            began = time.perf_counter()
            loss = loss_of(refitted(base, calibration, order, count), test)
            rows.append({"method": name, "order": order, "rise": loss - full, "s": time.perf_counter() - began})
        for method in METHODS:
            reduced = copy.deepcopy(plain)
            rival_cut(reduced, method, order, generator=generator, statistics=found)
            rows.append({"method": method, "order": order, "rise": loss_of(reduced, test) - full})
    return [row | {"seed": seed, "full": full} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--state-size", type=int, required=True)
    parser.add_argument("--orders", type=int, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--refit-steps", type=int, default=60)
    parser.add_argument("--batches", type=int, default=4, help="calibration batches of 8 sequences")
    parser.add_argument("--models", default="outputs/selection", help="folder that keeps the trained models")
    parser.add_argument("--json", default="selection.jsonl")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    options, overrides = parser.parse_args(argv[:split]), argv[split + 1 :]
    run = parse_run([options.config, *overrides, "--output_dir", options.models])
    rows = []
    for seed in options.seeds:
        folder = Path(options.models) / f"{Path(options.config).stem}_{options.state_size}_{seed}"
        model = trained(options.config, options.state_size, seed, folder, overrides)
        task = load_task(run.arguments.task or "", seed=seed, **run.task_options)
        order = torch.Generator().manual_seed(seed)
        train = DataLoader(task.train, batch_size=8, shuffle=True, generator=order, collate_fn=default_collate)
        calibration = [batch for batch, _ in zip(train, range(options.batches), strict=False)]
        test = list(DataLoader(task.test, batch_size=16, collate_fn=default_collate))
        rows += rises(model, calibration, test, options.orders, seed, options.refit_steps)
        with open(options.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["seed"] == seed)
    print(f"{options.config}, N = {options.state_size}, seeds {options.seeds}, torch {torch.__version__}")
    print(f"test loss at full size: {', '.join(f'{f:.4f}' for f in sorted({row['full'] for row in rows}))}")
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["method"], row["order"]), []).append(row["rise"])
    methods = dict.fromkeys(row["method"] for row in rows)
    cells = [[method, *(mean_and_deviation(found[method, order], 4) for order in options.orders)] for method in methods]
    print(markdown_table(["rise of the test loss", *(f"r = {order}" for order in options.orders)], cells))


if __name__ == "__main__":
    main()
