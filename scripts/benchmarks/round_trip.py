"""Train with the callback, save, and generate in a process that cannot import this package: the same tokens?

    python scripts/benchmarks/round_trip.py configs/runs/stdlib_qwen3_5.yaml configs/runs/stdlib_xlstm.yaml
    python scripts/benchmarks/round_trip.py configs/runs/stdlib_xlstm.yaml -- --max_steps 300

For every run file, with the options behind `--`: trains as scripts/pretrain.py does, generates from the first bytes of
the test data by the likeliest token, and has plain_generation.py do the same from the saved model in isolated mode with
this package's import blocked. Prints the bytes of state of one sequence, convolution included, at full size and after
the cuts; in the process without this package they are counted again. Ends with an error where tokens or bytes differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import machine_line
from plain_generation import bytes_per_sequence, continued
from torch import Tensor

from hf_compressm.report.text_tables import markdown_table
from hf_compressm.runs.pretraining import build_model, parse_run, run_pretraining

PLAIN = Path(__file__).with_name("plain_generation.py")
COLUMNS = ["run", "class", "states per layer", "test loss", "bytes of state before", "after", "equal tokens"]


def without_this_package(folder: str, prompt: Tensor, tokens: int) -> dict[str, Any]:
    """What plain_generation.py prints of a saved model for a prompt (1, L)."""
    command = [sys.executable, "-I", str(PLAIN), folder, "--tokens", str(tokens), "--prompt"]
    done = subprocess.run([*command, *map(str, prompt[0].tolist())], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder} cannot be used without this package:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(config: str, overrides: list[str], prompt_length: int, tokens: int) -> list[Any]:
    """Train by a run file, compare, and return the cells of `COLUMNS`."""
    run = parse_run([config, *overrides])
    folder = str(run.training.output_dir)
    result = run_pretraining(run)
    prompt = torch.as_tensor(result.task.test[0]["input_ids"])[None, :prompt_length]
    model: Any = result.model.eval()
    found = without_this_package(folder, prompt, tokens)
    before = bytes_per_sequence(build_model(run, result.task).eval(), prompt)
    after = bytes_per_sequence(model, prompt)
    expected = continued(model, prompt, tokens)
    if found["tokens"] != expected or found["bytes"] != after:
        raise SystemExit(f"{config}: {expected} and {after} bytes here, without this package {json.dumps(found)}")
    sizes = f"{result.sizes_before} -> {result.sizes_after}"
    loss = f"{result.metrics['test_loss']:.4f}"
    return [Path(config).name, found["class"].rpartition(".")[2], sizes, loss, before, after, len(expected)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    options, overrides = parser.parse_args(argv[:split]), argv[split + 1 :]
    rows = [row_of(config, overrides, options.prompt_length, options.tokens) for config in options.configs]
    print(machine_line())
    print(markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
