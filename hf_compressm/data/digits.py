"""`digits`: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. Needs no network and trains on a CPU."""

import numpy as np
from datasets import Dataset
from sklearn.datasets import load_digits

from .pixels import PIXEL_FEATURES, DecodePixels, pixel_task, stratified_split
from .task import Task, register_task

FULL_SCALE = 16.0
FRACTIONS = (0.7, 0.1, 0.2)


@register_task("digits")
def digits() -> Task:
    """Load the digits as sequences of L=64 pixels with one channel, row by row; 10 classes.

    The split into 70% train, 10% validation and 20% test is stratified and fixed. Pixels are scaled to zero
    mean and unit variance over the train split.
    """
    bunch = load_digits()
    pixels = bunch.data.astype(np.uint8)
    splits = stratified_split(bunch.target, FRACTIONS)
    train_pixels = pixels[splits[0]] / FULL_SCALE
    decode = DecodePixels(64, (float(train_pixels.mean()),), (float(train_pixels.std()),), FULL_SCALE)
    train, validation, test = (
        Dataset.from_dict(
            {"input_values": [row.tobytes() for row in pixels[split]], "labels": bunch.target[split]},
            features=PIXEL_FEATURES,
        )
        for split in splits
    )
    label_names = [str(digit) for digit in bunch.target_names]
    return pixel_task("digits", train, validation, test, decode=decode, label_names=label_names)
