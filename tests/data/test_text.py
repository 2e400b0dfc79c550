"""The task `text`: every kind of file, packing, made splits that stay, streaming, and what is refused."""

import gzip
import json

import datasets
import pytest
import torch
from datasets import IterableDataset
from test_wikitext import EOS, IDS, UNKNOWN, save_tokenizer

from hf_compressm.data import load_task, own_files
from hf_compressm.data.own_files import Shares, split_of

SHARES = {"validation_percent": 20, "test_percent": 20}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def documents(count: int = 60) -> list[str]:
    return [f"document {number} " + "says so. " * (number % 5 + 1) for number in range(count)]


def write(path, texts: list[str], column: str = "text"):
    rows = [{"number": number, column: text} for number, text in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path, index=False)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def texts_of(split) -> list[str]:
    """The documents of a split of bytes, but for what packing leaves over."""
    stream = bytes(token for row in split for token in row["input_ids"].tolist())
    return stream.decode().split("\0")


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_sequences(tmp_path, ending):
    file = write(tmp_path / f"corpus{ending}", documents())
    task = load_task("text", files=file, length=16, **SHARES)
    assert task.train[0]["input_ids"].shape == (16,) and task.train[0]["labels"].dtype == torch.int64
    shares = Shares(20, 20).of([])
    for split in ("train", "validation", "test"):
        wanted = [text for text in documents() if split_of(text.encode(), shares) == split]
        found = texts_of(getattr(task, split))
        assert len(wanted) > 5 and found[:-2] == wanted[: len(found) - 2] and len(found) >= len(wanted) - 1
    assert task.model_kwargs["vocab_size"] == 256 and task.metric_for_best_model == "nats_per_byte"


def test_patterns_folders_lists_and_compressed_files(tmp_path):
    for number in range(3):
        write(tmp_path / f"part{number}.txt", documents()[20 * number : 20 * (number + 1)])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "all.txt.gz").write_bytes(gzip.compress("\n\n".join(documents()).encode()))
    (tmp_path / "folder" / "notes.md").write_text("not for this task")
    names = ["part*.txt", [f"part{number}.txt" for number in range(3)], "folder", "folder/all.txt.gz"]
    first, *others = (load_task("text", files=name, length=16, **SHARES).train[:]["input_ids"] for name in names)
    assert all(torch.equal(first, other) for other in others)


def test_more_data_move_no_document(tmp_path):
    texts = documents(200)
    found = []
    for name, part in {"some.txt": texts[:100], "more.txt": texts[150:] + texts[:100] + texts[100:150]}.items():
        task = load_task("text", files=write(tmp_path / name, part), length=2, **SHARES)
        found.append({split: set(texts_of(getattr(task, split))[:-1]) for split in ("train", "validation", "test")})
    before, after = found
    for split in before:
        assert before[split] <= after[split] | {texts[99]} and len(after[split]) > len(before[split])
    assert not after["train"] & after["test"] and not after["train"] & after["validation"]


def test_splits_that_are_given_are_taken_as_they_are(tmp_path):
    files = {
        "train": write(tmp_path / "a.jsonl", documents(), "body"),
        "test": write(tmp_path / "b.jsonl", ["x" * 40], "body"),
    }
    task = load_task("text", files=files, column="body", length=8, **SHARES)
    assert len(task.test) == 5 and texts_of(task.test) == ["x" * 40]
    assert not set(texts_of(task.train)[:-1]) & set(texts_of(task.validation)[:-1])
    whole = dict.fromkeys(("train", "validation", "test"), files["train"])
    task = load_task("text", files=whole, column="body", length=8, evaluation_sequences=3)
    assert len(task.train) > len(task.validation) == len(task.test) == 3


@pytest.mark.parametrize("document, count", [("file", 1), ("line", 3), ("paragraph", 2)])
def test_what_is_a_document_of_a_text_file(tmp_path, document, count):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    files = dict.fromkeys(("train", "validation", "test"), "a.txt")
    task = load_task("text", files=files, document=document, length=2)
    assert sum(text != "" for text in texts_of(task.train)) in (count, count - 1)


def test_a_tokenizer_of_ones_own(tmp_path):
    folder = save_tokenizer(tmp_path / "words", IDS, eos_token="<eos>", unk_token="<unk>")
    file = write(tmp_path / "corpus.jsonl", ["w0 w1", "w2 nothing w3"] * 2)
    task = load_task("text", files=dict.fromkeys(("train", "validation", "test"), file), tokenizer=folder, length=7)
    assert task.train[0]["input_ids"].tolist() == [
        IDS["w0"], IDS["w1"], EOS, IDS["w2"], UNKNOWN, IDS["w3"], EOS
    ]  # fmt: skip
    assert task.model_kwargs["vocab_size"] == len(IDS) and task.tokenizer is not None


def test_streaming_gives_the_same_sequences_and_bounded_splits(tmp_path):
    file = write(tmp_path / "corpus.jsonl", documents())
    whole = load_task("text", files=file, length=16, **SHARES)
    task = load_task("text", files=file, length=16, streaming=True, evaluation_sequences=4, seed=1, **SHARES)
    assert isinstance(task.train, IterableDataset) and len(task.validation) == len(task.test) == 4
    rows = list(task.train)
    assert rows[0]["input_ids"].dtype == torch.int64 and torch.equal(rows[0]["labels"], rows[0]["input_ids"])
    found = sorted(row["input_ids"].tolist() for row in rows)
    assert found == sorted(whole.train[:]["input_ids"].tolist()) != [row["input_ids"].tolist() for row in rows]
    assert torch.equal(task.test[:]["input_ids"], whole.test[:4]["input_ids"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs its option files"),
        ({"files": "nowhere/*.txt"}, r"no file matches 'nowhere/\*.txt' \(from the folder .*\); it reads .txt, .jsonl"),
        ({"files": "a.md"}, "cannot read a.md: it reads .txt, .jsonl, .json, .csv, .parquet"),
        ({"files": ["a.txt", "a.jsonl"]}, "end in .jsonl and .txt; give one kind"),
        ({"files": {"training": "a.txt"}}, "there is no split 'training'; splits are train, validation, test"),
        ({"files": {"test": "a.txt"}}, "name test, but no files to train on"),
        ({"files": 3}, "must be paths or patterns; got 3"),
        ({"files": "a.jsonl", "column": "body"}, r"no column \['body'\]; its columns are \['number', 'text'\]"),
        ({"files": "a.jsonl", "column": "number"}, "column 'number' of a.jsonl holds int64, not text"),
        ({"files": "broken.jsonl"}, "broken.jsonl cannot be read as json"),
        ({"files": "broken_line.jsonl"}, "broken_line.jsonl cannot be read as json"),
        ({"files": "numbers.jsonl"}, "numbers.jsonl cannot be read as json"),
        ({"files": "mixed.jsonl"}, "column 'text' of mixed.jsonl holds Json, not text"),
        ({"files": "lists.parquet"}, "column 'text' of lists.parquet holds List, not text"),
        ({"files": "latin.jsonl", "length": 8}, "latin.jsonl cannot be read as UTF-8"),
        ({"files": "latin.jsonl", "length": 8, "streaming": True}, "latin.jsonl cannot be read as UTF-8"),
        ({"files": "latin.txt"}, "latin.txt cannot be read as text: 'utf-8' codec"),
        ({"files": "half.txt.gz"}, "half.txt.gz cannot be read as text: Compressed file ended"),
        ({"files": "half.txt.gz", "streaming": True}, "half.txt.gz cannot be read as text: Compressed file ended"),
        ({"files": "half.parquet"}, "half.parquet cannot be read as parquet"),
        ({"files": "a.txt", "streaming": "perhaps"}, "streaming .* must be of type bool; got 'perhaps'"),
        ({"files": "a.txt", "evaluation_sequences": "x"}, "must be of type int or nothing; got 'x'"),
        ({"files": "a.txt", "length": 100_000}, r"'train' .* has too few bytes for one sequence of 100000"),
        ({"files": "a.txt", "length": 100_000, "streaming": True}, "'train' .* has too few bytes for one sequence"),
        ({"files": "empty.txt"}, "task 'text': empty.txt is empty"),
        ({"files": "one.txt"}, r"split 'validation' of task 'text' .*has too few bytes"),
        ({"files": "a.txt", "document": "page"}, "document one of paragraph, line, file"),
        ({"files": "a.txt", "validation_percent": 0}, "at least 1 and together below 100; got 0 and 5"),
        ({"files": "a.txt", "length": 1}, "length must be at least 2"),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path, options, message):
    write(tmp_path / "a.txt", documents())
    write(tmp_path / "a.jsonl", documents())
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a document on its own " * 30)
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    line = '{"text": "word"}\n'
    (tmp_path / "broken_line.jsonl").write_text(line * 30 + '{"text": "wo\n' + line * 30)
    (tmp_path / "numbers.jsonl").write_text("1\n2\n")
    (tmp_path / "mixed.jsonl").write_text((line + '{"text": 3}\n') * 30)
    (tmp_path / "latin.jsonl").write_bytes(line.replace("o", "ö").encode("latin-1") * 30)
    (tmp_path / "latin.txt").write_bytes("wörd\n\n".encode("latin-1") * 30)
    (tmp_path / "half.txt.gz").write_bytes(gzip.compress("\n\n".join(documents()).encode())[:150])
    datasets.Dataset.from_list([{"text": ["word"]}] * 9).to_parquet(tmp_path / "lists.parquet")
    (tmp_path / "half.parquet").write_bytes((tmp_path / "lists.parquet").read_bytes()[:300])
    with pytest.raises(ValueError, match=message):
        load_task("text", **options)


def test_a_file_is_read_once_and_warned_about_in_two_splits(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some words\n")
    said = []
    monkeypatch.setattr(own_files.logger, "warning", said.append)
    twice = [str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]
    paths = {"train": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]}
    assert own_files.find_own_files("text", twice, [".txt"]) == paths and not said
    own_files.find_own_files("text", {"train": str(tmp_path / "*.txt"), "test": str(tmp_path / "a.txt")}, [".txt"])
    assert len(said) == 1 and "a.txt is in train and in test" in said[0]
