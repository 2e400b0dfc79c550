"""The report: what it says of real and of odd runs, and that anybody can read it anywhere."""

import json
import re
from html import unescape

import pytest
from made_up_runs import cut, undo, write_run
from page import Page, contrast, themes
from typer.testing import CliRunner

from hf_compressm import cli
from hf_compressm.report import read_run, render_report, write_report
from hf_compressm.report.figures import metric_figure
from hf_compressm.report.svg import THEME, Axis, number
from hf_compressm.report.tables import layers_table, signed

LIMIT = 1_500_000


def text_of(html: str) -> str:
    return unescape(
        re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)))
    )


def check_page(html: str) -> Page:
    """What must hold for every report."""
    page = Page(html)
    assert not page.wrong and len(html.encode()) <= LIMIT
    assert len(set(page.ids)) == len(page.ids)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1 and len(page.all("main")) == 1
    assert page.all("title") and page.all("header") and page.all("nav") and page.all("footer")
    assert not page.all("script") and not page.all("link") and not page.all("img")
    assert not re.search(r'(src|href)="(?!#)|url\(|@import|https?:', html)
    for svg in page.all("svg"):
        assert svg["role"] == "img" and all(name in page.ids for name in svg["aria-labelledby"].split())
    for anchor in page.all("a"):
        assert anchor["href"].removeprefix("#") in page.ids
    for table in [around for tag, _, around in page.elements if tag == "table"]:
        assert "div" in table  # it scrolls by itself on a narrow screen
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(deeper - level <= 1 for level, deeper in zip(levels, levels[1:], strict=False))
    return page


def test_the_run_writes_it_and_it_says_what_was_measured(finished_run):
    html = (finished_run / "report.html").read_text()
    check_page(html)
    text = text_of(html)
    compression = json.loads((finished_run / "compression.json").read_text())
    state = json.loads((finished_run / "trainer_state.json").read_text())
    assert "Finished: 24 of 24 steps." in text
    assert f"{number(sum(compression['sizes_before']) / 2)} → {number(sum(compression['sizes_after']) / 2)}" in text
    accuracy = json.loads((finished_run / "test_results.json").read_text())["test_accuracy"]
    assert f"Test accuracy {number(accuracy, 4)}" in text
    losses = [entry for entry in state["log_history"] if "compression/loss_after" in entry]
    assert len(losses) == len(compression["history"]) >= 2
    for entry in losses:
        before, after = entry["compression/loss_before"], entry["compression/loss_after"]
        assert number(before, 4) in text and number(after, 4) in text and f"{after - before:+.4f}" in text
    for record in compression["history"]:
        assert number(max(layer["bound"] for layer in record["layers"] if layer["bound"])) in text
        assert f"The cut at step {record['step']}, layer by layer" in text
    timed = [segment for segment in compression["speed"] if segment["steps"] > 10]
    assert timed and all(number(segment["steps_per_second"]) in text for segment in timed)


def test_attempts_that_cut_nothing_leave_their_spectra_in_the_log(finished_run):
    run = read_run(finished_run)
    measured = {spectrum.step for spectrum in run.layers()[0].spectra}
    cuts = {record["step"] for record in run.cuts}
    kept = {entry["step"] for entry in run.log if "compression/spectra" in entry}
    assert measured == cuts | kept and not cuts & kept and len(measured) == 4


def test_spectra_of_cuts_outside_training_say_so(tmp_path):
    outside = [cut(0, old, new) | {"step": None} for old, new in ((16, 12), (12, 8))]
    folder = write_run(tmp_path / "own_loop", step=20, max_steps=20)
    moments = {}
    for name, history in {"one": outside[:1], "two": outside, "mixed": [cut(20, 16, 12), outside[1]]}.items():
        (folder / "compression.json").write_text(json.dumps({"history": history, "speed": [], "settings": {}}))
        moments[name] = [spectrum.moment for spectrum in read_run(folder).layers()[0].spectra]
        page = render_report(read_run(folder))
        check_page(page)
        assert all(moment.removeprefix("at ") in page for moment in moments[name]) and "again" not in page
    assert moments == {
        "one": ["outside training"],
        "two": ["outside training, cut 1 of 2", "outside training, cut 2 of 2"],
        "mixed": ["at step 20", "outside training"],
    }


def test_a_checkpoint_speaks_for_an_unfinished_run(finished_run, tmp_path):
    folder = tmp_path / "unfinished"
    write_run(folder / "checkpoint-12", log=[{"step": 8, "loss": 2.0}], step=12, max_steps=40, history=[cut(8, 16, 9)])
    write_run(folder / "checkpoint-9", step=9, max_steps=40)
    page = render_report(read_run(folder))
    check_page(page)
    assert "Not finished: this shows the newest checkpoint, step 12 of 40." in text_of(page)
    assert "16 → 9" in text_of(page)


def test_a_new_run_in_an_old_folder_is_not_mixed_with_it(finished_run, tmp_path):
    folder = write_run(tmp_path / "again", step=10, max_steps=10, log=[{"step": 10, "loss": 9.0}])
    (folder / "compression.json").write_text(json.dumps({"history": [cut(5, 16, 3)], "speed": [], "settings": {}}))
    (folder / "test_results.json").write_text(json.dumps({"test_accuracy": 0.125}))
    write_run(folder / "checkpoint-20", step=20, max_steps=40, log=[{"step": 20, "loss": 1.0}], state_sizes=[16, 16])
    run = read_run(folder)
    assert run.step == 20 and not run.finished and not run.events and not run.metrics


def test_a_run_without_cuts(tmp_path):
    log = [{"step": 5, "loss": 2.0}, {"step": 10, "loss": float("nan")}]
    page = render_report(read_run(write_run(tmp_path / "full", log=log, state_sizes=[16, 16])))
    check_page(page)
    assert "No layer was cut." in text_of(page) and "No layer's size changed" in text_of(page)


def test_a_cut_of_value_channels_is_none_of_states(tmp_path):
    values = cut(0, 64, 32) | {"event": "value_cut"}
    with_values = read_run(write_run(tmp_path / "with", history=[values, cut(10, 16, 8)]))
    without = read_run(write_run(tmp_path / "without", history=[cut(10, 16, 8)]))
    assert with_values.events == without.events == [cut(10, 16, 8)]


def test_an_undone_cut(tmp_path):
    history = [cut(10, 16, 8), undo(20, 10, 8, 16)]
    log = [{"step": step, "eval_loss": value} for step, value in ((5, 1.0), (10, 1.5), (20, 2.0), (30, 0.9))]
    run = read_run(write_run(tmp_path / "undone", log=log, history=history))
    assert run.sizes_before() == run.sizes_after() == [16, 16]
    assert run.layers()[0].sizes == [(0, 16), (10, 8), (20, 16)]
    page = render_report(run)
    check_page(page)
    assert "1, 1 undone" in text_of(page) and "Undone at step" in text_of(page) and "cut, later undone" in page


@pytest.mark.parametrize(("layers", "states"), [(24, 128), (64, 64), (1, 1)])
def test_many_layers_and_long_logs_stay_small(tmp_path, layers, states):
    history = [cut(step, states, max(states // 2, 1), layers) for step in (10, 20, 30, 40)]
    log = [{"step": step, "loss": 5 / step, "eval_loss": 6 / step} for step in range(1, 4000)]
    run = read_run(write_run(tmp_path / "deep", log=log, history=history, step=4000, max_steps=4000))
    page = check_page(render_report(run))
    assert len(page.all("h3")) == layers


def test_rank_stability_is_shown_with_its_threshold(tmp_path):
    log = [{"step": step, "compression/rank_stability": step / 40} for step in (10, 20, 30)]
    folder = write_run(tmp_path / "stable", log=log, history=[cut(30, 16, 8)])
    (folder / "compression.json").write_text(
        json.dumps({"history": [cut(30, 16, 8)], "settings": {"stability_threshold": 0.7}, "speed": []})
    )
    page = render_report(read_run(folder))
    check_page(page)
    assert "settled from 0.7 on" in page and "0.75 at step 30" in page


def test_names_are_escaped(tmp_path):
    folder = tmp_path / "<b>&run"
    record = cut(10, 8, 4)
    record["layers"][0]["name"] = "<script>alert(1)</script>"
    record["layers"][1]["name"] = "\"onload='x'"
    check_page(render_report(read_run(write_run(folder, history=[record]))))


def test_a_folder_without_a_run_is_refused_with_what_was_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-compressm", "report", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    error = capsys.readouterr().err
    assert "holds no run" in error and "trainer_state.json" in error and "compression_history" in error
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_run(tmp_path / "missing")
    (tmp_path / "trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(ValueError, match="is not JSON"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_run(tmp_path)


def test_the_command_writes_where_it_is_told(finished_run, tmp_path):
    target = tmp_path / "page.html"
    done = CliRunner().invoke(cli.app, ["report", str(finished_run), "-o", str(target)])
    assert done.exit_code == 0 and str(target) in done.output
    assert target.read_text() == (finished_run / "report.html").read_text()
    assert write_report(finished_run) == finished_run / "report.html"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    colours = themes(THEME)[theme]
    for text in ("ink", "soft", "link"):
        assert contrast(colours[text], colours["paper"]) >= 4.5, text
        assert contrast(colours[text], colours["raised"]) >= 4.5, text
    for line in ("c1", "c2", "c3", "c4", "c5", "c6"):
        assert contrast(colours[line], colours["paper"]) >= 4.5, line


def test_axes_and_numbers():
    assert Axis.around([3, 97]).ticks() == [0, 50, 100]
    assert Axis.around([5.0]).high > Axis.around([5.0]).low
    assert Axis.around([0.02, 30], log=True).ticks() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert Axis.upto(1).ticks() == [0, 1]
    assert [number(value) for value in (0, 0.25, 1234.5, 1e-5, 2.5e9, 54.333)] == [
        *("0", "0.25", "1,234", "1e-5", "2.5e9", "54.3"),
    ]


def test_a_cut_by_a_score_that_measures_no_singular_values(tmp_path):
    record = cut(10, 12, 6)
    for layer in record["layers"]:
        layer |= {"singular_values": [], "bound": None}
    log = [{"compression/loss_before": 1.25, "compression/loss_after": 1.5, "step": 10}]
    html = render_report(read_run(write_run(tmp_path / "run", history=[record], log=log, state_sizes=[6, 6])))
    check_page(html)
    assert "12 → 6" in text_of(html) and "+0.2500" in text_of(html)


def test_columns_that_nothing_filled_are_left_out(tmp_path):
    log = [{"step": 10, "loss": 2.0}, {"step": 10, "eval_loss": 2.5, "eval_accuracy": 0.5}, {"step": 20, "loss": 1.0}]
    run = read_run(write_run(tmp_path / "run", log=log, history=[cut(10, 16, 8)], step=20))
    loss, accuracy = (metric_figure(run, name).table for name in ("eval_loss", "eval_accuracy"))
    assert (loss.columns, loss.rows) == (["Step", "Training", "Evaluation"], [["10", "2", "2.5"], ["20", "1", "–"]])
    assert (accuracy.columns, accuracy.rows) == (["Step", "Evaluation"], [["10", "0.5"]])
    assert layers_table(run, run.cuts[0]).columns == ["Layer", "States before", "After", "Sum removed", "Error bound"]


def test_a_run_without_a_log_is_drawn_to_its_last_cut(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"compression_history": [cut(10, 16, 8), cut(40, 8, 4)]}))
    run = read_run(folder)
    page = render_report(run)
    check_page(page)
    assert run.end == 40 and ">40</text>" in page
    for section in ("losses", "speed-section", "rank-stability"):
        assert f'id="{section}"' not in page and f'href="#{section}"' not in page


def test_a_log_without_losses_says_why(tmp_path):
    folder = write_run(tmp_path / "run", history=[cut(1, 16, 8)], step=2, max_steps=2)
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {"logging_steps": 500}))
    assert "the loss is logged every 500 steps, and the run had 2" in text_of(render_report(read_run(folder)))


@pytest.mark.parametrize(
    ("change", "text"),
    [(0, "0"), (-0.00001, "< 0.0001"), (0.00004, "< 0.0001"), (-0.0123, "-0.0123"), (0.5, "+0.5000")],
)
def test_a_change_has_no_sign_where_it_is_too_small_to_tell(change, text):
    assert signed(change) == text


def test_equal_lines_do_not_hide_each_other(tmp_path):
    page = render_report(read_run(write_run(tmp_path / "run", history=[cut(10, 16, 8)])))
    assert 'class="line c2 shared1"' in page
