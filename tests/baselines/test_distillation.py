"""Distillation with the plain Trainer: the loss by hand, accumulation, language models, and what is refused."""

import pytest
import torch
from datasets import Dataset
from helpers import arguments, small_data, small_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import Trainer

from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM
from hf_compressm.baselines import DistillationCallback


def student():
    return small_model(seed=0, state_sizes=3, dropout=0.0)


def teacher(**config):
    return small_model(seed=1, state_sizes=12, dropout=0.0, **config)


def language_model(seed, state_sizes):
    torch.manual_seed(seed)
    config = MimoSSMConfig(
        vocab_size=7, hidden_size=6, num_hidden_layers=1, state_sizes=state_sizes, dropout=0.0, r_min=0.3, r_max=0.9
    )
    return MimoSSMForCausalLM(config)


def trained(folder, callback, model=None, data=None, **settings):
    model = model or student()
    trainer = Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=data or small_data(),
        callbacks=[callback] if callback else [],
    )
    trainer.train()
    return model, trainer


def same(one, other, **tolerance):
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, **tolerance)


@pytest.mark.parametrize("alpha,T", [(0.5, 2.0), (0.0, 3.0), (1.0, 2.0)])
def test_the_loss_of_a_classifier_by_hand(tmp_path, alpha, T):
    taught, model = teacher().eval(), student()
    batch = small_data().select(range(64))[:]
    with torch.no_grad():
        z, t = model(input_values=batch["input_values"]).logits, taught(input_values=batch["input_values"]).logits
    soft = kl_div((z / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
    expected = alpha * cross_entropy(z, batch["labels"]) + (1 - alpha) * T**2 * soft
    _, trainer = trained(
        tmp_path, DistillationCallback(taught, alpha, T), max_steps=1, per_device_train_batch_size=64, logging_steps=1
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_alpha_one_is_training_without_a_teacher(tmp_path):
    plain, _ = trained(tmp_path, None, max_steps=5)
    same(plain, trained(tmp_path, DistillationCallback(teacher(), 1.0), max_steps=5)[0])


def tokens(count=32, length=9):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):  # sequences with different numbers of labels
        labels[row, : row % 6] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")


@pytest.mark.parametrize("language", [False, True])
def test_accumulation_changes_nothing(tmp_path, language):
    def run(**settings):
        model, taught = (language_model(0, 3), language_model(1, 9)) if language else (student(), teacher())
        data = tokens() if language else small_data()
        return trained(tmp_path, DistillationCallback(taught), model, data, max_steps=4, **settings)[0]

    # float32 sums in another order, and Adam divides by the gradient's own size
    same(
        run(per_device_train_batch_size=8),
        run(per_device_train_batch_size=4, gradient_accumulation_steps=2),
        rtol=2e-3,
        atol=2e-5,
    )


def test_the_loss_of_a_language_model_by_hand(tmp_path):
    model, taught, data, T = language_model(0, 3), language_model(1, 9).eval(), tokens(), 2.0
    batch = data[:]
    with torch.no_grad():
        z, t = model(batch["input_ids"]).logits[:, :-1], taught(batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    soft = kl_div((z[kept] / T).log_softmax(-1), (t[kept] / T).softmax(-1), reduction="batchmean")
    expected = 0.5 * cross_entropy(z[kept], labels[kept]) + 0.5 * T**2 * soft
    _, trainer = trained(
        tmp_path,
        DistillationCallback(taught),
        model,
        data,
        max_steps=1,
        per_device_train_batch_size=32,
        logging_steps=1,
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_student_comes_close_to_its_teacher(tmp_path):
    taught = teacher().eval()
    data = small_data()

    @torch.no_grad()
    def distance(model):  # up to a constant, which softmax does not see
        values = data[:]["input_values"]
        logits = [one(input_values=values).logits.log_softmax(-1) for one in (model.eval(), taught)]
        return float((logits[0] - logits[1]).norm())

    before = distance(student())
    model, trainer = trained(tmp_path, DistillationCallback(taught, alpha=0.0), max_steps=60)
    assert distance(model) < 0.3 * before
    assert not model._forward_hooks and not any("teacher" in name for name, _ in model.named_parameters())
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(
        float(cross_entropy(model(input_values=data[:]["input_values"]).logits, data[:]["labels"])), rel=1e-4
    )


def test_what_cannot_be_distilled_is_refused(tmp_path):
    for settings, message in (({"alpha": 1.5}, "alpha, .* in \\[0, 1\\]; got 1.5"), ({"temperature": 0}, "got 0")):
        with pytest.raises(ValueError, match=message):
            DistillationCallback(teacher(), **settings)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trained(tmp_path, DistillationCallback(teacher()), label_smoothing_factor=0.1)
    other = teacher()
    other.score = torch.nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"teacher's logits have shape \(8, 5\), the student's \(8, 3\)"):
        trained(tmp_path, DistillationCallback(other))
    data = small_data().remove_columns("labels")
    with pytest.raises(ValueError, match="with keywords, labels among them|did not return a loss"):
        trained(tmp_path, DistillationCallback(teacher()), data=data)
