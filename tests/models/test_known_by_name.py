"""What transformers decides by the names of classes: shifted labels, losses, pipelines, tasks of model cards."""

import pytest
import torch
from helpers import arguments, run_without_the_package
from own_models import CAUSAL, CLASSIFIERS, STEPS, B, Own
from peft import LoraConfig, get_peft_model
from selective_models import STOCK, make
from transformers import Trainer
from transformers.modelcard import TrainingSummary
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_compressm import from_stock

CLASSES = pytest.mark.parametrize("name", CAUSAL)


def examples(model):
    ids = torch.randint(1, model.config.vocab_size, (B, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.masked_fill(torch.arange(9) < torch.arange(B)[:, None] % 4, -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def first_loss(model, folder, smoothing):
    """The loss that the Trainer logs for the first step, of two accumulated batches."""
    model.train()
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    args = arguments(folder, label_smoothing_factor=smoothing, learning_rate=0.0, **settings)
    trainer = Trainer(model, args, train_dataset=examples(model))
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def smoothed(model, epsilon):
    """Label smoothing's cross-entropy of the next tokens, by hand."""
    data = examples(model)
    ids, labels = (torch.stack([row[key] for row in data]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    labels = labels[:, 1:]
    kept = labels != -100
    nll = -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return float(((1 - epsilon) * nll - epsilon * log_probs.mean(-1))[kept].mean())


@CLASSES
def test_smoothed_losses_are_those_of_the_next_token(name, tmp_path):
    model = Own(name).model()
    assert first_loss(model, tmp_path, 0.0) == pytest.approx(smoothed(model, 0), abs=2e-4)
    assert first_loss(model, tmp_path, 0.1) == pytest.approx(smoothed(model, 0.1), abs=2e-4)


@pytest.mark.parametrize("kind", STOCK)
def test_smoothed_losses_are_those_of_the_stock_model(kind, tmp_path):
    stock = make(STOCK, kind)
    losses = [first_loss(model, tmp_path, 0.1) for model in (from_stock(stock), stock)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@CLASSES
def test_smoothed_losses_beneath_adapters(name, tmp_path):
    target = "in_proj" if "Mamba" in name else "out_proj"
    model = get_peft_model(Own(name).model(), LoraConfig(target_modules=[target], task_type="CAUSAL_LM"))
    assert first_loss(model, tmp_path, 0.1) == pytest.approx(smoothed(model, 0.1), abs=2e-4)


@CLASSES
def test_smoothed_losses_of_a_class_that_is_derived_from_ours(name, tmp_path):
    own = Own(name)
    torch.manual_seed(0)
    model = type("Derived", (own.cls,), {})(own.config())
    assert first_loss(model, tmp_path, 0.1) == pytest.approx(smoothed(model, 0.1), abs=2e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_class_derived_from_a_classifier_keeps_its_loss(name):
    own = Own(name)
    model = type("Derived", (own.cls,), {})(own.config(num_labels=3))
    labels = torch.arange(B) % 3
    output = model(input_ids=own.ids(), labels=labels)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


@pytest.mark.parametrize(
    ("names", "task"),
    [(CAUSAL, "text-generation"), (CLASSIFIERS, "text-classification"), (STEPS, "token-classification")],
)
def test_model_cards_name_the_task(names, task, tmp_path):
    for name in names:
        summary = TrainingSummary.from_trainer(Trainer(Own(name).model(), arguments(tmp_path)))
        assert summary.tasks == task, name


def test_tables_that_composite_models_read_have_our_types():
    own = {"compressm_gated_deltanet", "compressm_mamba", "compressm_mamba2", "compressm_minimax", "mimo_ssm"}
    assert own <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


TRAINING = """
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
data = torch.load(sys.argv[1] + "/data.pt")
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True).train()
    assert type(model).__module__.startswith("transformers_modules.")
    settings = dict(use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, max_steps=1)
    args = TrainingArguments(sys.argv[1] + "/out", label_smoothing_factor=0.1, learning_rate=0.0, **settings)
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    print("LOSS", name, trainer.state.log_history[0]["loss"])
"""


def test_smoothed_losses_where_the_package_is_absent(tmp_path):
    expected = {}
    for name in CAUSAL:
        model = Own(name).model()
        model.save_pretrained(tmp_path / name)
        expected[name] = smoothed(model.eval(), 0.1)
    torch.save(examples(model), tmp_path / "data.pt")
    printed = run_without_the_package(TRAINING, tmp_path, str(tmp_path), *CAUSAL)
    found = dict(line.split()[1:] for line in printed.splitlines() if line.startswith("LOSS"))
    assert {name: float(loss) for name, loss in found.items()} == pytest.approx(expected, abs=2e-4)
