"""Run files and options: what is refused, made from a good one, and in which words."""

import random
import re
from pathlib import Path

import pytest
import yaml
from helpers import error_of, random_damage

from hf_compressm.data import load_task
from hf_compressm.runs.pretraining import build_model, build_trainer
from hf_compressm.runs.run_file import parse_run

GOOD = Path(__file__).resolve().parents[2] / "configs" / "runs" / "digits_narrow.yaml"


def run_file(folder, text: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [str(path), "--output_dir", str(folder / "out"), "--use_cpu", "true"]


def start(argv) -> None:
    """Everything up to the first step."""
    run = parse_run(argv)
    build_trainer(run, task := load_task(run.arguments.task, **run.task_options), build_model(run, task))


def with_lines(**lines) -> str:
    content = yaml.safe_load(GOOD.read_text())
    return yaml.safe_dump({k: v for k, v in content.items() if k not in lines}) + "".join(
        f"{key}: {value}\n" for key, value in lines.items()
    )


RUN_FILES = {
    "broken": (GOOD.read_text() + "model: {hidden_size: [\n", "run.yaml is not a file of options in YAML"),
    "tab": (GOOD.read_text() + "\ttau: 0.1\n", "run.yaml is not a file of options in YAML"),
    "not text": (b"\xff\xfe\x00task", "run.yaml is not a file of options in YAML"),
    "impossible date": (with_lines(seed="2001-13-99"), "run.yaml"),
    "deep": ("a: " + "[" * 5000, "run.yaml is not a file of options in YAML"),
    "code": (with_lines(task="!!python/object/apply:os.mkdir [evil]"), "run.yaml is not a file of options in YAML"),
    "list": ("- task\n", "must hold a mapping"),
    "empty": ("", "must hold a mapping"),
    "key twice": (GOOD.read_text() + "seed: 1\nseed: 2\n", "'seed' is given twice"),
    "key twice within": (with_lines(model="\n  hidden_size: 4\n  hidden_size: 8"), "'hidden_size' is given twice"),
    "unknown key": (with_lines(tua=0.1), "unknown option 'tua'; did you mean 'tau'"),
    "number as key": (GOOD.read_text() + "5: 1\n", "unknown option 5"),
    "word for number": (with_lines(max_steps="many"), "max_steps cannot be 'many'"),
    "fraction for count": (with_lines(max_steps=2.5), "max_steps cannot be 2.5"),
    "list for number": (with_lines(learning_rate="[1, 2]"), r"learning_rate cannot be \[1, 2\]"),
    "mapping for number": (with_lines(max_steps="{a: 1}"), "max_steps cannot be"),
    "words for steps": (with_lines(cut_steps="[one, two]"), "cut_steps cannot be"),
    "no value": (with_lines(max_steps=""), "max_steps has no value"),
    "word for truth": (with_lines(rollback="perhaps"), "rollback cannot be 'perhaps'"),
    "unknown choice": (with_lines(policy="enrgy"), "policy cannot be 'enrgy'"),
    "NaN rate": (with_lines(learning_rate=".nan"), "learning_rate must be a finite number"),
    "infinite window": (with_lines(window_end=".inf"), "window_end must be a finite number"),
    "NaN tolerance": (with_lines(rollback_tolerance=".nan"), "rollback_tolerance must be a finite number"),
    "negative batch": (with_lines(per_device_train_batch_size=-8), "per_device_train_batch_size must be greater"),
    "negative rate": (with_lines(learning_rate=-0.1), "learning_rate must be at least 0"),
    "negative target": (with_lines(policy="target", target_state_size=-4), "target state size must be at least 1"),
    "NaN target": (with_lines(policy="target", target_state_size=".nan"), "target_state_size must be a finite"),
    "conflict": (with_lines(policy="energy", target_state_size=4), "used by policy='target' only"),
    "conflict of triggers": (with_lines(trigger="stability", cut_steps="[3]"), "leave cut_steps out"),
    "no such task": (with_lines(task="didgits"), "unknown task 'didgits'"),
    "no task": (with_lines(task="null"), "no task given"),
    "task option": (with_lines(task_options="{length: 3}"), "does not take length"),
    "type of a task option": (with_lines(task="mqar", task_options="{length: long}"), "length of task 'mqar' must be"),
    "task options": (with_lines(task_options="[1]"), "task_options must map names to values"),
    "no such model": (with_lines(model_type="mimo_sms"), "unknown model_type 'mimo_sms'; did you mean 'mimo_ssm'"),
    "model is a list": (with_lines(model="[1, 2]"), "model must map names to values"),
    "field of the model": (with_lines(model="{state_size: 4}"), "no field 'state_size'"),
    "data's field": (with_lines(model="{num_channels: 4}"), "the data decide num_channels"),
    "negative size": (with_lines(model="{hidden_size: -4}"), "hidden_size must be an integer >= 1"),
    "NaN size": (with_lines(model="{state_sizes: .nan}"), "state_sizes"),
    "word for size": (with_lines(model="{r_min: low}"), "model = {'r_min': 'low'}"),
    "negative stock size": (with_lines(model_type="mamba2", model="{hidden_size: -4}"), "no mamba2 can be built"),
}


@pytest.mark.parametrize("text, message", RUN_FILES.values(), ids=RUN_FILES)
def test_malformed_run_files(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = error_of(lambda: start(run_file(tmp_path, text)))
    assert re.search(message, said), said
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("option", ["--model={bad", "--model=[1]", "--task_options=3", "--max_steps=x"])
def test_malformed_options(option, tmp_path):
    said = error_of(lambda: parse_run([str(GOOD), "--output_dir", str(tmp_path), option]))
    assert said == "2" or option[: option.index("=")] in said, said  # argparse has said the rest


def test_random_damage_to_a_run_file(tmp_path):
    for seed in range(60):
        argv = run_file(tmp_path, GOOD.read_bytes())
        random_damage(Path(argv[0]), random.Random(seed))
        try:
            start(argv)
        except Exception:
            assert error_of(lambda argv=argv: start(argv)), seed
