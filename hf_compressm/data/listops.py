"""`listops`: nested operations on lists of digits, and the value of the whole is the class. Needs no network.

Sources: Nangia and Bowman 2018, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv 1804.06028; the
distribution, lengths and split sizes of Tay et al. 2020, "Long Range Arena", arXiv 2011.04006.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from .collators import PAD, pad_right
from .listops_files import FEATURES, read_listops
from .metrics import classification_metrics
from .task import Task, label_fields, register_task

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = ("<pad>", *"0123456789", *OPERATORS, "]")
"""The token of each id."""
DIGIT, OPERATOR, END = 1, 11, 15
"""Ids: of the digit 0, of the first operator and of `]`."""

OPERATOR_SHARE = 0.25
"""Probability that a node above the greatest depth is an operator and not a digit."""
DEFAULT_TREES = (10, 10)
"""Greatest depth and number of arguments in the Long Range Arena."""
MOST_TREES, MOST_TOKENS = 2**14, 2**25
"""Expressions drawn at once, and their tokens if all were of the greatest length."""
PATIENCE = 2**20
"""Expressions that are drawn without a new one of the wanted length before an error."""


@register_task("listops")
def listops(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    min_length: int = 32,
    max_length: int = 128,
    max_depth: int = DEFAULT_TREES[0],
    max_args: int = DEFAULT_TREES[1],
    num_train: int = 20000,
    num_validation: int = 1000,
    num_test: int = 1000,
) -> Task:
    """Generate expressions such as `[MAX 4 [MED 1 7 ] [SM 8 9 ] 0 ]`, whose value is one of 10 classes.

    A node is a digit, or with probability 1/4 one of `[MIN`, `[MAX`, `[MED` (median, rounded down) and `[SM` (sum
    modulo 10) over 2 to `max_args` nodes; at depth `max_depth` all are digits. Expressions of other lengths are thrown
    away. That is the Long Range Arena's distribution, and its tokens after its parentheses have been removed; its data
    set has 501 to 1999 tokens and splits of 96000, 2000 and 2000. The defaults here are shorter, for CPUs.

    All expressions differ, within and between splits. Test is drawn first, then validation, then train, so that the
    number of training sequences changes neither of the others.

    `input_ids`, int64 (L,), are of different lengths; the collator pads a batch on the right with 0 and adds the
    `attention_mask`.

    Args:
        data_dir: a folder with the Long Range Arena's own basic_train.tsv, basic_val.tsv and basic_test.tsv, columns
            Source and Target, or with one sub-folder that holds them. They are then read in place of generating: of
            each, the first expressions of the wanted lengths, at most as many as are asked for. None generates.
        seed: of the generated expressions, >= 0.
        min_length, max_length: tokens of a sequence, both included; operators and `]` count.
        max_depth: levels of a tree, >= 1, the root included.
        max_args: of an operator, >= 2.
        num_train, num_validation, num_test: numbers of sequences.

    Raises:
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if an option is out of its range, or the others leave too few expressions of such lengths; with
            `data_dir`, if a file or column is missing, a token is unknown, or `max_depth` or `max_args` is given.
    """
    if not 1 <= min_length <= max_length:
        raise ValueError(f"1 <= min_length <= max_length must hold; got {min_length} and {max_length}")
    if max_depth < 1 or max_args < 2:
        raise ValueError(f"max_depth must be at least 1 and max_args at least 2; got {max_depth} and {max_args}")
    counts = {"test": num_test, "validation": num_validation, "train": num_train}
    if min(counts.values()) < 1:
        raise ValueError(f"every split needs at least one sequence; got {counts}")
    bounds = (min_length, max_length)
    if data_dir is None:
        stream = _distinct(seed, bounds, max_depth, max_args)
        splits = {split: _dataset(stream, count) for split, count in counts.items()}
    else:
        if (max_depth, max_args) != DEFAULT_TREES:
            raise ValueError("max_depth and max_args are the generator's; leave them out where data_dir is given")
        splits = read_listops(data_dir, {token: id for id, token in enumerate(TOKENS) if id != PAD}, bounds, counts)
    return Task(
        name="listops",
        **splits,
        model_kwargs={
            "vocab_size": len(TOKENS),
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": None,
            **label_fields("0123456789"),
        },
        compute_metrics=classification_metrics,
        metric_for_best_model="accuracy",
        problem="sequence_classification",
        collator=pad_right,
    )


def _dataset(stream: Iterator[tuple[bytes, int]], count: int) -> Dataset:
    rows, labels = zip(*(next(stream) for _ in range(count)), strict=True)
    columns = {"input_ids": [np.frombuffer(row, dtype=np.uint8) for row in rows], "labels": labels}
    return Dataset.from_dict(columns, features=FEATURES).with_format("torch")


def _distinct(seed: int, bounds: tuple[int, int], max_depth: int, max_args: int) -> Iterator[tuple[bytes, int]]:
    """The ids of one expression after the other, one byte each, and its value; none comes twice."""
    # RandomState, not Generator: NumPy promises that its stream stays the same from version to version.
    rng = np.random.RandomState(seed)
    trees = max(1, min(MOST_TREES, MOST_TOKENS // bounds[1]))
    seen: set[bytes] = set()
    stalled = 0
    while stalled < PATIENCE:
        levels, lengths = _grow(rng, trees, bounds, max_depth, max_args)
        known, stalled = len(seen), stalled + trees
        for row, value in _expressions(rng, levels, lengths):
            if row not in seen:
                seen.add(row)
                yield row, value
        stalled = 0 if len(seen) > known else stalled
    raise ValueError(
        f"found only {len(seen)} expressions of {bounds[0]} to {bounds[1]} tokens with max_depth={max_depth} and "
        f"max_args={max_args}, and {PATIENCE} more draws gave no new one; widen the lengths, allow more depth or "
        "arguments, or ask for fewer sequences"
    )


def _grow(
    rng: np.random.RandomState, trees: int, bounds: tuple[int, int], max_depth: int, max_args: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw trees level by level; keep those whose length lies within the bounds.

    Returns:
        for each depth, tree by tree, the number of arguments of each node, 0 for a digit; and the lengths of the trees.
    """
    lengths = np.zeros(trees, dtype=np.int64)
    tree, levels = np.arange(trees), []
    for depth in range(1, max_depth + 1):
        arity = np.zeros(len(tree), dtype=np.int64)
        if depth < max_depth:
            operators = np.flatnonzero(rng.random_sample(len(tree)) < OPERATOR_SHARE)
            arity[operators] = rng.randint(2, max_args + 1, len(operators))
        levels.append((tree, arity))
        lengths += np.bincount(tree, weights=1 + (arity > 0), minlength=trees).astype(np.int64)
        awaited = np.bincount(tree, weights=arity, minlength=trees)
        too_long = lengths + awaited > bounds[1]
        lengths[too_long] = bounds[1] + 1
        tree = np.repeat(tree, np.where(too_long[tree], 0, arity))
        if not len(tree):
            break
    kept = (bounds[0] <= lengths) & (lengths <= bounds[1])
    return [arity[kept[tree]] for tree, arity in levels], lengths[kept]


def _expressions(
    rng: np.random.RandomState, levels: list[np.ndarray], lengths: np.ndarray
) -> Iterator[tuple[bytes, int]]:
    """Draw the digits and operators of the trees; yield their ids in prefix order, one byte each, and their values."""
    ids, sizes, values = _fill(rng, levels)
    stops = np.cumsum(lengths)
    text = _prefix_order(levels, ids, sizes, stops - lengths, int(lengths.sum()))
    for stop, length, value in zip(stops.tolist(), lengths.tolist(), values.tolist(), strict=True):
        yield text[stop - length : stop], value


def _fill(
    rng: np.random.RandomState, levels: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Ids of the nodes of each level, lengths of the sub-expressions that begin there, and the values of the roots."""
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    below = np.zeros(0, dtype=np.int64)
    for arity in reversed(levels):  # arguments before their operators
        nodes = np.flatnonzero(arity)
        value, size = rng.randint(0, 10, len(arity)), np.ones(len(arity), dtype=np.int64)
        code = rng.randint(0, len(OPERATORS), len(nodes))
        if len(nodes):
            first = _first_arguments(arity[nodes])
            value[nodes] = _apply(code, below, arity[nodes], first)
            size[nodes] = 2 + np.add.reduceat(sizes[0], first)
        token = DIGIT + value
        token[nodes] = OPERATOR + code
        ids.insert(0, token)
        sizes.insert(0, size)
        below = value
    return ids, sizes, below


def _prefix_order(
    levels: list[np.ndarray], ids: list[np.ndarray], sizes: list[np.ndarray], start: np.ndarray, total: int
) -> bytes:
    """All expressions one after the other, the root of each at its `start`."""
    text = np.zeros(total, dtype=np.uint8)
    for depth, arity in enumerate(levels):
        nodes = np.flatnonzero(arity)
        text[start] = ids[depth]
        text[start[nodes] + sizes[depth][nodes] - 1] = END
        if not len(nodes):
            break
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
        first = before[_first_arguments(arity[nodes])]
        start = np.repeat(start[nodes] + 1 - first, arity[nodes]) + before
    return text.tobytes()


def _first_arguments(arity: np.ndarray) -> np.ndarray:
    """Where, among the nodes one level down, the arguments of each operator begin."""
    return np.cumsum(arity) - arity


def _apply(code: np.ndarray, value: np.ndarray, arity: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The value of each operator: `OPERATORS[code]` of the `arity` arguments that begin at `first` in `value`."""
    ranked = np.sort(10 * np.repeat(np.arange(len(arity)), arity) + value) % 10
    median = (ranked[first + (arity - 1) // 2] + ranked[first + arity // 2]) // 2
    total = np.add.reduceat(value, first) % 10
    return np.choose(code, [ranked[first], ranked[first + arity - 1], median, total])
