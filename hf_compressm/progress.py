"""Progress bars: shown by the first process, when something takes over two seconds, unless they are switched off."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm.auto import tqdm

GROUP = "hf_compressm"
"""Name of these bars for `huggingface_hub.utils.enable_progress_bars` and `disable_progress_bars`."""
DELAY = 2.0
"""Seconds before a bar appears."""

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on standard error. It obeys `transformers.utils.logging.disable_progress_bar` too."""
    others = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    rarely = {} if sys.stderr.isatty() else {"mininterval": DELAY}  # a log keeps every line
    bar = tqdm(
        items, what, total, leave=False, unit=unit, delay=DELAY, disable=others or are_progress_bars_disabled(GROUP),
        **rarely,
    )  # fmt: skip
    yield from bar
