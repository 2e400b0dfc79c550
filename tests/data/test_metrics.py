"""Accuracy and Perplexity against closed forms, through the interface of `evaluate`, without a network."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_compressm.data import Accuracy, Perplexity, classification_metrics


@pytest.fixture(autouse=True)
def no_files(tmp_path, monkeypatch):
    """Metrics must write neither to the current folder nor to evaluate's cache."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    yield
    assert os.listdir(tmp_path) == ["here"] and not os.listdir(tmp_path / "here")


def test_accuracy_over_batches():
    metric = Accuracy()
    metric.add_batch(predictions=np.array([1, 2, 3]), references=np.array([1, 2, 0]))
    metric.add_batch(predictions=torch.tensor([4]), references=torch.tensor([4]))
    assert metric.compute() == {"accuracy": 0.75}
    assert metric.compute(predictions=[0], references=[1]) == {"accuracy": 0.0}, "the first batches must be gone"


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    result = Perplexity().compute(nll=[math.log(256)] * 5, num_tokens=[1] * 5)
    assert result["perplexity"] == pytest.approx(256, rel=1e-12)
    assert result["nats_per_token"] == pytest.approx(math.log(256), rel=1e-12)


def test_perplexity_weighs_batches_by_their_tokens():
    per_token = np.random.default_rng(0).exponential(2.0, 100)
    batches = [per_token[:64], per_token[64:96], per_token[96:]]
    metric = Perplexity()
    for batch in batches:
        metric.add_batch(nll=[batch.mean()], num_tokens=[len(batch)])
    result = metric.compute()
    assert result["nats_per_token"] == pytest.approx(per_token.mean(), rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(per_token.mean()), rel=1e-12)


def test_perplexity_beyond_a_float_is_infinite():
    result = Perplexity().compute(nll=[1000.0], num_tokens=[1])
    assert result == {"perplexity": math.inf, "nats_per_token": 1000.0}


def test_combine():
    both = evaluate.combine([Accuracy(), Perplexity()])
    both.add_batch(predictions=[1, 0], references=[1, 1], nll=[0.5], num_tokens=[2])
    both.add_batch(predictions=[3], references=[3], nll=[2.0], num_tokens=[1])
    assert both.compute() == {
        "accuracy": pytest.approx(2 / 3),
        "perplexity": pytest.approx(math.e),
        "nats_per_token": pytest.approx(1.0),
    }


def test_instances_at_work_at_the_same_time_do_not_meet():
    def evaluate_one(right):
        metric = Accuracy()
        for i in range(20):
            metric.add_batch(predictions=[1], references=[1 if i < right else 0])
        return metric.compute()["accuracy"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(evaluate_one, range(1, 9))) == [right / 20 for right in range(1, 9)]


def test_several_processes_need_an_experiment_id():
    with pytest.raises(ValueError, match="experiment_id"):
        Accuracy(num_process=2, process_id=0)


@pytest.mark.parametrize(
    "metric, inputs, message",
    [
        (Accuracy, {"predictions": [1, 2], "references": [1]}, "[Mm]ismatch"),
        (Accuracy, {"predictions": [0.5], "references": [1]}, "not probabilities"),
        (Accuracy, {"predictions": [[0.1, 0.9]], "references": [1]}, "expected format"),
        (Accuracy, {"predictions": [], "references": []}, "no predictions"),
        (Accuracy, {}, "nothing to compute.*predictions, references"),
        (Perplexity, {"nll": [1.0, 2.0], "num_tokens": [1]}, "[Mm]ismatch"),
        (Perplexity, {"nll": [1.0, 2.0], "num_tokens": [1, 0]}, "at least 1, got 0"),
        (Perplexity, {}, "nothing to compute.*nll, num_tokens"),
    ],
)
def test_wrong_inputs_raise(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(**inputs)


def test_classification_metrics_takes_the_largest_logit():
    logits = np.array([[0.0, 2.0, 1.0], [5.0, -1.0, 0.0], [0.0, 0.0, 1.0], [9.0, 8.0, 7.0]])
    labels = np.array([1, 0, 2, 2])
    assert classification_metrics(EvalPrediction(logits, labels)) == {"accuracy": 0.75}
    assert classification_metrics(EvalPrediction((logits, np.zeros(3)), labels)) == {"accuracy": 0.75}


@pytest.mark.parametrize("shape, count", [((4,), 4), ((4, 5, 3), 4), ((4, 3), 5)])
def test_classification_metrics_checks_shapes(shape, count):
    with pytest.raises(ValueError, match="shapes"):
        classification_metrics(EvalPrediction(np.zeros(shape), np.zeros(count, dtype=int)))
