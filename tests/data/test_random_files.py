"""Stand-in files: read by the real loaders, and refused where there are none."""

import datasets
import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_compressm.data import load_task, takes_data_dir, task_names
from hf_compressm.data.random_files import stand_in_names, write_stand_in


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def everything(task):
    """The batch of all items of each split."""
    collate = task.collator or default_data_collator
    return [collate([split[i] for i in range(len(split))]) for split in (task.train, task.validation, task.test)]


@pytest.mark.parametrize("name", stand_in_names())
def test_the_loader_reads_them_like_the_real_files(name, tmp_path):
    task = load_task(name, data_dir=write_stand_in(name, tmp_path / name))
    for batch in everything(task):
        labels = batch["labels"]
        assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < task.model_kwargs["num_labels"]
        if "input_values" in batch:
            assert batch["input_values"].dtype == torch.float32
            assert batch["input_values"].shape[2] == task.model_kwargs["num_channels"]
        else:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            assert torch.equal(mask == 0, ids == task.model_kwargs["pad_token_id"]) and mask[..., 0].all()
            assert ids.max() < task.model_kwargs["vocab_size"]
    assert name in (tmp_path / name / "STAND_IN.md").read_text()
    assert len(np.unique(task.train[:]["labels"])) == task.model_kwargs["num_labels"]


def test_they_follow_the_seed(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_stand_in("imdb", tmp_path / folder, seed=seed)
    first, again, other = (
        everything(load_task("imdb", data_dir=tmp_path / folder))[2]["input_ids"] for folder in "abc"
    )
    assert torch.equal(first, again) and not torch.equal(first[:, :90], other[:, :90])


def test_every_task_that_reads_files_has_one_or_needs_a_tokenizer():
    assert {name for name in task_names() if takes_data_dir(name)} - set(stand_in_names()) == {"wikitext"}


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no stand-in for 'digits'; there are: aan, imdb"):
        write_stand_in("digits", tmp_path)
    with pytest.raises(ValueError, match="items must be at least 50.*got 7"):
        write_stand_in("imdb", tmp_path, items=7)
