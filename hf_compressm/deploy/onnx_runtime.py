"""Language models in onnxruntime, from the files of `write_onnx`. B batch, L length, V vocabulary."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np


class OnnxModel:
    """Prefill and single steps of a language model, with states as arrays that the caller keeps.

    Args:
        folder: holds prefill.onnx and step.onnx.
        threads: of onnxruntime for one operator; its own choice if 0.

    Raises:
        ValueError: if onnxruntime is not installed.
        FileNotFoundError: if a file is missing.
    """

    def __init__(self, folder: str | Path, threads: int = 0):
        if importlib.util.find_spec("onnxruntime") is None:
            raise ValueError('to run ONNX files install onnxruntime: pip install "hf-compressm[onnx]"')
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.sessions: dict[str, Any] = {}
        for name in ("prefill", "step"):
            if not (path := Path(folder) / f"{name}.onnx").is_file():
                raise FileNotFoundError(f"{folder} holds no {name}.onnx; write it with hf-compressm export --to onnx")
            self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def first_states(self, batch: int) -> list[np.ndarray]:
        """Zeros, float32, for the start of B = `batch` texts."""
        return [np.zeros((batch, *value.shape[1:]), np.float32) for value in self.sessions["step"].get_inputs()[1:]]

    def read(self, ids: np.ndarray, states: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Read tokens from given states.

        Args:
            ids: (B, L) int64; one token, L = 1, goes through step.onnx.
            states: those after the tokens before, or `first_states`.

        Returns:
            Logits (B, 1, V) of the last token, or of all if so exported, (B, L, V), and the states after it.
        """
        session = self.sessions["step" if ids.shape[1] == 1 else "prefill"]
        names = [value.name for value in session.get_inputs()]
        logits, *states = session.run(None, dict(zip(names, [ids, *states], strict=True)))
        return logits, states

    def generate(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:
        """Continue texts of one length greedily: int64 ids (B, L) -> (B, L + `new_tokens`)."""
        logits, states = self.read(ids, self.first_states(len(ids)))
        found = [ids, logits[:, -1].argmax(-1)[:, None]]
        for _ in range(new_tokens - 1):
            logits, states = self.read(found[-1], states)
            found.append(logits[:, -1].argmax(-1)[:, None])
        return np.concatenate(found, 1)
