"""Cut a trained model and heal it with LoRA: test loss before the cut, after it and healed, for each kind of cut.

    python scripts/benchmarks/healing.py configs/runs/finetune/stdlib_mamba.yaml --seeds 0 1 2

For every seed the model of --pretrain is trained at full size (or read from --models). Copies of it are cut to --order
states: by this package, refitted and in closed form, and by published scores (`hf_compressm.baselines`). Each copy, and
the full model as a control, then trains the same LoRA on the same batches for --share of the training's steps, with the
settings of the config. Options after `--` override the config.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from common import machine_line
from selection import trained

from hf_compressm import compress
from hf_compressm.baselines import rival_cut
from hf_compressm.report.text_tables import markdown_table, mean_and_deviation
from hf_compressm.runs.data_source import draw_calibration, evaluate, load_data
from hf_compressm.runs.finetuning import parse_finetune
from hf_compressm.runs.healing import heal
from hf_compressm.runs.pretraining import parse_run

OWN = {"refitted": 60, "closed form": 0}


def cut(model, method: str, order: int, batches: list[dict], seed: int):
    """A copy of the model with the given number of states."""
    reduced = copy.deepcopy(model)
    if method in OWN:
        compress(reduced, batches, target=order, refit_steps=OWN[method])
    elif method != "full size":
        rival_cut(reduced, method, order, batches, generator=torch.Generator().manual_seed(seed))
    return reduced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--pretrain", default="configs/runs/stdlib_mamba.yaml")
    parser.add_argument("--state-size", type=int, default=32)
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=[*OWN, "ghost", "full size"])
    parser.add_argument("--models", default="outputs/healing", help="folder that keeps the trained models")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    options, overrides = parser.parse_args(argv[:split]), argv[split + 1 :]
    steps = round(options.share * parse_run([options.pretrain, "--output_dir", options.models]).training.max_steps)
    losses: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        folder = Path(options.models) / f"{Path(options.pretrain).stem}_{options.state_size}_{seed}"
        model = trained(options.pretrain, options.state_size, seed, folder, [])
        settings = ["--model", str(folder), "--seed", str(seed), "--max_steps", str(steps), "--disable_tqdm", "true"]
        run = parse_finetune([options.config, *settings, *overrides, "--output_dir", options.models])
        task = load_data(run.source(), model, None)
        batches = draw_calibration(model, run.source(), task)
        size = run.training.per_device_eval_batch_size
        full = evaluate(model, task, size)["loss"]
        for method in options.methods:
            reduced = cut(model, method, options.order, batches, seed)
            row = {"before": full, "cut": evaluate(reduced, task, size)["loss"]}
            healed = heal(reduced, task, run)[0].model.eval()
            row["healed"] = evaluate(healed, task, size)["loss"]
            losses[method].append(row)
            print(json.dumps({"seed": seed, "method": method} | row), file=sys.stderr)
    print(
        f"{options.state_size} to {options.order} states, healed for {steps} steps, {len(options.seeds)} seed(s); ",
        end="",
    )
    print(machine_line())
    moments = ("before", "cut", "healed")
    rows = []
    for method, found in losses.items():
        rows.append([method, *(mean_and_deviation([row[moment] for row in found], 4) for moment in moments)])
    print(markdown_table(["test loss", "before", "after the cut", "healed"], rows))


if __name__ == "__main__":
    main()
