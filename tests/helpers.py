"""Small models and data that several tests share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification

WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_compressm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
"""Beginning of a program that cannot import this package."""


def run_without_the_package(program: str, folder, *words: str) -> str:
    """Run a program in a folder, in a process that cannot import this package; gives what it prints."""
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE + program, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def small_model(seed: int = 0, state_sizes=12, hidden_size: int = 6, layers: int = 2, **config):
    """A classifier of (L, 1) sequences into three classes."""
    torch.manual_seed(seed)
    return MimoSSMForSequenceClassification(
        MimoSSMConfig(
            num_channels=1,
            num_labels=3,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            state_sizes=state_sizes,
            r_min=0.3,
            r_max=0.95,
            **config,
        )
    )


def small_data(count: int = 64, length: int = 12) -> Dataset:
    """Sequences labelled by the tercile of their weighted mean."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, length, 1, generator=generator)
    score = (values[..., 0] * torch.linspace(0.2, 1, length)).sum(1)
    labels = torch.bucketize(score, torch.quantile(score, torch.tensor([1 / 3, 2 / 3])))
    return Dataset.from_dict({"input_values": values.tolist(), "labels": labels.tolist()}).with_format("torch")


def arguments(folder, **settings) -> TrainingArguments:
    """Training arguments of a short CPU run."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(**(defaults | settings))


def error_of(work) -> str:
    """The message of the error that work ends with, which must be of a kind that is meant for users."""
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        work()
    assert type(caught.value) in (ValueError, FileNotFoundError, SystemExit), repr(caught.value)
    return str(caught.value)


def random_damage(path, rng):
    """Flip a bit, cut the end off, or cut a piece out."""
    content = bytearray(path.read_bytes())
    where, kind = rng.randrange(len(content)), rng.randrange(3)
    if kind == 0:
        content[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[where:]
    else:
        del content[where : where + rng.randrange(1, 9)]
    path.write_bytes(content)
