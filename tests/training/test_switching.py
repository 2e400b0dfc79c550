"""A Trainer with the callback trains stock layers by this package's ops, and leaves the model as it was."""

import copy
import json

import pytest
import torch
from helpers import arguments
from selective_models import STOCK, make
from test_selective_training import data
from transformers import Trainer, TrainerCallback

from hf_compressm import CompressionConfig, CompreSSMCallback, Target, use_fast_ops
from hf_compressm.models.automatic import lent_mixers
from hf_compressm.surgery import CutSettings, make_plan
from hf_compressm.surgery.processes import ProcessTeam

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2"])
CUT = {"policy": "target", "target_state_size": 3, "cut_steps": [2]}


class Watch(TrainerCallback):
    """What each step saw; fails at one of them if told to."""

    def __init__(self, fail_at=None):
        self.lent, self.copies, self.fail_at = [], [], fail_at

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.lent.append(len(lent_mixers(model)))
        self.copies.append([type(module) for module in copy.deepcopy(model).modules()])
        if state.global_step == self.fail_at:
            raise KeyError("a training that fails")


def trainer_of(model, folder, *callbacks, **settings):
    return Trainer(model, arguments(folder, **settings), train_dataset=data(), callbacks=list(callbacks))


def classes(model):
    return [type(module) for module in model.modules()]


@KINDS
def test_on_while_training_off_behind_it_and_the_same_files(kind, tmp_path):
    losses, configs = [], []
    for fast in (True, False):
        model, watch = make(STOCK, kind).train(), Watch()
        before = classes(model)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
        trainer = trainer_of(model, tmp_path / str(fast), CompreSSMCallback(**CUT, fast_ops=fast), watch, **settings)
        trainer.train()
        assert watch.lent == [3 * fast] * 4 and all(found == before for found in watch.copies)
        assert classes(model) == before and not lent_mixers(model)
        losses.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
        configs.append((tmp_path / str(fast) / "checkpoint-3" / "config.json").read_text())
    assert torch.allclose(*losses, atol=1e-3)
    histories = [json.loads(config).pop("compression_history") for config in configs]
    assert [[layer["new_size"] for layer in record["layers"]] for record in histories[0]] == [
        [layer["new_size"] for layer in record["layers"]] for record in histories[1]
    ]
    plain = [{k: v for k, v in json.loads(config).items() if k != "compression_history"} for config in configs]
    assert plain[0] == plain[1]


@KINDS
def test_off_behind_an_error_and_on_again_in_the_next_training(kind, tmp_path):
    model, watch = make(STOCK, kind).train(), Watch(fail_at=1)
    before = classes(model)
    trainer = trainer_of(model, tmp_path, CompreSSMCallback(**CUT), watch, max_steps=4)
    for _ in range(2):
        with pytest.raises(KeyError, match="a training that fails"):
            trainer.train()
        assert classes(model) == before and watch.lent == [3, 3]
        watch.lent.clear()


def test_what_the_user_switched_on_stays_on(tmp_path):
    model, watch = make(STOCK, "mamba").train(), Watch()
    use_fast_ops(model)
    before = classes(model)
    trainer_of(model, tmp_path, CompreSSMCallback(**CUT), watch, max_steps=3).train()
    assert watch.lent == [0, 0, 0] and classes(model) == before


def test_a_model_of_model_init(tmp_path):
    watch = Watch()
    trainer = Trainer(
        args=arguments(tmp_path, max_steps=2),
        model_init=lambda: make(STOCK, "mamba").train(),
        train_dataset=data(),
        callbacks=[CompreSSMCallback(CompressionConfig(**CUT)), watch],
    )
    trainer.train()
    assert watch.lent == [3, 3] and not lent_mixers(trainer.model)


def test_the_switch_reaches_the_refit_of_a_cut(monkeypatch):
    monkeypatch.setattr("hf_compressm.models.automatic.fast_class", lambda stock: pytest.fail("switched on"))
    model = make(STOCK, "mamba2")
    batches = [{"input_ids": torch.arange(48).reshape(2, 24) % model.config.vocab_size}]
    settings = CutSettings(Target(3), refit_steps=1, fast_ops=False)
    plan = make_plan(model, settings=settings, calibration=batches, team=ProcessTeam())
    assert plan.cuts
