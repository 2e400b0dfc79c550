"""Forecasts by the task `series`: time, windows, splits, metrics, runs, and what is refused."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction, EvalPrediction

from hf_compressm.data import load_task
from hf_compressm.runs.evaluation import parse_evaluation, run_evaluation
from hf_compressm.runs.pretraining import parse_run, run_pretraining

STEPS = 100
OPTIONS = {"files": "data.csv", "kind": "forecasting", "target": "y", "group": "who", "time": "t", "context": 12,
           "horizon": 4, "season": 6, "validation_percent": 20, "test_percent": 10}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def table(series: int = 2, steps: int = STEPS) -> pd.DataFrame:
    """Hours of a wave with noise and of its driver, x, whose level steps up where the test begins."""
    parts = []
    for number in range(series):
        rng, hours = np.random.default_rng(number), np.arange(steps)
        y = (10 + number) * np.sin(2 * np.pi * hours / 6) + rng.normal(size=steps) + 1000 * (hours >= 90)
        times = pd.Timestamp("2026-01-01") + pd.to_timedelta(hours, unit="h")
        parts.append(pd.DataFrame({"who": f"s{number}", "t": times, "y": y.round(3), "x": rng.normal(size=steps)}))
    return pd.concat(parts, ignore_index=True)


def written(rows: pd.DataFrame, name: str = "data.csv") -> pd.DataFrame:
    rows.to_csv(name, index=False)
    return rows


def task_of(**options):
    return load_task("series", **(OPTIONS | options))


def in_own_unit(task, values) -> np.ndarray:
    return np.asarray(task.feature_extractor.denormalise(values))


def test_splits_are_in_time_and_nothing_of_the_test_is_learnt(tmp_path):
    rows = written(table())
    task = task_of(inputs="x")
    known = rows.groupby("who").head(70)
    assert np.allclose(task.feature_extractor.mean, [known.x.mean(), known.y.mean()])
    assert np.allclose(task.feature_extractor.target_std, [known.y.std(ddof=0)])
    assert {name: len(getattr(task, name)) for name in ("train", "validation", "test")} == {
        "train": 2 * 14,  # labels of steps 12 to 70, without what is left over at the start
        "validation": 2 * 5,
        "test": 2 * 2,
    }
    last = task.test[3]
    second = rows[rows.who == "s1"]
    assert last["input_values"].shape == (12, 2) and last["labels"].shape == (4, 1)
    assert np.allclose(in_own_unit(task, last["labels"])[:, 0], second.y[-4:], atol=1e-3)
    read = last["input_values"].numpy() * task.feature_extractor.std + task.feature_extractor.mean
    assert np.allclose(read, second[["x", "y"]][-16:-4], atol=1e-3)
    for split, begin, end in (("train", 0, 70), ("validation", 70, 90), ("test", 90, 100)):
        found = np.unique(np.concatenate([in_own_unit(task, item["labels"]).ravel() for item in getattr(task, split)]))
        allowed = rows.groupby("who").nth(slice(begin, end)).y.to_numpy()
        assert all(np.abs(allowed - value).min() < 1e-3 for value in found), split
    assert task.model_kwargs == {
        "num_channels": 2,
        "prediction_length": 4,
        "prediction_channel_indices": [1],
        "quantiles": [0.1, 0.5, 0.9],
    }


def test_windows_by_stride_and_splits_that_are_given():
    written(table())
    written(table(1, 40), "test.csv")
    task = task_of(files={"train": "data.csv", "test": "test.csv"}, stride=1)
    counts = {name: len(getattr(task, name)) for name in ("train", "validation", "test")}
    assert counts == {"train": 2 * 65, "validation": 2 * 17, "test": 25}


def test_rows_are_put_in_order_and_gaps_are_missing_values():
    rows = table().drop(index=[30, 31])
    rows.loc[40, "y"] = np.nan
    written(rows.sample(frac=1, random_state=0))
    task = task_of(stride=1)
    windows = {int(round(float(np.nan_to_num(w["input_values"].numpy()).sum() * 1e4))): w for w in task.train}
    assert len(windows) > 100
    first = [task.train[i] for i in range(len(task.train) // 2)]
    window = next(w for w in first if not w["observed_mask"].all() and w["observed_mask"][:, 0].sum() == 9)
    gap = (~window["observed_mask"][:, 0]).nonzero().flatten().tolist()
    assert len(gap) == 3 and gap[1] == gap[0] + 1 and gap[2] == gap[0] + 10
    filled = window["input_values"][:, 0]
    if gap[0] > 0:
        assert torch.equal(filled[gap[0] : gap[0] + 2], filled[gap[0] - 1].expand(2))  # the last value before
    assert sum(int(w["labels"].isnan().sum()) for w in first) == 3 * 4  # each is in four windows


@pytest.mark.parametrize("freq, steps", [("MS", 100), ("ME", 100), ("QE", 60), ("YE", 60), ("D", 100), ("15min", 100)])
def test_months_are_equal_steps(freq, steps):
    times = pd.date_range("1990-01-01", periods=steps, freq=freq)
    rows = pd.DataFrame({"t": times, "y": np.sin(np.arange(steps) + 0.1)})
    written(rows.drop(index=20))
    task = task_of(group="", stride=1, context=5, horizon=2, season=4)
    assert sum(int(item["labels"].isnan().sum()) for item in task.train) == 2
    assert len(task.train) == steps * 70 // 100 - 6


def test_metrics_are_in_the_targets_own_unit():
    rows = written(table())
    task = task_of()
    labels = np.stack([item["labels"] for item in task.test])
    std = task.feature_extractor.target_std[0]
    found = labels[:, None] + np.array([-2.0, 0.5, 3.0])[:, None, None] / std
    scores = task.compute_metrics(EvalPrediction(found, labels))
    naive = [np.abs(part.y[6:70].to_numpy() - part.y[:64].to_numpy()).mean() for _, part in rows.groupby("who")]
    assert scores["mae"] == pytest.approx(0.5, rel=1e-4) and scores["rmse"] == pytest.approx(0.5, rel=1e-4)
    assert scores["mase"] == pytest.approx(0.5 / np.mean(naive), rel=1e-4)
    assert scores["pinball"] == pytest.approx(np.mean([0.1 * 2, 0.5 * 0.5, 0.1 * 3]), rel=1e-4)
    mean = task_of(quantiles=[])
    scores = mean.compute_metrics(EvalPrediction(found[:, 1], labels))
    assert scores["mae"] == pytest.approx(0.5, rel=1e-4) and "pinball" not in scores
    assert mean.model_kwargs["quantiles"] is None


def test_arrays_and_lists():
    y = np.sin(np.arange(100) * 0.7) + np.array([[1.0], [2.0]])
    np.savez("data.npz", y=y, x=y * 2, both=np.stack([y, y], 2))
    plain = {"files": "data.npz", "group": "", "time": ""}
    assert task_of(**plain, inputs="x").test[0]["labels"].shape == (4, 1)
    assert task_of(**plain, target="both").test[0]["labels"].shape == (4, 2)
    with pytest.raises(ValueError, match="give each channel an array of its own"):
        task_of(**plain, inputs="both")
    pd.DataFrame({"y": list(y)}).to_parquet("data.parquet")
    assert task_of(files="data.parquet", group="", time="").test[0]["input_values"].shape == (12, 1)
    pd.DataFrame({"y": y[0]}).to_csv("rows.csv", index=False)
    assert len(task_of(files="rows.csv", group="", time="").test) == 2


def test_a_run_is_trained_scored_and_served(tmp_path):
    written(table())
    options = OPTIONS | {"inputs": "x", "stride": 1}
    config = {
        "task": "series",
        "task_options": options,
        "model_type": "mimo_ssm",
        "model": {"hidden_size": 8, "num_hidden_layers": 2, "state_sizes": 8, "scaling": "std"},
        "output_dir": "out",
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "policy": "target",
        "target_state_size": 4,
        "window_end": 0.5,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    result = run_pretraining(parse_run(["run.yaml"]))
    assert sum(result.sizes_after) == 8 and np.isfinite(result.metrics["test_pinball"])
    words = ["out", "--data", "series", "--task_options", json.dumps(options), "--cpu"]
    scored = run_evaluation(parse_evaluation(words))["metrics"]
    for name in ("mae", "mase", "pinball", "loss"):
        assert scored[name] == pytest.approx(result.metrics[f"test_{name}"], rel=1e-3)
    with pytest.raises(ValueError, match="is for models with prediction_length 5; this one has 4"):
        run_evaluation(parse_evaluation([*words[:4], json.dumps(options | {"horizon": 5}), "--cpu"]))
    model, extractor = (cls.from_pretrained("out") for cls in (AutoModelForTimeSeriesPrediction, AutoFeatureExtractor))
    context = table()[table().who == "s0"][["x", "y"]][-16:-4].to_numpy()
    served = extractor.denormalise(model.eval().forecast(extractor(context)["input_values"]))
    row = result.task.test[6]  # the last window of the first series
    expected = result.model.eval()(input_values=row["input_values"][None]).logits
    assert torch.allclose(served, extractor.denormalise(expected), rtol=1e-4, atol=1e-2) and served.shape == (
        1,
        3,
        4,
        1,
    )


def changed(**columns):
    return lambda rows: rows.assign(**columns)


MISTAKES = {
    "no context": (None, {"context": 0}, "needs its options context"),
    "no target": (None, {"target": None}, "needs its option target"),
    "unknown column": (None, {"inputs": "z"}, "has no column 'z'"),
    "time as an input": (None, {"inputs": "t"}, "'t' cannot be an input and something else at once"),
    "twice": (None, {"group": ""}, "t 2026-01-01 00:00:00 is there more than once; name the column"),
    "no times": (changed(t="noon"), {}, "'t' holds neither numbers nor dates of the form"),
    "time missing": (
        lambda rows: rows.assign(t=rows.t.where(rows.index != 3)),
        {},
        "1 rows of data.csv have no value in 't'",
    ),
    "unequal": (changed(t=np.tile(np.arange(STEPS) ** 1.5, 2)), {}, "t is not at equal steps, its rows are 1.0 to"),
    "sparse": (changed(t=np.tile(np.arange(STEPS) ** 3, 2)), {}, "t is not at equal steps, its rows are 1.0 to"),
    "not numbers": (changed(y="much"), {}, "column 'y' of data.csv holds what is not a number"),
    "too short": (None, {"context": 80}, "series s0 has 70 steps for train; context 80 and horizon 4 need 84"),
    "test too short": (
        None,
        {"horizon": 11},
        "test_percent 10 of the 100 steps of series s0 are 10, less than the hor",
    ),
    "long season": (None, {"season": 70}, "a season of 70 gives no scale for the metric mase: of y, with at most 70"),
    "constant": (changed(y=3.0), {}, "a season of 6 gives no scale"),
    "quantiles": (None, {"quantiles": [0.5, 0.5]}, r"quantiles must be increasing numbers in \(0, 1\), or \[\]"),
    "negative stride": (None, {"stride": -1}, "stride must be at least 0, got -1"),
    "another kind": (None, {"kind": "regression"}, "context, horizon, season of task 'series' are for kind: forec"),
    "unknown kind": (None, {"kind": "forecast"}, "must be one of classification, regression, labelling, forecasting"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_have_one_line(mistake):
    change, options, message = MISTAKES[mistake]
    written((change or (lambda rows: rows))(table()))
    with pytest.raises(ValueError, match=message) as error:
        task_of(**options)
    assert "\n" not in str(error.value)


def test_models_that_do_not_forecast_are_refused(tmp_path):
    written(table())
    config = {"task": "series", "task_options": OPTIONS, "model_type": "compressm_mamba", "output_dir": "out"}
    (tmp_path / "run.yaml").write_text(json.dumps(config | {"max_steps": 1, "use_cpu": True}))
    with pytest.raises(ValueError, match="compressm_mamba has no model that forecasts; mimo_ssm has one"):
        run_pretraining(parse_run(["run.yaml"]))
