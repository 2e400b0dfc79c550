"""The configs of the paper's suite: each builds its model at full size and trains two steps on stand-in files."""

from pathlib import Path

import datasets
import pytest

from hf_compressm import state_sizes
from hf_compressm.data import load_task
from hf_compressm.data.random_files import write_stand_in
from hf_compressm.reproduction.suite import load_suite
from hf_compressm.runs.pretraining import build_model, build_trainer
from hf_compressm.runs.run_file import parse_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PAPER = sorted((CONFIGS / "runs" / "paper").glob("*.yaml"))
SHORT = {"imdb": {"max_length": 256}, "aan": {"max_length": 128}, "listops": {"min_length": 32, "max_length": 64}}
"""Options of the tasks that can be made shorter."""
PUBLISHED = {  # layers, features, states, steps, batch, dropout
    "smnist": (1, 8, 256, 200_000, 50, 0.1),
    "scifar": (6, 512, 384, 180_000, 50, 0.1),
    "listops": (6, 128, 256, 80_000, 32, 0.0),
    "imdb": (1, 256, 192, 50_000, 32, 0.2),
    "aan": (6, 128, 256, 100_000, 64, 0.1),
    "pathfinder": (6, 192, 256, 500_000, 64, 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_two_steps_on_stand_in_files(path, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = "--max_steps 2 --per_device_train_batch_size 1 --eval_strategy no --save_strategy no --cut_steps 1"
    run = parse_run([str(path), *options.split(), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")])
    name = run.arguments.task
    task = load_task(name, data_dir=write_stand_in(name, tmp_path / name), **(run.task_options | SHORT.get(name, {})))
    model = build_model(run, task)
    before, weights = state_sizes(model), model.score.weight.detach().clone()
    trainer, _ = build_trainer(run, task, model)
    trainer.train()
    assert (model.score.weight != weights).any()
    assert all(after <= size for after, size in zip(state_sizes(model), before, strict=True))
    if not path.stem.endswith("mamba"):
        layers, features, states, *_ = PUBLISHED[path.stem]
        assert before == [states] * layers and model.config.hidden_size == features


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name, tmp_path):
    run = parse_run([str(CONFIGS / "runs" / "paper" / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    model, training = run.model, run.training
    found = (model["num_hidden_layers"], model["hidden_size"], model["state_sizes"], training.max_steps)
    assert (*found, training.per_device_train_batch_size, model["dropout"]) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name, steps",
    [
        ("scifar", [4500, 9000, 13500, 18000]),
        ("listops", [2000, 4000, 6000, 8000]),
        ("aan", [2500, 5000, 7500, 10000]),
        ("pathfinder", [12500, 25000, 37500, 50000]),
        ("imdb", [2000, 3000]),
        ("smnist", list(range(20_000, 200_000, 20_000))),
    ],
)
def test_cuts_come_when_the_paper_makes_them(name, steps, tmp_path):
    run = parse_run([str(CONFIGS / "runs" / "paper" / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert run.compression.attempt_steps(run.training.max_steps) == steps


@pytest.mark.slow
def test_the_suite_has_the_papers_grid():
    tasks = {task.name: task for task in load_suite(CONFIGS / "suites" / "paper.yaml").tasks}
    assert tasks.keys() == {path.stem for path in PAPER}
    taus = {
        name: [m.options["tau"] for m in task.methods.values() if m.kind == "compressed" and "tau" in m.options]
        for name, task in tasks.items()
    }
    assert taus["smnist"] == [0.04, 0.02, 0.01, 0.005, 0.001]
    for name in ("scifar", "listops", "imdb", "aan", "pathfinder"):
        assert taus[name] == [0.15, 0.10, 0.07, 0.05, 0.03, 0.02]
        scratch = [method.arguments["sizes_of"] for method in tasks[name].methods.values() if method.kind == "scratch"]
        assert scratch == [f"tau {tau:.2f}" for tau in taus[name]]
    assert {method.seeds for method in tasks["smnist"].methods.values()} == {10}
    assert {method.seeds for method in tasks["scifar"].methods.values()} == {5}
