"""The committed results are those of the committed suites, and the pages quote them."""

import re
from pathlib import Path

import pytest

from hf_compressm.reproduction.runner import current, read_records
from hf_compressm.reproduction.suite import jobs, load_suite
from hf_compressm.reproduction.summary import results_table

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = sorted(path.parent for path in (ROOT / "docs" / "evidence").glob("*/results.jsonl"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "evidence.md", ROOT / "docs" / "measured.md"]
SPREAD = re.compile(r"(\d+\.\d+) ± (\d*\.\d+)")


def figures(text):
    """Means and standard deviations as written."""
    return [match.groups() for match in SPREAD.finditer(text)]


def quoted(figure, measured):
    """Whether a figure is one of the measured ones, at the number of decimals it is given with."""
    mean, deviation = figure
    half = 0.5 * 10.0 ** -len(mean.split(".")[1]) + 1e-9
    return any(abs(float(mean) - float(m)) <= half and abs(float(deviation) - float(d)) <= half for m, d in measured)


@pytest.fixture(scope="module", params=EVIDENCE, ids=lambda folder: folder.name)
def evidence(request):
    """A folder of results, its suite, the suite's runs, and the results of these as they are now."""
    suite = load_suite(ROOT / "configs" / "suites" / f"{request.param.name}.yaml")
    planned = jobs(suite)
    return request.param, suite, planned, current(read_records(request.param / "results.jsonl"), planned)


def test_every_run_of_the_suite_has_its_result(evidence):
    _, _, planned, records = evidence
    missing = {job.key for job in planned} - {(r["task"], r["method"], r["seed"]) for r in records}
    assert not missing, "the suite or a run file has changed: run it again, and copy its results"


def test_the_table_is_that_of_the_results(evidence):
    folder, suite, _, records = evidence
    assert (folder / "table.md").read_text() == results_table(suite, records)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_figures_are_in_a_table(page):
    tables = [folder / "table.md" for folder in EVIDENCE] + sorted((ROOT / "docs" / "evidence").glob("*.md"))
    measured = [figure for table in tables for figure in figures(table.read_text())]
    found = figures(page.read_text())
    assert found, "no figure was found: has their form changed?"
    assert not [figure for figure in found if not quoted(figure, measured)]


def test_a_stale_figure_is_noticed():
    measured = figures("| full | 97.49 ± 0.44 | 0.0994 ± 0.0110 |")
    assert all(quoted(figure, measured) for figure in figures("97.49 ± 0.44, .1 and 0.099 ± 0.011"))
    assert not quoted(("97.48", "0.44"), measured) and not quoted(("97.49", "0.45"), measured)
