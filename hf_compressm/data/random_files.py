"""Write random files in the layout of the tasks that read files, to try a whole pipeline without the data.

Nothing can be learnt from them. Names, texts or ids say that they are stand-ins, where the layout allows it, and every
folder gets a STAND_IN.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from . import aan, imdb, listops_files, pathfinder
from .images import CIFAR10, MNIST, ImageSource
from .listops import TOKENS, listops

HELD_OUT = 4
"""Items of a validation or test split that is a file of its own."""
LEAST = 50
"""Items from which a tenth holds one of each of ten classes."""
NOTE = """Random stand-in data in the layout that the task `{name}` of hf_compressm reads: not the data set, and nothing
to learn from. Written by `hf_compressm.data.random_files.write_stand_in`.
"""


def write_stand_in(task_name: str, folder: str | os.PathLike[str], *, items: int = 64, seed: int = 0) -> Path:
    """Write small random files that `load_task(task_name, data_dir=folder)` reads like the real ones.

    Args:
        task_name: one of `stand_in_names()`.
        folder: where to, made if it is not there; files of an earlier call are overwritten.
        items: of the training split, or where one file holds all splits, in all; >= 50.
        seed: of the content.

    Returns:
        the folder, to be given as `data_dir`.

    Raises:
        ValueError: for a task that reads no files or has no stand-in, and for too few items.
    """
    if task_name not in _WRITERS:
        raise ValueError(f"there is no stand-in for {task_name!r}; there are: {', '.join(stand_in_names())}")
    if items < LEAST:
        raise ValueError(f"items must be at least {LEAST}, for all classes to be in all splits; got {items}")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "STAND_IN.md").write_text(NOTE.format(name=task_name))
    _WRITERS[task_name](root, items, np.random.default_rng(seed))
    return root


def stand_in_names() -> list[str]:
    """Return the tasks that `write_stand_in` writes files for, sorted."""
    return sorted(_WRITERS)


def _images(source: ImageSource) -> Callable[[Path, int, np.random.Generator], None]:
    def write(root: Path, items: int, rng: np.random.Generator) -> None:
        names = list(source.label_names)
        features = Features({source.image_column: Image(), source.label_column: ClassLabel(names=names)})
        for split, count in (("train", items), ("test", HELD_OUT)):
            pixels = rng.integers(0, 256, (count, *source.shape), dtype=np.uint8)
            rows = {
                source.image_column: [PILImage.fromarray(image) for image in pixels],
                source.label_column: np.arange(count) % len(names),
            }
            Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-stand-in.parquet")

    return write


def _text(rng: np.random.Generator, length: int) -> str:
    letters = rng.integers(ord("a"), ord("k"), (length // 7, 6), dtype=np.uint8)
    return " ".join(["stand-in", *(word.tobytes().decode() for word in letters)])


def _imdb(root: Path, items: int, rng: np.random.Generator) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(imdb.LABELS))})
    for split, count in (("train", items), ("test", HELD_OUT)):
        rows = {
            "text": [_text(rng, length) for length in rng.integers(100, 6000, count)],
            "label": np.arange(count) % 2,
        }
        Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-stand-in.parquet")


def _aan(root: Path, items: int, rng: np.random.Generator) -> None:
    for split, file in aan.FILES.items():
        lines = []
        for number in range(items if split == "train" else HELD_OUT):
            texts = [_text(rng, length) for length in rng.integers(100, 6000, 2)]
            ids = [f"stand-in-{number}-{side}" for side in "ab"]
            lines.append("\t".join([f"{number % 2}.0", *ids, *texts]) + "\n")
        (root / file).write_text("".join(lines))


def _pathfinder(root: Path, items: int, rng: np.random.Generator) -> None:
    place = root / "pathfinder32" / pathfinder.DIFFICULTY
    images, metadata = place / "imgs" / "0", place / "metadata"
    images.mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    lines = []
    for number in range(items):
        name = f"stand_in_{number}.png"
        pixels = rng.integers(0, 256, (pathfinder.SIDE, pathfinder.SIDE), dtype=np.uint8)
        PILImage.fromarray(pixels).save(images / name)
        lines.append(f"imgs/0 {name} {number} {number % 2} 1.8 1.0 1\n")
    (metadata / "0.npy").write_text("".join(lines))


def _listops(root: Path, items: int, rng: np.random.Generator) -> None:
    """Of every two expressions the first has 32 to 60 tokens and the second 501 to 700."""
    seed, half = int(rng.integers(2**31)), (items + 1) // 2
    counts = {"num_train": half, "num_validation": HELD_OUT // 2, "num_test": HELD_OUT // 2}
    drawn = [listops(seed=seed, min_length=low, max_length=high, **counts) for low, high in ((32, 60), (501, 700))]
    for split, file in listops_files.FILES.items():
        pairs = zip(*(getattr(task, split) for task in drawn), strict=True)
        rows = [item for pair in pairs for item in pair]
        lines = ["Source\tTarget\n", *(f"{_source(row['input_ids'])}\t{row['labels']}\n" for row in rows)]
        (root / file).write_text("".join(lines))


def _source(ids: np.ndarray) -> str:
    """With the parentheses of the release, here around operators only."""
    return " ".join(f"( {TOKENS[id]} )" if TOKENS[id].startswith("[") else TOKENS[id] for id in ids)


_WRITERS: dict[str, Callable[[Path, int, np.random.Generator], None]] = {
    "smnist": _images(MNIST),
    "scifar": _images(CIFAR10),
    "imdb": _imdb,
    "aan": _aan,
    "pathfinder": _pathfinder,
    "listops": _listops,
}
