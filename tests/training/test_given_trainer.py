"""A callback that is given its Trainer does what one does that finds it on the call stack."""

import copy
import pickle

import pytest
from helpers import arguments, small_data, small_model
from transformers import Trainer

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history

SETTINGS = {"cut_steps": [2, 4], "policy": "fraction", "keep_fraction": 0.5}
TIMES = ("seconds", "speed", "runtime", "per_second")


def make_trainer(folder, callbacks=(), **settings):
    data = small_data(32, 6)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | settings
    return Trainer(small_model(), arguments(folder, **settings), train_dataset=data, callbacks=list(callbacks))


def logged(trainer):
    return [{k: v for k, v in e.items() if not any(t in k for t in TIMES)} for e in trainer.state.log_history]


def test_it_trains_logs_and_resumes_as_one_that_finds_it(tmp_path):
    found = make_trainer(tmp_path / "found", [CompreSSMCallback(**SETTINGS)])
    found.train()
    given = make_trainer(tmp_path / "given")
    callback = CompreSSMCallback(trainer=given, **SETTINGS)
    given.add_callback(callback)
    assert callback.trainer is given
    given.train()
    assert history(given.model) == history(found.model) and len(history(given.model)) == 2
    assert logged(given) == logged(found)
    resumed = make_trainer(tmp_path / "given")  # a model of the original size
    callback = CompreSSMCallback(**SETTINGS)
    callback.trainer = resumed
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "given" / "checkpoint-3"))
    assert history(resumed.model) == history(given.model) and state_sizes(resumed.model) == state_sizes(given.model)


def test_without_a_given_trainer_it_comes_too_late_to_resize_what_is_loaded(tmp_path):
    trainer = make_trainer(tmp_path, [CompreSSMCallback(**SETTINGS)])
    trainer.train()
    late = make_trainer(tmp_path)
    late.add_callback(CompreSSMCallback(**SETTINGS))
    with pytest.raises(RuntimeError, match="size mismatch"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_it_serves_no_other_trainer(tmp_path):
    given = make_trainer(tmp_path / "given")
    other = make_trainer(tmp_path / "other", [CompreSSMCallback(trainer=given, **SETTINGS)])
    with pytest.raises(ValueError, match="given another Trainer than the one that trains"):
        other.train()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_is_given_none(tmp_path, duplicate):
    callback = CompreSSMCallback(trainer=make_trainer(tmp_path), **SETTINGS)
    copied = duplicate(callback)
    assert copied.trainer is None and copied.config == callback.config and callback.trainer is not None
