"""Run transformers' own tests on every class of this package, and this package's tests for what those leave out.

The sdist of the installed version is downloaded from PyPI (`pip download`), or given with `--sdist`. It carries the
common tests of models and configs, which run here on classes that read tokens, channels and pairs. It does not carry
the tests of generation and pipelines: `tests/models/test_generation.py` and `test_pipelines.py` check the same.

    python scripts/benchmarks/compatibility.py [--sdist transformers-5.23.0.tar.gz] [--json FILE] [-k EXPRESSION]

Exits with 1 if a test fails that is not named in `KNOWN`, or one that is named there passes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_compressm.report.text_tables import markdown_table

HERE = Path(__file__).resolve().parent
OWN = HERE.parents[1] / "tests/models"
OWN_LIST = ("test_generation.py", "test_pipelines.py")
FAMILIES = ("CompreSSMMamba", "CompreSSMMamba2", "CompreSSMGatedDeltaNet", "CompreSSMMiniMax", "MimoSSM")
OF_CHANNELS = {
    "test_inputs_embeds": "looks for input_ids; these models read input_values",
    "test_inputs_embeds_matches_input_ids": "looks for input_ids; these models read input_values",
    "test_model_get_set_embeddings": "expects nn.Embedding; channels go through nn.Linear",
    "test_load_with_mismatched_shapes": "sets another vocab_size, on which no tensor of these models depends",
}
WITHOUT_ATTENTION = "looks for softmax attention, which these models are made without"
ROTARY = (
    "is about transformers' own rotary embedding: with these small heads it divides by zero (Qwen3.5's), or differs by "
    "1.2e-5 where 1e-5 is allowed (MiniMax's)"
)
OF_ATTENTION = {
    "test_tp_plan_matches_params": WITHOUT_ATTENTION,
    **{
        f"test_model_rope_scaling_from_config_{kind}": WITHOUT_ATTENTION for kind in ("0_linear", "1_dynamic", "2_yarn")
    },
    "test_model_rope_scaling_frequencies": ROTARY,
}
KNOWN = {(f"{family}OfChannels", test): why for family in FAMILIES for test, why in OF_CHANNELS.items()} | {
    (f"{family}{kind}", "test_bc_cache_name_forward"): "expects a warning; a cache is taken by each of its names"
    for family in FAMILIES[:2]
    for kind in ("", "OfChannels")
}
KNOWN |= {
    (f"{family}{kind}", test): why
    for family in ("CompreSSMGatedDeltaNet", "CompreSSMMiniMax")
    for kind in ("", "OfChannels")
    for test, why in OF_ATTENTION.items()
}
KNOWN["CompreSSMGatedDeltaNetOfChannels", "test_model_rope_with_partial_rotation"] = (
    "gives input_ids; these models read input_values"
)
"""Tests that fail, by case and name, and why that is right."""

MISSING = {
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}
"""What the common tests import and the sdist leaves out: empty classes stand in."""

COMMON_FIELDS = {"return_dict": False, "output_hidden_states": True, "num_labels": 7, "problem_type": "regression"}


def downloaded(what: str, folder: Path) -> Path:
    """A source distribution from PyPI."""
    options = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, what], check=True)
    return next(folder.glob("*.tar.gz"))


def provide(sdist: Path | None, folder: Path) -> None:
    """Make `tests.test_modeling_common` and what it imports importable."""
    archive = sdist or downloaded(f"transformers=={version('transformers')}", folder)
    with tarfile.open(archive) as files:
        members = [member for member in files.getmembers() if "/tests/" in member.name and member.isfile()]
        files.extractall(folder, members, filter="data")
    root = next(path.parent for path in folder.glob("*/tests"))
    (root / "tests/__init__.py").touch()
    if importlib.util.find_spec("parameterized") is None:
        target = folder / "packages"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "parameterized"]
        subprocess.run(command, check=True)
        sys.path.insert(0, str(target))
    sys.path.insert(0, str(root))
    for name, wanted in MISSING.items():
        stand_in(name, **{wanted: type(wanted, (), {})})
    stand_in("tests.utils.test_configuration_utils", config_common_kwargs=COMMON_FIELDS)


def stand_in(name: str, **content: Any) -> None:
    package = types.ModuleType(name.rpartition(".")[0])
    package.__path__ = []
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules |= {package.__name__: package, name: module}


class Recorder:
    """A pytest plugin: what became of each test, by case and name. A test with a subtest that fails has failed."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}
        self.messages: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        parts = report.nodeid.partition("[")[0].split("::")
        name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        key = (parts[1], name) if len(parts) == 3 else own_key(name, parameters)
        if report.failed:
            self.outcomes[key] = "failed"
            self.messages[key] = str(report.longrepr).strip().rpartition("\n")[2]
        elif report.skipped:
            self.outcomes.setdefault(key, "skipped")
        elif report.when == "call":
            self.outcomes.setdefault(key, "passed")


def own_key(test: str, parameters: str) -> tuple[str, str]:
    family = max((name for name in FAMILIES if name in parameters), key=len, default="MimoSSM")
    return f"{family}, own list", f"{test}[{parameters}" if parameters else test


def run(paths: list[Path], expression: str, root: Path) -> Recorder:
    import pytest

    recorder = Recorder()
    options = ["-q", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
    pytest.main([*options, *(["-k", expression] if expression else []), *map(str, paths)], plugins=[recorder])
    return recorder


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """Markdown: how many tests of each case passed, do not apply, and failed."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for (case, _), outcome in outcomes.items():
        counts[case][outcome] += 1
    kinds = ("passed", "skipped", "failed")
    rows = [[case, *(counts[case][kind] for kind in kinds)] for case in sorted(counts)]
    total = Counter(outcomes.values())
    rows.append(["**all**", *(total[kind] for kind in kinds)])
    return markdown_table(["case", "passed", "does not apply", "failed"], rows)


def verdict(outcomes: dict[tuple[str, str], str], messages: dict[tuple[str, str], str]) -> tuple[list[str], bool]:
    """What is to be said of failures and of those that were expected, and whether all is as `KNOWN` says."""
    lines, right = [], True
    for key, outcome in sorted(outcomes.items()):
        if outcome == "failed":
            right &= key in KNOWN
            what, why = ("expected", KNOWN[key]) if key in KNOWN else ("FAILED", messages.get(key))
            lines.append(f"{what}: {' '.join(key)}: {why}")
        elif outcome == "passed" and key in KNOWN:
            right = False
            lines.append(f"PASSES, take it out of KNOWN: {' '.join(key)}")
    return lines, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sdist", type=Path, help="transformers' source distribution, instead of a download")
    parser.add_argument("--only-own-list", action="store_true", help="leave transformers' files out; needs no network")
    parser.add_argument("--json", type=Path, help="write outcomes by case and test")
    parser.add_argument("-k", dest="expression", default="", help="only tests that pytest's -k selects")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(OWN), str(OWN.parent)]
    with tempfile.TemporaryDirectory() as name:
        runs = [run([OWN / file for file in OWN_LIST], options.expression, OWN)]
        if not options.only_own_list:
            provide(options.sdist, Path(name))
            runs.append(run([HERE / "compatibility_cases.py"], options.expression, HERE))
    outcomes = {key: outcome for each in runs for key, outcome in each.outcomes.items()}
    lines, right = verdict(outcomes, {key: text for each in runs for key, text in each.messages.items()})
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch"))
    print(f"\n{versions}\n\n{table(outcomes)}\n", *lines, sep="\n")
    if options.json:
        found = [{"case": case, "test": test, "outcome": outcome} for (case, test), outcome in outcomes.items()]
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if right and outcomes else 1


if __name__ == "__main__":
    sys.exit(main())
