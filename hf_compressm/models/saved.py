"""Load saved models and tokenizers as they are: in their own dtype, with their own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from ..files import check_name
from .feature_extractor import MimoSSMFeatureExtractor
from .heads import HEADS, model_classes

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
FEATURE_EXTRACTOR_FILE = "preprocessor_config.json"


def load_config(name: str) -> Any:
    """Load the config of a saved model.

    Args:
        name: folder of the model, or its name on the hub.

    Raises:
        OSError: if there is no such model.
        ValueError: if its config cannot be read.
    """
    check_name(name, "model")
    if Path(name).expanduser().exists() and not (Path(name).expanduser() / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json, so it is not the folder of a saved model")
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(f"{name} is neither a folder nor a model that the hub or its cache gives: {error}") from error


def load_model(name: str, device: str = "auto") -> Any:
    """Load a causal language model or classifier in its own dtype, with the head that its config names.

    Args:
        name: folder of the model, or its name on the hub.
        device: as torch names it, or "auto" for a GPU if there is one.

    Raises:
        ValueError: if it is neither a causal language model nor a classifier, or there is no such device.
        OSError: if there is no such model, or its weights cannot be read.
    """
    place = _device(device)
    config = load_config(name)
    architecture = (config.architectures or [""])[0]
    for auto in HEADS.values():
        if architecture in [known.__name__ for known in model_classes(auto, type(config))]:
            model = _load(auto, name).eval()
            # A quantised model is on the device that its quantiser chose, and may not be moved.
            return model if getattr(config, "quantization_config", None) else model.to(place)
    raise ValueError(
        f"{name} was saved as {architecture or 'an unnamed architecture'}; supported are causal language models and "
        "classifiers"
    )


def load_checkpoint(name: str) -> Any:
    """Load a saved model of any head as the class that its config names, in its own dtype, on the CPU.

    Args:
        name: folder of the model, or its name on the hub.

    Raises:
        ValueError: if the class is neither this package's nor transformers', or the checkpoint lacks weights.
        OSError: if there is no such model, or its weights cannot be read.
    """
    from .. import models

    architecture = (load_config(name).architectures or ["an unnamed class"])[0]
    cls: Any = getattr(models, architecture, None) or getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(f"{name} was saved as {architecture}, which neither this package nor transformers defines")
    model, info = _load(cls, name, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the checkpoint {name} lacks weights of its model: {', '.join(sorted(info['missing_keys']))}")
    return model.eval()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer saved with a model; None if there is none, where `AutoTokenizer` would make an empty one."""
    for file in TOKENIZER_FILES:
        try:
            cached_file(name, file)
        except OSError:
            continue
        return AutoTokenizer.from_pretrained(name)
    return None


def has_feature_extractor(name: str) -> bool:
    """Whether a feature extractor was saved with a model."""
    try:
        cached_file(name, FEATURE_EXTRACTOR_FILE)
    except OSError:
        return False
    return True


def copy_feature_extractor(name: str, folder: str | Path) -> None:
    """Write the feature extractor that was saved with a model to a folder, with its code, if it is this package's."""
    if has_feature_extractor(name):
        saved, _ = MimoSSMFeatureExtractor.get_feature_extractor_dict(name)
        if saved.get("feature_extractor_type") == MimoSSMFeatureExtractor.__name__:
            MimoSSMFeatureExtractor.from_pretrained(name).save_pretrained(folder)


def is_stock(model: Any) -> bool:
    """Whether a model's class is one of transformers itself."""
    return type(model).__module__.startswith("transformers.")


def _load(cls: Any, name: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(name, dtype="auto", **options)
    except SafetensorError as error:
        raise OSError(f"the weights of {name} cannot be read: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise OSError(f"the weights of {name} have other shapes than its config.json says") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
