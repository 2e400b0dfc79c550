"""ONNX files of models: prefill and single step of language models, one file of classifiers."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import check_output, new_folder
from ..models.fast_ops import mixer_class, stock_mixers, use_fast_ops
from ..models.saved import is_stock, load_checkpoint, load_tokenizer
from ..surgery import state_sizes
from .graphs import FAMILIES, Recurrence, recurrence_inputs

NEEDED = ("onnx", "onnxscript")
LEAST_OPSET, USUAL_OPSET = 18, 20
HEADS = ("ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        architecture: name of the model's class.
        state_sizes: states of each layer.
        opset: version of ONNX's operators.
        files: names of all files.
    """

    architecture: str
    state_sizes: list[int]
    opset: int
    files: list[str]


def save_onnx(
    model: str, output: str | Path, opset: int = USUAL_OPSET, all_logits: bool = False, overwrite: bool = False
) -> OnnxExport:
    """Write a saved model as ONNX, in float32, with its config and tokenizer; after an error there is no folder.

    Args:
        model: folder or hub name of a saved model.
        output: folder to write.
        opset, all_logits: as for `write_onnx`.
        overwrite: replace a model that the folder already holds.

    Raises:
        ValueError: as `write_onnx`.
        OSError: if there is no such model, or the folder is in use.
    """
    folder = check_output(Path(output), model, overwrite)
    _check_packages()
    _check_opset(opset)
    loaded = load_checkpoint(model)
    with new_folder(folder) as partial:
        done = write_onnx(loaded.float(), partial, opset, all_logits)
        loaded.config.save_pretrained(partial)
        if (tokenizer := load_tokenizer(model)) is not None:
            tokenizer.save_pretrained(partial)
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    return OnnxExport(done.architecture, done.state_sizes, done.opset, files)


@torch.no_grad()
def write_onnx(model: Any, folder: Path, opset: int = USUAL_OPSET, all_logits: bool = False) -> OnnxExport:
    """Write a live model as ONNX files, of real arithmetic and standard operators only.

    A language model gives prefill.onnx for any batch and length, and step.onnx for one token of each text of a batch:
    both take `input_ids` and the states of all layers, zeros at first, and return `logits` and the states after the
    last token, as `next_` and the name of the state. A classifier gives model.onnx with `attention_mask` beside
    `input_ids` or `input_values`.

    Args:
        model: a Mamba, Mamba-2 or MimoSSM of this package or of transformers, in float32 and eval mode, with the head
            of a language model or of a classifier of sequences or steps. Left as it was.
        folder: an existing folder.
        opset: version of ONNX's operators, >= 18.
        all_logits: whether prefill.onnx gives logits of all tokens, (B, L, V); otherwise (B, 1, V), of the last.

    Raises:
        ValueError: if the model or the opset cannot be exported, or a package is missing; the message says what to do.
    """
    _check_packages()
    _check_opset(opset)
    check_exportable(model)
    with _own_ops(model):
        if type(model).__name__.endswith(HEADS):
            _write(_Classifier(model), *_classifier_inputs(model), folder / "model.onnx", opset)
        else:
            for name, step in (("prefill", False), ("step", True)):
                module = Recurrence(model, all_logits)
                _write(module, *recurrence_inputs(module, step), folder / f"{name}.onnx", opset)
    files = sorted(path.name for path in folder.iterdir())
    return OnnxExport(type(model).__name__, state_sizes(model), opset, files)


def check_exportable(model: Any) -> None:
    """Check that a model has an ONNX form.

    Raises:
        ValueError: if its class has none, or it is quantised, not in float32, or in training mode.
    """
    name, kind = type(model).__name__, getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES or not name.endswith((*HEADS, "ForCausalLM")):
        raise ValueError(
            f"{name} has no ONNX form; language models and classifiers of sequences or steps have one, of the types "
            f"{', '.join(FAMILIES)}"
        )
    if getattr(model.config, "quantization_config", None):
        raise ValueError("a quantised model has no ONNX form; export the model in float32 and quantise the ONNX files")
    if model.training:
        raise ValueError("the model is in training mode, and dropout would go into the graph; call model.eval() first")
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(f"the model holds {', '.join(map(str, dtypes))}; call model.float() first")


class _Classifier(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.name = "input_ids" if model.config.num_channels is None else "input_values"

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.model(**{self.name: inputs, "attention_mask": attention_mask}).logits,)

    def input_names(self) -> list[str]:
        return [self.name, "attention_mask"]

    def state_names(self) -> list[str]:
        return []


def _classifier_inputs(model: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    from torch.export import Dim

    channels = model.config.num_channels
    both = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    inputs = torch.zeros(2, 5, dtype=torch.long) if channels is None else torch.zeros(2, 5, channels)
    return (inputs, torch.ones(2, 5, dtype=torch.long)), (both, both)


def _write(module: Any, inputs: tuple, shapes: tuple, path: Path, opset: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=module.input_names(),
            output_names=["logits", *(f"next_{name}" for name in module.state_names())],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None  # it is for dynamo=True
    program.save(str(path))


@contextmanager
def _own_ops(model: Any) -> Iterator[None]:
    """Let a stock model run by this package's ops, since transformers' own code writes out every time step."""
    changed = is_stock(model) and any(type(mixer) is mixer_class(mixer) for mixer in stock_mixers(model).values())
    if changed:
        use_fast_ops(model)
    try:
        yield
    finally:
        if changed:
            use_fast_ops(model, enable=False)


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'ONNX files need {" and ".join(missing)}; install with: pip install "hf-compressm[onnx]"')


def _check_opset(opset: int) -> None:
    if opset < LEAST_OPSET:
        raise ValueError(f"opset {opset} is too old; torch's exporter writes opset {LEAST_OPSET} and later")
