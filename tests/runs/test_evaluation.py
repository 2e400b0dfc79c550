"""Scores of saved models, by one process and by two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from selective_models import OWN, STOCK, make

from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification
from hf_compressm.data import load_task
from hf_compressm.runs.evaluation import parse_evaluation, run_evaluation

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--data", "stdlib_bytes", "--task_options", '{"length": 32, "evaluation_bytes": 1120}', "--cpu"]


@pytest.mark.parametrize("table", [OWN, STOCK], ids=["own", "stock"])
def test_scores_do_not_depend_on_the_batch_size(tmp_path, table):
    make(table, "mamba", vocab_size=256).save_pretrained(tmp_path)
    one, other = (
        run_evaluation(parse_evaluation([str(tmp_path), *OPTIONS, "--batch_size", size])) for size in ("3", "8")
    )
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)
    assert one["metrics"]["loss"] == pytest.approx(one["metrics"]["nats_per_byte"], rel=1e-5)
    assert one["state_sizes"] == [8, 8, 8] and one["examples"] == 35 and one["parameters"] > 0


def test_a_classifier_on_another_split_and_on_a_task_of_another_kind(tmp_path):
    kwargs = load_task("digits").model_kwargs
    config = MimoSSMConfig(**kwargs, hidden_size=6, num_hidden_layers=1, state_sizes=4)
    MimoSSMForSequenceClassification(config).save_pretrained(tmp_path)
    argv = [str(tmp_path), "--data", "digits", "--split", "validation", "--cpu", "--batch_size", "64"]
    score = run_evaluation(parse_evaluation(argv))
    assert score["split"] == "validation" and set(score["metrics"]) == {"loss", "accuracy"}
    assert score["metrics"]["loss"] > 0 and 0 <= score["metrics"]["accuracy"] <= 1
    with pytest.raises(ValueError, match="is for models with vocab_size"):
        run_evaluation(parse_evaluation([str(tmp_path), "--data", "mqar", "--cpu"]))


@pytest.mark.multi_process
def test_two_processes_count_nothing_twice(tmp_path):
    make(OWN, "mamba", vocab_size=256).save_pretrained(tmp_path)
    script = [str(ROOT / "scripts" / "evaluate_model.py"), str(tmp_path), *OPTIONS]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    one = run_evaluation(parse_evaluation([str(tmp_path), *OPTIONS]))
    assert two["hardware"]["processes"] == 2 and one["hardware"]["processes"] == 1
    assert two["versions"] == one["versions"] and {"python", "torch", "hf-compressm"} <= one["versions"].keys()
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
