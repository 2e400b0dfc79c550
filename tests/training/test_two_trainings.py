"""One callback, several trainings: each is as if it had a callback of its own."""

import json
from pathlib import Path

import pytest
import torch
from helpers import arguments, small_data, small_model
from safetensors.torch import load_file
from transformers import Trainer

from hf_compressm import CompreSSMCallback
from hf_compressm.training.checkpoint import STATE_NAME

STEPS = 8
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "learning_rate": 3e-2}
HALF = {"policy": "fraction", "keep_fraction": 0.5}
HURTS = {"rollback": True, "rollback_greater_is_better": True}
"""The loss falls while training; told that higher is better, the callback sees it get worse."""
SETTLES = {"trigger": "stability", "stability_interval": 2, "stability_patience": 2, "window_end": 1.0}
MODES = {
    "energy": ({"tau": 0.3, "window_end": 0.8}, {}),
    "steps": ({"cut_steps": [2, 5], **HALF}, {}),
    "random": ({"cut_steps": [2, 5], "selection": "random", **HALF}, {}),
    "target": ({"policy": "target", "target_state_size": 3, "window_end": 0.8}, {}),
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
        "work": (folder / STATE_NAME).read_bytes() if (folder / STATE_NAME).exists() else None,
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
    for seed in (0, 1):
        make_trainer(tmp_path / str(seed), callback, seed, **options | {"save_steps": 3}).train()
        assert same(saved(tmp_path / str(seed)), saved(alone(mode, seed))), (mode, seed)
    assert callback.timer.segments[0].first_step == 0
    assert sum(segment.steps for segment in callback.timer.segments) == STEPS
