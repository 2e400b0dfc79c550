"""The report in a real browser: no accessibility violation, no request, no sideways scrolling on a phone.

Skipped where there is no Playwright, Chromium or axe-core; CONTRIBUTING.md says how to get them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from made_up_runs import cut, undo, write_run

from hf_compressm.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SCREENS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (360, "light"), "phone-dark": (360, "dark")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: set CHROMIUM to its path"),
    pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: set AXE_CORE to its axe.min.js"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        started = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(params=["finished", "deep", "undone", "bare"])
def report(request, finished_run, tmp_path):
    """Reports of runs of several shapes."""
    log = [{"step": step, "loss": 5 / step, "eval_loss": 6 / step} for step in range(1, 100)]
    made_up = {
        "deep": {"log": log, "history": [cut(step, 32, 16, 30) for step in (5, 10)]},
        "undone": {
            "log": [*log, {"step": 10, "compression/rank_stability": 0.9}],
            "history": [cut(10, 16, 8), undo(20, 10, 8, 16)],
        },
        "bare": {"history": [cut(1, 2, 1, 1)], "step": 0},
    }
    folder = finished_run if request.param == "finished" else write_run(tmp_path / "run", **made_up[request.param])
    return write_report(folder, tmp_path / "report.html")


@pytest.mark.parametrize("screen", SCREENS)
def test_anybody_can_read_it(browser, report, screen, tmp_path):
    width, scheme = SCREENS[screen]
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    for opened in (False, True):
        page.evaluate("open => document.querySelectorAll('details').forEach(part => part.open = open)", opened)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    letters = page.evaluate(
        """[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"""
    )
    assert min(letters, default=12) >= 9
    assert asked == [report.as_uri()]
    page.evaluate(AXE.read_text())
    found = page.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
    context.close()
