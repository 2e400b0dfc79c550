"""scripts/pretrain.py under the shipped configurations of FSDP2: as under DDP, to the saved model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # what `accelerate launch` does
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from hf_compressm.runs.pretraining import parse_run

ROOT = Path(__file__).resolve().parents[2]
RUN = [
    *("configs/runs/digits_narrow.yaml", "--model", '{"norm": "layer"}', "--target_state_size", "8"),
    *(
        "--max_steps",
        "8",
        "--cut_steps",
        "3",
        "6",
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--use_cpu",
        "true",
    ),
    *("--logging_steps", "1", "--disable_tqdm", "true"),
]


def environment_of(name, monkeypatch):
    """What `accelerate launch --config_file configs/accelerate/NAME.yaml` puts into the environment of a script."""
    words = ["--config_file", str(ROOT / f"configs/accelerate/{name}.yaml"), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    with monkeypatch.context() as patch:
        for key in [key for key in os.environ if key.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_"))]:
            patch.delenv(key)
        return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(("name", "replicas", "shards", "processes"), [("fsdp2", 1, 1, 2), ("hsdp", 2, 2, 4)])
def test_the_configurations_say_what_they_are_named_after(name, replicas, shards, processes, monkeypatch):
    arguments, found = environment_of(name, monkeypatch)
    assert arguments.use_fsdp and int(arguments.num_processes) == processes
    assert found["ACCELERATE_USE_FSDP"] == "true" and found["FSDP_VERSION"] == "2"
    assert found["FSDP_OFFLOAD_PARAMS"] == "false" and found["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    sizes = [int(found.get(f"PARALLELISM_CONFIG_DP_{kind}_SIZE", 1)) for kind in ("REPLICATE", "SHARD")]
    assert sizes == [replicas, shards]


@pytest.mark.parametrize(("words", "expected"), [([], True), (["true"], True), (["false"], None)])
def test_fsdp_is_a_switch_in_files_and_on_the_command_line(words, expected, tmp_path):
    assert parse_run([*RUN, "--output_dir", str(tmp_path), "--fsdp", *words]).training.fsdp == expected
    file = tmp_path / "run.yaml"
    switch = json.dumps(expected is True)
    file.write_text((ROOT / RUN[0]).read_text() + f"\nfsdp: {switch}\nfsdp_config:\n  fsdp_version: 2\n")
    assert parse_run([str(file), "--output_dir", str(tmp_path), "--use_cpu", "true"]).training.fsdp == expected


def trained(folder, script, environment, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *script]
    path = [str(ROOT / "tests/training"), *sys.path]
    environment = environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    words = [*command, *RUN, "--output_dir", str(folder), *options]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    record = json.loads((folder / "compression.json").read_text())
    return [entry["loss"] for entry in logged if "loss" in entry], record, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.multi_process
def test_pretraining_under_the_configuration_equals_ddp(tmp_path, monkeypatch):
    _, environment = environment_of("fsdp2", monkeypatch)
    environment["ACCELERATE_MIXED_PRECISION"] = "no"  # autocast, which DDP would use, rounds elsewhere
    script = "scripts/pretrain.py"
    losses, expected, _ = trained(tmp_path / "ddp", [script], dict(os.environ))
    found, record, output = trained(tmp_path / "fsdp", ["tests/training/fsdp_script.py", script], environment)
    assert "nothing is sharded" not in output
    assert found == pytest.approx(losses, rel=1e-5)  # the norm that clips gradients is summed in another order
    assert record["sizes_after"] == expected["sizes_after"] != record["sizes_before"]
    weights = [load_file(tmp_path / way / "model.safetensors") for way in ("ddp", "fsdp")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=0, msg=name)
    assert all((tmp_path / "fsdp" / file).exists() for file in ("report.html", "run.json", "test_results.json"))


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_loop_of_the_page_runs_on_two_processes(tmp_path):
    page = (ROOT / "docs/scale.md").read_text()
    (program,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "fully_shard(" in text]
    (tmp_path / "loop.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "loop.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(sizes) == 2 and sum(sizes) == 32
