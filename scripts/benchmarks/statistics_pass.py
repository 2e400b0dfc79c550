"""Measure the cost of the statistics of selective layers: time in training steps, memory by calibration batches.

    python scripts/benchmarks/statistics_pass.py configs/runs/stdlib_mamba.yaml configs/runs/stdlib_mamba2.yaml

For every config, at its full size: a pass that gathers the statistics of all layers over the callback's default number
of calibration batches, interleaved with a training step (forward, backward, AdamW) on a batch of the same size;
medians. Then the peak resident memory of a fresh process that gathers statistics over few and many batches. Last, the
memory that generation keeps for one sequence, before and after a cut to the config's target.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from common import machine_line
from plain_generation import bytes_per_sequence
from torch.utils.data import DataLoader, default_collate

from hf_compressm import compress
from hf_compressm.data import load_task
from hf_compressm.runs.pretraining import build_model, parse_run
from hf_compressm.surgery import gather_statistics


def prepared(config: str, count: int):
    """The config's model at full size, `count` training batches, and the parsed run."""
    run = parse_run([config, "--output_dir", "outputs/statistics_pass"])
    task = load_task(run.arguments.task or "", seed=0, **run.task_options)
    model = build_model(run, task)
    size = run.training.per_device_train_batch_size
    loader = DataLoader(task.train, batch_size=size, collate_fn=task.collator or default_collate)
    return run, model, [batch for batch, _ in zip(loader, range(count), strict=False)]


def peak_memory(config: str, batches: int) -> float:
    """Peak resident memory in MiB of a process that gathers statistics over so many batches."""
    done = subprocess.run(
        [sys.executable, __file__, config, "--memory-of", str(batches)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def times(config: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a statistics pass and of one training step, interleaved."""
    run, model, batches = prepared(config, run_batches(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def pass_over() -> None:
        gather_statistics(model, batches)

    def step() -> None:
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measured: dict[str, list[float]] = {"pass": [], "step": []}
    model.train()
    for repeat in range(repeats + 2):
        for name, work in (("pass", pass_over), ("step", step)):
            began = time.perf_counter()
            work()
            if repeat >= 2:
                measured[name].append(time.perf_counter() - began)
    return measured


def run_batches(config: str) -> int:
    return parse_run([config, "--output_dir", "outputs/statistics_pass"]).compression.calibration_batches


@torch.no_grad()
def cache_before_and_after(config: str) -> tuple[int, int]:
    run, model, batches = prepared(config, run_batches(config))
    prompt = batches[0]["input_ids"][:1]
    before = bytes_per_sequence(model.eval(), prompt)
    compress(model, batches, policy=run.compression.order_policy(), refit_steps=0)
    return before, bytes_per_sequence(model, prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-batches", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _, model, batches = prepared(options.configs[0], 1)
        gather_statistics(model, (batches[0] for _ in range(options.memory_of)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(machine_line())
    for config in options.configs:
        measured = times(config, options.repeats)
        middle = {name: statistics.median(values) for name, values in measured.items()}
        memory = {count: round(peak_memory(config, count)) for count in options.memory_batches}
        before, after = cache_before_and_after(config)
        print(
            f"{config}: {run_batches(config)} calibration batches {middle['pass'] * 1e3:.0f} ms, training step "
            f"{middle['step'] * 1e3:.0f} ms, ratio {middle['pass'] / middle['step']:.2f}; peak memory in MiB by "
            f"batches {json.dumps(memory)}; cache per sequence {before} -> {after} bytes"
        )


if __name__ == "__main__":
    main()
