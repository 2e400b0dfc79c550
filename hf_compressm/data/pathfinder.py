"""`pathfinder`: are two dots on one dashed curve? Images of 32 x 32 pixels, read pixel by pixel.

Sources: Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated recurrent units"; the hard
images of Pathfinder-32 of Tay et al. 2020, "Long Range Arena", arXiv 2011.04006, whose release has the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from .pixels import PIXEL_FEATURES, DecodePixels, pixel_task, stratified_split
from .sources import check_labels, no_hub
from .task import Task, register_task

DIFFICULTY = "curv_contour_length_14"
SIDE = 32
FRACTIONS = (0.8, 0.1, 0.1)
LABELS = ("apart", "connected")
FOLDER, NAME, LABEL = 0, 1, 3
"""Columns of the metadata."""


@register_task("pathfinder")
def pathfinder(*, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """Load the hard images of Pathfinder-32: L=1024 pixels in row-major order, one channel in [-1, 1], 2 classes.

    The split into 80% train, 10% validation and 10% test is stratified and fixed; the release has none. The images are
    decoded at the start, into a kilobyte of memory each.

    Args:
        data_dir: the release's folder pathfinder32, the one that holds it, or its curv_contour_length_14. In this lie
            the folder metadata, of text files *.npy with a line of columns for each image (its folder, its name, a
            number, the label, more), and the folder imgs. Must be given: there is no copy on the hub in this form.

    Raises:
        FileNotFoundError: if `data_dir` is not a folder, or an image is missing.
        ValueError: without `data_dir`, or if metadata are missing or malformed, an image is not 32 x 32 and grey, or a
            label is neither 0 nor 1.
    """
    folder = _find(Path(no_hub("pathfinder", data_dir, [f"{DIFFICULTY}/metadata/*.npy"])).expanduser())
    samples = list(_samples(folder))
    labels = np.array([label for _, label in samples], dtype=np.int64)
    check_labels(labels, len(LABELS), f"the metadata in {folder}")
    rows = [_pixels(file) for file, _ in samples]
    train, validation, test = (
        Dataset.from_dict(
            {"input_values": [rows[index] for index in part], "labels": labels[part]}, features=PIXEL_FEATURES
        )
        for part in stratified_split(labels, FRACTIONS)
    )
    decode = DecodePixels(SIDE * SIDE, (0.5,), (0.5,))
    return pixel_task("pathfinder", train, validation, test, decode=decode, label_names=LABELS)


def _find(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir is not a folder: {root}")
    places = [root, root / DIFFICULTY, root / "pathfinder32" / DIFFICULTY]
    for place in places:
        if place.name == DIFFICULTY and any((place / "metadata").glob("*.npy")):
            return place
    raise ValueError(f"data_dir needs {DIFFICULTY}/metadata/*.npy, in {root} or in its folder pathfinder32")


def _samples(folder: Path) -> Iterator[tuple[Path, int]]:
    """The image and label of each line of the metadata, files in the order of their numbers."""
    for file in sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem)):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            columns = line.split()
            if len(columns) <= LABEL or not columns[LABEL].isdecimal():
                raise ValueError(
                    f"{file}, line {number}: expected columns of text, the fourth a label; got {line[:80]!r}"
                )
            yield folder / columns[FOLDER] / columns[NAME], int(columns[LABEL])


def _pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        pixels = np.asarray(image)
    if pixels.shape != (SIDE, SIDE) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{file}: images must have shape {(SIDE, SIDE)} and type uint8, found {pixels.shape} and {pixels.dtype}"
        )
    return pixels.tobytes()
