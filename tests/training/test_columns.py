"""Data of which only labels would reach the model."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback
from hf_compressm.models import (
    CompreSSMMambaConfig,
    CompreSSMMambaForSequenceClassification,
    MimoSSMConfig,
    MimoSSMForSequenceClassification,
)

SIZES = {"hidden_size": 8, "num_hidden_layers": 1}


def mimo():
    return MimoSSMForSequenceClassification(MimoSSMConfig(num_channels=1, state_sizes=4, num_labels=2, **SIZES))


def mamba():
    return CompreSSMMambaForSequenceClassification(
        CompreSSMMambaConfig(vocab_size=8, state_size=4, num_labels=2, **SIZES)
    )


def trainer_of(model, column, folder, values, **options):
    data = Dataset.from_dict({column: values, "labels": [0, 1] * 4})
    arguments = TrainingArguments(
        str(folder), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", **options
    )
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        callbacks=[CompreSSMCallback(policy="target", target_state_size=2, cut_steps=[1])],
    )


@pytest.mark.parametrize(
    ("make", "expected", "values"),
    [(mimo, "input_values", [[[0.5]] * 4] * 8), (mamba, "input_ids", [[1, 2, 3]] * 8)],
)
def test_a_column_that_the_trainer_drops_is_named(make, expected, values, tmp_path):
    with pytest.raises(ValueError, match=rf"drops the columns sensor of the data.*Rename .* to {expected}"):
        trainer_of(make(), "sensor", tmp_path, values).train()
    trainer_of(make(), expected, tmp_path, values).train()


def test_columns_that_a_collator_reads_are_let_through(tmp_path):
    trainer = trainer_of(mimo(), "sensor", tmp_path, [[[0.5]] * 4] * 8, remove_unused_columns=False)
    trainer.data_collator = lambda rows: {
        "input_values": torch.tensor([row["sensor"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("make", [mimo, mamba])
def test_a_model_without_input_says_where_it_may_have_gone(make):
    with pytest.raises(ValueError, match="exactly one of .* not none. A Trainer drops columns"):
        make()(labels=torch.tensor([0]))
