"""`smnist` and `scifar`: image data sets read pixel by pixel, from the hub, its cache or a local folder."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Image

from .pixels import PIXEL_FEATURES, DecodePixels, pixel_task, stratified_split
from .sources import check_labels, load_from_folder, load_from_hub, require_columns
from .task import Task, register_task

SPLITS = ("train", "test")
VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class ImageSource:
    """Where an image data set is on the hub, and the shape and scale of its images."""

    repo: str
    image_column: str
    label_column: str
    shape: tuple[int, ...]  # (height, width) or (height, width, channels)
    mean: tuple[float, ...]  # of pixel / 255, channel by channel
    std: tuple[float, ...]
    label_names: tuple[str, ...]


MNIST = ImageSource(
    repo="ylecun/mnist",
    image_column="image",
    label_column="label",
    shape=(28, 28),
    mean=(0.1307,),
    std=(0.3081,),
    label_names=tuple("0123456789"),
)
CIFAR10 = ImageSource(
    repo="uoft-cs/cifar10",
    image_column="img",
    label_column="label",
    shape=(32, 32, 3),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    label_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)


@register_task("smnist")
def smnist(*, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """Load sequential MNIST: L=784 pixels, one channel, 10 classes. See `image_task`."""
    return image_task("smnist", MNIST, data_dir)


@register_task("scifar")
def scifar(*, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """Load sequential CIFAR-10: L=1024 pixels, three channels, 10 classes. See `image_task`."""
    return image_task("scifar", CIFAR10, data_dir)


def image_task(name: str, source: ImageSource, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """Make a task of an image data set; each image is a sequence of pixels in row-major order.

    Validation is a fixed, stratified tenth of the train split; test is the data set's own. The images are
    decoded once and kept as bytes in the `datasets` cache.

    Args:
        name: the task's name.
        source: the data set.
        data_dir: a folder with `train-*.parquet` and `test-*.parquet`, or with one sub-folder that holds
            them, as in the hub's repositories. None reads from the hub or its cache.

    Raises:
        ConnectionError: if the hub does not yield the data set.
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if a split or column is missing, or an image or label is not what `source` says.
    """
    if data_dir is None:
        raw = load_from_hub(name, source.repo, SPLITS, (source.image_column, source.label_column))
    else:
        raw = load_from_folder(data_dir, SPLITS)
    full_train, test = (_encode(raw[split], source, f"split {split!r} of {name!r}") for split in SPLITS)
    keep, hold_out = stratified_split(_labels(full_train), (1 - VALIDATION_FRACTION, VALIDATION_FRACTION))
    return pixel_task(
        name,
        full_train.select(keep),
        full_train.select(hold_out),
        test,
        decode=DecodePixels(source.shape[0] * source.shape[1], source.mean, source.std),
        label_names=source.label_names,
        hub_dataset=source.repo,
    )


def _encode(dataset: Dataset, source: ImageSource, where: str) -> Dataset:
    require_columns(dataset, (source.image_column, source.label_column), where)
    dataset = dataset.cast_column(source.image_column, Image())
    encoded = dataset.map(
        _encode_batch,
        batched=True,
        fn_kwargs={"source": source, "where": where},
        remove_columns=dataset.column_names,
        features=PIXEL_FEATURES,
        desc=f"Encoding {where}",
    )
    check_labels(_labels(encoded), len(source.label_names), where)
    return encoded


def _encode_batch(batch: dict[str, list[Any]], source: ImageSource, where: str) -> dict[str, list[Any]]:
    rows = []
    for image in batch[source.image_column]:
        pixels = np.asarray(image)
        if pixels.shape != source.shape or pixels.dtype != np.uint8:
            raise ValueError(
                f"{where}: images must have shape {source.shape} and type uint8, "
                f"found {pixels.shape} and {pixels.dtype}"
            )
        rows.append(pixels.tobytes())
    return {"input_values": rows, "labels": batch[source.label_column]}


def _labels(encoded: Dataset) -> np.ndarray:
    return encoded.data.column("labels").to_numpy()
