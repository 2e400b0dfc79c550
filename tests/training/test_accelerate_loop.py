"""A hand-written loop of Accelerate goes on from `save_state` with a model of its original size."""

import pytest
import torch
from accelerate import Accelerator
from helpers import small_data, small_model
from torch.utils.data import DataLoader

from hf_compressm import compress, state_sizes
from hf_compressm.surgery import history, short
from hf_compressm.training import resize_to_checkpoint


def steps(model, optimizer, accelerator, count):
    batches = list(DataLoader(small_data(8, 6).with_format("torch"), batch_size=4))
    for index in range(count):
        accelerator.backward(model(**batches[index % 2]).loss)
        optimizer.step()
        optimizer.zero_grad()


def made():
    model = small_model(dropout=0.0).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    "prepared, backend",
    [(False, "no"), (True, "no"), (False, "eager"), (True, "eager")],
    ids=["before prepare", "after prepare", "compiled, before prepare", "compiled, after prepare"],
)
def test_the_one_call_before_load_state(tmp_path, prepared, backend):
    accelerator = Accelerator(cpu=True, dynamo_backend=backend)
    model, optimizer = accelerator.prepare(*made())
    steps(model, optimizer, accelerator, 3)
    record = compress(model, tau=0.3, optimizer=optimizer, step=3)
    steps(model, optimizer, accelerator, 2)
    accelerator.save_state(str(tmp_path))
    accelerator.unwrap_model(model).config.save_pretrained(tmp_path)
    steps(model, optimizer, accelerator, 3)

    accelerator = Accelerator(cpu=True, dynamo_backend=backend)
    again, fresh = made()
    if prepared:
        again, fresh = accelerator.prepare(again, fresh)
    resize_to_checkpoint(again, tmp_path, fresh)
    if not prepared:
        again, fresh = accelerator.prepare(again, fresh)
    accelerator.load_state(str(tmp_path))
    assert state_sizes(again) == again.config.state_sizes == [layer["new_size"] for layer in record["layers"]]
    assert history(again) == [short(record)]
    steps(again, fresh, accelerator, 3)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_without_it_accelerate_refuses_the_sizes(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*made())
    compress(model, tau=0.3, optimizer=optimizer)
    accelerator.save_state(str(tmp_path))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*made())
    with pytest.raises(RuntimeError, match="size mismatch"):
        accelerator.load_state(str(tmp_path))


def test_weights_of_another_model_change_nothing(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(small_model(hidden_size=10))
    accelerator.save_state(str(tmp_path))
    model, optimizer = made()
    with pytest.raises(ValueError, match="the weights are of another model"):
        resize_to_checkpoint(model, tmp_path, optimizer)
    assert state_sizes(model) == [12, 12]
    with pytest.raises(FileNotFoundError):
        resize_to_checkpoint(model, tmp_path / "none", optimizer)
