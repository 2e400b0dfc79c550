"""Break training runs in many ways, let them resume by themselves, and count what was lost.

    python scripts/benchmarks/faults.py --faults 100

Each fault starts `scripts/pretrain.py --resume auto` on configs/runs/digits_narrow.yaml, made short and with two cuts,
breaks it, and starts it again until it ends. Kinds:

- kill, kill two: SIGKILL at a random moment, half of the time right after a cut or the first file of a checkpoint; two
  processes (DDP) lose one rank.
- term: SIGTERM.
- full disk: no file may grow beyond a random size.
- truncate, flip, remove: after a kill, a random file of the newest checkpoint is damaged.
- hang: one of two ranks is stopped; the other gives up after `--ddp_timeout`.

A fault counts as survived if the run ends without help with the weights of an uninterrupted one: equal to the bit in a
single process, to 1e-5 with two. Damaged checkpoints that a resumed run accepted are counted apart; there must be none.
Ctrl-C ends early, with a table of what has been done.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from hf_compressm.report.text_tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
STEPS, CUTS, SAVES = 40, (10, 20), 4
KINDS = ("kill", "kill two", "term", "full disk", "truncate", "flip", "remove", "hang")
ATTEMPTS = 4
"""Restarts after which a run counts as lost."""


def command(folder: Path, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        *(sys.executable, *(launcher if processes > 1 else []), "scripts/pretrain.py"),
        *("configs/runs/digits_narrow.yaml", "--output_dir", str(folder), "--resume", "auto"),
        *("--model", '{"norm": "layer"}', "--max_steps", str(STEPS), "--cut_steps", *map(str, CUTS)),
        *("--save_strategy", "steps", "--save_steps", str(SAVES), "--save_total_limit", "3"),
        *("--per_device_train_batch_size", str(16 // processes), "--eval_strategy", "no"),
        *("--ddp_timeout", "20", "--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "1"),
    ]


def start(folder: Path, processes: int, largest_file: int | None = None) -> subprocess.Popen:
    def limit() -> None:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115  it outlives this function
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command(folder, processes), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        preexec_fn=limit,
    )  # fmt: skip


def wait_for(process: subprocess.Popen, folder: Path, rng: random.Random) -> None:
    """Return at a random moment of the run: in a random step, or right after a cut or in the midst of a checkpoint."""
    log, step = folder.with_suffix(".log"), rng.randrange(1, STEPS)
    sign = rng.choice([f"[CompreSSM] Step {cut}" for cut in CUTS] + ["checkpoint", "step", "step", "step"])
    while process.poll() is None:
        text = log.read_text()
        if sign == "checkpoint":
            save = folder / f"checkpoint-{step // SAVES * SAVES or SAVES}"
            if save.exists() and any(save.iterdir()):
                return
        elif (text.count("'loss'") >= step) if sign == "step" else (sign in text):
            time.sleep(rng.uniform(0, 0.05))
            return
        time.sleep(0.002)


def ranks(process: subprocess.Popen) -> list[int]:
    """Process ids of the workers under torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def end(process: subprocess.Popen, patience: float = 600) -> int:
    """Wait for the end of a run, after `patience` seconds by killing it and its workers; returns its exit code."""
    try:
        return process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        for pid in [*ranks(process), process.pid]:  # torchrun's workers have sessions of their own
            os.kill(pid, signal.SIGKILL)
        return process.wait()


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


def break_run(kind: str, folder: Path, rng: random.Random) -> Path | None:
    """Start a run and break it; returns the file that was damaged, if any."""
    processes = 2 if kind in ("kill two", "hang") else 1
    process = start(folder, processes, rng.randrange(2_000, 60_000) if kind == "full disk" else None)
    if kind != "full disk":
        wait_for(process, folder, rng)
    if process.poll() is None and kind != "full disk":
        if kind == "hang":
            os.kill(rng.choice(ranks(process)), signal.SIGSTOP)
        elif kind == "kill two":
            os.kill(rng.choice(ranks(process)), signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
    end(process, patience=60)
    return damage(kind, folder, rng) if kind in ("truncate", "flip", "remove") else None


def survives(kind: str, folder: Path, expected: dict[int, dict[str, torch.Tensor]], rng: random.Random) -> str:
    damaged = break_run(kind, folder, rng)
    processes = 2 if kind in ("kill two", "hang") else 1
    marker = len(folder.with_suffix(".log").read_text())
    for _ in range(ATTEMPTS):
        if end(start(folder, processes)) == 0:
            break
    else:
        return "lost"
    said = folder.with_suffix(".log").read_text()[marker:]
    if damaged is not None and (damaged.name not in said or f"going on from {damaged.parent}" in said):
        return "damage accepted"
    found = load_file(folder / "model.safetensors")
    tolerance = 1e-5 if processes > 1 else 0.0
    same = all(torch.allclose(found[n], value, atol=tolerance, rtol=0) for n, value in expected[processes].items())
    return "survived" if same else "other weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        expected = {}
        for processes in (1, 2):
            folder = Path(scratch, f"whole{processes}")
            if end(start(folder, processes)):
                raise RuntimeError(folder.with_suffix(".log").read_text())
            expected[processes] = load_file(folder / "model.safetensors")
        try:
            for index in tqdm(range(options.faults)):
                rng = random.Random(options.seed * 1_000_003 + index)
                kind = options.kinds[index % len(options.kinds)]
                folder = Path(scratch, f"fault{index}")
                outcome = survives(kind, folder, expected, rng)
                counts[kind, outcome] += 1
                if outcome != "survived":
                    print(f"fault {index}, {kind}: {outcome}\n{folder.with_suffix('.log').read_text()[-3000:]}")
                shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            print("interrupted; so far:")
    outcomes = ("survived", "lost", "other weights", "damage accepted")
    found = {kind: [counts[kind, outcome] for outcome in outcomes] for kind in options.kinds}
    rows = [[kind, sum(numbers), *numbers] for kind, numbers in found.items()]
    print(markdown_table(["fault", "runs", *outcomes], rows))


if __name__ == "__main__":
    main()
