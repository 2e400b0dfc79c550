"""The speed benchmarks at tiny sizes: what they write, and that they time nothing that is wrong."""

import argparse
import importlib
import importlib.util
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import run_script

FOLDER = Path(__file__).resolve().parents[1] / "scripts/benchmarks"
OPS = ("ops.py", "--sizes", "1", "3", "12", "128", "--shape", "1", "9", "4", "--repeats", "3", "--threads", "1")
TRAINING = (
    "training.py",
    "--sizes",
    "6",
    "3",
    "1",
    "--hidden",
    "16",
    "--length",
    "12",
    "--batch",
    "2",
    "--threads",
    "1",
)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a benchmark in this process, and returns what it prints."""

    def run(name, *arguments):
        run_script(FOLDER / name, *arguments, monkeypatch=monkeypatch)
        return capsys.readouterr().out

    return run


def make_wrong(monkeypatch, module, function):
    """Let a kernel's first result be off by a hundredth."""
    kernels = importlib.import_module(f"hf_compressm.ops.{module}")
    right = getattr(kernels, function)

    def wrong(*arguments):
        first, *others = right(*arguments)
        return 1.01 * first, *others

    monkeypatch.setattr(kernels, function, wrong)


def assert_ordered(times):
    assert 0 < times["p10_ms"] <= times["median_ms"] <= times["p90_ms"]


def assert_describes(machine):
    assert machine["processor"] and machine["threads"] >= 1 and machine["torch"]


@pytest.mark.slow
def test_ops_writes_times_shares_and_how_they_go_with_the_size(script, tmp_path):
    printed = script(*OPS, "--json", tmp_path / "ops.json")
    record = json.loads((tmp_path / "ops.json").read_text())
    assert_describes(record["machine"])
    assert record["copy_bandwidth_gb_s"] > 0
    scans = ("diag_scan", "selective_scan", "ssd_scan")
    expected = [(op, N, name) for op in scans for N in (1, 3, 12, 128) for name in ("forward", "training")]
    expected += [("state_gramian", N, "forward") for N in (1, 3, 12, 128)]
    assert [(row["op"], row["N"], row["pass"]) for row in record["rows"]] == expected
    for row in record["rows"]:
        assert_ordered(row["times"])
        assert row["shape"] == [1, 9, 4] and row["times"]["steps"] == 3
        moved = row["bytes"] / row["times"]["median_ms"] / 1e6
        assert row["share"] == pytest.approx(moved / record["copy_bandwidth_gb_s"])
        assert (row["backend"], row["against"]) == ("cpu", "naive")
        assert_ordered(row["against_times"])
        assert row["ratio"] == pytest.approx(row["against_times"]["median_ms"] / row["times"]["median_ms"])
    # u, and the states with the final one, of 9 complex64 numbers for each state; three poles.
    bytes_of = {(row["op"], row["N"], row["pass"]): row["bytes"] for row in record["rows"]}
    assert bytes_of["diag_scan", 3, "forward"] == 8 * (27 + 3 + 27 + 3)
    assert bytes_of["diag_scan", 3, "training"] == 8 * (3 * (27 + 3) + 2 * (27 + 3))
    assert all(difference < 1e-4 for difference in record["differences"].values())
    assert all(found["ratio_12_128"] > 0 and found["miss"] >= 0 for found in record["summary"])
    assert printed.count("N = 12 takes") == 7 and "straight line missed" in printed and "parabola missed" in printed


@pytest.mark.slow
def test_training_writes_steps_and_what_is_left_of_the_possible(script, tmp_path):
    models = ("mimo_ssm", "compressm_mamba", "compressm_mamba2", "mamba", "mamba2")
    script(*TRAINING, "--repeats", "2", "--against", "naive", "--json", tmp_path / "training.json")
    record = json.loads((tmp_path / "training.json").read_text())
    assert_describes(record["machine"])
    assert record["settings"] == {"hidden": 16, "layers": 2, "length": 12, "batch": 2, "against": "naive"}
    assert [(row["model"], row["N"]) for row in record["rows"]] == [(name, N) for name in models for N in (6, 3, 1)]
    for first, middle, last in zip(*[iter(record["rows"])] * 3, strict=True):
        t6, t3, t1 = (row["times"]["median_ms"] for row in (first, middle, last))
        assert middle["speed_up"] == pytest.approx(t6 / t3)
        assert middle["possible"] == pytest.approx(t6 / (t1 + (t6 - t1) * 2 / 5))
        assert middle["reached"] == pytest.approx(middle["speed_up"] / middle["possible"])
        assert middle["saved"] == pytest.approx((t6 - t3) / (t6 - t1)) and middle["states_gone"] == pytest.approx(3 / 5)
        assert (first["reached"], last["reached"]) == (pytest.approx(1), pytest.approx(1))
        for row in (first, middle, last):
            assert row["difference"] < 1e-3
            assert_ordered(row["times"])
            assert_ordered(row["against_times"])


def test_ops_refuses_to_time_a_wrong_kernel(script, tmp_path, monkeypatch):
    make_wrong(monkeypatch, "diag_scan.cpu", "backward")
    with pytest.raises(SystemExit, match="diag_scan, N = 1: outputs .* 'cpu'.*nothing is timed"):
        script(*OPS, "--ops", "diag_scan", "--json", tmp_path / "ops.json")
    assert not (tmp_path / "ops.json").exists()


def test_training_refuses_to_time_a_wrong_kernel(script, monkeypatch):
    make_wrong(monkeypatch, "ssd_scan.cpu", "backward")
    with pytest.raises(SystemExit, match="compressm_mamba2: loss, logits or gradients differ.*SSD_SCAN=naive"):
        script(*TRAINING, "--models", "compressm_mamba2")


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("benchmarks_common", FOLDER / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_at_powers_of_two_show(common):
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    curve, miss, _ = common.fitted(sizes, [3 + 0.5 * N for N in sizes])
    assert miss < 1e-9 and curve[-1] == pytest.approx(131)
    assert common.fitted(sizes, [3 + 0.5 * 2 ** (N - 1).bit_length() for N in sizes])[1] > 0.15
    assert (
        common.fitted(sizes, [1 + N * N for N in sizes])[1]
        > 0.3
        > common.fitted(sizes, [1 + N * N for N in sizes], 2)[1]
    )


def test_a_slow_work_is_measured_twice_and_others_to_the_end(common):
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in ("slow", "fast", "large")}

    def clock(work):
        work()
        if calls[-1] == "large":
            raise torch.OutOfMemoryError
        return {"slow": 5.0, "fast": 1.0}[calls[-1]]

    assert common.in_turns(works, 6, 6.5, clock) == {"slow": [5.0] * 2, "fast": [1.0] * 6, "large": []}
    assert sorted(calls[:3]) == ["fast", "large", "slow"] and calls.count("large") == 1


def test_differences_are_relative_and_nan_is_not_swallowed(common):
    right = [torch.tensor([1.0, 100.0]), torch.tensor([1e-3])]
    assert common.largest_difference([right[0] + 1, right[1]], right) == pytest.approx(0.01)
    assert math.isnan(common.largest_difference([right[0] * torch.nan, right[1]], right))
    assert math.isnan(common.largest_difference([right[0], right[1] * torch.nan], right))


def test_other_programs_are_noticed(common, capsys):
    quiet, loud = ({"times": {"p10_ms": 1.0, "p90_ms": high}} for high in (1.2, 2.0))
    common.warn_of_noise([quiet] * 3 + [loud])
    assert not capsys.readouterr().out
    common.warn_of_noise([quiet] * 2 + [loud])
    assert "noisy: in 1 of 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_of_time_against_states_is_written(monkeypatch, tmp_path, ending, start):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    from plotting import plot

    times = [{"p10_ms": 1.0, "median_ms": 2.0, "p90_ms": 3.0}] * 2
    curve = {"label": "forward", "N": [1, 2], "times": times, "line": [2.0, 2.0]}
    plot(tmp_path / f"times.{ending}", "an op", [{"title": "op", "curves": [curve], "log": False}])
    assert (tmp_path / f"times.{ending}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--plot", "a.png"], "pip install matplotlib"),
        (["--json", "missing/a.json"], "there is no folder"),
        (["--sizes", "0"], "at least 1"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_measured(
    common, options, message, monkeypatch, tmp_path, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ops.py", *options])
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", type=int, default=[1])
    with pytest.raises(SystemExit, match="2"):
        common.parse(parser, repeats=1)
    assert message in capsys.readouterr().err


def test_compatibility_counts_and_judges_outcomes(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import compatibility

    (case, test), why = next(iter(compatibility.KNOWN.items()))
    outcomes = {(case, test): "failed", (case, "test_a"): "passed", ("MimoSSM", "test_a"): "skipped"}
    assert f"| {case} | 1 | 0 | 1 |" in compatibility.table(outcomes)
    assert "| **all** | 1 | 1 | 1 |" in compatibility.table(outcomes)
    assert compatibility.verdict(outcomes, {}) == ([f"expected: {case} {test}: {why}"], True)
    for wrong in ({("MimoSSM", "test_b"): "failed"}, {(case, test): "passed"}):
        assert not compatibility.verdict(outcomes | wrong, {})[1]


@pytest.mark.slow
def test_compatibility_runs_the_own_list():
    # In a process of its own, since it calls pytest.
    command = [sys.executable, FOLDER / "compatibility.py", "--only-own-list", "-k", "classes_generate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (
        "| CompreSSMGatedDeltaNet, own list | 1 | 0 | 0 |" in done.stdout and "| **all** | 5 | 0 | 0 |" in done.stdout
    )


GATED_DELTA = ("gated_delta.py", "--sizes", "12", "4", "--batches", "1", "--length", "9", "--heads", "2")
GATED_DELTA += ("--key-heads", "1", "--width", "5", "--repeats", "3", "--threads", "1")


def test_gated_delta(script, tmp_path):
    printed = script(*GATED_DELTA, "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 3 and "ours is slower" in printed
    for row in rows:
        assert_ordered(row["times"])
        assert row["ratio"] > 0 and (row["variant"] != "theirs" or row["ratio"] == 1)


def test_gated_delta_times_nothing_that_is_wrong(script, monkeypatch):
    make_wrong(monkeypatch, "gated_delta_scan.cpu", "forward")
    with pytest.raises(SystemExit, match="ours: results differ by"):
        script(*GATED_DELTA)


BRIEFLY = [
    *("--", "--max_steps", "3", "--cut_steps", "2", "--refit_steps", "1", "--per_device_train_batch_size", "4"),
    *("--task_options", '{"length": 32, "evaluation_bytes": 1120}', "--eval_strategy", "no", "--use_cpu", "true"),
    *("--disable_tqdm", "true", "--no_report"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after"),
    # Three delta-rule layers: 4 matrices each with 32 columns, and 4 taps of 2 * 2 key heads and 128 values. Two xLSTM
    # layers: 4 matrices each with 32 columns and a normaliser, and 4 maxima.
    [
        ("qwen3_5", 12 * (4 * 64 * 32 + 4 * (4 * 64 + 128)), 12 * (4 * 16 * 32 + 4 * (4 * 16 + 128))),
        ("xlstm", 8 * (4 * 64 * 33 + 4), 8 * (4 * 16 * 33 + 4)),
    ],
)
def test_what_is_trained_here_generates_the_same_without_this_package(name, before, after, script, tmp_path):
    config = FOLDER.parents[1] / f"configs/runs/stdlib_{name}.yaml"
    printed = script("round_trip.py", "--tokens", "12", config, *BRIEFLY, "--output_dir", tmp_path)
    row = [cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")]
    assert row[0] == config.name and row[2].endswith("-> [16, 16" + (", 16]" if name == "qwen3_5" else "]"))
    assert row[4:] == [str(before), str(after), "12"]


@pytest.mark.slow
def test_a_model_that_needs_this_package_fails_the_round_trip(script, tmp_path):
    config = FOLDER.parents[1] / "configs/runs/stdlib_gated_deltanet.yaml"
    with pytest.raises(SystemExit, match="cannot be used without this package"):
        script("round_trip.py", config, *BRIEFLY, "--output_dir", tmp_path)


def test_serving_before_and_after_a_cut(script, tmp_path):
    file = tmp_path / "serving.json"
    sizes = ("--full", "8", "--cut", "2", "--hidden", "16", "--layers", "1", "--prompt", "40", "--batches", "2")
    printed = script("serving.py", "--families", "mimo_ssm", *sizes, "--repeats", "1", "--threads", "1", "--json", file)
    found = json.loads(file.read_text())["rows"]
    assert [(row["class"], row["states"], row["bytes"]) for row in found] == [("own", 8, 64), ("own", 2, 16)]
    assert all(row["tokens_per_s"] > 0 and row["prefill_ms"] > 0 and row["step_mb"] > 0 for row in found)
    assert printed.count("mimo_ssm, own |") == 4  # as they are measured, and in the table


@pytest.mark.slow
def test_forecasting_scores_every_method_on_the_same_windows(script, tmp_path, monkeypatch):
    rng, steps = np.random.default_rng(0), np.arange(3000)
    demand = 3e4 + 5e3 * np.sin(2 * np.pi * steps / 48) + 1e3 * np.sin(2 * np.pi * steps / 336) + rng.normal(size=3000)
    data = types.ModuleType("pmdarima.datasets")
    data.load_taylor = lambda: demand  # as the real one, which is an extra
    monkeypatch.setitem(sys.modules, "pmdarima", types.ModuleType("pmdarima"))
    monkeypatch.setitem(sys.modules, "pmdarima.datasets", data)
    methods = ["naive", "full", "compressed", "scratch"]
    small = ["--steps", "20", "--states", "8", "--seeds", "0", "--output", tmp_path]
    printed = script("forecasting.py", "--methods", *methods, *small)
    rows = {row["method"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert list(rows) == methods and "| **compressed while training** |" in printed
    origins = range(3000 - 48, 3000 - (3000 - 336) // 5 - 1, -12)
    expected = np.mean([np.abs(demand[o : o + 48] - demand[o - 336 : o - 288]).mean() for o in origins])
    assert rows["naive"]["mae"] == pytest.approx(expected, rel=1e-4)
    assert rows["full"]["sizes"] == [8, 8]
    assert sum(rows["compressed"]["sizes"]) == 4 and rows["scratch"]["sizes"] == rows["compressed"]["sizes"]
