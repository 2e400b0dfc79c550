"""`mqar`: multi-query associative recall, where the number of states decides what can be remembered.

Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

import numpy as np
from datasets import Dataset, Features, Sequence, Value

from .language import IGNORED, language_metrics, token_scores
from .task import Task, register_task


@register_task("mqar")
def mqar(
    *,
    seed: int = 0,
    length: int = 128,
    num_kv_pairs: int = 16,
    vocab_size: int = 256,
    num_train: int = 20000,
    num_validation: int = 1000,
    num_test: int = 1000,
    power: float = 0.01,
    values_shown: bool = False,
) -> Task:
    """Generate pairs of a key and its value, then every key once more at a place drawn by a power law.

    The model has to name the value of a key when the key comes again. With `values_shown` it comes again with its value
    behind it, many times, which is learnt sooner.

    Keys are tokens of the first half of the vocabulary without 0, values of the second half; all other places after the
    pairs hold 0. A queried key's value is the label of the token after it, so that the loss of a causal language model,
    which compares the logits at t with the label at t + 1, asks for it at the key. The input there does not show it.

    Args:
        seed: of the examples; the three splits differ.
        length: tokens of a sequence, at least 4 per pair.
        num_kv_pairs: pairs to remember, >= 1, fewer than keys.
        vocab_size: even, >= 4.
        num_train, num_validation, num_test: numbers of sequences.
        power: the gap g between a pair and its query is drawn with weight (g + 1)^(power - 1); small values favour
            short gaps.
        values_shown: the sequence is full of pairs, those after the first `num_kv_pairs` drawn evenly from them. Each
            of their values is a label. `power` does not count then.

    Raises:
        ValueError: if an option is out of its range.
    """
    if num_kv_pairs < 1 or length < 4 * num_kv_pairs:
        raise ValueError(
            f"{num_kv_pairs} pairs and their queries need at least 1 pair and a length of {4 * num_kv_pairs}; "
            f"got length {length}"
        )
    if vocab_size % 2 or vocab_size // 2 - 1 < num_kv_pairs:
        raise ValueError(
            f"vocab_size must be even and at least {2 * num_kv_pairs + 2} for {num_kv_pairs} pairs; got {vocab_size}"
        )
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    if min(counts.values()) < 1:
        raise ValueError(f"every split needs at least one sequence; got {counts}")
    streams = np.random.SeedSequence(seed).spawn(len(counts))

    def examples(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        if values_shown:
            return _pairs_again(rng, count, length, num_kv_pairs, vocab_size)
        return _examples(rng, count, length, num_kv_pairs, vocab_size, power)

    splits = {
        name: _dataset(*examples(np.random.default_rng(stream), count))
        for (name, count), stream in zip(counts.items(), streams, strict=True)
    }
    return Task(
        name="mqar",
        **splits,
        model_kwargs={"vocab_size": vocab_size, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        compute_metrics=language_metrics("query"),
        preprocess_logits_for_metrics=token_scores,
        metric_for_best_model="accuracy",
        problem="causal_lm",
    )


def _examples(
    rng: np.random.Generator, count: int, length: int, pairs: int, vocab_size: int, power: float
) -> tuple[np.ndarray, np.ndarray]:
    keys, values = _keys_and_values(rng, count, pairs, vocab_size)
    # Queries stand at even places behind the pairs, so that the token after one belongs to no other. Drawing without
    # replacement by weight: the largest of log(weight) + Gumbel noise.
    places = (length - 2 * pairs) // 2
    weight = (power - 1) * np.log(np.arange(1, places + 1))
    chosen = (weight + rng.gumbel(size=(count, places))).argsort(axis=1)[:, -pairs:]
    chosen = rng.permuted(chosen, axis=1)
    at = 2 * pairs + 2 * chosen
    inputs = np.zeros((count, length), dtype=np.int64)
    labels = np.full((count, length), IGNORED, dtype=np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(inputs, at, keys, axis=1)
    np.put_along_axis(labels, at + 1, values, axis=1)
    return inputs, labels


def _pairs_again(
    rng: np.random.Generator, count: int, length: int, pairs: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    order = np.tile(np.arange(pairs), (count, 1))
    order = np.concatenate([order, rng.integers(0, pairs, (count, length // 2 - pairs))], axis=1)
    both = [np.take_along_axis(part, order, axis=1) for part in _keys_and_values(rng, count, pairs, vocab_size)]
    inputs = np.zeros((count, length), dtype=np.int64)
    labels = np.full((count, length), IGNORED, dtype=np.int64)
    inputs[:, : 2 * order.shape[1]] = np.stack(both, axis=2).reshape(count, -1)
    labels[:, 2 * pairs + 1 : 2 * order.shape[1] : 2] = both[1][:, pairs:]
    return inputs, labels


def _keys_and_values(rng: np.random.Generator, count: int, pairs: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Different keys and different values of each sequence: int64 (count, pairs) each."""
    half = vocab // 2
    keys = 1 + rng.random((count, half - 1)).argsort(axis=1)[:, :pairs]
    return keys, half + rng.random((count, half)).argsort(axis=1)[:, :pairs]


def _dataset(inputs: np.ndarray, labels: np.ndarray) -> Dataset:
    tokens = Sequence(Value("int16"), length=inputs.shape[1])
    columns = {"input_ids": list(inputs.astype(np.int16)), "labels": list(labels.astype(np.int16))}
    dataset = Dataset.from_dict(columns, features=Features({"input_ids": tokens, "labels": tokens}))
    return dataset.with_format("torch")
