"""Break training runs in many ways, let them resume by themselves, and count what was lost.

    python scripts/benchmarks/faults.py --faults 100
    python scripts/benchmarks/faults.py --faults 32 --fsdp FULL_STATE_DICT
    python scripts/benchmarks/faults.py --faults 32 --fsdp SHARDED_STATE_DICT

Each fault starts `scripts/pretrain.py --resume auto` on configs/runs/digits_narrow.yaml, made short and with two cuts,
breaks it, and starts it again until it ends. Kinds:

- kill, kill two: SIGKILL at a random moment, half of the time right after a cut or the first file of a checkpoint; two
  processes (DDP) lose one rank.
- term: SIGTERM, of several processes to one or to all.
- full disk: no file may grow beyond a random size.
- truncate, flip, remove: after a kill, a random file of the newest checkpoint is damaged.
- hang: one of two ranks is stopped; the other gives up after `--ddp_timeout`.

With `--fsdp` all runs have two processes, sharded by FSDP2 over CPUs, with checkpoints in the given format. Then "kill"
ends all of them at once. `--fork` starts ranks as forks of this process, not by torchrun,
in a fraction of the time.

A fault counts as survived if the run ends without help with the weights of an uninterrupted one, read from the saved
model: equal to the bit in a single process, to 1e-5 with two. Damaged checkpoints that a resumed run accepted are
counted apart; there must be none.
Ctrl-C ends early, with a table of what has been done.
"""

import argparse
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu_fsdp import FORMATS, grant_fsdp, launched, sharding
from forked import import_all, kill, running, start_ranks, workers
from safetensors.torch import load_file
from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/pretrain.py"
KINDS = ("kill", "kill two", "term", "full disk", "truncate", "flip", "remove", "hang")
ATTEMPTS = 4
"""Restarts after which a run counts as lost."""


class Run(NamedTuple):
    """One training, and its log."""

    folder: Path
    processes: int
    steps: int
    fsdp: str | None
    """In which format FSDP2 saves; None for DDP."""
    fork: bool = False

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def cuts(self) -> tuple[int, int]:
        return self.steps // 4, self.steps // 2

    @property
    def saves(self) -> int:
        return self.steps // 10

    def options(self) -> list[str]:
        return [
            *("configs/runs/digits_narrow.yaml", "--output_dir", str(self.folder), "--resume", "auto"),
            *("--model", '{"norm": "layer"}', "--max_steps", str(self.steps)),
            *("--cut_steps", *map(str, self.cuts)),
            *("--save_strategy", "steps", "--save_steps", str(self.saves), "--save_total_limit", "3"),
            *("--per_device_train_batch_size", str(16 // self.processes), "--eval_strategy", "no"),
            *("--ddp_timeout", "20", "--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "1"),
            *sharding(self.fsdp),
        ]


def start(run: Run, largest_file: int | None = None) -> Any:
    """The process of a run, or the one that starts its ranks: of `subprocess` or of `multiprocessing`."""

    def limit() -> None:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    run.log.touch()
    if run.fork:
        return start_ranks(run.processes, lambda: pretrain(run), run.log, limit)
    log = open(run.log, "a")  # noqa: SIM115  it outlives this function
    return subprocess.Popen(
        [*launched(run.processes, SCRIPT, run.fsdp), *run.options()],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log,
        start_new_session=True, preexec_fn=limit,
    )  # fmt: skip


def end(process: Any, patience: float = 600) -> int:
    """Wait for the end of a run, after `patience` seconds by killing it and its workers; returns its exit code."""
    deadline = time.monotonic() + patience
    while running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    return process.returncode if isinstance(process, subprocess.Popen) else process.exitcode


def pretrain(run: Run) -> None:
    """Be one rank of a run."""
    os.chdir(ROOT)
    if run.fsdp is not None:
        grant_fsdp()
    sys.argv = [SCRIPT, *run.options()]
    runpy.run_path(SCRIPT, run_name="__main__")


def wait_for(process: Any, run: Run, rng: random.Random) -> None:
    """Return at a random moment of the run: in a random step, or right after a cut or in the midst of a checkpoint."""
    step = rng.randrange(1, run.steps)
    sign = rng.choice([f"[CompreSSM] Step {cut}" for cut in run.cuts] + ["checkpoint", "step", "step", "step"])
    while running(process):
        text = run.log.read_text()
        if sign == "checkpoint":
            save = run.folder / f"checkpoint-{step // run.saves * run.saves or run.saves}"
            if save.exists() and any(save.iterdir()):
                return
        elif (text.count("'loss'") >= step) if sign == "step" else (sign in text):
            time.sleep(rng.uniform(0, 0.05))
            return
        time.sleep(0.002)


def damage(kind: str, folder: Path, rng: random.Random) -> Path | None:
    """Damage a random file of the newest sealed checkpoint; None if there is no checkpoint yet."""
    sealed = sorted(folder.glob("checkpoint-*/checkpoint_manifest.json"), key=lambda p: int(p.parent.name[11:]))
    if not sealed:
        return None
    names = sorted(json.loads(sealed[-1].read_text())["files"])
    path = sealed[-1].parent / rng.choice([name for name in names if (sealed[-1].parent / name).stat().st_size])
    content = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return path


def break_run(kind: str, run: Run, rng: random.Random) -> Path | None:
    """Start a run and break it; returns the file that was damaged, if any."""
    process = start(run, rng.randrange(2_000, 60_000) if kind == "full disk" else None)
    if kind != "full disk":
        wait_for(process, run, rng)
    if running(process) and kind != "full disk":
        if kind == "hang":
            os.kill(rng.choice(workers(process.pid)), signal.SIGSTOP)
        elif kind == "kill two":
            os.kill(rng.choice(workers(process.pid)), signal.SIGKILL)
        elif kind == "term":
            os.kill(rng.choice([*workers(process.pid), process.pid]), signal.SIGTERM)
        else:
            kill(process)
    end(process, patience=60)
    return damage(kind, run.folder, rng) if kind in ("truncate", "flip", "remove") else None


def survives(kind: str, run: Run, expected: dict[str, torch.Tensor], rng: random.Random) -> str:
    damaged = break_run(kind, run, rng)
    marker = len(run.log.read_text())
    for _ in range(ATTEMPTS):
        if end(start(run)) == 0:
            break
    else:
        return "lost"
    said = run.log.read_text()[marker:]
    if damaged is not None and (damaged.name not in said or f"going on from {damaged.parent}" in said):
        return "damage accepted"
    found = load_file(run.folder / "model.safetensors")
    tolerance = 1e-5 if run.processes > 1 else 0.0
    same = found.keys() == expected.keys() and all(
        torch.allclose(found[name], value, atol=tolerance, rtol=0) for name, value in expected.items()
    )
    return "survived" if same else "other weights"


def processes_for(kind: str, fsdp: str | None) -> int:
    return 2 if fsdp or kind in ("kill two", "hang") else 1


def uninterrupted(scratch: str, options: argparse.Namespace) -> dict[int, dict[str, torch.Tensor]]:
    """The final weights of runs that nothing breaks, by their number of processes."""
    found = {}
    for processes in (2,) if options.fsdp else (1, 2):
        run = Run(Path(scratch, f"whole{processes}"), processes, options.steps, options.fsdp, options.fork)
        if end(start(run)):
            raise RuntimeError(run.log.read_text())
        found[processes] = load_file(run.folder / "model.safetensors")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=40, help="Steps of a run, at least 20.")
    parser.add_argument("--fsdp", choices=FORMATS, help="Shard by FSDP2, with checkpoints in this format.")
    parser.add_argument("--fork", action="store_true", help="Start ranks as forks, not by torchrun.")
    options = parser.parse_args()
    if options.fork:
        import_all()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        expected = uninterrupted(scratch, options)
        try:
            for index in tqdm(range(options.faults)):
                rng = random.Random(options.seed * 1_000_003 + index)
                kind = options.kinds[index % len(options.kinds)]
                processes = processes_for(kind, options.fsdp)
                run = Run(Path(scratch, f"fault{index}"), processes, options.steps, options.fsdp, options.fork)
                outcome = survives(kind, run, expected[processes], rng)
                counts[kind, outcome] += 1
                if outcome != "survived":
                    print(f"fault {index}, {kind}: {outcome}\n{run.log.read_text()[-3000:]}", flush=True)
                shutil.rmtree(run.folder, ignore_errors=True)
        except KeyboardInterrupt:
            print("interrupted; so far:")
    outcomes = ("survived", "lost", "other weights", "damage accepted")
    found = {kind: [counts[kind, outcome] for outcome in outcomes] for kind in options.kinds}
    rows = [[kind, sum(numbers), *numbers] for kind, numbers in found.items()]
    print(markdown_table(["fault", "runs", *outcomes], rows))


if __name__ == "__main__":
    main()
