"""Checkpoints across cuts: resume, best model, and what a kill leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import arguments, small_data, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history
from hf_compressm.surgery.record_keys import STATE_FILE
from hf_compressm.training import verify_checkpoint

CUT = 6


class Killed(BaseException):
    """Stands for the end of the process: nothing in the Trainer catches it."""


class KillAt(TrainerCallback):
    """Stops everything right after the given step has been saved."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def make_trainer(folder, callback=None, callbacks=(), model=None, **settings):
    data = small_data()
    callback = callback or CompreSSMCallback(cut_steps=[CUT, 9], policy="fraction", keep_fraction=0.3)
    defaults = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    return Trainer(
        model or small_model(dropout=0.2),
        arguments(folder, **(defaults | settings)),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, *callbacks],
    )


def checkpoint(folder, step) -> Path:
    return Path(folder) / f"checkpoint-{step}"


def assert_same_end(one, two, step=12):
    """Weights, optimizer state, config and history of two runs' last checkpoints are equal to the bit."""
    first, second = checkpoint(one, step), checkpoint(two, step)
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (first, second)]
    assert states[0].keys() == states[1].keys() and states[0]
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][key])), (index, key)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


def kill_and_resume(folder, step, make, seed_for_new_model=1):
    with pytest.raises(Killed):
        make(folder, callbacks=[KillAt(step)]).train()
    trainer = make(folder, model=small_model(seed=seed_for_new_model, dropout=0.2))
    trainer.train(resume_from_checkpoint=str(checkpoint(folder, step)))
    return trainer


@pytest.mark.parametrize("step", [CUT - 1, CUT, CUT + 1, 9, 10])
def test_killed_around_a_cut_and_resumed_is_bit_identical(tmp_path, step):
    make_trainer(tmp_path / "whole").train()
    trainer = kill_and_resume(tmp_path / "killed", step, make_trainer)
    assert len(history(trainer.model)) == 2 and state_sizes(trainer.model) == [4, 4]
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("step", [6, 7, 8, 9])
def test_a_pending_rollback_survives_a_kill(tmp_path, step):
    """Cut at 6, judged at 9, undone from then on; the loss falls, and higher is declared better, so it is undone."""

    def make(folder, **settings):
        callback = CompreSSMCallback(
            cut_steps=[CUT],
            policy="fraction",
            keep_fraction=0.5,
            rollback=True,
            rollback_greater_is_better=True,
        )
        return make_trainer(folder, callback, learning_rate=3e-2, **settings)

    make(tmp_path / "whole").train()
    trainer = kill_and_resume(tmp_path / "killed", step, make)
    assert [record["event"] for record in history(trainer.model)] == ["cut", "undo"]
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_lost_snapshot_keeps_the_cut_and_says_so(tmp_path, caplog):
    def make(folder, **settings):
        callback = CompreSSMCallback(
            cut_steps=[CUT],
            policy="fraction",
            keep_fraction=0.5,
            rollback=True,
            rollback_greater_is_better=True,
        )
        return make_trainer(folder, callback, **settings)

    with pytest.raises(Killed):
        make(tmp_path, callbacks=[KillAt(7)]).train()
    (checkpoint(tmp_path, 7) / STATE_FILE).unlink()
    trainer = make(tmp_path)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 7)))
    assert "The cut stays" in caplog.text and state_sizes(trainer.model) == [6, 6]


@pytest.mark.parametrize("step", [4, 5])
def test_the_stability_trigger_survives_a_kill(tmp_path, step):
    def make(folder, **settings):
        callback = CompreSSMCallback(
            trigger="stability",
            stability_interval=2,
            window_end=1.0,
            stability_threshold=0.3,
            policy="fraction",
            keep_fraction=0.5,
        )
        return make_trainer(folder, callback, **settings)

    make(tmp_path / "whole").train()
    trainer = kill_and_resume(tmp_path / "killed", step, make)
    assert [record["step"] for record in history(trainer.model)] == [6]
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_resume_with_restored_callbacks(tmp_path):
    """The Trainer then puts a new callback, built from the exported state, in the place of the user's."""

    def make(folder, **settings):
        return make_trainer(folder, restore_callback_states_from_checkpoint=True, **settings)

    make(tmp_path / "whole").train()
    kill_and_resume(tmp_path / "killed", 7, make)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_resume_with_an_optimizer_handed_to_the_trainer(tmp_path):
    def make(folder, model=None, callbacks=()):
        model = model or small_model(dropout=0.2)
        data = small_data()
        return Trainer(
            model,
            arguments(folder, save_strategy="steps", save_steps=1, max_steps=12),
            train_dataset=data,
            callbacks=[CompreSSMCallback(cut_steps=[CUT], policy="fraction", keep_fraction=0.3), *callbacks],
            optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-2), None),
        )

    make(tmp_path / "whole").train()
    kill_and_resume(tmp_path / "killed", 7, make)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_resume_from_sharded_weights(tmp_path):
    make_trainer(tmp_path).train()
    folder = checkpoint(tmp_path, 7)
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="1KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    verify_checkpoint(folder)
    whole = load_file(checkpoint(tmp_path, 12) / "model.safetensors")
    shutil.rmtree(checkpoint(tmp_path, 12))
    make_trainer(tmp_path, model=small_model(seed=1, dropout=0.2)).train(resume_from_checkpoint=str(folder))
    again = load_file(checkpoint(tmp_path, 12) / "model.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_resuming_a_run_that_knew_no_compression(tmp_path):
    data = small_data()
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=12)
    Trainer(small_model(), args, train_dataset=data).train()
    trainer = make_trainer(tmp_path, save_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 4)))
    assert state_sizes(trainer.model) == [4, 4]


def test_best_model_from_before_a_cut_is_loaded_at_its_own_size(tmp_path):
    class BestIsFirst(TrainerCallback):
        """Replaces the metric so that the first evaluation, at full size, is the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = make_trainer(
        tmp_path, callbacks=[BestIsFirst()], save_steps=3, load_best_model_at_end=True, save_total_limit=1
    )
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert state_sizes(trainer.model) == trainer.model.config.state_sizes == [12, 12]
    best = load_file(checkpoint(tmp_path, 3) / "model.safetensors")
    assert all(torch.equal(best[key], value) for key, value in trainer.model.state_dict().items())
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    trainer.save_model(tmp_path / "final")
    assert state_sizes(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")) == [12, 12]


class TestVerify:
    """A checkpoint whose tensors disagree with its config, or that is not whole."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_trainer(tmp_path, save_steps=6).train()
        return checkpoint(tmp_path, 12)

    def test_a_sound_one_passes(self, folder):
        verify_checkpoint(folder)

    def test_a_config_that_disagrees(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["state_sizes"] = [4, 5]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"layers\.1\.mixer\.\w+ is \(.*the config wants \(.*config.json"):
            verify_checkpoint(folder)
        with pytest.raises(RuntimeError, match=r"does not fit its config.*layers\.1\.mixer"):
            AutoModelForSequenceClassification.from_pretrained(folder)

    def test_missing_and_damaged_files(self, folder):
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            verify_checkpoint(folder)
        weights.unlink()
        with pytest.raises(FileNotFoundError, match="no model.safetensors"):
            verify_checkpoint(folder)
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="no config.json"):
            verify_checkpoint(folder)

    def test_tensors_of_one_layer_that_disagree_stop_a_resume(self, folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["backbone.layers.0.mixer.C_re"] = torch.zeros(6, 3)
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"layers\.0\.mixer\.C_re has shape \(6, 3\), expected \(6, 4\)"):
            make_trainer(folder.parent).train(resume_from_checkpoint=str(folder))

    def test_a_history_that_disagrees_with_the_weights_stops_a_resume(self, folder):
        state = json.loads((folder / "trainer_state.json").read_text())
        saved = state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["saved"]
        saved["history"][-1]["layers"][0]["new_size"] = 11
        (folder / "trainer_state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"ends with state sizes \[11, 4\], its weights have \[4, 4\]"):
            make_trainer(folder.parent, max_steps=14).train(resume_from_checkpoint=str(folder))
