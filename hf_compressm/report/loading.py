"""Tell how a model is loaded: a section of its card, which follows the model where it is exported or pushed to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..models.heads import CLASS_ENDINGS, HEADS
from .page import templates
from .record import config_sizes

OWN_TYPES = ("mimo_ssm", "compressm_gated_deltanet", "compressm_mamba", "compressm_mamba2", "compressm_minimax")
STOCK_FORM = ("compressm_mamba",)
"""Those of them that can always be converted to a model of transformers itself."""
TITLE = "## How to load it"
_HEADER = re.compile(r"\A---\r?\n(.*?)\n---\r?\n", re.DOTALL)


def loading(
    config: Mapping[str, Any], name: str, sizes: Sequence[int], problem: str | None = None, adapter: bool = False
) -> dict[str, Any]:
    """Return what the template of the section is told.

    Args:
        config: the model's, as in its file.
        name: folder or name on the hub to load from.
        sizes: states of each layer after the last cut; empty if unknown.
        problem: the task's kind of head; None if unknown.
        adapter: whether it is an adapter of PEFT, with its base beside it.
    """
    kind, problem = config.get("model_type"), problem_of(config, problem)
    head = "AutoModel" if problem is None else HEADS[problem].__name__
    return {
        "name": name,
        "head": head,
        "own": kind in OWN_TYPES,
        "stock": kind in STOCK_FORM and problem == "causal_lm",
        "padded": _padded(config, sizes),
        "adapter": adapter,
    }


def readdressed(text: str, config: Mapping[str, Any], name: str | None, before: str, sizes: Sequence[int]) -> str:
    """Return a card for the form and the place that its model was written to.

    The section about loading, the tag of the class, and the class that the first lines name follow the config; all
    else stays as it is.

    Args:
        text: the card, perhaps by another hand: what is not there is not added.
        config: of the model as it was written.
        name: the model's name there; None to leave that of the card.
        before: `model_type` that it was written from.
        sizes: states of each layer before they were padded.
    """
    kind = str(config.get("model_type"))
    if header := _HEADER.match(text):
        text = _retagged(header.group(1), before, kind) + text[header.end() :]
    if kind != before:
        text = text.replace(f"model (`{before}`)", f"model (`{kind}`)", 1)
    start = text.find(f"\n{TITLE}\n") + 1
    if not start:
        return text
    named = re.search(r'from_pretrained\("([^"]+)"', text[start:])
    end = text.find("\n## ", start)
    told = loading(config, name or (named.group(1) if named else "model"), sizes)
    section = templates().get_template("loading.md.jinja").render(**told)
    section = re.sub(r"\n{3,}", "\n\n", section).rstrip() + "\n"
    return text[:start] + section + ("" if end < 0 else text[end:])


def problem_of(config: Mapping[str, Any], problem: str | None = None) -> str | None:
    """Return which kind of head a model has; None if neither the task's kind nor the config says."""
    if problem in HEADS:
        return problem
    names = tuple(str(name) for name in config.get("architectures") or [])
    return next((kind for kind, ending in CLASS_ENDINGS.items() if any(n.endswith(ending) for n in names)), None)


def _padded(config: Mapping[str, Any], sizes: Sequence[int]) -> int | None:
    """States of every layer in a stock model whose layers were padded to them; None if none was."""
    written = config_sizes(config)
    stock = config.get("model_type") not in OWN_TYPES
    return written[0] if stock and len(written) == len(sizes) and written != list(sizes) else None


def _retagged(header: str, before: str, kind: str) -> str:
    """The metadata with the tag of another class; as they were if there is none to change."""
    whole = f"---\n{header}\n---\n"
    try:
        data = yaml.safe_load(header)
        tags = data["tags"]
    except (yaml.YAMLError, KeyError, TypeError):
        return whole
    if not isinstance(tags, list) or before not in tags or kind == before:
        return whole
    data["tags"] = [kind if tag == before else tag for tag in tags]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"
