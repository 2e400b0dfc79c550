"""Small suites that train in about a second a run."""

from pathlib import Path

import yaml

RUNS = Path(__file__).resolve().parents[2] / "configs" / "runs"

OPTIONS = {
    "max_steps": 20,
    "eval_strategy": "no",
    "use_cpu": True,
    "window_end": 0.5,
    "policy": "target",
    "model": {"state_sizes": 16},
}
METHODS = {
    "full": {"method": "full"},
    "small": {"method": "compressed", "options": {"target_state_size": 4}},
    "scratch": {"method": "scratch", "sizes_of": "small"},
}


def write_suite(folder: Path, methods=None, options=None, config="digits_narrow", **rest) -> Path:
    """A suite of one task, `narrow`, in `folder/tiny.yaml`."""
    task = {
        "config": str(RUNS / f"{config}.yaml"),
        "options": OPTIONS | (options or {}),
        "methods": methods or METHODS,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"seeds": 1, "tasks": {"narrow": task}, **rest}, sort_keys=False))
    return path
