"""imdb and aan: bytes, lengths, splits and pairs from files like the real ones, and what is refused."""

import datasets
import pytest
import torch
from datasets import Dataset

from hf_compressm.data import load_task

REVIEWS = [f"review {number} \N{WHITE SMILING FACE} " + "x" * (7 * number % 30) for number in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_imdb(folder, texts=tuple(REVIEWS), labels=None, columns=("text", "label")):
    folder.mkdir(parents=True, exist_ok=True)
    labels = [number // 20 for number in range(len(texts))] if labels is None else labels
    for split, part in (("train", slice(None)), ("test", slice(0, None, 4)), ("unsupervised", slice(3))):
        rows = {columns[0]: texts[part], columns[1]: labels[part] if split != "unsupervised" else [-1] * 3}
        Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def text_of(ids) -> str:
    return bytes((ids[ids != 0] - 1).tolist()).decode()


def test_reviews_are_bytes_and_validation_is_a_stratified_tenth_of_train(tmp_path):
    task = load_task("imdb", data_dir=write_imdb(tmp_path / "data" / "plain_text").parent)
    train, validation = ([text_of(row["input_ids"]) for row in split] for split in (task.train, task.validation))
    assert sorted(train + validation) == sorted(REVIEWS) and len(validation) == 4
    assert task.validation[:]["labels"].tolist() == [0, 0, 1, 1]
    assert [text_of(row["input_ids"]) for row in task.test] == REVIEWS[::4]
    again = load_task("imdb", data_dir=tmp_path / "data", seed=1)
    assert [text_of(row["input_ids"]) for row in again.validation] == validation
    assert task.model_kwargs["vocab_size"] == 257 and task.model_kwargs["id2label"] == {0: "neg", 1: "pos"}


def test_reviews_are_cut_to_the_greatest_length_and_padded(tmp_path):
    task = load_task("imdb", data_dir=write_imdb(tmp_path / "data"), max_length=20)
    batch = task.collator([task.test[index] for index in range(len(task.test))])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (10, 20)
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], REVIEWS[::4], strict=True):
        expected = [byte + 1 for byte in text.encode()][:20]
        assert row.tolist() == expected + [0] * (20 - len(expected))
        assert mask.tolist() == [1] * len(expected) + [0] * (20 - len(expected))


PAIRS = [
    [1.0, "P1", "P2", '"quoted text', "NA"],
    [0.0, "1", "2", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "17"],
]


def write_aan(folder, rows=tuple(PAIRS), missing=None):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval", "test"):
        lines = ["\t".join(map(str, row)) for row in [*rows, [0.0, "3", "4", f"in {split}", "b"]]]
        if split != missing:
            (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_pairs_are_two_texts_byte_by_byte(tmp_path):
    task = load_task("aan", data_dir=write_aan(tmp_path / "release" / "tsv_data").parent)
    for split, name in (("train", "train"), ("validation", "eval"), ("test", "test")):
        data = getattr(task, split)
        found = [[text_of(ids) for ids in row["input_ids"]] for row in data]
        assert found == [*(row[3:] for row in PAIRS), [f"in {name}", "b"]]
        assert data[:]["labels"].tolist() == [1, 0, 0]
    assert task.problem == "sequence_pair_classification"


def test_a_batch_of_pairs_has_one_length(tmp_path):
    task = load_task("aan", data_dir=write_aan(tmp_path), max_length=8)
    batch = task.collator([task.test[0], task.test[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, 8)
    assert batch["attention_mask"].sum(2).tolist() == [[8, 2], [5, 2]]
    assert batch["labels"].tolist() == [1, 0]
    assert torch.equal(batch["input_ids"][0, 1] == 0, batch["attention_mask"][0, 1] == 0)


def test_imdb_refuses(tmp_path):
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        load_task("imdb", max_length=0)
    with pytest.raises(ValueError, match=r"'train' of 'imdb' has no column \['text'\]"):
        load_task("imdb", data_dir=write_imdb(tmp_path / "a", columns=("review", "label")))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\], found \[0, 2\]"):
        load_task("imdb", data_dir=write_imdb(tmp_path / "b", labels=[number % 3 for number in range(40)]))
    with pytest.raises(ValueError, match="'train' of 'imdb' has a row without text"):
        load_task("imdb", data_dir=write_imdb(tmp_path / "c", texts=["", *REVIEWS[1:]]))


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[1.0, "P1", "P2", "a"]], "new_aan_pairs.train.tsv has a row without text"),
        ([[1.0, "P1", "P2", "a", "b", "c"], [1.0, "P1", "P2", "a", "b"]], "columns label, id1, id2, text1, text2 betw"),
        ([["yes", "P1", "P2", "a", "b"]], "cannot be read as columns label.*yes"),
        ([[0.5, "P1", "P2", "a", "b"]], r"new_aan_pairs.train.tsv: labels must lie in \[0, 1\], found \[-1, 0\]"),
    ],
)
def test_malformed_pairs_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task("aan", data_dir=write_aan(tmp_path, rows))


def test_aan_needs_its_files(tmp_path):
    with pytest.raises(ValueError, match="'aan' needs --data_dir FOLDER with new_aan_pairs.train.tsv.*lra_release"):
        load_task("aan")
    with pytest.raises(ValueError, match=r"missing: \['new_aan_pairs.eval.tsv'\]"):
        load_task("aan", data_dir=write_aan(tmp_path / "release", missing="eval").parent)
    with pytest.raises(FileNotFoundError, match="not a folder.*nowhere"):
        load_task("aan", data_dir=tmp_path / "nowhere")
    for name in ("a", "b"):
        write_aan(tmp_path / "two" / name)
    with pytest.raises(ValueError, match="a, b; pass one of them"):
        load_task("aan", data_dir=tmp_path / "two")
