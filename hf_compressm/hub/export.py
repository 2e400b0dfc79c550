"""Write a saved model as a folder to share: with the modelling code that it needs, or as a stock transformers model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..files import check_output, new_folder
from ..models import to_stock
from ..models.runtimes import check_runtime, to_stock_for
from ..models.saved import copy_feature_extractor, is_stock, load_checkpoint, load_tokenizer
from ..moved import old_names
from ..report import readdressed
from ..report.card import CARD_NAME
from ..surgery import state_sizes

__getattr__ = old_names(__name__)

FILES_BESIDE = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "compression.json",
    "preprocessor_config.json",
    "run.json",
    "*_results.json",
    "*.html",
    "*.png",
    "*.svg",
)
"""Files of a model's folder that are copied beside model and tokenizer. No others: training arguments, for example, are
a pickle that may hold a token."""


class Form(str, Enum):
    """What a shared model needs where it is loaded.

    Attributes:
        REMOTE_CODE: this package, or `trust_remote_code=True`: the class keeps a state size for each layer.
        STOCK: nothing but transformers: layers with fewer states are padded to the largest.
    """

    REMOTE_CODE = "remote-code"
    STOCK = "stock"


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        form: what loading it needs.
        architecture: name of the model's class.
        state_sizes: states of each layer.
        files: names of all files.
    """

    form: Form
    architecture: str
    state_sizes: list[int]
    files: list[str]


def export(
    model: str, output: str | Path, to: Form | None = None, overwrite: bool = False, runtime: str | None = None
) -> ExportResult:
    """Write weights, config, code, tokenizer and card of a saved model to a folder; after an error there is no folder.

    Args:
        model: folder or hub name of a saved model, of this package's classes or a stock one.
        output: folder to write.
        to: what loading the result may need; by default nothing for stock models, and their code for others.
        overwrite: replace a model that the folder already holds.
        runtime: with STOCK, name of the runtime that is to run the result; see `to_stock_for`.

    Raises:
        ValueError: if the model's class is unknown or cannot be had in that form, or weights are missing; if the
            runtime is unknown, or takes no model like this one.
        OSError: if there is no such model, or the folder is in use.
    """
    if runtime is not None:
        check_runtime(runtime)
        if to is not Form.STOCK:
            raise ValueError(f"{runtime} runs stock models only; use --to stock")
    folder = check_output(Path(output), model, overwrite)
    loaded = load_checkpoint(model)
    if runtime is not None:
        loaded = to_stock_for(runtime, loaded)
    with new_folder(folder) as partial:
        return write(loaded, model, partial, to)


def write(model: Any, source: str, folder: Path, to: Form | None = None, name: str | None = None) -> ExportResult:
    """Write a loaded model in the given form, and copy the files that stand beside the saved one.

    Args:
        model: the loaded model.
        source: folder or hub name that it was loaded from.
        folder: folder to write to.
        to: as of `export`.
        name: what the result is loaded by, for its card; None for the name that the card has.

    Raises:
        ValueError: if the model is not one of state-space layers, or cannot be had in that form.
    """
    stock = is_stock(model)
    if stock and to is Form.REMOTE_CODE:
        raise ValueError(
            f"{source} holds a {type(model).__name__}, a class of transformers itself: it loads everywhere and has no "
            "code to carry. Use --to stock, or turn it into this package's class with from_stock."
        )
    form = to or (Form.STOCK if stock else Form.REMOTE_CODE)
    sizes, cut, kind = state_sizes(model), state_sizes(model), model.config.model_type
    if form is Form.STOCK and not stock:
        try:
            model = to_stock(model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} cannot be a stock model: {error} Use --to remote-code.") from error
        sizes = [max(sizes)] * len(sizes)  # stock classes have one for all layers
    for path in _beside(source):
        shutil.copyfile(path, folder / path.name)
    model.save_pretrained(folder)
    if (card := folder / CARD_NAME).is_file():
        text = card.read_bytes().decode("utf-8", "surrogateescape")
        text = readdressed(text, model.config.to_dict(), name, kind, cut)
        card.write_bytes(text.encode("utf-8", "surrogateescape"))
    if (tokenizer := load_tokenizer(source)) is not None:
        tokenizer.save_pretrained(folder)
    copy_feature_extractor(source, folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return ExportResult(form, type(model).__name__, sizes, files)


def _beside(source: str) -> list[Path]:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(FILES_BESIDE)))
    return sorted({path for pattern in FILES_BESIDE for path in folder.glob(pattern) if path.is_file()})
