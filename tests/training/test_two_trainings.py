"""One callback, several trainings: each is as if it had a callback of its own."""

import json
import random as python_random
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import arguments, small_data, small_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history
from hf_compressm.surgery.record_keys import STATE_FILE
from hf_compressm.training import DurableCheckpoints, newest_checkpoint

STEPS = 8
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "learning_rate": 3e-2}
HALF = {"policy": "fraction", "keep_fraction": 0.5}
HURTS = {"rollback": True, "rollback_greater_is_better": True}
"""The loss falls while training; told that higher is better, the callback sees it get worse."""
SETTLES = {"trigger": "stability", "stability_interval": 2, "stability_patience": 2, "window_end": 1.0}
MODES = {
    "energy": ({"tau": 0.3, "window_end": 0.8}, {}),
    "random": ({"cut_steps": [2, 5], "selection": "random", **HALF}, {}),
    "stability": ({**SETTLES, **HALF, "stability_threshold": 0.3}, {}),
    "never settled": ({**SETTLES, "stability_threshold": 1.0, "stability_patience": 9}, {}),
    "rollback undone": ({"cut_steps": [4], **HALF, **HURTS}, EVALUATED | {"eval_steps": 2}),
    "rollback due at the end": ({"cut_steps": [5], **HALF, **HURTS}, EVALUATED | {"eval_steps": 4}),
    "rollback not judged at the end": ({"cut_steps": [8], **HALF, **HURTS}, EVALUATED),
}


def make_trainer(folder, callback, seed=0, callbacks=(), model=None, **settings):
    data = small_data(32, 6)
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS, "per_device_train_batch_size": 4}
    return Trainer(
        small_model(seed=seed, dropout=0.2) if model is None else model,
        arguments(folder, **(defaults | settings)),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, *callbacks],
    )


def checkpoint(folder, step=STEPS) -> Path:
    return Path(folder) / f"checkpoint-{step}"


def same(one, two) -> bool:
    """Whether two trees of mappings, lists, tensors and plain values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def saved(folder) -> dict:
    """What the last checkpoint says of weights, optimizer, config, the callback and its log, without times."""
    folder = checkpoint(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    times = ("seconds", "runtime", "per_second")
    log = [{k: v for k, v in entry.items() if not any(t in k for t in times)} for entry in state["log_history"]]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(folder / "optimizer.pt", weights_only=True),
        "config": (folder / "config.json").read_bytes(),
        "callback": state["stateful_callbacks"]["CompreSSMCallback"],
        "work": (folder / STATE_FILE).read_bytes() if (folder / STATE_FILE).exists() else None,
        "log": log,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Checkpoints of trainings with a callback of their own, by mode and seed; each is made once."""
    made = {}

    def train(mode, seed):
        if (mode, seed) not in made:
            settings, options = MODES[mode]
            folder = tmp_path_factory.mktemp("alone")
            make_trainer(folder, CompreSSMCallback(**settings), seed, **options | {"save_steps": 3}).train()
            made[mode, seed] = folder
        return made[mode, seed]

    return train


@pytest.mark.parametrize("mode", MODES)
def test_a_callback_used_twice_is_as_two(tmp_path, alone, mode):
    settings, options = MODES[mode]
    callback = CompreSSMCallback(**settings)
    for seed in (0, 1):  # the first has the callback to itself
        make_trainer(tmp_path / str(seed), callback, seed, **options | {"save_steps": 3}).train()
    assert same(saved(tmp_path / "1"), saved(alone(mode, 1)))
    assert callback.timer.segments[0].first_step == 0
    assert sum(segment.steps for segment in callback.timer.segments) == STEPS


@pytest.mark.parametrize("mode", ["energy", "stability", "rollback undone", "rollback not judged at the end"])
def test_a_resumed_training_with_a_used_callback_is_as_one_with_its_own(tmp_path, alone, mode):
    """The callback comes from a training whose ranking was followed and whose cut was never judged."""
    settings, options = MODES[mode]
    callback = CompreSSMCallback(**settings)
    make_trainer(tmp_path / "first", callback, 1, **options | {"save_steps": 3}).train()
    for step in (3, 6):
        shutil.copytree(alone(mode, 0), tmp_path / str(step))
        shutil.rmtree(checkpoint(tmp_path / str(step)))
        trainer = make_trainer(tmp_path / str(step), callback, 2, **options | {"save_steps": 3})
        trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path / str(step), step)))
        assert same(saved(tmp_path / str(step)), saved(alone(mode, 0))), step


def test_trainings_of_one_callback_may_be_nested(tmp_path, alone):
    """An outer training that trains another model in the middle of its steps, before and after its own cut."""
    mode = "rollback undone"
    settings, options = MODES[mode]
    callback = CompreSSMCallback(**settings)

    class TrainInside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 5):
                random = torch.random.get_rng_state(), np.random.get_state(), python_random.getstate()
                folder = tmp_path / f"inner-{state.global_step}"
                make_trainer(folder, callback, 1, **options | {"save_steps": 3}).train()
                torch.random.set_rng_state(random[0]), np.random.set_state(random[1])
                python_random.setstate(random[2])

    make_trainer(tmp_path / "outer", callback, 0, callbacks=[TrainInside()], **options | {"save_steps": 3}).train()
    assert same(saved(tmp_path / "outer"), saved(alone(mode, 0)))
    for step in (2, 5):
        assert same(saved(tmp_path / f"inner-{step}"), saved(alone(mode, 1))), step


class FailAt(TrainerCallback):
    """Raises in a step, the first time it comes."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("mode", ["stability", "rollback undone", "rollback due at the end"])
def test_a_training_that_an_error_ended_leaves_nothing(tmp_path, alone, mode):
    settings, options = MODES[mode]
    callback = CompreSSMCallback(**settings)
    broken = make_trainer(tmp_path / "broken", callback, 1, [FailAt(5, KeyError("here"))], **options)
    with pytest.raises(KeyError, match="here"):
        broken.train()
    make_trainer(tmp_path / "whole", callback, 0, **options | {"save_steps": 3}).train()
    assert same(saved(tmp_path / "whole"), saved(alone(mode, 0)))


def test_a_smaller_batch_after_too_little_memory_begins_again_with_the_model_as_it_is(tmp_path):
    """`auto_find_batch_size` starts training anew with a model that is cut already, and a cut not judged yet."""
    settings, options = MODES["rollback undone"]
    callback = CompreSSMCallback(**settings | {"cut_steps": [3, 6], "rollback_greater_is_better": False})
    error = RuntimeError("CUDA out of memory.")
    trainer = make_trainer(tmp_path, callback, callbacks=[FailAt(3, error)], auto_find_batch_size=True, **options)
    trainer.train()
    events = [(record["event"], record["step"]) for record in history(trainer.model)]
    assert events == [("cut", 3), ("cut", 3), ("cut", 6)]  # a share of the first size, not of the present one
    assert state_sizes(trainer.model) == trainer.model.config.state_sizes == [6, 6]
    assert trainer.state.global_step == STEPS == sum(segment.steps for segment in callback.timer.segments)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    assert callback.timer.segments[0].first_step == 0


def test_folds_by_model_init_and_train_called_twice(tmp_path, alone):
    """One Trainer that makes a fresh model for each training, also one that is resumed at another size."""
    settings, options = MODES["rollback due at the end"]
    data = small_data(32, 6)

    def make(folder, callback):
        args = arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=2, **options)
        both = {"train_dataset": data, "eval_dataset": data}
        return Trainer(None, args, model_init=lambda: small_model(dropout=0.2), callbacks=[callback], **both)

    one, callback = make(tmp_path / "one", CompreSSMCallback(**settings)), CompreSSMCallback(**settings)
    one.train()
    expected = saved(tmp_path / "one")
    two = make(tmp_path / "two", callback)
    first = two.model
    for resumed in (None, str(checkpoint(tmp_path / "one", 6)), None):
        two.train(resume_from_checkpoint=resumed)
        assert same(saved(tmp_path / "two"), expected), resumed
        assert not two.model._load_state_dict_pre_hooks
    assert first is not two.model and state_sizes(first) == [12, 12]


class Optuna(ModuleType):
    """What `Trainer.hyperparameter_search` uses of optuna."""

    class TrialPruned(Exception):
        pass

    class Trial:
        def __init__(self, number, study, pruned):
            self.number, self.study, self.pruned, self.params = number, study, pruned, {}

        def report(self, value, step):
            self.step = step

        def should_prune(self):
            return self.number == self.pruned and self.step > 4

    def __init__(self, pruned):
        super().__init__("optuna")
        self.__spec__, self.pruned = ModuleSpec("optuna", None), pruned
        self.trial = SimpleNamespace(BaseTrial=self.Trial)

    def create_study(self, **kwargs):
        return self

    def _is_multi_objective(self):
        return False

    def optimize(self, objective, n_trials, **kwargs):
        for number in range(n_trials):
            self.best_trial = self.Trial(number, self, self.pruned)
            try:
                self.best_trial.value = objective(self.best_trial)
            except self.TrialPruned:
                assert number == self.pruned


def test_hyperparameter_search_with_a_trial_that_is_pruned(tmp_path, monkeypatch):
    """Every trial is as a training of its own, also after one that ended with a cut that was to be undone."""
    monkeypatch.setitem(sys.modules, "optuna", Optuna(pruned=1))
    settings, options = MODES["rollback undone"]
    data, callback = small_data(32, 6), CompreSSMCallback(**settings)
    args = arguments(tmp_path, max_steps=STEPS, save_strategy="steps", save_steps=3, **options)
    trainer = Trainer(
        model_init=lambda: small_model(dropout=0.2),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, DurableCheckpoints()],
    )
    trainer.hyperparameter_search(lambda trial: {"learning_rate": 3e-2}, backend="optuna", n_trials=3)
    found = [saved(tmp_path / f"run-{number}") for number in (0, 2)]
    assert same(*found) and len(found[0]["callback"]["attributes"]["saved"]["history"]) == 2
    assert newest_checkpoint(tmp_path / "run-2") == checkpoint(tmp_path / "run-2")
    assert newest_checkpoint(tmp_path / "run-1") == checkpoint(tmp_path / "run-1", 3)
