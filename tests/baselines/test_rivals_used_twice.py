"""The rivals' callbacks used for several trainings, and the models that their hooks are on."""

import copy
import io
import pickle

import pytest
import torch
from helpers import arguments, small_data, small_model
from torch.nn import Module
from transformers import Trainer, TrainerCallback

from hf_compressm.baselines import DistillationCallback, HankelNormCallback, RivalCutCallback
from hf_compressm.surgery import measure_model

STEPS = 4
KINDS = {
    "distillation": lambda: DistillationCallback(small_model(seed=9, norm="layer")),
    "hankel": lambda: HankelNormCallback(0.1),
    "score": lambda: RivalCutCallback("last", 3, cut_steps=[1, 3]),
}


def train(folder, callbacks=(), seed=0, model=None, **settings):
    """The parameters and the log of a training, without times."""
    model = small_model(seed=seed, norm="layer", dropout=0.0) if model is None else model
    args = arguments(folder, **({"max_steps": STEPS, "logging_steps": 1} | settings))
    trainer = Trainer(model, args, train_dataset=small_data(32, 6), callbacks=list(callbacks))
    trainer.train()
    log = [{k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in trainer.state.log_history]
    return [parameter.detach().clone() for parameter in model.parameters()], log


def assert_same(one, two):
    assert len(one[0]) == len(two[0]) and all(map(torch.equal, one[0], two[0]))
    assert one[1] == two[1]


class At(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.step = None
            self.action(model)


class FailInside(Module):
    """A layer that fails when it is called for the last time, in the middle of a step."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *args, **kwargs):
        self.calls -= 1
        if self.calls == 0:
            raise KeyError("here")
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_used_twice_and_nested_is_as_several(tmp_path, kind):
    alone = [train(tmp_path, [KINDS[kind]()], seed, max_steps=STEPS + seed) for seed in (0, 1)]
    callback, found = KINDS[kind](), {}
    for seed in (0, 1):
        assert_same(train(tmp_path, [callback], seed, max_steps=STEPS + seed), alone[seed])

    def inside(model):
        with torch.random.fork_rng():
            found["inner"] = train(tmp_path, [callback], 1, max_steps=STEPS + 1)

    assert_same(train(tmp_path, [At(2, inside), callback]), alone[0])
    assert_same(found["inner"], alone[1])


@pytest.mark.parametrize("kind", ["distillation", "hankel"])
def test_a_training_that_an_error_ended_leaves_a_model_with_its_own_loss(tmp_path, kind):
    callback, model = KINDS[kind](), small_model(norm="layer", dropout=0.0)
    layers = model.backbone.layers
    layers[1] = FailInside(layers[1], 2)
    with pytest.raises(KeyError, match="here"):
        train(tmp_path, [callback], model=model)
    layers[1] = layers[1].inner
    fresh = copy.deepcopy(model)
    data = small_data(4, 6)[:]
    model.train()
    assert torch.equal(model(**data).loss, fresh.train()(**data).loss)  # by hand
    assert_same(train(tmp_path, model=model), train(tmp_path, model=fresh))
    assert not model._forward_hooks
    assert_same(train(tmp_path, [callback], 1), train(tmp_path, [KINDS[kind]()], 1))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "kind,way", [("distillation", torch_saved), ("distillation", copy.deepcopy), ("hankel", pickled)]
)
def test_a_copy_made_in_training_has_its_own_loss_and_no_teacher(tmp_path, kind, way):
    copies = []

    def take(model):
        copies.append((way(model), [p.detach().clone() for p in model.parameters()], len(pickle.dumps(model))))

    train(tmp_path, [At(2, take), callback := KINDS[kind]()])
    other, values, size = copies[0]
    assert all(map(torch.equal, values, other.parameters()))
    plain = small_model(norm="layer", dropout=0.0)
    plain.load_state_dict(other.state_dict())
    assert_same(train(tmp_path, model=other), train(tmp_path, model=plain))
    assert size < 1.1 * len(pickle.dumps(plain))
    again = pickled(callback)
    assert_same(train(tmp_path, [again], 1), train(tmp_path, [callback], 1))


def test_the_norm_of_an_earlier_training_is_not_logged(tmp_path):
    """The first training ends between two logs; the second logs before its first step."""
    callback = HankelNormCallback(0.1)
    broken = At(3, lambda model: (_ for _ in ()).throw(KeyError("here")))
    with pytest.raises(KeyError):
        train(tmp_path, [callback, broken], logging_steps=10)
    model = small_model(seed=1, norm="layer", dropout=0.0)
    settings = {"max_steps": 1, "eval_on_start": True, "eval_strategy": "steps"}
    trainer = Trainer(
        model,
        arguments(tmp_path, **settings),
        train_dataset=small_data(8, 6),
        eval_dataset=small_data(4, 6),
        callbacks=[callback],
    )
    before = sum(float(measured.spectrum().sum()) for measured in measure_model(model).values())
    trainer.train()
    logged = [entry["hankel_norm"] for entry in trainer.state.log_history if "hankel_norm" in entry]
    assert logged == [pytest.approx(before, rel=1e-4)]
