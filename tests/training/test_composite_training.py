"""An unmodified Trainer on models whose mixers belong to another config than the model's own, or to none."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from composite_models import Classifier, mimo, multimodal
from datasets import Dataset
from helpers import arguments, small_data
from safetensors.torch import load_file, save_file
from stock_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.cli import main
from hf_compressm.hub.export import export
from hf_compressm.layers.lru import LRU
from hf_compressm.report.record import read_run
from hf_compressm.surgery import history, original_sizes, short
from hf_compressm.surgery.record_keys import STATE_FILE
from hf_compressm.training import verify_checkpoint


class Bare(nn.Module):
    """Layers, and no config anywhere."""

    def __init__(self, size: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Linear(1, 6), nn.ModuleList(LRU(6, size) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, input_values, labels=None):
        hidden = self.embed(input_values)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden)[0])
        logits = self.head(hidden.mean(1))
        return SequenceClassifierOutput(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def wrapped(size: int = 16) -> Classifier:
    torch.manual_seed(0)
    return Classifier(mimo(size))


def tokens() -> Dataset:
    ids = torch.randint(0, 60, (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


MODELS = {"wrapper": wrapped, "bare layers": Bare, "multimodal": lambda: multimodal("bamba")}
RENAMED = ("jamba", "nemotron_h")
"""Families whose weights transformers saves under other names than it trains with, as it does those of Llava."""


def stock(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]())


def trainer_of(kind, folder, callback=None, callbacks=(), **settings) -> Trainer:
    data = tokens() if kind in ("multimodal", *RENAMED) else small_data()
    defaults = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    callback = callback or CompreSSMCallback(
        cut_steps=[2, 4], policy="fraction", keep_fraction=0.25, calibration_batches=1, refit_steps=0
    )
    args = arguments(folder, **(defaults | settings))
    model = stock(kind) if kind in RENAMED else MODELS[kind]()
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback, *callbacks])


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("make", [wrapped, Bare])
def test_a_quarter_of_128_in_four_attempts_is_32(make, tmp_path):
    model = make(128)
    callback = CompreSSMCallback(cut_steps=[2, 3, 4, 5], policy="fraction", keep_fraction=0.25)
    Trainer(model, arguments(tmp_path, max_steps=6), train_dataset=small_data(), callbacks=[callback]).train()
    assert state_sizes(model) == [32, 32] and original_sizes(model) == [128, 128]
    assert [record["step"] for record in history(model)] == [2, 3, 4, 5]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainings of each kind, made once: the Trainer, and its folder with a checkpoint of every step."""
    made = {}

    def train(kind):
        if kind not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("whole")
            made[kind] = trainer_of(kind, folder), folder
            made[kind][0].train()
        return made[kind]

    return train


RESUMED = [
    *itertools.product(("wrapper", "bare layers"), (1, 3, 4, 5)),
    *itertools.product(("multimodal", *RENAMED), (1, 3)),
]


@pytest.mark.parametrize(("kind", "step"), RESUMED)
def test_a_run_resumes_into_a_model_of_the_original_size(kind, step, tmp_path, trained):
    whole, folder = trained(kind)
    assert state_sizes(whole.model) == [4, 4]
    resumed = trainer_of(kind, tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert same_weights(whole.model, resumed.model) and history(whole.model) == history(resumed.model)
    assert original_sizes(resumed.model) == [16, 16]


class BestIsFirst(TrainerCallback):
    """Replaces the metric so that the first evaluation is the best."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("kind", [*MODELS, *RENAMED])
def test_a_best_model_from_before_a_cut_is_loaded_with_its_size_in_the_config(kind, tmp_path):
    callback = CompreSSMCallback(
        cut_steps=[4], policy="fraction", keep_fraction=0.25, calibration_batches=1, refit_steps=0
    )
    watch = [BestIsFirst(), kept := WeightsAt(2)]
    trainer = trainer_of(kind, tmp_path, callback, watch, save_steps=2, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_global_step == 2 and state_sizes(trainer.model) == [16, 16]
    found = trainer.model.state_dict()
    assert found.keys() == kept.weights.keys() and all(torch.equal(found[name], kept.weights[name]) for name in found)
    if kind == "wrapper":
        assert trainer.model.body.config.state_sizes == [16, 16]
    if kind == "multimodal":
        assert trainer.model.config.text_config.mamba_d_state == 16


class WeightsAt(TrainerCallback):
    """Keeps the weights after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_a_cut_that_hurts_is_undone(kind, tmp_path):
    def make(folder):
        callback = CompreSSMCallback(
            cut_steps=[3],
            policy="fraction",
            keep_fraction=0.5,
            rollback=True,
            rollback_greater_is_better=True,
            calibration_batches=1,
            refit_steps=0,
        )
        return trainer_of(kind, folder, callback, learning_rate=3e-2)

    whole = make(tmp_path / "whole")
    whole.train()
    assert [record["event"] for record in history(whole.model)] == ["cut", "undo"]
    assert state_sizes(whole.model) == [16, 16]
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same_weights(whole.model, resumed.model) and history(whole.model) == history(resumed.model)


def test_a_multimodal_checkpoint_loads_is_reported_and_exported(tmp_path, capsys, trained):
    trainer, run_folder = trained("multimodal")
    folder = run_folder / "checkpoint-6"
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    assert same_weights(loaded, trainer.model) and history(loaded) == list(map(short, history(trainer.model)))
    run = read_run(run_folder)
    assert run.sizes_before() == [16, 16] and run.sizes_after() == [4, 4] and run.events == history(trainer.model)

    written = export(str(folder), tmp_path / "out")
    assert written.state_sizes == [4, 4]
    assert same_weights(LlavaForConditionalGeneration.from_pretrained(tmp_path / "out"), loaded)
    with pytest.raises(SystemExit):
        main(["inspect", str(folder)])
    assert "supported are causal language models and classifiers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["multimodal", *RENAMED])
def test_a_checkpoint_under_other_names_is_verified(kind, tmp_path):
    callback = CompreSSMCallback(
        cut_steps=[1],
        policy="fraction",
        keep_fraction=0.5,
        rollback=True,
        calibration_batches=1,
        refit_steps=0,
    )
    settings = {"max_steps": 2, "save_steps": 1, "eval_on_start": True, "eval_steps": 10}
    trainer_of(kind, tmp_path, callback, **settings).train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / STATE_FILE).is_file()  # with the copy of the model from before the cut
    verify_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("A_log"))
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is missing, and would start anew"):
        verify_checkpoint(folder)
    save_file(weights | {name: weights[name][:-1]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is .*, the config wants"):
        verify_checkpoint(folder)


def test_a_report_reads_the_history_within_a_composite_config(tmp_path):
    model = multimodal("bamba")
    sizes = {"old_size": 16, "new_size": 4, "singular_values": []}
    layers = [{"name": f"layers.{index}.mamba", **sizes} for index in (0, 2)]
    record = {"event": "cut", "step": 2, "layers": layers}
    model.config.text_config.compression_history = [record]
    model.config.save_pretrained(tmp_path)
    run = read_run(tmp_path)
    assert run.events == [record] and run.sizes_after() == [4, 4]
    config = json.loads((tmp_path / "config.json").read_text())
    config["other_config"] = {"compression_history": [record | {"layers": layers[:1]}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [layer.name for layer in read_run(tmp_path).layers()]
    assert names == ["text_config.layers.0.mamba", "text_config.layers.2.mamba", "other_config.layers.0.mamba"]


def test_a_push_of_a_model_without_config_has_no_code_to_carry():
    state = SimpleNamespace(is_world_process_zero=True)
    CompreSSMCallback().on_push_begin(SimpleNamespace(output_dir="x"), state, None, model=Bare())


def test_sizes_that_the_config_cannot_hold_are_refused_before_the_first_step(tmp_path):
    callback = CompreSSMCallback(cut_steps=[2], uniform=False)
    trainer = trainer_of("multimodal", tmp_path, callback)
    with pytest.raises(ValueError, match="uniform=False cannot be met"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_wrapper_is_saved_as_the_trainer_saves_plain_modules(trained):
    trainer, folder = trained("wrapper")
    saved = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()
    entry = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    records = entry["CompreSSMCallback"]
    records = (records[0] if isinstance(records, list) else records)["attributes"]["saved"]["history"]
    assert records == history(trainer.model)
