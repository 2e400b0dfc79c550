"""Kill a training run around its cuts, resume it, and compare its end with that of an uninterrupted run.

    python scripts/benchmarks/resume.py

The run of configs/runs/digits_narrow.yaml, made short and saving every step, is started as a process of its own and
killed with SIGKILL as soon as the checkpoint of the wanted step is complete and the next step has begun. It is then
started again with --resume_from_checkpoint: a model at the original size meets a checkpoint of another size. Weights
and optimizer state at the end must be equal to the bit.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
STEPS, CUTS = 40, (10, 20)


def command(output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "scripts/pretrain.py", "configs/runs/digits_narrow.yaml", "--output_dir", str(output)),
        *("--cut_steps", *map(str, CUTS)),
        *("--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3"),
        *("--eval_strategy", "no", "--disable_tqdm", "true", *more),
    ]


def run(output: Path, *more: str) -> None:
    done = subprocess.run(command(output, *more), cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_and_kill(output: Path, step: int) -> None:
    """Start a run and kill it once the checkpoint after `step` exists; later checkpoints are deleted."""
    process = subprocess.Popen(
        command(output), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (output / f"checkpoint-{step + 1}").exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended by itself with code {process.returncode} before step {step + 1}")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in output.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)


def differences(one: Path, two: Path) -> int:
    """Number of tensors, of weights and optimizer state, that are not equal to the bit."""
    first, second = one / f"checkpoint-{STEPS}", two / f"checkpoint-{STEPS}"
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (first, second)]
    pairs = [(tensor, weights[1][key]) for key, tensor in weights[0].items()]
    pairs += [(value, states[1][i][key]) for i, state in states[0].items() for key, value in state.items()]
    return sum(not torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--around", type=int, nargs="+", default=[-1, 0, 1], help="killed at cut + this many steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        run(whole)
        rows = []
        for step in tqdm([cut + shift for cut in CUTS for shift in options.around], desc="kills"):
            output = Path(folder) / f"killed-{step}"
            run_and_kill(output, step)
            run(output, "--resume_from_checkpoint", str(output / f"checkpoint-{step}"))
            rows.append((step, differences(whole, output)))
    columns = (f"killed after step (cuts at {CUTS[0]} and {CUTS[1]})", f"tensors that differ at step {STEPS}")
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
