"""One step over a whole batch and one over accumulated parts of it are the same step, for every class and problem."""

import copy

import pytest
import torch
from helpers import arguments
from own_models import CAUSAL, CLASSIFIERS, B, L, Own
from torch.utils.data import SequentialSampler
from transformers import Trainer

PROBLEMS = {
    "single_label_classification": (3, lambda g: torch.randint(0, 3, (B,), generator=g)),
    "multi_label_classification": (3, lambda g: torch.randint(0, 2, (B, 3), generator=g).float()),
    "regression to one": (1, lambda g: torch.randn(B, generator=g)),
    "regression to several": (4, lambda g: torch.randn(B, 4, generator=g)),
}
WHOLE, SPLIT = (B, 1), (3, 3)
"""Rows of a part, parts of a step: the last of eight rows in three parts is smaller."""


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def step(model, data, folder, rows, parts):
    """The gradients of one optimizer step, and the loss that the Trainer logs for it."""
    model = copy.deepcopy(model).train()
    args = arguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=parts,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        logging_steps=1,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = InOrder(model, args, train_dataset=data)
    trainer.train()
    changes = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    return changes, trainer.state.log_history[0]["loss"]


def by_hand(model, data):
    """The gradients of the mean over all label entries of the batch, and that mean."""
    model = copy.deepcopy(model).train()
    loss = model(**{key: torch.stack([row[key] for row in data]) for key in data[0]}).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, float(loss.detach())


def compare(model, data, folder, *splits):
    expected, loss = by_hand(model, data)
    for rows, parts in splits:
        found, logged = step(model, data, folder, rows, parts)
        assert logged == pytest.approx(loss, rel=1e-3, abs=1e-4)  # the Trainer's log has four digits
        for name, change in found.items():
            assert torch.allclose(change, expected[name], rtol=1e-3, atol=1e-5), (rows, parts, name)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name, problem, tmp_path):
    own, (labels, make) = Own(name), PROBLEMS[problem]
    # Where the config leaves it open, floats of several columns mean several labels at once.
    named = "regression" if problem == "regression to several" else None
    model = own.model(num_labels=labels, problem_type=named)
    targets = make(torch.Generator().manual_seed(1))
    if problem.startswith("single"):
        targets[3] = -100  # left out
    data = [{"input_ids": ids, "labels": target} for ids, target in zip(own.ids(), targets, strict=True)]
    compare(model, data, tmp_path, SPLIT)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name, tmp_path):
    own = Own(name)
    ids = own.ids()
    labels = ids.masked_fill(torch.arange(L) < torch.arange(B)[:, None] % 5, -100)
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    compare(own.model(), data, tmp_path, WHOLE, SPLIT)
