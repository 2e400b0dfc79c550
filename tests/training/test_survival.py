"""Manifests, the newest checkpoint that verifies, SIGTERM."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import arguments, small_data, small_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback
from hf_compressm.training import DurableCheckpoints, newest_checkpoint, verify_manifest, write_manifest
from hf_compressm.training.checkpoints.durable import MANIFEST_NAME

ROOT = Path(__file__).resolve().parents[2]


class At(TrainerCallback):
    """Does something at the end of one step, once."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            self.action()


def trainer_in(folder, *callbacks, **settings):
    data = small_data()
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3} | settings
    own = [CompreSSMCallback(cut_steps=[3, 5], tau=0.2), DurableCheckpoints()]
    return Trainer(small_model(), arguments(folder, **settings), train_dataset=data, callbacks=[*callbacks, *own])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    trainer_in(folder).train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_every_checkpoint_is_sealed_and_the_newest_is_found(run):
    folders = sorted(run.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]
    for folder in folders:
        verify_manifest(folder)
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"} <= files.keys()
    assert newest_checkpoint(run) == run / "checkpoint-12"
    assert newest_checkpoint(run / "nothing") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST_NAME])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_skipped_by_name(name, damage, copy, caplog):
    damage(copy / "checkpoint-12" / name)
    if name == MANIFEST_NAME and damage is not Path.unlink:
        (copy / "checkpoint-12" / name).write_bytes(b'{"files": [')
    with caplog.at_level("WARNING"):
        assert newest_checkpoint(copy) == copy / "checkpoint-10"
    assert "skipped the checkpoint of step 12" in caplog.text and name in caplog.text


def test_a_sealed_checkpoint_with_a_foreign_config_is_skipped(copy):
    config = copy / "checkpoint-12" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"state_sizes": [size + 1 for size in content["state_sizes"]]}))
    write_manifest(copy / "checkpoint-12")
    assert newest_checkpoint(copy) == copy / "checkpoint-10"


def test_sigterm_saves_stops_and_the_rest_is_as_without_it(run, tmp_path):
    trainer = trainer_in(tmp_path, At(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    durable = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, DurableCheckpoints))
    assert trainer.state.global_step == durable.stopped_at == 7 and signal.getsignal(signal.SIGTERM) is before
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-7"
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    expected = load_file(run / "checkpoint-12" / "model.safetensors")
    assert all(torch.equal(expected[name], value) for name, value in again.model.state_dict().items())


def test_a_second_sigterm_is_not_held_back_and_the_next_training_starts_afresh(tmp_path):
    got, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: got.append("second"))
    try:
        trainer = trainer_in(tmp_path, At(3, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == ["second"] and trainer.state.global_step == 3
    trainer.train()
    assert trainer.state.global_step == 12


def test_a_limit_of_one_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit=1 .* at least 2"):
        trainer_in(tmp_path, save_total_limit=1).train()


@pytest.mark.slow
def test_the_program_stops_on_sigterm_and_goes_on_by_itself(tmp_path):
    command = [
        *(sys.executable, "scripts/pretrain.py", "configs/runs/digits_narrow.yaml", "--output_dir", str(tmp_path)),
        *("--max_steps", "400", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "100"),
        *("--resume", "auto", "--disable_tqdm", "true", "--logging_steps", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if "[CompreSSM] Step 20" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 143 and "go on with --resume auto" in rest, rest
    done = subprocess.run([*command, "--max_steps", "40"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    with pytest.raises(ValueError, match="give --resume or --resume_from_checkpoint, not both"):
        from hf_compressm.runs.pretraining import parse_run, run_pretraining

        run_pretraining(parse_run([*command[2:], "--resume_from_checkpoint", "true"]))


def test_an_error_leaves_sigterm_as_it_was_and_a_used_callback_is_as_new(tmp_path):
    """Nothing tells a callback that an error ended a training: the next signal, or the next training, finds out."""

    def fail():
        raise KeyError("here")

    got, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, own := lambda *_: got.append("own"))
    try:
        for times in (1, 2):
            with pytest.raises(KeyError):
                trainer_in(tmp_path / "broken", At(2, fail)).train()
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == ["own"] * times and signal.getsignal(signal.SIGTERM) is own
        broken = trainer_in(tmp_path / "broken", At(2, fail))
        with pytest.raises(KeyError):
            broken.train()
        durable = next(cb for cb in broken.callback_handler.callbacks if isinstance(cb, DurableCheckpoints))
        again = trainer_in(tmp_path / "again", At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        again.remove_callback(DurableCheckpoints)
        again.add_callback(durable)
        again.train()
        assert durable.stopped_at == 3 and len(got) == 2 and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_stops_a_training_and_the_one_that_it_is_nested_in(tmp_path):
    durable = DurableCheckpoints()
    inner = trainer_in(tmp_path / "inner", At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    outer = trainer_in(tmp_path / "outer", At(2, inner.train))
    before = signal.getsignal(signal.SIGTERM)
    for trainer in (inner, outer):
        trainer.remove_callback(DurableCheckpoints)
        trainer.add_callback(durable)
    outer.train()
    assert (inner.state.global_step, outer.state.global_step) == (3, 2) and signal.getsignal(signal.SIGTERM) is before
    for folder, step in (("inner", 3), ("outer", 2)):
        assert newest_checkpoint(tmp_path / folder) == tmp_path / folder / f"checkpoint-{step}"
