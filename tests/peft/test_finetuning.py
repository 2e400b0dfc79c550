"""Cut, heal with LoRA, merge, save: the run from a file, on tiny models."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from selective_models import OWN, STOCK, make
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import state_sizes
from hf_compressm.runs.evaluation import parse_evaluation, run_evaluation
from hf_compressm.runs.finetuning import parse_finetune, run_finetuning
from hf_compressm.runs.healing import add_lora, default_targets

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "runs" / "finetune" / "stdlib_mamba.yaml")
DATA = ["--task_options", '{"length": 32, "evaluation_bytes": 1024}']
STEPS = ["--max_steps", "3", "--calibration_batches", "2", "--refit_steps", "2"]
SMALL = [*DATA, *STEPS, "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture
def saved(tmp_path):
    def save(table=OWN, kind="mamba"):
        make(table, kind, vocab_size=256).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def options(model, output, *more):
    return [CONFIG, "--model", model, "--output_dir", str(output), *SMALL, *more]


@pytest.mark.parametrize(
    ("table", "kind", "more"),
    [(OWN, "mamba", ()), (STOCK, "mamba2", ("--lora", '{"use_dora": true, "r": 4}')), (STOCK, "mamba", ())],
    ids=["own", "stock mamba2 dora", "stock"],
)
def test_a_whole_run(tmp_path, saved, table, kind, more, capsys):
    name = saved(table, kind)
    argv = options(name, tmp_path / "healed", *more)
    runpy.run_path(str(ROOT / "scripts" / "finetune.py"))["main"](argv)
    printed = capsys.readouterr().out
    assert "states per layer: [8, 8, 8] ->" in printed and "healed" in printed
    record = json.loads((tmp_path / "healed" / "finetuning.json").read_text())
    assert list(record["scores"]) == ["before", "cut", "healed"] and record["sizes_before"] == [8, 8, 8]
    assert sum(record["sizes_after"]) == 12 and len(record["history"]) == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert state_sizes(merged) == record["sizes_after"]
    assert not any("lora" in name for name, _ in merged.named_parameters())
    arguments = parse_evaluation(
        [str(tmp_path / "healed"), "--data", "stdlib_bytes", *DATA, "--cpu", "--batch_size", "16"]
    )
    score = run_evaluation(arguments)
    assert score["metrics"]["loss"] == pytest.approx(record["scores"]["healed"]["loss"], rel=1e-4)


def test_the_adapter_and_its_base(tmp_path, saved):
    output = tmp_path / "adapter"
    result = run_finetuning(parse_finetune(options(saved(), output, "--no_merge")))
    assert state_sizes(AutoModelForCausalLM.from_pretrained(output / "base")) == result.sizes_after
    argv = [str(output), "--data", "stdlib_bytes", *DATA, "--cpu", "--output", str(tmp_path / "scores.json")]
    score = run_evaluation(parse_evaluation(argv))
    assert score["metrics"]["loss"] == pytest.approx(result.scores["healed"]["loss"], rel=1e-5)
    assert json.loads((tmp_path / "scores.json").read_text()) == score


def test_a_compressed_model_is_healed_without_a_cut(tmp_path, saved):
    text = (ROOT / "configs" / "runs" / "finetune" / "stdlib_mamba.yaml").read_text()
    (tmp_path / "heal.yaml").write_text(text.replace("target_state_size: 4\n", ""))
    result = run_finetuning(parse_finetune([str(tmp_path / "heal.yaml"), *options(saved(), tmp_path / "healed")[1:]]))
    assert list(result.scores) == ["before", "healed"] and result.sizes_after == [8, 8, 8]


def test_pushing_is_the_trainers_own(tmp_path, saved, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, *args, **kwargs: pushed.append(type(self.model).__name__))
    run_finetuning(
        parse_finetune(options(saved(), tmp_path / "healed", "--push_to_hub", "true", "--hub_model_id", "me/it"))
    )
    assert pushed == ["CompreSSMMambaForCausalLM"]
    assert (tmp_path / "healed" / "finetuning.json").exists()


@pytest.mark.parametrize(
    ("table", "kind", "targets"),
    [
        (OWN, "mamba", ["in_proj", "out_proj", "x_proj"]),
        (OWN, "mamba2", ["in_proj", "out_proj"]),
        (STOCK, "mamba", ["in_proj", "x_proj"]),
        (STOCK, "mamba2", ["in_proj"]),
    ],
)
def test_default_targets_all_get_gradients(table, kind, targets):
    model = make(table, kind)
    assert default_targets(model) == targets
    adapted = add_lora(model, type("Task", (), {"problem": "causal_lm"}), {"init_lora_weights": False})
    ids = torch.randint(0, 50, (1, 9))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_what_lora_would_not_reach_is_refused():
    task = type("Task", (), {"problem": "causal_lm"})
    with pytest.raises(ValueError, match="weight of dt_proj in .*without calling.*suited are in_proj, x_proj"):
        add_lora(make(STOCK, "mamba"), task, {"target_modules": ["dt_proj"]})


def test_own_mixers_call_every_layer():
    task = type("Task", (), {"problem": "causal_lm"})
    model = add_lora(make(OWN, "mamba"), task, {"target_modules": ["dt_proj"], "init_lora_weights": False})
    ids = torch.randint(0, 50, (1, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([CONFIG, "--tau", "0.1"], "one of tau, target_state_size and keep_fraction"),
        (["--data", "stdlib_bytes", "--output_dir", "x"], "no model given"),
        (["--model", "x", "--output_dir", "x"], "no data given"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_finetune(argv)


def test_unknown_keys_of_the_file_are_named(tmp_path):
    (tmp_path / "run.yaml").write_text("modle: x\n")
    with pytest.raises(ValueError, match="unknown option 'modle'; did you mean 'model'"):
        parse_finetune([str(tmp_path / "run.yaml")])


def test_without_peft_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-compressm\[peft\]'"):
        add_lora(make(OWN, "mamba"), type("Task", (), {"problem": "causal_lm"}), {})
