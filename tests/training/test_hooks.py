"""What the callback hangs on a model: it holds nothing, leaves at the end, and serves the Trainer that loads."""

import copy
import io
import pickle

import pytest
import torch
from helpers import small_data, small_model
from safetensors.torch import load_file
from test_two_trainings import HALF, STEPS, checkpoint, make_trainer, same, saved
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history
from hf_compressm.training import verify_checkpoint

CUT = 4
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "learning_rate": 3e-2,
}


class BestIsFirst(TrainerCallback):
    """Replaces the metric so that the first evaluation, at full size, is the best."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


class At(TrainerCallback):
    """Hands the model to a function at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def compression():
    return CompreSSMCallback(cut_steps=[CUT], **HALF)


def hooks(model) -> list:
    """Every hook on the model and the modules in it."""
    names = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]
    return [hook for module in model.modules() for name in names for hook in getattr(module, name).values()]


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES = {
    "torch.save": torch_saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_values=small_data(4, 6)[:]["input_values"]).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, compression()).train()
    return folder


@pytest.mark.parametrize("way", COPIES)
def test_a_model_can_be_copied_and_saved_at_any_moment(tmp_path, whole, way):
    """Before, in and after training, which is not changed by it; nothing is left on the model, and what is left on a
    copy leaves when the copy is trained."""
    found = []

    def take(model):
        mode = model.training
        found.append((COPIES[way](model), state_sizes(model), logits(copy.deepcopy(model))))
        assert model.training is mode

    trainer = make_trainer(tmp_path / "run", compression(), callbacks=[At(CUT - 1, take), At(CUT + 2, take)])
    take(trainer.model)
    trainer.train()
    take(trainer.model)
    assert same(saved(tmp_path / "run"), saved(whole)) and not hooks(trainer.model)
    assert [sizes for _, sizes, _ in found] == [[12, 12], [12, 12], [6, 6], [6, 6]]
    for model, sizes, expected in found:
        assert state_sizes(model) == sizes and torch.equal(logits(model), expected)
    model = found[1][0]
    make_trainer(tmp_path / "again", compression(), model=model).train()
    assert state_sizes(model) == [6, 6] and not hooks(model)


def test_a_copy_of_a_trained_model_trains_as_the_model_does(tmp_path):
    trainer = make_trainer(tmp_path / "first", compression(), callbacks=[BestIsFirst()], **BEST)
    trainer.train()
    model, twin = trainer.model, copy.deepcopy(trainer.model)
    make_trainer(tmp_path / "twin", compression(), model=twin).train()
    make_trainer(tmp_path / "model", compression(), model=model).train()
    assert same(saved(tmp_path / "twin"), saved(tmp_path / "model"))
    assert state_sizes(twin) == state_sizes(model) == [6, 6] and not hooks(model) and not hooks(twin)


@pytest.mark.parametrize("shared", [True, False])
def test_a_second_trainer_loads_its_best_model_across_a_cut(tmp_path, shared):
    """And its history is that of the model, so that cuts go on and checkpoints are sound."""
    first = make_trainer(tmp_path / "0", callback := compression(), callbacks=[BestIsFirst()], **BEST)
    first.train()
    model = first.model
    for run in (1, 2):
        assert state_sizes(model) == model.config.state_sizes == [12, 12] and history(model) == []
        callback = callback if shared else compression()
        trainer = make_trainer(tmp_path / str(run), callback, model=model, callbacks=[BestIsFirst()], **BEST)
        trainer.train()
        assert trainer.state.best_global_step == 2 and not hooks(model)
        best = load_file(checkpoint(tmp_path / str(run), 2) / "model.safetensors")
        assert all(torch.equal(best[key], value) for key, value in model.state_dict().items())
        held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
        for step in (2, STEPS):
            verify_checkpoint(checkpoint(tmp_path / str(run), step))
    again = make_trainer(tmp_path / "again", compression(), seed=3)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path / "2", 2)))
    assert state_sizes(again.model) == [6, 6] and [record["step"] for record in history(again.model)] == [CUT]


def test_the_same_trainer_goes_back_to_a_checkpoint_from_before_a_cut(tmp_path, whole):
    trainer = make_trainer(tmp_path, compression(), save_steps=2)
    trainer.train()
    assert state_sizes(trainer.model) == [6, 6] and not hooks(trainer.model)
    trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 2)))
    assert same(saved(tmp_path), saved(whole)) and not hooks(trainer.model)


def test_loading_by_hand_changes_sizes_in_training_only(tmp_path):
    """In training the running Trainer's optimizer follows; afterwards the model is as any other."""
    kept = {}

    def keep(model):
        kept.update(copy.deepcopy(model.state_dict()))

    def back(model):
        model.load_state_dict(kept)

    actions = [At(CUT - 1, keep), At(CUT + 1, back)]
    trainer = make_trainer(tmp_path, compression(), callbacks=actions)
    trainer.train()
    model = trainer.model
    assert state_sizes(model) == model.config.state_sizes == [12, 12]
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert not any(torch.equal(kept[name], value) for name, value in model.named_parameters())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(small_model(state_sizes=6).state_dict())


def test_a_callback_that_is_copied_or_pickled_in_training_knows_nothing_of_it(tmp_path, whole):
    copies = []

    def take(model):
        copies.extend(work(callback) for work in (copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))))

    callback = compression()
    make_trainer(tmp_path / "run", callback, callbacks=[At(CUT + 1, take)]).train()
    for index, other in enumerate(copies):
        make_trainer(tmp_path / str(index), other).train()
        assert same(saved(tmp_path / str(index)), saved(whole))
    assert len(copies) == 3
