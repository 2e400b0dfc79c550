"""A speed is told only where enough steps were timed, on the page, the card, the screen and in the log alike."""

import json
from types import SimpleNamespace

import pytest
from made_up_runs import cut, undo, write_run

from hf_compressm.report import read_run, render_card, render_report
from hf_compressm.runs.pretraining import summary
from hf_compressm.surgery.record_keys import LEAST_TIMED_STEPS
from hf_compressm.training.timing import StepTimer


def segment(first: int, size: float, steps: int, speed: float) -> dict:
    return {"first_step": first, "mean_state_size": size, "steps": steps, "steps_per_second": speed}


def told(tmp_path, speed: list[dict], history: list[dict]) -> list[bool]:
    """Whether page, card and screen compare the speeds."""
    folder = write_run(tmp_path / "run", history=history)
    (folder / "compression.json").write_text(json.dumps({"history": history, "settings": {}, "speed": speed}))
    run = read_run(folder)
    sizes = run.sizes_before(), run.sizes_after()
    result = SimpleNamespace(sizes_before=sizes[0], sizes_after=sizes[1], speed=speed, metrics={"train_runtime": 1.0})
    texts = render_report(run), str(render_card(run)), summary(result)
    return [
        one in text for one, text in zip(("25×", "per second before the first cut", "25 x full"), texts, strict=True)
    ]


ENOUGH = LEAST_TIMED_STEPS + 1


@pytest.mark.parametrize(
    ("steps", "sizes", "expected"),
    [
        ((ENOUGH, ENOUGH, ENOUGH), (16, 8, 4), True),
        ((ENOUGH, 1, ENOUGH), (16, 8, 4), True),
        ((ENOUGH - 1, ENOUGH, ENOUGH), (16, 8, 4), False),
        ((ENOUGH, ENOUGH, ENOUGH - 1), (16, 8, 4), False),
        ((ENOUGH, ENOUGH), (8, 4), False),  # of a run that was resumed after its first cut
        ((ENOUGH, ENOUGH), (16, 8), False),  # of one that has not ended
    ],
)
def test_speeds_are_compared_where_both_were_timed(tmp_path, steps, sizes, expected):
    speed = [segment(0, size, count, 10 * 16 / size) for size, count in zip(sizes, steps, strict=True)]
    speed[-1]["steps_per_second"] = 12.5  # 1.25 times as fast as the first
    history = [cut(10, 16, 8), cut(20, 8, 4)]
    assert told(tmp_path, speed, history) == [expected] * 3


def test_an_undone_cut_makes_nothing_faster(tmp_path):
    speed = [segment(0, 16, ENOUGH, 10.0), segment(10, 8, ENOUGH, 15.0), segment(20, 16, ENOUGH, 12.5)]
    assert told(tmp_path, speed, [cut(10, 16, 8), undo(20, 10, 8, 16)]) == [False] * 3


def test_the_page_says_what_was_not_timed(tmp_path):
    history = [cut(10, 16, 8)]
    folder = write_run(tmp_path / "run", history=history)
    record = {"history": history, "speed": [segment(0, 16, 1, 0.5), segment(1, 8, 1, 40.0)]}
    (folder / "compression.json").write_text(json.dumps(record))
    page = render_report(read_run(folder))
    assert "2 stretches of training" in page and f"fewer than {LEAST_TIMED_STEPS} timed steps" in page
    assert 'id="speed-title"' not in page and "Steps per second" not in page


def test_a_running_training_has_the_steps_of_its_stretches_in_the_log(tmp_path):
    history = [cut(5, 16, 8), cut(20, 8, 4)]
    log = [{"step": 20, "compression/steps_per_second_before": 15.0}]
    run = read_run(write_run(tmp_path / "run", history=history, log=log, step=25))
    assert run.speed == [segment(5, 8, 15, 15.0)]


def test_a_resumed_timer_begins_at_its_step():
    timer = StepTimer(first_step=40)
    timer.begin_step()
    timer.end_step()
    timer.close_segment(41, 8.0)
    assert timer.segments[0].first_step == 40
