"""Measure the mixers of a live model, on calibration batches where they need them, without disturbing its training."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.automatic import by_fast_ops
from ..progress import with_progress
from .adapters.base import MixerSite, ReductionError, Statistics, find_mixers
from .batches import model_inputs
from .parameters import outside_inference_mode
from .refit import Recording, output_of
from .wrappers import class_name

Batches = Iterable[Mapping[str, Any]]


@outside_inference_mode
def measure_model(
    model: nn.Module,
    calibration: Batches | None = None,
    fast_ops: bool = True,
) -> dict[str, Any]:
    """Measure every mixer: name -> measurement, with `.spectrum()` giving its Hankel singular values.

    Args:
        model: a model with supported mixers.
        calibration: batches for mixers that are measured on data; see `gather_statistics`.
        fast_ops: as in `compress`.

    Raises:
        ReductionError: naming the first layer that cannot be measured and why.
        ValueError, TypeError: calibration batches that are missing, empty, too short or of the wrong fields.
    """
    return measure_mixers(model, gather_statistics(model, calibration, fast_ops=fast_ops))


def measure_mixers(
    model: nn.Module,
    statistics: Mapping[str, Any],
    sites: Sequence[MixerSite] | None = None,
    look: Callable[[MixerSite], MixerSite] | None = None,
) -> dict[str, Any]:
    """Measure every mixer, from statistics by mixer name where it needs them; or what adapters in `sites` measure.

    With `look` each is measured on the site that this gives for its own, such as one whose parameters are gathered.

    Raises:
        ReductionError: naming the first layer that cannot be measured and why.
    """
    measurements = {}
    for site in with_progress(find_mixers(model) if sites is None else sites, "measuring", "layer"):
        try:
            mixer = (site if look is None else look(site)).mixer
            measurements[site.name] = site.adapter.measure(mixer, statistics.get(site.name))
        except ReductionError as error:
            raise ReductionError(f"{site.name}: {error}") from error
    return measurements


def needs_calibration(model: nn.Module) -> bool:
    """Whether any mixer of the model can only be measured with calibration batches."""
    return any(site.adapter.statistics(site.mixer) is not None for site in find_mixers(model))


def gather_statistics(
    model: nn.Module,
    batches: Batches | None,
    recordings: dict[str, Recording] | None = None,
    make: Callable[[MixerSite], Any] = lambda site: site.adapter.statistics(site.mixer),
    run: Callable[[nn.Module, Batches], int] | None = None,
    complete: bool = True,
    fast_ops: bool = True,
    sites: Sequence[MixerSite] | None = None,
) -> dict[str, Any]:
    """Pass calibration batches through a model once and let every mixer that asks for it gather statistics.

    The model is in evaluation mode meanwhile (no dropout, no update of running averages) and no gradients are formed;
    modes, gradients and the random state of Python, NumPy and torch are afterwards as they were. Memory does not grow
    with the number of batches.

    Args:
        model: a model with supported mixers, on its device.
        batches: mappings with what the model's forward takes, for example from a DataLoader; a single mapping counts as
            one batch. Labels are not used, nor fields that the forward does not name; see `model_inputs`, which keeps
            packed sequences apart. May be None if no mixer needs statistics.
        recordings: filled, by mixer name, with inputs and outputs to refit on, if given.
        make: makes the empty statistics of a mixer, or None where none are needed; by default its adapter does.
        run: runs the model on the batches and returns the number of passes; None for `run_all`.
        complete: whether there must be as many tokens as states.
        fast_ops: let stock mixers run by this package's ops meanwhile, where that is exact; see `use_fast_ops`.
        sites: the mixers with the adapters that ask; by default those of `find_mixers`.

    Returns:
        Statistics by mixer name, for the mixers that need them.

    Raises:
        ValueError: no batches where they are needed; fewer tokens than a layer has states; a batch that lacks what the
            model's forward needs.
        TypeError: a batch that is not a mapping.
        ReductionError: statistics that are not finite.
    """
    sites = find_mixers(model) if sites is None else sites
    gathered = {site.name: found for site in sites if (found := make(site)) is not None}
    if not gathered:
        return {}
    if batches is None:
        raise ValueError(
            f"{class_name(model)} has layers whose states can only be ranked on data: pass calibration batches, "
            "mappings of what its forward takes, such as [{'input_ids': ...}] or a DataLoader"
        )
    batches = with_progress([batches] if isinstance(batches, Mapping) else batches, "calibrating", "batch")
    with undisturbed(model), by_fast_ops(model, fast_ops), _observing(sites, gathered), _recording(sites, recordings):
        count = (run or run_all)(model, batches)
    if complete:
        _check(sites, gathered, count)
    return gathered


def run_all(model: nn.Module, batches: Batches, otherwise: Callable[[Any], Any] | None = None) -> int:
    """Run a model on batches, as `passes_of` says, and return the number of passes."""
    return call_all(passes_of(model, batches, otherwise))


def call_all(passes: Iterable[Callable[[], Any]]) -> int:
    """Call each of the passes, and return their number."""
    count = 0
    for one in passes:
        one()
        count += 1
    return count


def passes_of(
    model: nn.Module, batches: Batches, otherwise: Callable[[Any], Any] | None = None
) -> Iterator[Callable[[], Any]]:
    """Forward passes of a model over batches, each a function to call.

    Args:
        model: the model.
        batches: mappings; see `model_inputs`.
        otherwise: runs the model on a batch that is not what its forward takes, if given.

    Raises:
        ValueError, TypeError: a batch that the forward does not take, without `otherwise`, or if that fails too.
    """
    for batch in batches:
        try:
            inputs = list(model_inputs(model, batch))
        except (TypeError, ValueError) as problem:
            if otherwise is None:
                raise
            yield partial(_attempt, otherwise, batch, problem)
            continue
        for each in inputs:
            yield partial(model, **each)


def _attempt(otherwise: Callable[[Any], Any], batch: Any, problem: Exception) -> None:
    try:
        otherwise(batch)
    except Exception as error:
        raise problem from error


def _check(sites: Sequence[MixerSite], gathered: Mapping[str, Statistics], count: int) -> None:
    if count == 0:
        raise ValueError("the calibration data is empty: it yielded no batch")
    for site in sites:
        if site.name in gathered and gathered[site.name].tokens < site.state_size:
            raise ValueError(
                f"the calibration data is too short: {gathered[site.name].tokens} real tokens cannot rank the "
                f"{site.state_size} states of {site.name}. Pass more or longer batches."
            )


@contextmanager
def _observing(sites: Sequence[MixerSite], gathered: Mapping[str, Statistics]) -> Iterator[None]:
    def hook(site: MixerSite):
        def observe(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                gathered[site.name].observe(mixer, *_inputs_of(mixer, args, kwargs))
            except ReductionError as error:
                raise ReductionError(f"{site.name}: {error}") from error

        return observe

    handles = [
        site.mixer.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites if site.name in gathered
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recording(sites: Sequence[MixerSite], recordings: dict[str, Recording] | None) -> Iterator[None]:
    def hook(site: MixerSite, recording: Recording):
        def record(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden_states, mask = _inputs_of(mixer, args, kwargs)
            recording.add(hidden_states, output_of(output), mask)

        return record

    handles = []
    if recordings is not None:
        for site in sites:
            if site.adapter.refitted(site.mixer):
                recordings[site.name] = Recording()
                handles.append(site.mixer.register_forward_hook(hook(site, recordings[site.name]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs_of(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Hidden states, which mixers take first, and attention mask that a mixer is called with."""
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if hidden_states is not None and len(args) < 2:
        return hidden_states, kwargs.get("attention_mask")
    given = inspect.signature(mixer.forward).bind(*args, **kwargs).arguments
    return next(iter(given.values())), given.get("attention_mask")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and by no compiled code, which would pass over the hooks that measure.

    Afterwards modes and the random state of Python, NumPy and torch are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])
