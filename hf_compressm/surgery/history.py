"""The compression history: a record of every cut, kept in the configs that hold the sizes, so that checkpoints have it.

Singular values are many: a config that is saved with a model keeps a record without them, `short`, and the module that
it belongs to has them in memory. Files of their own keep full records: `compression.json` and the Trainer's state.

A model may have several owners of mixers. Each keeps the part of a record about its own mixers, by their names within
its module, so that this module can be saved and loaded alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .adapters.base import MixerSite, find_mixers
from .owners import Owner, find_owners
from .record_keys import HISTORY

Record = dict[str, Any]
LONG = "singular_values"
"""What a layer's entry has in a full record alone."""
DETAILS = "_compression_details"
"""Attribute of an owner's module: full records, as far as this process has seen them."""
POSITION = "position"
"""Key of a record's place in the history of the whole model, where an owner's own history has it elsewhere."""


def history(model: nn.Module) -> list[Record]:
    """The model's compression history: records of cuts and undone cuts, oldest first. A copy.

    Layers of a loaded model's earlier cuts lack `singular_values`, which its config does not keep; see `with_details`.
    """
    sites = find_mixers(model)
    owners, order = find_owners(model, sites), {site.name: index for index, site in enumerate(sites)}
    outer = _outer(model, owners)
    records = [] if outer is None else [_renamed(record, sites) for record in getattr(outer, HISTORY)]
    records += merged([[_renamed(record, owner.sites, owner) for record in _kept(owner)] for owner in owners])
    for record in records:
        record["layers"].sort(key=lambda layer: order.get(layer["name"], len(order)))
    return records


def set_history(model: nn.Module, records: Iterable[Record]) -> None:
    """Write the compression history to the configs of the mixers, or to the mixers themselves if they have none."""
    sites = find_mixers(model)
    owners, named = find_owners(model, sites), [_renamed(record, sites) for record in records]
    if (outer := _outer(model, owners)) is not None:
        vars(outer).pop(HISTORY)
    for owner in owners:
        own: list[Record] = []
        for position, record in enumerate(named):
            own += _part(record, owner, position, len(own))
        _keep(owner, own)


def append_history(model: nn.Module, record: Record) -> None:
    """Add a record to the history."""
    owners = find_owners(model)
    if _outer(model, owners) is not None:
        set_history(model, [*history(model), record])
        return
    kept = [_kept(owner) for owner in owners]
    last = max((own[-1].get(POSITION, len(own) - 1) for own in kept if own), default=-1)
    for owner, own in zip(owners, kept, strict=True):
        _keep(owner, own + _part(record, owner, last + 1, len(own)))


def short(record: Record) -> Record:
    """The record as configs keep it: without singular values."""
    layers = [{key: value for key, value in layer.items() if key != LONG} for layer in record["layers"]]
    return {**record, "layers": layers}


def with_details(records: Iterable[Record], full: Iterable[Record]) -> list[Record]:
    """The records, each replaced by the full one that it is short for, if that is there."""
    known = [record for record in full if any(LONG in layer for layer in record["layers"])]
    return [next((found for found in known if short(found) == record), record) for record in records]


def original_sizes(model: nn.Module) -> list[int]:
    """State sizes before the first cut on record, in model order."""
    first: dict[str, int] = {}
    for record in history(model):
        for layer in record["layers"] if record["event"] == "cut" else ():
            first.setdefault(layer["name"], layer["old_size"])
    return [first.get(site.name, site.state_size) for site in find_mixers(model)]


def last_sizes(model: nn.Module, records: Iterable[Record]) -> dict[str, int]:
    """State sizes of mixers, by name, after the last change in these records; none for those never changed."""
    sites = find_mixers(model)
    last: dict[str, int] = {}
    for record in records:
        if record["event"] in ("cut", "undo"):
            last |= {layer["name"]: layer["new_size"] for layer in _renamed(record, sites)["layers"]}
    return {site.name: last[site.name] for site in sites if site.name in last}


def merged(parts: Sequence[Sequence[Record]]) -> list[Record]:
    """One history from the parts of several owners: records of one cut are joined, in the order of their positions."""
    found: dict[tuple[int, str], Record] = {}
    for part in parts:
        for index, record in enumerate(part):
            about = {key: value for key, value in record.items() if key not in ("layers", POSITION)}
            place = (record.get(POSITION, index), json.dumps(about, sort_keys=True, default=str))
            joined = found.setdefault(place, {**about, "layers": []})
            joined["layers"] = [*joined["layers"], *record["layers"]]
    return [found[place] for place in sorted(found, key=lambda place: place[0])]


def _outer(model: nn.Module, owners: Sequence[Owner]) -> Any:
    """The model's own config, if it has a history although the mixers belong to others: earlier versions kept it so."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or not vars(config).get(HISTORY):
        return None
    return None if any(config is keeper for owner in owners for keeper in owner.keepers) else config


def _kept(owner: Owner) -> list[Record]:
    found = [getattr(keeper, HISTORY, None) for keeper in owner.keepers]
    records: list[Record] = next((records for records in found if records), [])
    return copy.deepcopy(with_details(records, getattr(owner.module, DETAILS, [])))


def _keep(owner: Owner, records: Sequence[Record]) -> None:
    if owner.keepers[0] is owner.module:
        kept = list(records)
    else:
        kept = [short(record) for record in records]
        setattr(owner.module, DETAILS, copy.deepcopy(list(records)))
    for keeper in owner.keepers:
        if records or getattr(keeper, HISTORY, None):
            setattr(keeper, HISTORY, copy.deepcopy(kept))


def _part(record: Record, owner: Owner, position: int, index: int) -> list[Record]:
    """What a record of the whole model says of an owner's mixers, by their names within it; empty if nothing."""
    own = {site.name: owner.name(site) for site in owner.sites}
    layers = [layer | {"name": own[layer["name"]]} for layer in record["layers"] if layer["name"] in own]
    placed = {} if position == index else {POSITION: position}
    return [{**record, **placed, "layers": layers}] if layers else []


def _renamed(record: Record, sites: Sequence[MixerSite], owner: Owner | None = None) -> Record:
    """A copy of a record with the names that mixers have in this model, whatever it was wrapped in at the time."""
    known = {site.name if owner is None else owner.name(site): site.name for site in sites}
    names = _located([layer["name"] for layer in record["layers"]], list(known))
    layers = [
        copy.deepcopy(layer) | {"name": known[names[layer["name"]]] if layer["name"] in names else layer["name"]}
        for layer in record["layers"]
    ]
    return {**copy.deepcopy({key: value for key, value in record.items() if key != "layers"}), "layers": layers}


def _located(names: Sequence[str], known: Sequence[str]) -> Mapping[str, str]:
    """Match names to known ones: an equal one, one that it ends with, or one that ends with it."""
    found = {}
    for name in names:
        near = [own for own in known if own == name]
        near = near or [own for own in known if own and (f".{name}".endswith(f".{own}") or own.endswith(f".{name}"))]
        if len(near) == 1:
            found[name] = near[0]
    return found if found or len(names) != len(known) else dict(zip(names, known, strict=True))
