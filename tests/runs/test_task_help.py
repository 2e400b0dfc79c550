"""What programs say about tasks, and tasks of the user's own in a run."""

import json
import sys

import pytest
import torch
from test_user_code import folder as folder

from hf_compressm.data import describe_task, list_tasks, task, task_names
from hf_compressm.runs.pretraining import parse_run, run_pretraining

OWN = '''
import torch
from datasets import Dataset
from hf_compressm.data import Task, classification_metrics, register_task

@register_task("parity")
def parity(*, steps: int = 6, noise: float = 0.0, seed: int = 0) -> Task:
    """Is the number of ones even?

    Args:
        steps: length of a sequence.
        noise: share of labels
            that are wrong.
    """
    bits = torch.randint(0, 2, (40, steps), generator=torch.Generator().manual_seed(seed))
    rows = {"input_values": bits[..., None].float().tolist(), "labels": (bits.sum(1) % 2).tolist()}
    data = Dataset.from_dict(rows).with_format("torch")
    return Task(
        name="parity", train=data, validation=data, test=data, model_kwargs={"num_channels": 1, "num_labels": 2},
        compute_metrics=classification_metrics, metric_for_best_model="accuracy", problem="sequence_classification",
    )
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(task, "_BUILDERS", dict(task._BUILDERS))  # no public way to forget a task


@pytest.fixture
def my_tasks(folder) -> str:
    (folder / "my_tasks.py").write_text(OWN)
    return "my_tasks.py"


def printed(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_run(words)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_every_task_has_its_line_and_all_its_options():
    lines = list_tasks().splitlines()
    assert [line.split()[0] for line in lines] == task_names() and all(len(line.split()) > 4 for line in lines)
    for name in task_names():
        text = describe_task(name)
        for option in task._BUILDERS[name].__kwdefaults__ or {}:
            assert option == "seed" or f"\n  {option}: " in text, (name, option)
        assert "\n\n  " not in text and "Raises" not in text


def test_tasks_of_ones_own_are_listed_and_described(my_tasks, capsys):
    assert "parity" not in printed(capsys, "--list-tasks")
    assert "parity        Is the number of ones even?\n" in printed(capsys, "--list-tasks", "--import", my_tasks)
    text = printed(capsys, "--import", my_tasks, "--help", "parity")
    assert "  steps: int, default 6\n      length of a sequence.\n" in text
    assert "  noise: float, default 0.0\n      share of labels that are wrong.\n" in text and "seed" not in text


def test_a_misspelt_task_gets_a_suggestion():
    with pytest.raises(ValueError, match="unknown task 'digit'; did you mean 'digits'?"):
        parse_run(["--help", "digit"])


def test_plain_help_lists_the_options_of_runs(capsys):
    text = printed(capsys, "--help")
    assert "--help TASK" in text and "--import" in text and "Under task_options" not in text


@pytest.mark.parametrize("where", ["line", "file"])
def test_a_task_of_ones_own_is_trained_on(folder, my_tasks, where):
    fields = {"task": "parity", "task_options": {"steps": 4}, "output_dir": "out", "max_steps": 2, "use_cpu": True}
    fields |= {"model": {"hidden_size": 4, "num_hidden_layers": 1, "state_sizes": 4}, "report_to": "none"}
    fields |= {"save_strategy": "no", "disable_tqdm": True, "compress": False}
    (folder / "run.yaml").write_text(json.dumps(fields | ({"imports": [my_tasks]} if where == "file" else {})))
    result = run_pretraining(parse_run(["run.yaml", *(["--import", my_tasks] if where == "line" else [])]))
    assert result.task.name == "parity" and result.task.train[0]["input_values"].shape == (4, 1)
    assert "my_tasks" in sys.modules and torch.isfinite(next(result.model.parameters())).all()


def test_streams_need_a_number_of_steps(folder, capsys):
    (folder / "a.txt").write_text("words")
    options = ["--task", "text", "--task_options", '{"files": "a.txt", "streaming": true}', "--output_dir", "out"]
    with pytest.raises(ValueError, match="streamed data have no length, so the run needs max_steps"):
        run_pretraining(parse_run(options))
    assert not (folder / "out").exists()
