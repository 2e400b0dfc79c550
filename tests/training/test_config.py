"""Compression settings: the schedule they give, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainingArguments

from hf_compressm import CompressionConfig, CompreSSMCallback


def test_default_schedule_is_that_of_the_paper():
    assert CompressionConfig().attempt_steps(1000) == [25, 50, 75, 100]
    assert CompressionConfig().tau == 0.1 and CompressionConfig().min_change == 0.05


@given(st.integers(1, 10**6), st.integers(1, 20), st.floats(0, 0.5), st.floats(0.5, 1))
def test_attempts_lie_in_the_window_and_end_with_it(max_steps, attempts, start, end):
    config = CompressionConfig(attempts=attempts, window_start=start, window_end=end + 1e-6 if end <= start else end)
    first, last = config.window(max_steps)
    if first >= min(last, max_steps):
        with pytest.raises(ValueError, match="holds no step"):
            config.attempt_steps(max_steps)
        return
    steps = config.attempt_steps(max_steps)
    assert len(steps) == len(set(steps)) == min(attempts, last - first)
    assert first < steps[0] and steps[-1] == last and steps == sorted(steps)


def test_windows_in_steps_and_explicit_steps():
    assert CompressionConfig(window_start=100, window_end=300, attempts=2).attempt_steps(1000) == [200, 300]
    assert CompressionConfig(cut_steps=[9, 3, 3]).attempt_steps(10) == [3, 9]
    assert CompressionConfig(trigger="stability", stability_interval=10).attempt_steps(400) == [
        10,
        20,
        30,
        40,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "tau must lie strictly between 0 and 1; got 0.0"),
        ({"tau": 1.0}, "tau must lie strictly"),
        ({"policy": "best"}, "policy must be energy, target or fraction; got 'best'"),
        ({"policy": "target"}, "needs target_state_size"),
        ({"policy": "fraction"}, "needs keep_fraction"),
        ({"policy": "fraction", "keep_fraction": 1.5}, "fraction to keep must lie strictly between"),
        ({"target_state_size": 4}, "used by policy='target' only"),
        ({"keep_fraction": 0.5}, "used by policy='fraction' only"),
        ({"policy": "target", "target_state_size": 0}, "at least 1"),
        ({"window_start": 0.2, "window_end": 0.1}, "window_start < window_end"),
        ({"attempts": 0}, "attempts and stability_patience must be >= 1"),
        ({"cut_steps": []}, "at least one"),
        ({"cut_steps": [0]}, "optimizer steps >= 1"),
        ({"trigger": "stability", "cut_steps": [5]}, "leave cut_steps out"),
        ({"trigger": "never"}, "trigger must be schedule or stability"),
        ({"stability_threshold": 0}, "stability_threshold must lie in"),
        ({"min_state_size": 0}, "minimum and multiple_of must be >= 1"),
        ({"min_change": 1.0}, "minimum_change must lie in"),
        ({"selection": "best"}, "selection must be largest, smallest or random"),
        ({"rollback_tolerance": -1}, "rollback_tolerance must be >= 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**settings)


def test_a_window_without_a_step_and_unknown_length_are_refused():
    with pytest.raises(ValueError, match="of 5 training steps holds no step"):
        CompressionConfig().attempt_steps(5)
    with pytest.raises(ValueError, match="number of training steps is unknown"):
        CompressionConfig().attempt_steps(-1)
    with pytest.raises(ValueError, match="beyond the last training step, 10"):
        CompressionConfig(cut_steps=[11]).attempt_steps(10)


def test_unknown_settings_of_the_callback_are_named():
    with pytest.raises(TypeError, match="unknown settings .'taux'.; allowed are .*'tau'"):
        CompreSSMCallback(taux=0.1)
    assert CompreSSMCallback(CompressionConfig(tau=0.2), attempts=2).config == CompressionConfig(tau=0.2, attempts=2)


def test_settings_parse_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, CompressionConfig))
    words = ["--output_dir", str(tmp_path), "--tau", "0.2", "--cut_steps", "3", "5", "--rollback", "true"]
    _, config = parser.parse_args_into_dataclasses(words)
    assert config == CompressionConfig(tau=0.2, cut_steps=[3, 5], rollback=True)


def test_direction_of_the_watched_metric():
    assert not CompressionConfig(rollback_metric="eval_loss").greater_is_better
    assert CompressionConfig(rollback_metric="eval_accuracy").greater_is_better
    assert not CompressionConfig(rollback_metric="eval_wer", rollback_greater_is_better=False).greater_is_better
