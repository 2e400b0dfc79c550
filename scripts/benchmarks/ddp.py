"""Compare several processes with one over several cuts: do losses agree, and are ranks equal to the bit?

    python scripts/benchmarks/ddp.py --processes 2 4 --steps 200
    python scripts/benchmarks/ddp.py --processes 2 --combinations

For each setting a run in one process, and runs of the same global batch on several CPU processes over gloo, with four
cuts. Every tenth step the checksums of all parameters and moments are compared across ranks, and at the end the largest
difference of any parameter between ranks is taken. `--combinations` takes every combination of the settings. Columns:
the largest relative difference of the training loss from the single process before the first cut and after it, the
largest difference between ranks, and the final state sizes.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16
SETTINGS = {
    "defaults": [],
    "no unused parameters": ["--ddp_find_unused_parameters", "false"],
    "static graph": ["--ddp_static_graph", "true", "--ddp_find_unused_parameters", "false"],
    "accumulation over 2": ["--gradient_accumulation_steps", "2"],
    "gradient checkpointing": ["--gradient_checkpointing", "true"],
    "bfloat16 autocast": ["--bf16", "true"],
    "torch.compile": ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"],
}


def job(argv: list[str]) -> None:
    """One run, in one of its processes."""
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback

    from hf_compressm.data import load_task
    from hf_compressm.runs.pretraining import build_model, build_trainer, parse_run
    from hf_compressm.surgery import state_sizes
    from hf_compressm.surgery.processes import processes
    from hf_compressm.training import verify_replicas

    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step % 10 == 0:
                verify_replicas(model, optimizer)

    torch.set_num_threads(1)
    run = parse_run(argv)
    task = load_task(run.arguments.task or "", **run.task_options)
    trainer, _ = build_trainer(run, task, build_model(run, task))
    trainer.add_callback(Compare())
    trainer.train()
    apart = 0.0
    if processes() > 1:
        for parameter in trainer.model.parameters():
            copies = [torch.empty_like(parameter.data) for _ in range(processes())]
            dist.all_gather(copies, parameter.data)
            apart = max(apart, *(float((copy - copies[0]).abs().max()) for copy in copies))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "apart": apart, "sizes": state_sizes(trainer.model)}
        Path(str(run.training.output_dir), "ddp.json").write_text(json.dumps(result))
    if processes() > 1:
        # The reducer frees a gloo group under the GIL, for which the group's thread may wait: it must go first.
        del trainer
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def start(config: str, processes: int, steps: int, options: list[str]) -> dict:
    cuts = [str(steps * k // 10) for k in range(1, 5)]
    accumulation = 2 if "--gradient_accumulation_steps" in options else 1
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [
            *(sys.executable, *(launcher if processes > 1 else []), __file__, "--job", config, "--output_dir", folder),
            *("--per_device_train_batch_size", str(BATCH // processes // accumulation), "--max_steps", str(steps)),
            *("--cut_steps", *cuts, "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"),
            *("--use_cpu", "true", "--disable_tqdm", "true", *options),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        result = Path(folder, "ddp.json")
        if not result.exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(result.read_text())


def combinations(settings: dict[str, list[str]]) -> dict[str, list[str]]:
    """Every choice of settings that can go together: those of the reducer exclude each other."""
    reducer = [name for name in settings if "--ddp_find_unused_parameters" in settings[name]]
    others = [name for name in settings if settings[name] and name not in reducer]
    found = {}
    for count in range(len(others) + 1):
        for chosen in itertools.combinations(others, count):
            for first in ([], *([name] for name in reducer)):
                names = [*first, *chosen]
                found[" + ".join(names) or "defaults"] = [option for name in names for option in settings[name]]
    return found


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        return job(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/runs/stdlib_mamba2.yaml")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--combinations", action="store_true")
    options = parser.parse_args()
    settings = {name: SETTINGS[name] for name in options.settings}
    if options.combinations:
        settings = combinations(settings)
    small = [
        *("--model", '{"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 32}'),
        *("--task_options", '{"length": 64}', "--target_state_size", "4"),
    ]
    rows = []
    for name, setting in tqdm(settings.items()):
        one = start(options.config, 1, options.steps, [*setting, *small])
        for processes in options.processes:
            many = start(options.config, processes, options.steps, [*setting, *small])
            apart = [abs(a - b) / a for a, b in zip(one["losses"], many["losses"], strict=True)]
            first = options.steps // 10
            largest = [f"{max(part):.1e}" for part in (apart[:first], apart[first:])]
            rows.append([name, processes, *largest, many["apart"], f"{one['sizes']} = {many['sizes']}"])
    columns = ["setting", "processes", "loss before cuts", "loss after cuts", "ranks apart", "states"]
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
