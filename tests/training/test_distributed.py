"""Cuts on two processes over gloo: the same losses as on one, equal ranks, errors on all ranks alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import arguments, small_model
from transformers import Trainer

from hf_compressm import CompreSSMCallback
from hf_compressm.compatibility import raise_recompile_limit
from hf_compressm.training.ddp import find_ddp

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
RUN = [
    *("--max_steps", "12", "--cut_steps", "4", "8", "--eval_strategy", "no", "--save_strategy", "no"),
    *("--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"),
]
LRU = ["configs/runs/digits_narrow.yaml", "--model", '{"norm": "layer"}', "--target_state_size", "8", *RUN]
MAMBA = [
    *(
        "configs/runs/stdlib_mamba2.yaml",
        "--model",
        '{"state_size": 16, "hidden_size": 32, "num_heads": 4, "head_dim": 16}',
    ),
    *("--task_options", '{"length": 32}', "--target_state_size", "4", *RUN),
]

HYBRID = [
    *("configs/runs/stdlib_qwen3_5.yaml", "--model", '{"hidden_size": 32, "head_dim": 8, "linear_key_head_dim": 16}'),
    *("--task_options", '{"length": 32}', "--target_state_size", "4", *RUN),
]


def launch(command, folder, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*command, *options, *(("--output_dir", str(folder)) if folder else ())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in entries if "loss" in entry])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of runs on one process, each made once."""
    made = {}

    def train(run):
        if id(run) not in made:
            made[id(run)] = tmp_path_factory.mktemp("one")
            command = [sys.executable, "scripts/pretrain.py", *run]
            launch(command, made[id(run)], "--per_device_train_batch_size", "16")
        return made[id(run)]

    return train


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    "run, options",
    [(LRU, []), (LRU, ["--ddp_find_unused_parameters", "false"]), (MAMBA, []), (HYBRID, [])],
    ids=["lru", "lru-all-used", "mamba2", "hybrid"],
)
def test_two_processes_train_as_one_does(run, options, tmp_path, alone):
    launch([*TORCHRUN, "scripts/pretrain.py", *run], tmp_path, "--per_device_train_batch_size", "8", *options)
    assert torch.allclose(losses(alone(run)), losses(tmp_path), atol=2e-4)
    records = [json.loads((folder / "compression.json").read_text()) for folder in (alone(run), tmp_path)]
    assert records[0]["sizes_after"] == records[1]["sizes_after"] != records[0]["sizes_before"]
    assert [cut["step"] for cut in records[1]["history"]] == [4, 8]


@pytest.mark.slow
@pytest.mark.multi_process
def test_what_needs_processes_but_no_trainer():
    launch([*TORCHRUN, str(ROOT / "tests/training/ddp_checks.py")], None)


def test_deepspeed_is_refused_with_what_does_the_same(tmp_path):
    args = arguments(tmp_path)
    object.__setattr__(args, "deepspeed", {"train_batch_size": 8})
    trainer = Trainer(small_model(), arguments(tmp_path), train_dataset=None)
    with pytest.raises(NotImplementedError, match="one flat partition for each rank.* FSDP2 shards .*fsdp_version"):
        CompreSSMCallback().on_train_begin(args, trainer.state, trainer.control, model=trainer.model)


def test_a_single_process_needs_no_wrapper():
    assert find_ddp(None, small_model()) is None


def test_the_recompile_limit_only_rises():
    with torch._dynamo.config.patch(recompile_limit=8):
        raise_recompile_limit(12)
        assert torch._dynamo.config.recompile_limit == 20
        raise_recompile_limit(1)
        assert torch._dynamo.config.recompile_limit == 20
