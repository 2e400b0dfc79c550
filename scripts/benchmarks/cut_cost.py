"""Measure the cost of a cut on several processes, part by part, in training steps of the same run.

    OMP_NUM_THREADS=1 python scripts/benchmarks/cut_cost.py --processes 1 2 4
    OMP_NUM_THREADS=1 python scripts/benchmarks/cut_cost.py --processes 2 4 --fsdp FULL_STATE_DICT

Trains the config with scripts/pretrain.py on CPU processes over gloo, each with batches of the config's size, with cuts
so small that the model stays near its full size. The callback logs the time of each part of a cut on rank 0, where a
collective includes the wait for the slowest rank: statistics (drawing calibration batches, forward passes, the sum over
ranks), decision (on rank 0), broadcast, surgery, rebuild of the reducer, verification, and the losses that it logs from
before and after. Medians over the cuts, relative to the median training step between them. With `--fsdp` parameters are
sharded by FSDP2. Options after `--` override the config.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import machine
from cpu_fsdp import FORMATS, launched, sharding
from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table
from hf_compressm.surgery import record_keys as keys

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("statistics", "decision", "broadcast", "surgery", "rebuild", "verification", "loss")


def train(given: argparse.Namespace, processes: int, options: list[str]) -> tuple[list[dict], list[dict]]:
    """What was logged at each cut, and the segments of training between them."""
    cuts, spacing = given.cuts, given.spacing
    steps = [str(spacing * k) for k in range(1, cuts + 1)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(*launched(processes, "scripts/pretrain.py", given.fsdp), given.config, *sharding(given.fsdp)),
            *("--output_dir", folder, "--max_steps", str(spacing * (cuts + 1)), "--cut_steps", *steps),
            *("--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"),
            *options,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        logged = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
        speed = json.loads(Path(folder, "compression.json").read_text())["speed"]
    found = [entry for entry in logged if keys.SECONDS in entry]
    if len(found) != cuts or len(speed) != cuts + 1:
        raise RuntimeError(f"{cuts} cuts were wanted, but of {len(found)} attempts {len(speed) - 1} cut")
    return found, speed[:-1]


def costs(logged: list[dict], speed: list[dict]) -> dict:
    """Medians over the cuts: seconds of every part and of all, and of a training step."""
    found = {part: median(entry.get(keys.seconds_of(part), 0.0) for entry in logged) for part in PARTS}
    return {
        "seconds": found | {"all": median(entry[keys.SECONDS] for entry in logged)},
        "step": median(1 / segment["steps_per_second"] for segment in speed),
        "sizes": [segment["mean_state_size"] for segment in speed],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/runs/stdlib_mamba.yaml")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--spacing", type=int, default=6, help="Training steps between two cuts.")
    parser.add_argument("--target", default="96", help="States per layer after the last cut.")
    parser.add_argument("--fsdp", choices=FORMATS, help="Shard by FSDP2, with checkpoints in this format.")
    parser.add_argument("--output", type=Path, help="Where to write the figures as JSON; else they are printed.")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    arguments, options = parser.parse_args(argv[:split]), argv[split + 1 :]
    options = ["--target_state_size", arguments.target, "--min_change", "0.01", *options]
    results = {}
    for processes in tqdm(arguments.processes):
        results[processes] = costs(*train(arguments, processes, options))
    columns = [f"{processes} process{'es' if processes > 1 else ''}" for processes in results]
    rows = [
        [part, *(f"{found['seconds'][part] / found['step']:.2f}" for found in results.values())]
        for part in [*PARTS, "all"]
    ]
    rows.append(["one step, ms", *(f"{found['step'] * 1000:.0f}" for found in results.values())])
    print(markdown_table(["in training steps", *columns], rows))
    record = {
        "config": arguments.config,
        "cuts": arguments.cuts,
        "fsdp": arguments.fsdp,
        "options": options,
        "processes": results,
        "machine": machine(),
        "load": os.getloadavg(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    text = json.dumps(record, indent=2)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
