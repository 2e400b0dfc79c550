"""Progress bars appear where something takes long, on the first process only, unless they are switched off."""

import time

import pytest
import torch.distributed as dist
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from hf_compressm import progress


@pytest.fixture
def bars():
    """Bars on, and as before afterwards."""
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    enable_progress_bars()
    yield
    disable_progress_bars() if not before else None
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def shown(capsys, seconds):
    def slowly():
        for item in range(3):
            time.sleep(seconds / 3)
            yield item

    assert list(progress.with_progress(slowly(), "measuring", "layer", 3)) == [0, 1, 2]
    return "measuring" in capsys.readouterr().err


def test_only_what_takes_long_has_a_bar(bars, capsys, monkeypatch):
    assert not shown(capsys, 0.03)
    monkeypatch.setattr(progress, "DELAY", 0.1)
    assert shown(capsys, 0.6)


def test_no_bar_where_bars_are_switched_off_or_on_other_processes(bars, capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.1)
    logging.disable_progress_bar()
    assert not shown(capsys, 0.6)
    enable_progress_bars(progress.GROUP)  # as the command line does, which wants none of transformers' bars
    assert shown(capsys, 0.6)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert not shown(capsys, 0.6)
