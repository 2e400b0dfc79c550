"""Cuts and undone cuts come between two steps: no gradient of the last one reaches the next."""

import functools

import pytest
import torch
from helpers import arguments, small_data, small_model
from selective_models import OWN, make
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history


class Watch(TrainerCallback):
    """What gradients are left when a cut is due."""

    def __init__(self):
        self.left = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.left.append([parameter.grad for parameter in model.parameters()])


def run(folder, keep_zeros, rollback=False, table=None):
    model = small_model(dropout=0.0) if table is None else make(table, "mamba2").train()
    if keep_zeros:  # as a training loop of one's own may clear them
        model.zero_grad = functools.partial(type(model).zero_grad, model, set_to_none=False)
    settings = {"cut_steps": [3, 6], "policy": "fraction", "keep_fraction": 0.5, "refit_steps": 0}
    if rollback:
        settings |= {"rollback": True, "rollback_greater_is_better": True}  # a loss that falls undoes the cut
    data = small_data()
    if table is not None:
        ids = torch.randint(1, 50, (16, 12), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": row, "labels": row} for row in ids]
    watch = Watch()
    options = {"max_steps": 9, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    if rollback:
        options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[watch, CompreSSMCallback(**settings)],
    )
    trainer.train()
    return model, watch.left


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("table", [None, OWN], ids=["lru", "mamba2"])
def test_zeros_in_place_of_none_change_nothing(tmp_path, table, rollback, caplog):
    plain, left = run(tmp_path / "a", keep_zeros=False, rollback=rollback, table=table)
    zeros, kept = run(tmp_path / "b", keep_zeros=True, rollback=rollback, table=table)
    assert all(gradient is None for step in left for gradient in step)
    assert all(gradient is not None and not gradient.any() for step in kept for gradient in step)
    assert state_sizes(plain) == state_sizes(zeros) and ("undo" in [e["event"] for e in history(plain)]) == rollback
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), zeros.parameters(), strict=True))
    assert "nothing on record" not in caplog.text
