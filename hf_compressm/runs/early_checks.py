"""Check what a run was given before its data and its model are loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from ..data import check_task, task_names
from ..data.sources import reading
from ..data.text_files import text_files
from ..files import check_name
from ..models.saved import load_config
from ..surgery import Policy
from ..surgery.adapters.base import sizes_in_config
from ..surgery.policies import check_target
from .arguments import DataSource, did_you_mean

ADAPTER_CONFIG = "adapter_config.json"


def check_source(source: DataSource | None) -> None:
    """Check that there is a task or text of that name, that a task takes the options, and that a text is not empty.

    Raises:
        ValueError: if it is neither a task nor a file or folder, or the options do not suit it.
        OSError: if a folder that is given does not exist, or the text is empty.
    """
    if source is None:
        return
    if source.name in task_names():
        options = dict(source.options) if source.length is None else {"length": source.length, **source.options}
        return check_task_options(source.name, source.data_dir, options)
    path = Path(source.name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{source.name!r} is neither a file or folder nor a task{did_you_mean(source.name, task_names()) or ';'} "
            f"the tasks are {', '.join(task_names())}"
        )
    if source.options or source.data_dir is not None:
        raise ValueError(f"task options and a data_dir are for tasks; {source.name!r} is a file or folder")
    if not any(file.stat().st_size for file in text_files(path)):
        raise ValueError(f"{source.name} holds no text")


def check_task_options(name: str, data_dir: str | None, options: Mapping[str, Any]) -> None:
    """Check a task's name and options, and that the folders that they name exist.

    Raises:
        ValueError: as `check_task`.
        FileNotFoundError: if there is no folder `data_dir`, or none of the tokenizer or feature extractor.
    """
    check_task(name, data_dir, options)
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise FileNotFoundError(f"data_dir is not a folder: {Path(data_dir).expanduser()}")
    for option in ("tokenizer", "feature_extractor"):
        if isinstance(options.get(option), str):
            check_name(options[option], option.replace("_", " "))


def check_new_model(kind: str, fields: Mapping[str, Any]) -> Any:
    """Check the architecture and the config's fields of a model that is to be built.

    Args:
        kind: architecture, as known to AutoConfig.
        fields: field of the config -> value.

    Returns:
        The config with these values, as far as the data do not decide it.

    Raises:
        ValueError: if there is no such architecture, or its config has no such field or refuses the value.
    """
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {kind!r}{did_you_mean(kind, CONFIG_MAPPING)}")
    config = AutoConfig.for_model(kind)
    if unknown := [key for key in fields if not hasattr(config, key)]:
        known = sorted(key for key in config.to_dict() if not key.startswith("_"))
        raise ValueError(
            f"{type(config).__name__} has no field {', '.join(map(repr, unknown))}"
            f"{did_you_mean(unknown[0], known) or ';'} it has {', '.join(known)}"
        )
    return make_config(kind, fields)


def make_config(kind: str, fields: Mapping[str, Any], **decided: Any) -> Any:
    """Make a config and let it check its values.

    Args:
        kind: architecture, as known to AutoConfig.
        fields: field of the config -> value, as the user gives them.
        decided: further fields, which the data decide.

    Raises:
        ValueError: if a value is refused.
    """
    try:
        config = AutoConfig.for_model(kind, **decided, **fields)
        config.validate()  # now, not at the first save
    except Exception as error:  # each architecture has ways of its own to fail on values that it does not check
        raise ValueError(f"no {kind} can be built with model = {dict(fields)}: {error}") from error
    return config


def check_saved_model(name: str, policy: Policy | None = None, minimum: int = 1) -> None:
    """Check that a saved model, or a PEFT adapter, exists, and that a cut can reach the target.

    Args:
        name: folder or name on the hub.
        policy: how much is to be cut.
        minimum: smallest number of states that a layer may keep.

    Raises:
        OSError: if there is no such model, or no weights of the adapter.
        ValueError: if the target is not below the present size, or an adapter's config cannot be read.
    """
    check_name(name, "model")
    adapter = read_adapter(name)
    if adapter is not None and Path(name).is_dir() and not any(Path(name).glob("adapter_model.*")):
        raise FileNotFoundError(f"{name} holds no weights of its adapter, such as adapter_model.safetensors")
    config = load_config(name if adapter is None else adapter["base_model_name_or_path"])
    check_policy(config, policy, minimum)


def read_adapter(name: str) -> dict[str, Any] | None:
    """Read the config of a saved PEFT adapter; None if the folder or name is not that of an adapter.

    Raises:
        ValueError: if it cannot be read, or names no base.
    """
    try:
        text = Path(str(cached_file(name, ADAPTER_CONFIG))).read_text()
    except OSError:
        return None
    with reading(f"{ADAPTER_CONFIG} of {name} cannot be read"):
        content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("base_model_name_or_path"), str):
        raise ValueError(f"{ADAPTER_CONFIG} of {name} names no base model (base_model_name_or_path)")
    return content


def check_policy(config: Any, policy: Policy | None, minimum: int = 1) -> None:
    """Check a target against the state sizes that a config names. A config that names none is checked with the model.

    Raises:
        ValueError: as `check_target`.
    """
    if sizes := sizes_in_config(config.get_text_config()):
        check_target(policy, sizes, minimum)


def check_lora(settings: Mapping[str, Any]) -> None:
    """Check fields of peft.LoraConfig: their names, and that numbers are numbers.

    Raises:
        ImportError: without peft.
        ValueError: on a name that it does not have, or another value where it has a number.
    """
    known = {field.name: field.default for field in dataclasses.fields(import_peft().LoraConfig)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"peft.LoraConfig has no field {name!r}{did_you_mean(name, known)}")
        if type(known[name]) in (int, float) and type(value) not in (int, float):
            raise ValueError(f"{name} of peft.LoraConfig must be a number; got {value!r}")


def import_peft() -> Any:
    """Import peft, which is an extra.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'hf-compressm[peft]'") from error
    return peft
