"""Runs from YAML: parsing, the whole job on a small model, resuming, and bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus
from transformers import AutoModelForSequenceClassification
from transformers.models.mamba.modeling_mamba import MambaMixer

from hf_compressm import state_sizes
from hf_compressm.data import load_task
from hf_compressm.runs.pretraining import build_model, parse_run, run_pretraining, summary
from hf_compressm.training import write_manifest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
NARROW = str(ROOT / "configs" / "runs" / "digits_narrow.yaml")


def short(folder, *more) -> list[str]:
    return [
        *(NARROW, "--output_dir", str(folder), "--max_steps", "24", "--window_end", "0.5", "--disable_tqdm", "true"),
        *("--model", json.dumps({"state_sizes": 16}), "--eval_strategy", "no", "--use_cpu", "true", *more),
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse_and_build(path, tmp_path):
    run = parse_run([str(path), "--output_dir", str(tmp_path)])
    assert run.training.report_to in (["none"], [], "none")
    if run.arguments.task == "digits":
        model = build_model(run, load_task("digits"))
        assert set(state_sizes(model)) == {run.model["state_sizes"]}


def test_the_command_line_overrides_the_file(tmp_path):
    run = parse_run(short(tmp_path, "--learning_rate", "0.5", "--model", '{"hidden_size": 5}'))
    assert run.training.learning_rate == 0.5 and run.training.max_steps == 24
    assert run.model["hidden_size"] == 5 and run.model["num_hidden_layers"] == 1
    assert run.arguments.ssm_learning_rate == pytest.approx(2e-3)


@pytest.mark.parametrize("fast", [True, False])
def test_stock_models_run_by_the_ops_of_this_package(tmp_path, fast):
    options = ["--task", "digits", "--output_dir", str(tmp_path), "--model_type", "mamba", "--use_cpu", "true"]
    run = parse_run([*options, "--model", '{"num_hidden_layers": 2}', *([] if fast else ["--no_fast_ops"])])
    model = build_model(run, SimpleNamespace(problem="causal_lm", model_kwargs={"vocab_size": 16, "hidden_size": 8}))
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    assert [type(mixer) is MambaMixer for mixer in mixers] == [not fast] * 2


def test_time_steps_that_a_stock_class_does_not_offer(tmp_path):
    task = SimpleNamespace(problem="causal_lm", model_kwargs={"vocab_size": 16})
    run = parse_run([str(CONFIGS[0].with_name("stdlib_qwen3_5.yaml")), "--output_dir", str(tmp_path)])
    model = build_model(run, task)
    assert state_sizes(model) == [64] * 3 and model.config.layer_types[3] == "full_attention"
    steps = torch.cat([softplus(parameter) for name, parameter in model.named_parameters() if "dt_bias" in name])
    assert len(steps.unique()) == 12 and 0.001 <= steps.min() < 0.01 < steps.max() <= 0.1
    run.arguments.time_steps = None
    plain = dict(build_model(run, task).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name]) != ("dt_bias" in name), name


def test_time_steps_for_a_model_without_any(tmp_path):
    task = SimpleNamespace(problem="causal_lm", model_kwargs={"vocab_size": 16})
    run = parse_run([str(CONFIGS[0].with_name("stdlib_xlstm.yaml")), "--output_dir", str(tmp_path)])
    assert state_sizes(build_model(run, task)) == [64, 64]
    run.arguments.time_steps = [0.001, 0.1]
    with pytest.raises(ValueError, match="no layer of xLSTMForCausalLM has a dt_bias"):
        build_model(run, task)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and result of a run that saved a checkpoint every 8 steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run_pretraining(parse_run(short(folder, "--save_strategy", "steps", "--save_steps", "8")))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that folder, to go on from."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_a_whole_run(finished):
    folder, result = finished
    assert result.sizes_before == [16] and result.sizes_after == [6]
    compression = json.loads((folder / "compression.json").read_text())
    assert compression["sizes_after"] == [6] and compression["history"] and len(compression["speed"]) >= 2
    assert json.loads((folder / "train_results.json").read_text())["train_loss"] > 0
    assert json.loads((folder / "test_results.json").read_text())["test_accuracy"] == result.metrics["test_accuracy"]
    assert state_sizes(AutoModelForSequenceClassification.from_pretrained(folder)) == [6]
    table = summary(result)
    assert "layer 0" in table and "37.5%" in table and "test accuracy" in table
    assert "steps per second" not in table  # too few were timed


def test_without_compression_nothing_shrinks(tmp_path):
    result = run_pretraining(parse_run(short(tmp_path, "--no_compress")))
    assert result.sizes_after == [16] and not (tmp_path / "compression.json").exists()


def test_resuming_across_cuts(copy):
    again = run_pretraining(parse_run(short(copy, "--resume_from_checkpoint", str(copy / "checkpoint-8"))))
    assert again.sizes_before == [16] and again.sizes_after == [6]
    last = run_pretraining(parse_run(short(copy, "--resume_from_checkpoint", "true")))
    assert last.sizes_after == [6]


def test_resuming_from_a_checkpoint_that_contradicts_itself(copy):
    config = copy / "checkpoint-24" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"state_sizes": [9]}))
    with pytest.raises(ValueError, match=r"config.json has .* bytes .* seal this one again"):
        run_pretraining(parse_run(short(copy, "--resume_from_checkpoint", "true")))
    write_manifest(config.parent)
    with pytest.raises(ValueError, match="the config wants"):
        run_pretraining(parse_run(short(copy, "--resume_from_checkpoint", "true")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: digits\ntua: 0.1\n", "unknown option 'tua'; did you mean 'tau'"),
        ("- task\n", "must hold a mapping"),
        ("tau: 0.1\n", "no task given.*digits"),
        ("task: digits\nhub_token: hf_secret\n", "would be saved and pushed .* HF_TOKEN"),
        ("task: digits\ntau: 7\n", "tau must lie strictly between 0 and 1"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_run([str(path)])


def test_unknown_config_fields_of_the_model_are_named(tmp_path):
    run = parse_run(short(tmp_path, "--model", '{"state_size": 3}'))
    with pytest.raises(ValueError, match="no field 'state_size'; did you mean 'state_sizes'.* it has .*state_sizes"):
        build_model(run, load_task("digits"))
