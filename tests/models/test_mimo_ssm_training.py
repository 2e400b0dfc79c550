"""MimoSSM models under the Trainer."""

import logging

import pytest
import torch
from mimo_models import L, V, close, config, token_ids
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compressm.models import (
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
)


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(model, rows, tmp_path, **kwargs):
    arguments = TrainingArguments(
        tmp_path,
        **{
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **kwargs,
        },
    )
    losses = Losses()
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[losses])
    trainer.train()
    return trainer, losses.losses


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def test_trainer_classification(tmp_path):
    model = MimoSSMForSequenceClassification(config(vocab_size=None, num_channels=1, num_labels=2, dropout=0.0))
    values = torch.randn(16, L, 1)
    rows = [{"input_values": v, "labels": int(v.mean() > 0)} for v in values]
    trainer, losses = train(model, rows, tmp_path, max_steps=12)
    assert losses[-1] < losses[0]
    prediction = trainer.predict(rows)
    assert prediction.predictions.shape == (16, 2) and "eval_loss" in trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    close(loaded(input_values=values).logits, torch.tensor(prediction.predictions))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trainer_causal_lm(tmp_path):
    ids = token_ids(8, L)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer, losses = train(MimoSSMForCausalLM(config(dropout=0.0)), rows, tmp_path, gradient_checkpointing=True)
    assert losses[-1] < losses[0] and trainer.evaluate()["eval_loss"] < losses[0]
    assert trainer.predict(rows).predictions.shape == (8, L, V)
