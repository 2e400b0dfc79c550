"""The digits task: its split, its values, and that a plain `Trainer` reads it."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments

from hf_compressm.data import load_task
from hf_compressm.data.digits import FRACTIONS
from hf_compressm.data.pixels import stratified_split

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def task():
    return load_task("digits")


@pytest.fixture(scope="module")
def parts():
    return stratified_split(load_digits().target, FRACTIONS)


def test_split_sizes_are_70_10_20(task):
    assert [len(getattr(task, split)) for split in SPLITS] == [1258, 180, 359]


def test_split_uses_every_image_once(parts):
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))


def test_split_is_stratified(task):
    counts = np.bincount(load_digits().target)
    for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
        kept = np.bincount(np.asarray(getattr(task, split)["labels"][:]), minlength=10)
        assert np.abs(kept - fraction * counts).max() <= 1


def test_split_indices_never_change(parts):
    digest = hashlib.sha256(b"|".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()
    assert digest == "f0564c75f2c2f9e9616b3413dc54c897f04179f8cb7e920c0c407ee8dd4f3312"


def test_split_does_not_follow_the_seed(task):
    other = load_task("digits", seed=123)
    for split in SPLITS:
        assert torch.equal(getattr(other, split)[:]["input_values"], getattr(task, split)[:]["input_values"])


def test_another_split_seed_gives_another_split(parts):
    assert not np.array_equal(stratified_split(load_digits().target, FRACTIONS, seed=1)[0], parts[0])


def test_items_are_the_pixels_row_by_row(task, parts):
    bunch = load_digits()
    train = bunch.data[parts[0]] / 16
    for split, part in zip(SPLITS, parts, strict=True):
        batch = getattr(task, split)[:]
        assert batch["input_values"].shape == (len(part), 64, 1)
        assert batch["input_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
        expected = (bunch.images[part].reshape(-1, 64, 1) / 16 - train.mean()) / train.std()
        # float32 holds 7 digits of values below 3
        np.testing.assert_allclose(batch["input_values"].numpy(), expected, atol=1e-6)
        np.testing.assert_array_equal(batch["labels"].numpy(), bunch.target[part])


def test_parts_of_the_data_decode_alone(task):
    assert task.test[:0]["input_values"].shape == (0, 64, 1)
    assert torch.equal(task.test["labels"][:3], task.test[:3]["labels"])


def test_train_pixels_have_zero_mean_and_unit_variance(task):
    values = task.train[:]["input_values"]
    assert values.mean().abs() < 1e-5 and (values.std() - 1).abs() < 1e-4


def test_model_kwargs_and_choices(task):
    assert task.model_kwargs["num_channels"] == 1 and task.model_kwargs["num_labels"] == 10
    assert task.model_kwargs["id2label"][3] == "3" and task.model_kwargs["label2id"]["3"] == 3
    assert (task.problem, task.metric_for_best_model, task.collator) == (
        "sequence_classification",
        "accuracy",
        None,
    )


def test_task_data_survives_pickling_for_loader_workers(task):
    copy = pickle.loads(pickle.dumps(task.validation))
    assert torch.equal(copy[5]["input_values"], task.validation[5]["input_values"])


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.2, -0.2)])
def test_fractions_must_be_shares(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        stratified_split(np.zeros(4), fractions)


class Lookup(torch.nn.Module):
    """Predicts the class of the nearest stored sequence, moved on by `offset`."""

    def __init__(self, memory, offset=0):
        super().__init__()
        self.memory, self.offset = memory, offset

    def forward(self, input_values, labels):
        distances = torch.cdist(input_values.flatten(1), self.memory["input_values"].flatten(1))
        predicted = (self.memory["labels"][distances.argmin(1)] + self.offset) % 10
        logits = torch.nn.functional.one_hot(predicted, 10).float()
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("offset, accuracy", [(0, 1.0), (1, 0.0)])
def test_trainer_evaluates_the_task_as_it_is(task, tmp_path, offset, accuracy):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(
        Lookup(task.test[:], offset),
        arguments,
        eval_dataset=task.test,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
    )
    assert trainer.evaluate()["eval_accuracy"] == accuracy
