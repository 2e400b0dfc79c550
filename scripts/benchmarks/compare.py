"""Full size against compressed against trained from scratch at the compressed sizes, on the task of a config.

    python scripts/benchmarks/compare.py configs/runs/digits_mimo_ssm.yaml --seeds 5 --json digits.jsonl
    python scripts/benchmarks/compare.py configs/runs/stdlib_mamba.yaml --seeds 3 --json mamba.jsonl -- --max_steps 1000

For every seed: a run of the config without cuts, one with, and one whose layers start with the sizes that the second
ended with. Options after `--` override the config in all runs. Each run is a process of its own with a fixed number of
threads. Finished runs in the JSON-lines file are not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

METHODS = ("full", "compressed", "scratch")


def run_job(config: str, overrides: list[str]) -> dict:
    """One training run in this process."""
    import torch

    from hf_compressm.pretraining import execute, parse_run

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory() as folder:
        run = parse_run([config, *overrides, "--output_dir", folder, "--save_strategy", "no", "--disable_tqdm", "true"])
        result = execute(run)
    return {
        "metrics": {name: value for name, value in result.metrics.items() if name.startswith("test_")},
        "seconds": result.metrics["train_runtime"],
        "sizes": result.sizes_after,
        "sizes_before": result.sizes_before,
        "speed": result.speed,
        "torch": torch.__version__,
    }


def start(config: str, method: str, seed: int, sizes: list[int] | None, threads: int, overrides: list[str]) -> dict:
    """One training run in a process of its own."""
    command = [sys.executable, __file__, config, "--job", "--", *overrides, "--seed", str(seed)]
    if method != "compressed":
        command += ["--no_compress"]
    if method == "scratch":
        command += ["--model", json.dumps({"state_sizes": sizes})]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return {"config": config, "method": method, "seed": seed} | json.loads(done.stdout.splitlines()[-1])


def seed_runs(config: str, seed: int, done: dict, threads: int, overrides: list[str]):
    """Runs of one seed that are still missing, one after the other."""
    for method in METHODS:
        if (method, seed) not in done:
            sizes = done[("compressed", seed)]["sizes"] if method == "scratch" else None
            done[(method, seed)] = start(config, method, seed, sizes, threads, overrides)
            yield done[(method, seed)]


def table(done: dict, seeds: int) -> str:
    lines = [
        "| | test accuracy, % | test loss | states per layer | training time, s | relative to full size |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        runs = [done[(method, seed)] for seed in range(seeds)]
        accuracy = [100 * run["metrics"]["test_accuracy"] for run in runs]
        loss = [run["metrics"]["test_loss"] for run in runs]
        states = [statistics.mean(run["sizes"]) for run in runs]
        seconds = [run["seconds"] for run in runs]
        ratio = [run["seconds"] / done[("full", run["seed"])]["seconds"] for run in runs]
        spread = statistics.stdev if seeds > 1 else (lambda _: 0.0)
        lines.append(
            f"| {method} | {statistics.mean(accuracy):.2f} ± {spread(accuracy):.2f} | "
            f"{statistics.mean(loss):.4f} ± {spread(loss):.4f} | {statistics.mean(states):.1f} | "
            f"{statistics.mean(seconds):.1f} ± {spread(seconds):.1f} | {statistics.median(ratio):.2f} |"
        )
    differences = [
        done[("compressed", seed)]["metrics"]["test_loss"] - done[("full", seed)]["metrics"]["test_loss"]
        for seed in range(seeds)
    ]
    lines.append(f"test loss, compressed minus full, by seed: {', '.join(f'{d:+.4f}' for d in differences)}")
    ratios = [
        speed[-1]["steps_per_second"] / speed[0]["steps_per_second"]
        for seed in range(seeds)
        if len(speed := done[("compressed", seed)]["speed"]) > 1
    ]
    if ratios:
        lines.append(
            f"steps per second after the last cut over those before the first, median: {statistics.median(ratios):.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--json", default="compare.jsonl", help="results, one line a run; finished runs are kept")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    argv = sys.argv[1:]
    overrides = argv[argv.index("--") + 1 :] if "--" in argv else []
    options = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    if options.job:
        print(json.dumps(run_job(options.config, overrides)))
        return
    output = Path(options.json)
    lines = output.read_text().splitlines() if output.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(r["method"], r["seed"]): r for r in records if r["config"] == options.config}
    bar = tqdm(total=len(METHODS) * options.seeds, initial=len(done), desc="runs")

    def work(seed: int) -> None:
        for record in seed_runs(options.config, seed, done, options.threads, overrides):
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.update()

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work, range(options.seeds)))
    bar.close()
    print(f"{options.config}, {options.seeds} seeds, {options.threads} thread(s) a run, {platform.machine()}")
    print(table(done, options.seeds))


if __name__ == "__main__":
    main()
