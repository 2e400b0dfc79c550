"""A real, short run to look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_compressm.runs.pretraining import parse_run, run_pretraining

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run of 24 steps on `digits`, with cuts, evaluations and a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "short_digits"
    options = {
        "--output_dir": str(folder),
        "--max_steps": "24",
        "--window_end": "0.5",
        "--model": json.dumps({"state_sizes": 16, "num_hidden_layers": 2}),
        "--eval_strategy": "steps",
        "--eval_steps": "4",
        "--logging_steps": "2",
        "--save_strategy": "steps",
        "--save_steps": "12",
        "--disable_tqdm": "true",
        "--use_cpu": "true",
    }
    config = ROOT / "configs" / "runs" / "digits_narrow.yaml"
    run_pretraining(parse_run([str(config), *(part for option in options.items() for part in option)]))
    return folder
