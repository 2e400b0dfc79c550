"""scripts/pretrain.py under the shipped configurations of FSDP2: as under DDP, to the saved model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # what `accelerate launch` does
from accelerate.utils.launch import prepare_multi_gpu_env
from forked_ranks import run_ranks
from gloo_fsdp import LAUNCHER
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_compressm import state_sizes
from hf_compressm.runs.pretraining import parse_run

ROOT = Path(__file__).resolve().parents[2]
RUN = [
    *("configs/runs/digits_narrow.yaml", "--model", '{"norm": "layer"}', "--target_state_size", "8"),
    *("--max_steps", "8", "--cut_steps", "3", "6", "--eval_strategy", "no", "--save_strategy", "no"),
    *("--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"),
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


def trained(folder, environment, *options, processes=2):
    """Losses, the record of cuts, saved weights and output of scripts/pretrain.py."""
    batch = ("--per_device_train_batch_size", 8 // processes)
    words = [LAUNCHER, "scripts/pretrain.py", *RUN, *batch, "--output_dir", folder, *options]
    output = run_ranks(processes, *words, environment=environment)
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    record = json.loads((folder / "compression.json").read_text())
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    return losses, record["sizes_after"], load_file(folder / "model.safetensors"), output


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("ddp"), dict(os.environ))


def check_close(found, expected, loss, weights=math.inf):
    """Losses within a relative distance, weights within an absolute one."""
    assert "nothing is sharded" not in found[3]
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert found[1] == expected[1] != [64]
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, atol=weights, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.multi_process
def test_pretraining_under_the_configuration_equals_ddp(replicated, tmp_path, monkeypatch):
    _, environment = environment_of("fsdp2", monkeypatch)
    environment["ACCELERATE_MIXED_PRECISION"] = "no"  # autocast, which DDP would use, rounds elsewhere
    found = trained(tmp_path, environment)
    check_close(found, replicated, 1e-5, 1e-4)  # the norm that clips gradients is summed in another order
    assert all((tmp_path / file).exists() for file in ("report.html", "run.json", "test_results.json"))


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_whole_model_is_saved_where_checkpoints_are_shards_and_it_is_compiled(replicated, tmp_path, monkeypatch):
    _, environment = environment_of("fsdp2", monkeypatch)
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    compiled = ("--torch_compile", "true", "--torch_compile_backend", "eager")
    found = trained(tmp_path, environment, "--save_strategy", "steps", "--save_steps", "4", *compiled)
    check_close(found, replicated, 1e-5, 1e-4)
    assert not (tmp_path / "checkpoint-8/model.safetensors").exists()
    model, loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values()) and state_sizes(model) == [8]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("name, processes", [("fsdp2", 2), ("hsdp", 4)])
def test_the_configurations_train_in_mixed_precision(name, processes, replicated, tmp_path, monkeypatch):
    _, environment = environment_of(name, monkeypatch)
    found = trained(tmp_path, environment, processes=processes)
    # bfloat16 has 8 bits; a cut may choose another basis of the states.
    check_close(found, replicated, 0.02)
    assert all(value.isfinite().all() for value in found[2].values())


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
