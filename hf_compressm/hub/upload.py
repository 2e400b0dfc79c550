"""Upload a saved model to the hub, everything in one commit, so that an interruption never leaves half a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_session, get_token
from huggingface_hub.utils import validate_repo_id

from ..models.saved import load_checkpoint
from ..moved import old_names
from .export import ExportResult, Form, write

__getattr__ = old_names(__name__)

FILES_OF_A_MODEL = (
    "config.json",
    "generation_config.json",
    "compression.json",
    "run.json",
    "modeling_*.py",
    "configuration_*.py",
    "feature_extraction_*.py",
    "preprocessor_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_*",
)
"""Files that belong to one model. Those of an earlier push that the new model lacks are deleted in the same commit:
transformers would load an old weight file in place of new shards."""


TIMEOUT = 120.0
"""Seconds without an answer after which an upload is given up; huggingface_hub itself would wait for ever."""


@dataclass(frozen=True)
class PushResult(ExportResult):
    """What was pushed.

    Attributes:
        repo_id: full name of the repository.
        url: its address.
        commit: hash of the commit that holds the model.
        deleted: names of files of the earlier model that were deleted.
    """

    repo_id: str
    url: str
    commit: str
    deleted: list[str]


def push(
    model: str,
    repo_id: str,
    *,
    to: Form | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    timeout: float = TIMEOUT,
) -> PushResult:
    """Put a saved model into a hub repository, created if need be, as one commit.

    If it is interrupted the repository holds what it held before, and the same call again completes it: files that
    have arrived are not sent twice.

    Args:
        model: folder or hub name of a saved model.
        repo_id: "name" or "namespace/name".
        to: as in `export`.
        private: create a repository that only its owners see.
        revision: branch, created if need be; the main one if None.
        message: of the commit.
        token: with the right to write. By default that of `HF_TOKEN` or of `hf auth login`.
        timeout: seconds, > 0, without a sign from the hub after which a request fails; requests that carry large files
            are tried several times. A file may take as long as it keeps moving.

    Raises:
        ValueError: as `export` does, on a malformed name or timeout, and if the repository is public but `private` is
            asked for.
        OSError: if there is no such model.
        PermissionError: without a token.
        RuntimeError: if the hub refuses or cannot be reached.
    """
    validate_repo_id(repo_id)
    if not timeout > 0:
        raise ValueError(f"timeout is in seconds, greater than 0; got {timeout:g}")
    token = token or get_token()
    if not token:
        raise PermissionError("no token to push with: log in with `hf auth login`, or set HF_TOKEN")
    loaded, api = load_checkpoint(model), HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="hf_compressm-") as scratch:
        exported = write(loaded, model, Path(scratch), to, repo_id)
        with _explain_errors(repo_id, token, timeout):
            present = _repository(api, repo_id, private, revision, timeout)
        if private and not present.private:
            raise ValueError(
                f"{present.id} exists and is public; make it private in its settings, or leave --private out"
            )
        with _explain_errors(repo_id, token, timeout):
            return _commit(api, Path(scratch), exported, present, revision, message)


def _repository(api: HfApi, repo_id: str, private: bool, revision: str | None, timeout: float) -> ModelInfo:
    """Find the repository, or create it."""
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision, timeout=timeout)


def _commit(
    api: HfApi, folder: Path, exported: ExportResult, present: ModelInfo, revision: str | None, message: str | None
) -> PushResult:
    there = {file.rfilename for file in present.siblings or []} - set(exported.files)
    stale = sorted(name for name in there if any(fnmatch(name, pattern) for pattern in FILES_OF_A_MODEL))
    # Not upload_folder: with Xet it may split a folder into several commits.
    commit = api.create_commit(
        present.id,
        [
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
            *(CommitOperationAdd(name, folder / name) for name in exported.files),
        ],
        commit_message=message or f"Upload {exported.architecture}",
        revision=revision,
        # Two pushes at once must not delete or mix each other's files.
        parent_commit=present.sha,
    )
    url = f"{api.endpoint}/{present.id}"
    return PushResult(**vars(exported), repo_id=present.id, url=url, commit=commit.oid, deleted=stale)


@contextmanager
def _explain_errors(repo_id: str, token: str, timeout: float) -> Iterator[None]:
    """Turn any error of an upload, and silence, into one line that says what became of the repository; no token."""
    try:
        with _limit_silence(timeout):
            yield
    except Exception as error:
        # For a large file only the cause says what went wrong.
        told = [error, error.__cause__] if type(error) is RuntimeError and error.__cause__ else [error]
        if any("Timeout" in type(part).__name__ for part in told):
            told = [TimeoutError(f"the hub did not answer within {timeout:g} s")]
        reason = " ".join(": ".join(str(part) or type(part).__name__ for part in told).split())
        reason = reason.replace(token, "<token>").rstrip(".")
        status = getattr(getattr(error, "response", None), "status_code", 0)
        # Not `from error`: what a server sends back may hold the token, and would be printed with the cause.
        if 400 <= status < 500:
            raise RuntimeError(f"the hub refused the push to {repo_id}: {reason}. Nothing was changed.") from None
        raise RuntimeError(
            f"the push to {repo_id} stopped: {reason}. The repository is as it was before, or complete if only the "
            "hub's last answer was lost; the same command again completes it."
        ) from None


@contextmanager
def _limit_silence(timeout: float) -> Iterator[None]:
    """Let huggingface_hub's shared client give up after some seconds without an answer."""
    client = get_session()
    before, client.timeout = client.timeout, timeout
    try:
        yield
    finally:
        client.timeout = before
