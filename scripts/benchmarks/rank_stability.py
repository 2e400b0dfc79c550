"""How well the ranking of states early in training predicts that at the end, on the task of a config at full size.

    python scripts/benchmarks/rank_stability.py configs/runs/digits_narrow.yaml --seeds 3 --json stability.jsonl
    python scripts/benchmarks/rank_stability.py configs/runs/stdlib_mamba.yaml --seeds 1 -- --max_steps 1000

Options after `--` override the config. The JSON-lines file gets a line per seed, with values for every layer; seeds
that it has for the same config and options are not trained again. See `hf_compressm.reproduction.rankings` for what the
columns mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine

from hf_compressm.pretraining import execute, parse_run
from hf_compressm.reproduction.stability import RankRecorder, stability_table


def study(config: str, seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Records of one run at full size."""
    recorder = RankRecorder()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--seed", str(seed), "--output_dir", folder, "--no_compress", "--no_report"]
        options += ["--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"]
        execute(parse_run([config, *overrides, *options]), callbacks=[recorder])
    return recorder.as_records()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="file for the results, one line a seed; finished seeds are kept")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    options, overrides = parser.parse_args(argv[:split]), argv[split + 1 :]
    torch.set_num_threads(options.threads)
    lines = options.json.read_text().splitlines() if options.json and options.json.exists() else []
    key = {"config": options.config, "overrides": overrides}
    found = {line["seed"]: line for line in map(json.loads, lines) if {name: line[name] for name in key} == key}
    for seed in range(options.seeds):
        if seed not in found:
            records = study(options.config, seed, overrides)
            found[seed] = {**key, "seed": seed, "machine": machine(), "records": records}
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(found[seed]) + "\n")
    about = ", ".join(f"{name} {value}" for name, value in found[0]["machine"].items())
    print(f"{options.config} {' '.join(overrides)}, {options.seeds} seed(s); {about}")
    print(stability_table([record for seed in range(options.seeds) for record in found[seed]["records"]]))


if __name__ == "__main__":
    main()
