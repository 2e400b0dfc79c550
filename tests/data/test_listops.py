"""listops: values by an independent evaluator, shapes of the trees, splits, padding, and training on it."""

import hashlib
import re
import statistics
from collections import Counter

import numpy as np
import pytest
import torch

from hf_compressm.data import load_task
from hf_compressm.data.listops import TOKENS, _expressions, _grow
from hf_compressm.runs.pretraining import parse_run, run_pretraining

SPLITS = ("train", "validation", "test")
SMALL = {"min_length": 8, "max_length": 60, "num_train": 1500, "num_validation": 100, "num_test": 200}


@pytest.fixture(scope="module")
def task():
    return load_task("listops", **SMALL)


def texts(data) -> list[str]:
    return [" ".join(TOKENS[token] for token in row) for row in data["input_ids"][:]]


def parse(words: list[str]):
    """A digit, or (operator, arguments), read from the front of `words`."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    arguments = []
    while words[0] != "]":
        arguments.append(parse(words))
    words.pop(0)
    return word, arguments


def parsed(text: str):
    words = text.split()
    tree = parse(words)
    assert not words, "one expression and nothing after it"
    return tree


def evaluate(tree) -> int:
    if isinstance(tree, int):
        return tree
    operator, arguments = tree[0], [evaluate(argument) for argument in tree[1]]
    return {
        "[MIN": min(arguments),
        "[MAX": max(arguments),
        "[MED": int(statistics.median(arguments)),
        "[SM": sum(arguments) % 10,
    }[operator]


def nodes(tree, depth: int = 1):
    """(depth, operator or digit, number of arguments) of every node."""
    if isinstance(tree, int):
        yield depth, tree, 0
    else:
        yield depth, tree[0], len(tree[1])
        for argument in tree[1]:
            yield from nodes(argument, depth + 1)


def test_the_evaluator_knows_the_papers_example():
    assert evaluate(parsed("[MAX 2 9 [MIN 4 7 ] 0 ]")) == 9
    assert evaluate(parsed("[MED 1 2 ]")) == 1 and evaluate(parsed("[SM 7 8 ]")) == 5


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_values(task, split):
    data = getattr(task, split)
    assert [evaluate(parsed(text)) for text in texts(data)] == data["labels"][:].tolist()


def test_long_and_deep_expressions_have_their_values_too():
    options = {"min_length": 501, "max_length": 1999, "num_train": 40, "num_validation": 1, "num_test": 1}
    data = load_task("listops", **options).train
    found = texts(data)
    assert [evaluate(parsed(text)) for text in found] == data["labels"][:].tolist()
    assert all(501 <= len(text.split()) <= 1999 for text in found)
    assert max(depth for text in found for depth, _, _ in nodes(parsed(text))) == 10


def test_lengths_lie_within_the_bounds_and_reach_them():
    data = load_task("listops", min_length=4, max_length=12, num_train=800, num_validation=1, num_test=1).train
    lengths = Counter(len(row) for row in data["input_ids"][:])
    assert set(lengths) == set(range(4, 13))


def test_depth_and_number_of_arguments_lie_within_the_bounds_and_reach_them():
    options = {"min_length": 12, "max_length": 40, "max_depth": 3, "max_args": 4}
    data = load_task("listops", num_train=500, num_validation=1, num_test=1, **options).train
    found = [node for text in texts(data) for node in nodes(parsed(text))]
    assert {depth for depth, _, _ in found} == {1, 2, 3}
    assert {arguments for _, _, arguments in found} == {0, 2, 3, 4}


def test_without_bounds_on_the_length_a_quarter_of_the_nodes_is_an_operator():
    # Counted before equal ones are removed: `_expressions` gives every tree that was drawn.
    rng = np.random.RandomState(0)
    rows = list(_expressions(rng, *_grow(rng, 4000, (1, 10**6), 4, 10)))
    found = [node for row, _ in rows for node in nodes(parsed(" ".join(TOKENS[token] for token in row)))]
    inner = [arguments > 0 for depth, _, arguments in found if depth < 4]
    # Standard deviation 0.43 / sqrt(about 16,000) = 0.0034
    assert len(rows) == 4000 and abs(sum(inner) / len(inner) - 0.25) < 0.015
    counts = Counter(arguments for _, _, arguments in found if arguments)
    assert set(counts) == set(range(2, 11)) and max(counts.values()) < 1.3 * min(counts.values())
    operators = Counter(name for _, name, arguments in found if arguments)
    assert len(operators) == 4 and max(operators.values()) < 1.2 * min(operators.values())
    digits = Counter(name for _, name, arguments in found if not arguments)
    assert len(digits) == 10 and max(digits.values()) < 1.1 * min(digits.values())


def test_no_expression_comes_twice():
    # 4 operators over two digits make 400 expressions, so that many are drawn again.
    counts = {"num_train": 300, "num_validation": 40, "num_test": 60}
    task = load_task("listops", min_length=4, max_length=4, **counts)
    found = [text for split in SPLITS for text in texts(getattr(task, split))]
    assert [len(getattr(task, split)) for split in SPLITS] == [300, 40, 60]
    assert len(set(found)) == len(found) == 400


def test_classes_are_not_degenerate(task):
    counts = torch.bincount(task.train["labels"][:], minlength=10)
    # MIN and MAX favour 0 and 9
    assert counts.min() > 0.04 * len(task.train) and counts.max() < 0.3 * len(task.train)


def test_the_number_of_training_sequences_changes_no_other_split(task):
    other = load_task("listops", **(SMALL | {"num_train": 10}))
    assert texts(other.test) == texts(task.test) and texts(other.validation) == texts(task.validation)
    assert texts(other.train) == texts(task.train)[:10]


def digest(data) -> str:
    return hashlib.sha256("|".join(texts(data)).encode()).hexdigest()


PINNED = "21cecd0664b287f4e17c3e210953f084e8886e3c8c616a60f299896e5e009291"


def test_expressions_never_change(task):
    assert digest(task.test) == PINNED


def test_expressions_follow_the_seed_and_nothing_else(task):
    assert digest(load_task("listops", seed=0, **SMALL).train) == digest(task.train)
    assert not set(texts(load_task("listops", seed=1, **SMALL).test)) & set(texts(task.test))


def test_a_batch_is_padded_on_the_right(task):
    items = [task.train[index] for index in range(8)]
    batch = task.collator(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, longest)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    for row, mask, label, item in zip(*(batch[name] for name in batch), items, strict=True):
        length = len(item["input_ids"])
        assert torch.equal(row[:length], item["input_ids"]) and (row[length:] == 0).all()
        assert mask.tolist() == [1] * length + [0] * (longest - length)
        assert label == item["labels"]


def test_model_kwargs_and_choices(task):
    assert task.model_kwargs["vocab_size"] == 16 and task.model_kwargs["pad_token_id"] == 0
    assert task.model_kwargs["num_labels"] == 10 and task.model_kwargs["id2label"][7] == "7"
    assert (task.problem, task.metric_for_best_model) == ("sequence_classification", "accuracy")
    used = {token for row in task.train["input_ids"][:] for token in row.tolist()}
    assert used == set(range(1, 16)), "every token but padding"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_length": 0}, "1 <= min_length <= max_length must hold; got 0 and 128"),
        ({"min_length": 200}, "got 200 and 128"),
        ({"max_depth": 0}, "max_depth must be at least 1"),
        ({"max_args": 1}, "max_args at least 2; got 10 and 1"),
        ({"num_test": 0}, "every split needs at least one sequence; got {'test': 0"),
        ({"min_length": 2, "max_length": 3}, "found only 0 expressions of 2 to 3 tokens"),
        ({"max_depth": 1, "min_length": 1}, "found only 10 expressions.*max_depth=1.*ask for fewer"),
        ({"min_length": 1, "max_length": 4}, re.escape("found only 410 expressions of 1 to 4 tokens")),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_task("listops", **options)


MODELS = {
    "mimo_ssm": "{hidden_size: 8, num_hidden_layers: 2, state_sizes: 12, r_min: 0.5, norm: batch}",
    "compressm_mamba": "{hidden_size: 8, num_hidden_layers: 2, state_size: 12}",
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_a_short_run(tmp_path, model_type):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"task: listops\ntask_options: {SMALL}\nmodel_type: {model_type}\nmodel: {MODELS[model_type]}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 12\nper_device_train_batch_size: 8\nreport_to: none\n"
        "save_strategy: 'no'\nuse_cpu: true\ndisable_tqdm: true\n"
        "policy: target\ntarget_state_size: 5\nwindow_end: 0.5\n"
    )
    result = run_pretraining(parse_run([str(file)]))
    assert result.sizes_before == [12, 12] and sum(result.sizes_after) <= 10
    assert 0 <= result.metrics["test_accuracy"] <= 1 and 1 < result.metrics["train_loss"] < 5


def write_release(folder, rows=("( [MAX 4 ( [MED 1 7 ] ) 0 ] )\t4", "7\t7", "[SM 1 2 3 ]\t6"), header="Source\tTarget"):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_the_files_of_the_release_are_read_in_place_of_generating(tmp_path):
    data = load_task("listops", data_dir=write_release(tmp_path), min_length=2, max_length=9).train
    assert texts(data) == ["[MAX 4 [MED 1 7 ] 0 ]", "[SM 1 2 3 ]"] and data["labels"][:].tolist() == [4, 6]
    task = load_task("listops", data_dir=tmp_path, min_length=1, max_length=5, num_validation=1)
    assert texts(task.validation) == ["7"] and texts(task.test) == ["7", "[SM 1 2 3 ]"]
    batch = task.collator([task.test[0], task.test[1]])
    assert batch["input_ids"].shape == (2, 5) and batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, {}, "basic_train.tsv has no expression of 32 to 128 tokens; widen"),
        ({}, {"max_depth": 3}, "max_depth and max_args are the generator's; leave them out"),
        (
            {"rows": ["[MAX 1 12 ]\t2"]},
            {"min_length": 1},
            r"has the token '12'; known are 0 1 .*\[SM \]",
        ),
        ({"rows": ["[SM 9 1 2 ]\t12"]}, {"min_length": 1}, r"labels must lie in \[0, 9\], found \[12, 12\]"),
        ({"header": "Text\tValue"}, {}, "cannot be read as columns Source, Target"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, options, message):
    with pytest.raises(ValueError, match=message):
        load_task("listops", data_dir=write_release(tmp_path, **changes), **options)
