"""The `hf-compressm` command: look at a model's Hankel singular values, and compress a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from .reduction import SizeConstraints, energy_orders, numerical_rank
from .surgery import Energy, Fraction, Policy, Target, compress, find_mixers, measure_model, state_sizes

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Model = Annotated[str, typer.Argument(help="Folder of a saved model, or its name on the hub.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error


@app.callback()
def quiet() -> None:
    """State-space models that shrink while they train."""
    logging.disable_progress_bar()


@app.command()
def inspect(
    model: Model,
    tau: Annotated[list[float], typer.Option(help="Tolerance to try; may be given several times.")] = [0.01, 0.05, 0.1],  # noqa: B006
) -> None:
    """Show how many states each layer has, needs in exact arithmetic, and would keep at some tolerances."""
    loaded = _load(model)
    spectra = [measurement.spectrum() for measurement in measure_model(loaded).values()]
    orders = {f"tau {value:g}": energy_orders(spectra, value) for value in tau}
    header = f"{'layer':28}{'states':>8}{'rank':>8}{'largest':>12}" + "".join(f"{name:>11}" for name in orders)
    typer.echo(header)
    for index, (site, spectrum) in enumerate(zip(find_mixers(loaded), spectra, strict=True)):
        row = f"{site.name:28}{len(spectrum):8d}{numerical_rank(spectrum):8d}{float(spectrum[0]):12.4g}"
        typer.echo(row + "".join(f"{kept[index]:11d}" for kept in orders.values()))


@app.command("compress")
def compress_command(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the compressed model.")],
    tau: Annotated[float | None, typer.Option(help="Share of the sum of singular values that may go.")] = None,
    target: Annotated[float | None, typer.Option(help="Mean number of states per layer to reach.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of every layer's states to keep.")] = None,
    multiple_of: Annotated[int, typer.Option(help="Round state sizes up to a multiple of this.")] = 1,
    uniform: Annotated[bool | None, typer.Option(help="Cut all layers to one common size.")] = None,
) -> None:
    """Cut the states of a trained model and save the result."""
    given = {"tau": tau, "target": target, "fraction": fraction}
    if sum(value is not None for value in given.values()) > 1:
        raise typer.BadParameter("give one of --tau, --target and --fraction, not several")
    policy: Policy = Energy(0.1 if tau is None else tau)
    if target is not None:
        policy = Target(target)
    elif fraction is not None:
        policy = Fraction(fraction)
    loaded = _load(model)
    before = state_sizes(loaded)
    compress(loaded, policy=policy, constraints=SizeConstraints(multiple_of=multiple_of, uniform=uniform))
    loaded.save_pretrained(output)
    typer.echo(f"states {before} -> {state_sizes(loaded)}; saved to {output}")


def _load(name: str) -> Any:
    """The model with the head that its config names, so that saving it loses nothing."""
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        known: Any = auto._model_mapping.get(type(config), None)
        if known is not None and known.__name__ == architecture:
            return auto.from_pretrained(name)
    raise ValueError(
        f"{name} was saved as {architecture or 'an unnamed architecture'}; supported are causal language models and "
        "sequence classifiers"
    )
