"""The commands of the documentation run: each as it stands, with options after it that make it small."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from documents import PAGES, ROOT, blocks, commands, commands_of
from hub.server import USER, Hub

from hf_compressm import cli
from hf_compressm.runs.pretraining import parse_run, run_pretraining

DIGITS = """--model '{"hidden_size": 8, "num_hidden_layers": 1, "state_sizes": 24}' --max_steps 4 --use_cpu true"""
BYTES = '{"length": 32, "evaluation_bytes": 1120}'
MAMBA = f"""--model '{{"hidden_size": 16, "num_hidden_layers": 2, "state_size": 32}}' --task_options '{BYTES}'
 --max_steps 4 --target_state_size 24 --use_cpu true"""
SHORT = "--window_end 1 --eval_strategy no --save_strategy no --disable_tqdm true"

RUN = {
    "accelerate launch scripts/pretrain.py configs/runs/digits_mimo_ssm.yaml": f"{DIGITS} {SHORT} --output_dir out",
    "scripts/pretrain.py configs/runs/stdlib_mamba.yaml": f"{MAMBA} {SHORT} --output_dir out",
    "accelerate launch scripts/finetune.py": f"--task_options '{BYTES}' --max_steps 2 --use_cpu true --output_dir out "
    "--disable_tqdm true --per_device_train_batch_size 2",
    "scripts/compress.py MODEL --data corpus.txt": "--length 32 --batches 2 --refit-steps 1 --output out",
    "scripts/evaluate_model.py": "--cpu",
    "hf-compressm report": "",
    "hf-compressm card": "",
    "hf-compressm inspect MODEL": "",
    "hf-compressm inspect outputs/stdlib_mamba": f"--task-options '{BYTES}' --batches 1",
    "hf-compressm compress MODEL": "",
    "hf-compressm export": "",
    "hf-compressm push": "",
    "scripts/benchmarks/ops.py": "--ops diag_scan --sizes 1 3 --shape 1 9 4 --repeats 1 --threads 1",
    "scripts/benchmarks/training.py": "--models mimo_ssm --sizes 3 1 --hidden 8 --length 12 --batch 2 --repeats 1 "
    "--threads 1",
    "scripts/benchmarks/fast_ops.py": "--families mamba2 --quick --repeats 1 --budget 0.1 --threads 1",
    "scripts/benchmarks/gated_delta.py": "--sizes 4 --batches 1 --length 9 --heads 2 --key-heads 1 --width 5 "
    "--repeats 1 --threads 1",
    "scripts/benchmarks/key_channels.py": "--seeds 0",
    "scripts/benchmarks/reduction.py": "--systems 4 --repeats 1",
    "scripts/benchmarks/moments.py": "--seeds 1 --before 3 --after 2",
    "scripts/benchmarks/selection.py": f"--seeds 0 --orders 2 --refit-steps 1 --batches 1 -- {MAMBA}",
    "scripts/benchmarks/hankel_norm.py": "--shapes digits --batch 2 --repeats 1 --threads 1 --device cpu",
    "scripts/benchmarks/round_trip.py": f"--max_steps 2 --cut_steps 1 --task_options '{BYTES}' --use_cpu true "
    "--eval_strategy no --disable_tqdm true",
    "scripts/reproduce.py configs/suites/paper.yaml": "--dry-run --tasks smnist --methods full --output out",
    "scripts/benchmarks/healing.py": f"--share 0.001 --methods refitted -- --task_options '{BYTES}' --use_cpu true",
}
"""Beginnings of commands, without `python` and variables before them, and the options that make each small."""

NOT_RUN = {
    "hf-compressm export outputs/small small-gguf": "needs the extra gguf; tests/deploy/test_gguf.py runs it",
    "scripts/benchmarks/llama_cpp_tokens.py": "needs xllamacpp, which brings llama.cpp",
    "pip install": ".ci/run runs README's in a fresh environment; they would change this one",
    "pytest": "it runs this",
    "accelerate launch scripts/pretrain.py CONFIG.yaml": "stands for any run file; the other commands name some",
    "scripts/pretrain.py --help": "tests/runs/test_task_help.py runs it",
    "scripts/pretrain.py --list-tasks": "tests/runs/test_task_help.py runs it",
    "accelerate launch --config_file configs/accelerate/single_gpu.yaml": "needs a GPU",
    "accelerate launch --config_file configs/accelerate/multi_gpu.yaml": "needs several GPUs",
    "accelerate launch --config_file configs/accelerate/multi_node.yaml": "needs several machines",
    "accelerate launch --config_file configs/accelerate/fsdp2.yaml": "needs several GPUs; test_fsdp_scripts.py runs it",
    "accelerate launch --config_file configs/accelerate/hsdp.yaml": "needs several GPUs; test_fsdp_scripts.py runs it",
    "torchrun --nproc_per_node 8": "needs eight GPUs",
    "torchrun --nnodes 2": "needs several machines",
    "torchrun --nproc_per_node 2 scripts/pretrain.py": "tests/training/test_distributed.py runs it small",
    "hf-compressm export outputs/small small-onnx": "its packages are an extra; tests/deploy/test_onnx.py runs it",
    "hf-compressm export outputs/deploy": "part of the program of docs/deploy.md",
    "hf-compressm report outputs/tutorial": "part of the program of docs/tutorial.md",
    "hf-compressm inspect outputs/decay": "part of the program of docs/adapters.md",
    "hf-compressm compress outputs/decay": "part of the program of docs/adapters.md",
    "hf-compressm report outputs/decay": "part of the program of docs/adapters.md",
    "hf-compressm inspect outputs/tutorial": "part of the program of docs/tutorial.md",
    "hf-compressm compress outputs/mamba": "part of the program of docs/tutorial.md",
    "scripts/benchmarks/compatibility.py": "downloads transformers' sdist; tests/test_benchmarks.py runs its parts",
    "scripts/benchmarks/cut_cost.py": "several processes; tests/training/test_cut_cost.py runs it small",
    "scripts/benchmarks/ddp.py": "several processes for each setting; takes minutes at any size",
    "scripts/benchmarks/faults.py": "kills and restarts dozens of runs",
    "scripts/benchmarks/forecasting.py": "needs pmdarima and neuralforecast; test_benchmarks.py runs it small without",
    "scripts/benchmarks/inspect_cost.py": "its model has a vocabulary of 50,280 at any depth",
    "scripts/benchmarks/jax_lru.py": "needs JAX, which is not among the extras",
    "scripts/benchmarks/onnx_export.py": "its packages are an extra; tests/deploy/test_onnx.py runs it small",
    "scripts/benchmarks/quantised.py": "needs a model that was trained for some minutes, and bitsandbytes",
    "scripts/benchmarks/resume.py": "kills and restarts six runs",
    "scripts/benchmarks/sharded.py": "several processes for each model; takes minutes at any size",
    "scripts/benchmarks/shard_memory.py": "several processes, whose memory it measures at real sizes",
    "scripts/benchmarks/statistics_pass.py": "two models at full size, and processes to measure their memory",
    "scripts/reproduce.py configs/suites/paper.yaml --tasks scifar": "trains for hours; the dry run is run",
    "scripts/reproduce.py configs/suites/cpu.yaml": "trains for 85 minutes; tests/reproduction runs a small one",
    "scripts/reproduce.py configs/suites/language.yaml": "trains for half an hour; tests/reproduction runs a small one",
}
"""Beginnings of commands that no test here runs, and why. test_docs.py runs the programs of pages."""


PROGRAMS = ["tutorial.md", "adapters.md", "deploy.md"]


def plain(words: list[str]) -> str:
    """A command as text, without the variables and the `python` before it."""
    while re.fullmatch(r"\w+=\S+", words[0]) or words[0] == "python":
        words = words[1:]
    return shlex.join(words)


def entry(command: str) -> str:
    """The longest beginning of the command in either table.

    Raises:
        LookupError: if it is in none.
    """
    found = [start for start in [*RUN, *NOT_RUN] if f"{command} ".startswith(f"{start} ")]
    if not found:
        raise LookupError(f"add a beginning of `{command}` to RUN, or with a reason to NOT_RUN")
    return max(found, key=len)


COMMANDS = list(dict.fromkeys(plain(words) for page in PAGES for words in commands_of(page)))


def test_every_command_is_run_or_has_a_reason():
    used = {entry(command) for command in COMMANDS}
    assert set(RUN) | set(NOT_RUN) == used, "entries without a command"
    assert not set(RUN) & set(NOT_RUN) and all(NOT_RUN.values())
    for page in PROGRAMS:
        shown = [content for language, content in blocks(ROOT / "docs" / page) if language == "bash"]
        in_program = {entry(plain(words)) for content in shown for words in commands(content)}
        assert {start for start, reason in NOT_RUN.items() if reason.endswith(f"of docs/{page}")} <= in_program


def test_an_unknown_command_is_noticed():
    for unknown in ("hf-compressm shrink MODEL", "scripts/pretraining.py", "torchrun --nproc_per_node 80 scripts/x.py"):
        with pytest.raises(LookupError, match="to RUN, or with a reason to NOT_RUN"):
            entry(unknown)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the repository's scripts and configs, and what README's commands find under their names."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for name, options in {
        "digits_mimo_ssm": ["configs/runs/digits_mimo_ssm.yaml", *shlex.split(DIGITS)],
        "full": ["configs/runs/digits_mimo_ssm.yaml", *shlex.split(DIGITS), "--no_compress"],
        "stdlib_mamba": ["configs/runs/stdlib_mamba.yaml", *shlex.split(MAMBA), "--no_compress"],
    }.items():
        config, *options = options
        run_pretraining(
            parse_run([str(ROOT / config), *options, *SHORT.split(), "--output_dir", str(folder / "outputs" / name)])
        )
    outputs = folder / "outputs"
    shutil.copytree(outputs / "stdlib_mamba", outputs / "small")
    for seed in range(3):
        shutil.copytree(outputs / "stdlib_mamba", outputs / f"healing/stdlib_mamba_32_{seed}")
    (folder / "corpus.txt").write_text("It is a truth universally acknowledged, that a single byte is in want. " * 40)
    return folder


STAND_INS = {
    "MODEL": "outputs/full",
    "RUN": "outputs/digits_mimo_ssm",
    "OTHER_RUN": "outputs/full",
    "TASK": "digits",
    "DIR": "out",
}


def small(command: str) -> list[str]:
    """The words of a command with its extra options, and with names that exist for those that stand for any."""
    stand_ins = STAND_INS | ({"MODEL": "outputs/stdlib_mamba"} if "corpus.txt" in command else {})
    words = [*shlex.split(command), *shlex.split(RUN[entry(command)])]
    return [stand_ins.get(word, re.sub(r"^me/", f"{USER}/", word)) for word in words]


@pytest.fixture
def hub(monkeypatch):
    """A local hub in the place of the real one."""
    with Hub() as server:
        server.stand_in(monkeypatch)
        yield server


def launched(words: list[str]) -> None:
    """Run by accelerate, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"layer 0 .*\ntotal .*\ntest accuracy: .*\nsaved to ", done.stdout, re.DOTALL), done.stdout


@contextmanager
def ends_well():
    """Let a program end itself, with exit code 0."""
    try:
        yield
    except SystemExit as ended:
        assert not ended.code, ended.code


def called(words: list[str], monkeypatch) -> None:
    """Run a script in this process, as the main program."""
    known, threads, term = set(sys.modules), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    monkeypatch.syspath_prepend(os.path.dirname(os.path.abspath(words[0])))
    monkeypatch.setattr(sys, "argv", words)
    try:
        with ends_well():
            runpy.run_path(words[0], run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, term)
        for name in set(sys.modules) - known:
            if "benchmarks" in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if entry(command) in RUN])
def test_it_runs(command, workspace, request, monkeypatch, tmp_path):
    words = small(command)
    monkeypatch.chdir(tmp_path)
    for item in workspace.iterdir():
        (tmp_path / item.name).symlink_to(item)
    hub = request.getfixturevalue("hub") if words[1] == "push" else None
    if words[:3] == ["accelerate", "launch", "scripts/pretrain.py"]:
        launched(words)
    elif words[0] == "hf-compressm":
        with ends_well():
            cli.main(words[1:])
    else:
        called(words[2:] if words[0] == "accelerate" else words, monkeypatch)
    if hub is not None:
        assert "config.json" in hub.files(words[3])
    for option, name in zip(words, words[1:], strict=False):
        if option in ("--output", "--output_dir", "--plot", "--json") and name != "-":
            written = tmp_path / name
            assert written.exists(), f"{option} {name}"
            assert written.is_dir() or written.suffix != ".json" or json.loads(written.read_text())
