"""Crash-safe checkpoints: a manifest written last, a search for the newest that verifies, a checkpoint on SIGTERM.

The Trainer writes a checkpoint's files one by one under their final names. The manifest, with the size and hash of
each, is written after all of them are on the disk, under a temporary name that is then changed: a folder without one is
not finished, and one whose files differ from it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from ...files import PARTIAL_SUFFIX, new_file, sync
from ...surgery.processes import processes
from ..run_state import PerRun, is_running
from ..trainer_log import running_trainer
from .contents import checkpoint_folder
from .sharded_files import METADATA, WHOLE_MOMENTS, WHOLE_WEIGHTS
from .verification import verify_checkpoint

logger = logging.get_logger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
READ = {".safetensors", ".pt", ".pth", ".distcp"}
READ_NAMES = {CONFIG_NAME, TRAINER_STATE_NAME, WHOLE_WEIGHTS, WHOLE_MOMENTS, METADATA}
"""Suffixes and names of the files that are read when training goes on."""
BLOCK = 1 << 20
"""Bytes of a file that are hashed at once."""


class DurableCheckpoints(TrainerCallback):
    """Writes a manifest into every checkpoint; on SIGTERM saves one and stops, on a second SIGTERM ends at once.

    Put it after the callbacks that write files of their own into a checkpoint.

    Attributes:
        stopped_at: the step at which SIGTERM ended the training that began last; None if it did not.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        self._runs: PerRun[_Listener] = PerRun()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Begin to listen for SIGTERM.

        Raises:
            ValueError: if `save_total_limit` is 1.
        """
        if args.save_total_limit == 1:
            raise ValueError(
                "save_total_limit=1 deletes the previous checkpoint before the next is sealed, so a kill in between "
                "would leave none. Set it to at least 2."
            )
        self.stopped_at = None
        listener = self._runs.begin(state, _Listener(state))
        if threading.current_thread() is threading.main_thread():
            listener.install()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        listener = self._runs.of(state)
        if listener is not None and _anyone(listener.asked, args):
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(f"SIGTERM: saving a checkpoint at step {state.global_step} and stopping")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if processes() > 1:
            dist.barrier()  # every rank has written its files
        if args.should_save:
            write_manifest(checkpoint_folder(running_trainer(), args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if (listener := self._runs.end(state)) is not None:
            listener.remove()


class _Listener:
    """The handler of SIGTERM of one training: remembers the first, and passes on a second.

    A training that an error ended cannot take its handler away. Such a handler passes on the first signal, too.

    Attributes:
        asked: whether the signal has come.
    """

    def __init__(self, state: TrainerState):
        self.asked = False
        self._state = weakref.ref(state)
        self._previous: Any = signal.SIG_DFL

    def install(self) -> None:
        self._previous = _not_left_over(signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, self)

    def remove(self) -> None:
        present: Any = signal.getsignal(signal.SIGTERM)
        if present is self:
            signal.signal(signal.SIGTERM, self._previous)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.asked or not is_running(self._state(), frame):
            signal.signal(signal.SIGTERM, self._previous)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.asked = True
        if isinstance(self._previous, _Listener):  # of a training that this one is nested in
            self._previous(signum, frame)


def _not_left_over(handler: Any) -> Any:
    """The handler, or if a training that an error ended left it, the one from before."""
    if isinstance(handler, _Listener) and not is_running(handler._state()):
        return _not_left_over(handler._previous)
    return signal.SIG_DFL if handler is None else handler  # None: one that was not installed from Python


def _anyone(asked: bool, args: TrainingArguments) -> bool:
    """Whether any rank has got the signal: all must save and stop in the same step."""
    if processes() == 1:
        return asked
    flag = torch.tensor(int(asked), device=args.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Seal a checkpoint: wait until its files are on the disk, then write a manifest of their sizes and hashes."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_content(path))
    entries = {}
    for path in files:
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    with new_file(folder / MANIFEST_NAME, durable=True) as partial:
        partial.write_text(json.dumps({"files": entries}, indent=2) + "\n")
    for directory in {path.parent for path in files} | {folder, folder.parent}:
        sync(directory)


def verify_manifest(folder: str | os.PathLike[str]) -> None:
    """Check that a checkpoint is finished and its files are those that were written.

    Raises:
        FileNotFoundError: the folder has no manifest, or lacks a file that its manifest names.
        ValueError: a damaged manifest, one that does not cover a file that training would read, or a file of another
            size or hash; the message names it.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST_NAME}: the checkpoint was not finished")
    try:
        entries = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in _files(manifest).items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest} cannot be read: {error}") from error
    for path in [*folder.iterdir(), *folder.glob("*/*")]:  # those of FSDP2's shards lie in folders
        name = path.relative_to(folder).as_posix()
        if name not in entries and (path.suffix in READ or path.name in READ_NAMES):
            raise ValueError(f"{manifest} does not cover {name}")
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}")
        if _hash(path) != digest:
            raise ValueError(f"{path} is damaged: its hash is not the one that was written")


def verify_sealed(folder: str | os.PathLike[str]) -> None:
    """`verify_manifest`, if the checkpoint has a manifest, and `verify_checkpoint`: for one that was asked for by name.

    Raises:
        FileNotFoundError, ValueError: as they do, with what to do about a file that was changed on purpose.
    """
    if (Path(folder) / MANIFEST_NAME).is_file():
        try:
            verify_manifest(folder)
        except (OSError, ValueError) as error:
            raise type(error)(
                f"{error}. Use another checkpoint; if the change is meant, seal this one again with "
                "hf_compressm.training.write_manifest."
            ) from error
    verify_checkpoint(folder)


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run that verifies, or None; warns of each newer one that does not."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if path.is_dir() and step.isdecimal():
            found[int(step)] = path
    for step in sorted(found, reverse=True):
        try:
            verify_manifest(found[step])
            verify_checkpoint(found[step])
        except (OSError, ValueError) as error:
            logger.warning(f"skipped the checkpoint of step {step}: {error}")
        else:
            return found[step]
    return None


def _files(manifest: Path) -> Any:
    return json.loads(manifest.read_text())["files"]


def _is_content(path: Path) -> bool:
    return path.name != MANIFEST_NAME and path.suffix != PARTIAL_SUFFIX


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
