"""Associative recall with values shown: pairs, labels and splits."""

import numpy as np
import pytest

from hf_compressm.data import load_task

OPTIONS = {"length": 21, "num_kv_pairs": 3, "vocab_size": 16, "num_train": 50, "num_validation": 5, "num_test": 5}


def arrays(split):
    rows = split.with_format("numpy")[:]
    return np.asarray(rows["input_ids"]), np.asarray(rows["labels"])


def test_each_value_after_the_first_pairs_is_asked_for():
    ids, labels = arrays(load_task("mqar", seed=1, values_shown=True, **OPTIONS).train)
    assert ids.shape == labels.shape == (50, 21)
    assert not ids[:, 20].any() and (labels[:, 20] == -100).all()  # no room for half a pair
    for row, asked in zip(ids, labels, strict=True):
        pairs = dict(zip(row[0:6:2].tolist(), row[1:6:2].tolist(), strict=True))
        assert len(pairs) == len(set(pairs.values())) == 3
        assert all(1 <= key < 8 <= value < 16 for key, value in pairs.items())
        assert [pairs[key] for key in row[6:20:2].tolist()] == row[7:20:2].tolist() == asked[7:20:2].tolist()
        assert (asked[:7] == -100).all() and (asked[8:20:2] == -100).all()


def test_all_pairs_come_again_somewhere():
    ids, _ = arrays(load_task("mqar", values_shown=True, **OPTIONS | {"length": 60}).train)
    assert all(set(row[6:60:2].tolist()) == set(row[0:6:2].tolist()) for row in ids)


def test_without_it_the_values_stay_hidden():
    ids, labels = arrays(load_task("mqar", seed=1, **OPTIONS).train)
    asked = labels != -100
    assert (asked.sum(1) == 3).all() and not ids[asked].any()


def test_splits_and_seeds_differ():
    task, other = (load_task("mqar", seed=seed, values_shown=True, **OPTIONS) for seed in (0, 1))
    assert not np.array_equal(arrays(task.validation)[0], arrays(task.test)[0])
    assert not np.array_equal(arrays(task.train)[0], arrays(other.train)[0])


def test_options_are_checked():
    with pytest.raises(ValueError, match="need at least 1 pair and a length of 12; got length 11"):
        load_task("mqar", values_shown=True, **OPTIONS | {"length": 11})
