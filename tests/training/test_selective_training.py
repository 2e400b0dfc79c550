"""The callback on selective models, stock and own, in an unmodified Trainer."""

import pytest
import torch
from datasets import Dataset
from helpers import arguments
from selective_models import OWN, STOCK, make
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history
from hf_compressm.training.calibration import calibration_batches

TABLES = {"stock": STOCK, "own": OWN}
MODELS = pytest.mark.parametrize("table, kind", [(t, k) for t in TABLES for k in ("mamba", "mamba2")])


def data(count=64, length=16):
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(1, 50, (count, 1), generator=generator)
    ids = (start + 3 * torch.arange(length)) % 49 + 1
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")


def trainer_of(model, folder, callback, **settings):
    return Trainer(model, arguments(folder, **settings), train_dataset=data(), callbacks=[callback] if callback else [])


@MODELS
def test_states_go_during_training_and_the_checkpoint_is_small(table, kind, tmp_path):
    model = make(TABLES[table], kind).train()
    callback = CompreSSMCallback(policy="target", target_state_size=3, cut_steps=[4, 8])
    trainer = trainer_of(model, tmp_path, callback, max_steps=30, optim="adamw_torch")
    trainer.train()
    assert sum(state_sizes(model)) <= 9 and [record["step"] for record in history(model)] == [4, 8]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.tensor(losses).isfinite())
    trainer.save_model(tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = data()[:2]["input_ids"]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("at", [4, 6])
def test_resuming_across_a_cut_is_bit_identical(kind, at, tmp_path):
    finals = []
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    for resume in (None, str(tmp_path / "run" / f"checkpoint-{at}")):
        callback = CompreSSMCallback(policy="target", target_state_size=3, cut_steps=[5, 8])
        trainer = trainer_of(make(OWN, kind).train(), tmp_path / "run", callback, **settings)
        trainer.train(resume_from_checkpoint=resume)
        finals.append(trainer)
    for (name, first), second in zip(finals[0].model.named_parameters(), finals[1].model.parameters(), strict=True):
        assert torch.equal(first, second), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in finals]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k]["exp_avg"], states[1][k]["exp_avg"]) for k in states[0])


def test_a_cut_leaves_the_order_of_the_data_alone(tmp_path):
    seen = {}
    for name, callback in (("with", CompreSSMCallback(tau=1e-9, cut_steps=[3, 5])), ("without", None)):
        model, batches = make(STOCK, "mamba").train(), []
        keep = lambda module, args, kwargs, batches=batches: (  # noqa: E731
            batches.append(kwargs["input_ids"].clone()) if module.training else None
        )
        model.register_forward_pre_hook(keep, with_kwargs=True)
        trainer_of(model, tmp_path, callback, max_steps=10).train()
        seen[name] = torch.stack(batches)
    assert torch.equal(seen["with"], seen["without"])


def test_best_model_from_before_a_cut_comes_back_at_its_size(tmp_path):
    model = make(OWN, "mamba2").train()
    callback = CompreSSMCallback(policy="target", target_state_size=2, cut_steps=[5])
    args = arguments(
        tmp_path, max_steps=8, eval_strategy="steps", save_strategy="steps", eval_steps=4, save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="size", greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data(), eval_dataset=data(8), callbacks=[callback],
        compute_metrics=lambda prediction: {"size": sum(state_sizes(model))},
    )  # fmt: skip
    trainer.train()
    assert state_sizes(model) == [8, 8, 8] == model.config.state_sizes


def test_stability_trigger_works_on_selective_layers(tmp_path):
    model = make(STOCK, "mamba").train()
    callback = CompreSSMCallback(
        policy="fraction", keep_fraction=0.5, trigger="stability", window_end=1.0, stability_interval=3,
        stability_threshold=0.3, stability_patience=2,
    )  # fmt: skip
    trainer_of(model, tmp_path, callback, max_steps=20).train()
    assert state_sizes(model) == [4, 4, 4] and len(history(model)) == 1


def test_calibration_batches_need_training_data():
    with pytest.raises(ValueError, match="no training data loader"):
        calibration_batches(None, 2, 0)


def test_uneven_sizes_of_a_stock_model_are_refused_before_training(tmp_path):
    trainer = trainer_of(make(STOCK, "mamba"), tmp_path, CompreSSMCallback(uniform=False))
    with pytest.raises(ValueError, match="one state size for all layers"):
        trainer.train()


def test_missing_labels_are_reported_by_the_trainer(tmp_path):
    trainer = Trainer(
        make(STOCK, "mamba"), arguments(tmp_path), train_dataset=data().remove_columns("labels"),
        callbacks=[CompreSSMCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()
