"""Measure the peak memory of a cut under FSDP2, next to that of a training step, in one process of several.

    python scripts/benchmarks/shard_memory.py --processes 2

Mamba language models of two sizes, sharded by block, train for some steps by an unmodified Trainer on CPU processes
over gloo, with one cut to an eighth of the states. Peak resident memory of each process is taken of every training step
and of the callback's part of the step that cuts (calibration, gathering, the plan, surgery and verification), by
resetting the kernel's high-water mark (Linux). Memory that is freed goes back to the system at once, so that one phase
does not look like the one before it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from common import machine_line
from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table

SIZES = {
    "small": {"hidden_size": 512, "num_hidden_layers": 12, "state_size": 64},
    "large": {"hidden_size": 1024, "num_hidden_layers": 16, "state_size": 64},
}
VOCABULARY, LENGTH, BATCH, STEPS, CUT = 1024, 128, 2, 6, 4
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}


def megabytes(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest since the mark was last reset) of this process."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) / 1024


def reset_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def job(kind: str, fields: dict, folder: str) -> None:
    """One run, in one of its processes."""
    import torch.distributed as dist
    from cpu_fsdp import grant_fsdp
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from hf_compressm import CompreSSMCallback
    from hf_compressm.surgery import state_sizes

    torch.set_num_threads(1)
    grant_fsdp()
    peaks: dict[str, list[float]] = {"step": [], "cut": []}

    class Mark(TrainerCallback):
        """Takes the peak since the last mark as one of `name`."""

        def __init__(self, name: str):
            self.name = name

        def on_step_begin(self, args, state, control, **kwargs):
            reset_mark()

        def on_step_end(self, args, state, control, **kwargs):
            if self.name == "step" or state.global_step == CUT:
                peaks[self.name].append(megabytes("VmHWM"))
            reset_mark()

    arguments = TrainingArguments(
        **{"output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_strategy": "no"},
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, "fsdp": True},
        fsdp_config={"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    )
    bare = megabytes("VmRSS")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **fields))
    parameters = sum(p.numel() for p in model.parameters())
    ids = torch.randint(1, VOCABULARY, (64, LENGTH)).tolist()
    target = fields["state_size"] // 8
    callback = CompreSSMCallback(policy="target", target_state_size=target, cut_steps=[CUT])
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[Mark("step"), callback, Mark("cut")],
    )  # fmt: skip
    trainer.train()
    if mean(state_sizes(trainer.model)) != target or len(peaks["cut"]) != 1:
        raise RuntimeError(f"no cut to {target} states: {state_sizes(trainer.model)}")
    # AdamW's moments are there from the second step on; steps after the cut are of a smaller model.
    found = torch.tensor([bare, max(peaks["step"][1:CUT]), peaks["cut"][0]])
    every = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(every, found)
    if dist.get_rank() == 0:
        numbers = [[float(x) for x in one] for one in every]
        Path(folder, "peaks.json").write_text(json.dumps({"parameters": parameters, "ranks": numbers}))
    dist.destroy_process_group()


def start(kind: str, fields: dict, processes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, __file__, "--job", json.dumps([kind, fields, folder])]
        done = subprocess.run(command, env=os.environ | GIVE_BACK, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(Path(folder, "peaks.json").read_text())


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        return job(*json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--models", nargs="+", default=["compressm_mamba", "mamba"], help="Model types.")
    options = parser.parse_args()
    cases = [(p, m, s) for p in options.processes for m in options.models for s in options.sizes]
    rows = []
    for processes, kind, size in tqdm(cases):
        found = start(kind, SIZES[size], processes)
        bare, step, cut = max(found["ranks"], key=lambda numbers: numbers[2] / numbers[1])
        ratios = [f"{cut / step:.2f}", f"{(cut - bare) / (step - bare):.2f}"]
        rows.append(
            [kind, f"{found['parameters'] / 1e6:.0f}", processes, *(f"{x:.0f}" for x in (bare, step, cut)), *ratios]
        )
        tqdm.write(str(rows[-1]))
    columns = ["model", "parameters, M", "processes", "bare process, MB", "step, MB", "cut, MB", "cut / step"]
    print(markdown_table([*columns, "without the bare process"], rows))
    print(machine_line())


if __name__ == "__main__":
    main()
