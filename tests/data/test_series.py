"""The task `series`: its forms of files, missing values, made splits, normalisation, and what is refused."""

import gzip
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoFeatureExtractor

from hf_compressm import MimoSSMConfig, MimoSSMFeatureExtractor, MimoSSMForTokenClassification
from hf_compressm.data import load_task
from hf_compressm.data.own_files import Shares, split_of
from hf_compressm.runs.data_source import evaluate
from hf_compressm.runs.evaluation import parse_evaluation, run_evaluation
from hf_compressm.runs.pretraining import parse_run, run_pretraining

GROUPS = 40
SHARES = {"validation_percent": 20, "test_percent": 20}
LONG = {"inputs": ["a", "b"], "target": "label", "group": "who", "time": "t", **SHARES}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def sequences(count: int = GROUPS) -> list[dict]:
    """Sequences of 3 to 7 steps of two channels, some values missing, each with a class and a number."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        values = rng.normal([5.0, -1.0], [2.0, 0.1], (3 + number % 5, 2)).round(3)
        values[1, number % 2] = np.nan
        found.append({"who": f"w{number}", "values": values, "label": "yn"[number % 2], "size": float(number)})
    return found


def long_table(rows: list[dict]) -> pd.DataFrame:
    parts = []
    for row in rows:
        part = pd.DataFrame(row["values"], columns=["a", "b"]).assign(t=np.arange(len(row["values"])))
        parts.append(part.assign(who=row["who"], label=row["label"], size=row["size"]))
    return pd.concat(parts).sample(frac=1, random_state=0)


def expected(rows: list[dict]) -> dict[str, list[dict]]:
    shares, splits = Shares(20, 20).of([]), {"train": [], "validation": [], "test": []}
    for row in rows:
        splits[split_of(row["who"].encode(), shares)].append(row)
    return splits


def normalised(task, row) -> torch.Tensor:
    extractor = task.feature_extractor
    return torch.tensor(extractor.features(row["values"]))


@pytest.mark.parametrize("form", ["csv", "parquet", "lists", "npz"])
def test_each_form_of_file_gives_the_same_sequences(tmp_path, form):
    rows = sequences()
    options = dict(LONG)
    if form == "csv":
        long_table(rows).to_csv("data.csv", index=False)
    elif form == "parquet":
        long_table(rows).to_parquet("data.parquet")
    elif form == "lists":
        table = [{"a": r["values"][:, 0], "b": r["values"][:, 1], "who": r["who"], "label": r["label"]} for r in rows]
        pd.DataFrame(table).to_parquet("data.parquet")
        options["time"] = ""
    else:
        padded = np.full((GROUPS, 7, 2), np.nan)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row["values"])] = row["values"]
        named = {key: np.array([row[key] for row in rows]) for key in ("who", "label")}
        np.savez("data.npz", both=padded, **named)
        options |= {"inputs": "both", "time": ""}
    task = load_task("series", files="data.*", **options)
    wanted = expected(rows)
    real = np.concatenate([row["values"] for row in wanted["train"]])
    assert np.allclose(task.feature_extractor.mean, np.nanmean(real, 0))  # of train alone
    assert np.allclose(task.feature_extractor.std, np.nanstd(real, 0))
    for split, members in wanted.items():
        found = {tuple(item["input_values"].flatten().tolist()): int(item["labels"]) for item in getattr(task, split)}
        assert len(members) > 3
        assert found == {tuple(normalised(task, r).flatten().tolist()): "ny".index(r["label"]) for r in members}
    assert task.model_kwargs["num_channels"] == 2 and task.model_kwargs["id2label"] == {0: "n", 1: "y"}


def test_a_row_for_each_sequence_of_one_channel(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(60, 6)), columns=[f"t{n}" for n in range(6)]).assign(label=np.arange(60) % 3)
    table.loc[0, ["t4", "t5"]] = np.nan
    table.to_csv("wide.csv", index=False)
    task = load_task("series", files="wide.csv", inputs=[f"t{n}" for n in range(6)], target="label", **SHARES)
    items = [item for split in (task.train, task.validation, task.test) for item in split]
    assert sorted(item["input_values"].shape[0] for item in items) == [4] + [6] * 59
    assert task.model_kwargs["num_labels"] == 3 and task.model_kwargs["num_channels"] == 1
    more = pd.concat([pd.DataFrame(rng.normal(size=(60, 6)), columns=table.columns[:6]).assign(label=1), table])
    more.to_csv("more.csv", index=False)
    after = load_task("series", files="more.csv", inputs=[f"t{n}" for n in range(6)], target="label", **SHARES)
    for split in ("train", "validation", "test"):
        assert len(getattr(after, split)) > len(getattr(task, split))


def test_more_groups_move_none(tmp_path):
    for name, rows in {"some.csv": sequences(20), "more.csv": sequences(40)[::-1]}.items():
        long_table(rows).to_csv(name, index=False)
    some, more = (load_task("series", files=name, **{**LONG, "target": "size", "kind": "regression"})
                  for name in ("some.csv", "more.csv"))  # fmt: skip
    for split in ("train", "validation", "test"):
        before, after = (
            {round(float(task.feature_extractor.denormalise(item["labels"])), 3) for item in getattr(task, split)}
            for task in (some, more)
        )
        assert before <= after


def test_numbers_are_learnt_at_unit_variance_and_scored_in_their_own(tmp_path):
    long_table(sequences()).to_csv("data.csv", index=False)
    task = load_task("series", files="data.csv", **{**LONG, "target": ["size"], "kind": "regression"})
    labels = torch.stack([item["labels"] for item in task.train])
    assert labels.shape[1:] == (1,) and abs(labels.mean()) < 1e-6 and abs(labels.std(correction=0) - 1) < 1e-6
    assert task.model_kwargs["problem_type"] == "regression" and not task.greater_is_better
    std = task.feature_extractor.target_std[0]
    found = task.compute_metrics(type("Prediction", (), {"predictions": labels + 1, "label_ids": labels}))
    assert found == pytest.approx({"mae": std, "rmse": std})


@pytest.mark.parametrize("fractions", [False, True])
def test_labels_of_steps(tmp_path, fractions):
    table = long_table(sequences())
    table["mark"] = np.where(table.b > -1, 0.25 if fractions else 1.0, 0.0)
    table.loc[table.t == 2, "mark"] = np.nan
    table.to_csv("data.csv", index=False)
    task = load_task("series", files="data.csv", **{**LONG, "target": "mark", "kind": "labelling"})
    assert task.problem == "token_classification" and task.greater_is_better != fractions
    items = [task.train[index] for index in range(6)]
    lengths = [len(item["input_values"]) for item in items]
    labels = task.collator(items)["labels"]
    missing = sum(max(lengths) - length + 1 for length in lengths)
    assert (labels == -100).sum() == missing and labels.shape[:2] == (6, max(lengths))
    if fractions:
        assert labels.dtype == torch.float32 and labels.shape[2] == 1
        found = task.compute_metrics(type("P", (), {"predictions": labels + 1, "label_ids": labels}))
        assert found["mae"] == pytest.approx(task.feature_extractor.target_std[0], rel=1e-4)
    else:
        assert set(labels.unique().tolist()) == {-100, 0, 1} and task.model_kwargs["id2label"][0] == "0.0"
        scores = torch.nn.functional.one_hot(labels.clamp(min=0), 2).float()
        found = task.preprocess_logits_for_metrics(scores, labels)
        assert task.compute_metrics(type("P", (), {"predictions": found, "label_ids": labels})) == {
            "accuracy": 1,
            "f1": 1,
        }


def test_steps_are_scored_across_batches_of_other_lengths(tmp_path):
    table = long_table(sequences())
    table.assign(mark=(table.b > -1).astype(int)).to_csv("data.csv", index=False)
    task = load_task("series", files="data.csv", **{**LONG, "target": "mark", "kind": "labelling"})
    config = MimoSSMConfig(hidden_size=8, num_hidden_layers=1, state_sizes=4, **task.model_kwargs)
    model = MimoSSMForTokenClassification(config).eval()
    one, several = evaluate(model, task, 100), evaluate(model, task, 2)
    assert one == pytest.approx(several, rel=1e-5) and {"loss", "accuracy", "f1"} <= set(one)


def test_batches_have_a_mask_and_indicators_are_channels(tmp_path):
    long_table(sequences()).to_csv("data.csv", index=False)
    task = load_task("series", files="data.csv", indicators=True, **LONG)
    items = [task.train[index] for index in range(6)]
    batch = task.collator(items)
    lengths = [len(item["input_values"]) for item in items]
    assert batch["attention_mask"].sum(1).tolist() == lengths and len(set(lengths)) > 1
    assert batch["input_values"].shape == (6, max(lengths), 4) == (6, max(lengths), task.model_kwargs["num_channels"])
    assert batch["input_values"][..., 2:].sum((1, 2)).tolist() == [1.0] * 6


def test_given_splits_and_a_saved_normalisation(tmp_path):
    wanted = expected(sequences())
    for split, rows in wanted.items():
        long_table(rows).to_csv(f"{split}.csv", index=False)
    files = {split: f"{split}.csv" for split in wanted}
    task = load_task("series", files=files, **LONG)
    assert [len(getattr(task, split)) for split in wanted] == [len(rows) for rows in wanted.values()]
    task.feature_extractor.mean = [1.0, 2.0]
    task.feature_extractor.save_pretrained("saved")
    again = load_task("series", files=files, feature_extractor="saved", **LONG)
    assert again.feature_extractor.mean == [1.0, 2.0]
    with pytest.raises(ValueError, match="was made for 2 channels; the data have 1"):
        load_task("series", files=files, feature_extractor="saved", **{**LONG, "inputs": "a"})


def test_a_run_saves_the_normalisation_and_the_score_uses_it(tmp_path, monkeypatch):
    long_table(sequences()).to_csv("data.csv", index=False)
    options = {"files": "data.csv", **LONG}
    fields = ["--task", "series", "--task_options", str(options).replace("'", '"'), "--output_dir", "out"]
    fields += ["--model", '{"hidden_size": 8, "num_hidden_layers": 1, "state_sizes": 8}', "--max_steps", "4"]
    fields += [
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--save_steps",
        "2",
        "--disable_tqdm",
        "true",
        "--no_compress",
    ]
    result = run_pretraining(parse_run(fields))
    saved = AutoFeatureExtractor.from_pretrained("out")
    assert (
        saved.mean
        == result.task.feature_extractor.mean
        == AutoFeatureExtractor.from_pretrained("out/checkpoint-2").mean
    )
    shifted = long_table(sequences())
    shifted[["a", "b"]] += 100
    shifted.to_csv("data.csv", index=False)
    words = ["out", "--data", "series", "--task_options", fields[3], "--cpu"]
    seen = []
    monkeypatch.setattr("hf_compressm.runs.evaluation.evaluate", lambda model, task, *a, **k: seen.append(task) or {})
    run_evaluation(parse_evaluation(words))
    assert seen[0].feature_extractor.mean == saved.mean and seen[0].test[0]["input_values"].abs().max() > 10


BAD = {
    "no inputs": ({"inputs": None}, "needs its option inputs"),
    "no target": ({"target": None}, "needs its option target"),
    "kind": ({"kind": "clasification"}, "must be one of classification, regression.*; got 'clasification'"),
    "column": ({"inputs": ["a", "c"]}, "data.csv has no column 'c'; its columns are a, b, t, who, label, size"),
    "not numeric": (
        {"inputs": ["a", "word"], "files": "words.csv"},
        "column 'word' of words.csv holds what is not",
    ),
    "input and target": ({"target": "a"}, "'a' cannot be an input and something else at once"),
    "changes": ({"target": "t", "time": ""}, "who w.*'t' has several values in one sequence"),
    "several classes": ({"target": ["label", "size"]}, "classes come from one target"),
    "one class": ({"files": "one.csv"}, "target 'label' has only the class y in train"),
    "words to regress": ({"kind": "regression"}, "target label of sequence w.* is not a number"),
    "unseen class": ({"files": {"train": "data.csv", "test": "new.csv"}}, "is 'new', which no sequence of train has"),
    "no value": ({"files": "empty_group.csv"}, "sequence nobody of train has no value in any channel"),
    "no such file": ({"files": "*.xlsx"}, "no file matches"),
    "too few": ({"files": "few.csv"}, "split .* of task 'series' has none of the 1 sequences; (raise|lower)"),
    "nothing in a channel": ({"files": "one_channel.csv"}, "no value at all: channel 0 of a, b"),
    "group missing": ({"files": "no_group.csv"}, "1 rows of no_group.csv have no value in 'who'"),
    "time missing": ({"files": "no_time.csv"}, "1 rows of no_time.csv have no value in 't'"),
    "infinite": ({"files": "infinite.csv"}, "sequence w.* of train has an infinite value"),
    "no label": ({"files": "no_label.csv"}, "target 'label' has no value in train"),
    "number for names": ({"inputs": 5}, "must be names of columns; got 5"),
    "mapping for names": ({"inputs": {"a": 1}}, "must be names of columns; got {'a': 1}"),
    "twice": ({"inputs": ["a", "a"]}, r"named twice in \['a', 'a'\]"),
    "word for a switch": ({"indicators": "maybe"}, "indicators .* must be of type bool; got 'maybe'"),
    "number for a name": ({"feature_extractor": 3}, "feature_extractor .* must be of type str or nothing; got 3"),
    "extractor of a list": ({"feature_extractor": "listed"}, "listed holds no feature extractor that can be read"),
    "extractor of other targets": (
        {"feature_extractor": "other", "kind": "regression", "target": "size"},
        "knows 2 targets; the data have 1",
    ),
    "only a header": ({"files": "header.csv"}, "header.csv cannot be read as csv: it has no rows"),
    "long row": ({"files": "long_row.csv"}, "long_row.csv cannot be read as csv: .*Expected 6 fields"),
    "Latin-1": ({"files": "latin.csv"}, "latin.csv cannot be read as csv: 'utf-8' codec can't decode"),
    "half a .gz": ({"files": "half.csv.gz"}, "half.csv.gz cannot be read as csv: Compressed file ended"),
    "no .gz": ({"files": "plain.csv.gz"}, "plain.csv.gz cannot be read as csv: Not a gzipped file"),
    "half a parquet": ({"files": "half.parquet"}, "half.parquet cannot be read as parquet: "),
    "no list": (
        {"files": "lists.parquet", "group": "", "time": ""},
        "row 1: columns need lists of one length; got {'a': None",
    ),
    "npz": ({"files": "data.npz"}, r"data.npz has no column 'a', 'b', 'label', 'who', 't'; its columns are x"),
    "time is an input": ({"time": "a"}, "'a' cannot be an input"),
}


def damage_tables(table: pd.DataFrame) -> None:
    """Write files that are not what their names say."""
    text = table.to_csv(index=False)
    Path("header.csv").write_text(text.partition("\n")[0])
    Path("long_row.csv").write_text(text + "1,2,3,4,5,6,7,8\n")
    Path("latin.csv").write_bytes(text.replace("w1,", "wé,").encode("latin-1"))
    Path("half.csv.gz").write_bytes(gzip.compress(text.encode())[:500])
    Path("plain.csv.gz").write_text(text)
    table.to_parquet("half.parquet")
    Path("half.parquet").write_bytes(Path("half.parquet").read_bytes()[:2000])
    rows = [{"a": [1.0, 2.0], "b": [1.0, 2.0], "label": "x"}, {"a": None, "b": [1.0, 2.0], "label": "y"}]
    pd.DataFrame(rows).to_parquet("lists.parquet")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_mistakes_are_told(tmp_path, changes, message):
    table = long_table(sequences())
    table.to_csv("data.csv", index=False)
    table.assign(word="many").to_csv("words.csv", index=False)
    table.assign(label="y").to_csv("one.csv", index=False)
    table.assign(label="new").to_csv("new.csv", index=False)
    empty = table[table.who == "w0"].assign(who="nobody", a=np.nan, b=np.nan)
    pd.concat([table, empty]).to_csv("empty_group.csv", index=False)
    table[table.who == "w0"].to_csv("few.csv", index=False)
    np.savez("data.npz", x=np.zeros((3, 4)))
    table.assign(a=np.nan).to_csv("one_channel.csv", index=False)
    table.assign(a=np.inf).to_csv("infinite.csv", index=False)
    table.assign(label=np.nan).to_csv("no_label.csv", index=False)
    for name, column in {"no_group": "who", "no_time": "t"}.items():
        table.assign(**{column: [None, *table[column][1:]]}).to_csv(f"{name}.csv", index=False)
    damage_tables(table)
    Path("listed").mkdir()
    Path("listed/preprocessor_config.json").write_text("[1]")
    MimoSSMFeatureExtractor(2, target_mean=[0.0, 0.0], target_std=[1.0, 1.0]).save_pretrained("other")
    with pytest.raises(ValueError, match=message):
        load_task("series", **{"files": "data.csv", **LONG, **changes})


GIVEN = {"x": np.ones((6, 4)), "y": np.arange(6) % 2}
ARRAYS = {
    "objects": (
        {"x": np.array([[1], [1, 2]], dtype=object)},
        "array 'x' of data.npz cannot be read as numbers or text",
    ),
    "a number": ({"y": np.array(3)}, r"first axis of all arrays must have one length, at least 1; got .*'y': \(\)"),
    "too few": ({"y": np.zeros(5)}, "first axis of all arrays must have one length"),
    "none": ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, "must have one length, at least 1"),
    "words": ({"x": np.full((6, 4), "a")}, r"inputs must be numbers of shape \(n, L\) or \(n, L, C\)"),
    "complex": ({"x": np.ones((6, 4), complex)}, "inputs must be numbers"),
    "other steps": ({"z": np.zeros((6, 5)), "inputs": ["x", "z"]}, "must have one length L"),
    "other labels": ({"y": np.zeros((6, 3)), "kind": "labelling"}, "must have one length L"),
    "several classes": ({"y": np.zeros((6, 4))}, r"classes come from one target; got 4 of \['y'\]"),
    "a target too deep": ({"y": np.zeros((6, 4, 2))}, r"must have shape \(n,\) or \(n, K\)"),
}


@pytest.mark.parametrize("changes, message", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, message):
    arrays = {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    np.savez("data.npz", **(GIVEN | arrays))
    options = {name: value for name, value in changes.items() if not isinstance(value, np.ndarray)}
    given = dict.fromkeys(("train", "validation", "test"), "data.npz")
    with pytest.raises(ValueError, match=message):
        load_task("series", **{"files": given, "inputs": "x", "target": "y", **options})


@pytest.mark.parametrize("damage", ["half", "text", "one array", "flipped bytes", "junk"])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    np.savez("data.npz", **GIVEN)
    content = Path("data.npz").read_bytes()
    if damage == "half":
        Path("data.npz").write_bytes(content[: len(content) // 2])
    elif damage == "text":
        Path("data.npz").write_text("no archive")
    elif damage == "one array":
        with Path("data.npz").open("wb") as file:
            np.save(file, GIVEN["x"])
    elif damage == "flipped bytes":
        Path("data.npz").write_bytes(content[:200] + b"\xff" * 20 + content[220:])
    else:
        with zipfile.ZipFile("data.npz", "w") as archive:
            archive.writestr("x.npy", b"junk")
            archive.writestr("y.npy", b"junk")
    with pytest.raises(ValueError, match=r"^(array 'x' of )?data.npz(:| cannot be read as)"):
        load_task("series", files="data.npz", inputs="x", target="y")


def test_several_targets_in_one_array(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 4)), np.random.default_rng(1).normal(size=(40, 3))
    np.savez("data.npz", x=x, y=y)
    task = load_task("series", files="data.npz", inputs="x", target="y", kind="regression", **SHARES)
    assert task.train[0]["labels"].shape == (3,) and task.model_kwargs["num_labels"] == 3
