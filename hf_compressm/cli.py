"""The `hf-compressm` command: look at a model or a run, compress a trained model, and share it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from .hub import Exported, Form, export, push
from .hub.upload import TIMEOUT
from .progress import GROUP
from .reduction import SizeConstraints
from .report import tolerances_plot, write_card, write_report
from .runs.compression import CompressionJob, summary
from .runs.compression import run as run_job
from .runs.data_source import DataSource
from .runs.inspection import inspect_model
from .runs.user_code import import_user_module
from .surgery import Energy, Fraction, Policy, Target
from .surgery.refit import STEPS

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Model = Annotated[str, typer.Argument(help="Folder of a saved model, or its name on the hub.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="What selective layers are ranked on: a registered task, or a text file, parquet file or folder of them, "
        "read with the model's own tokenizer. MIMO SSM models need none."
    ),
]
TaskOptions = Annotated[str | None, typer.Option(help="Options of the task, as a JSON object.")]
DataDir = Annotated[str | None, typer.Option(help="Local folder with the task's data, instead of the hub.")]
Batches = Annotated[int, typer.Option(help="Batches to calibrate on.")]
BatchSize = Annotated[int, typer.Option(help="Sequences of a batch.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a sequence. Default: the task's own, or 512 for files.")]
Seed = Annotated[int, typer.Option(help="Of a task's data and the order in which they are drawn.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

Imports = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Module, or path of a .py file, that registers a model and an adapter of your own; may be given several "
        "times. Its code is run.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="Folder that a training run wrote.")]
FastOps = Annotated[
    bool, typer.Option("--fast-ops/--no-fast-ops", help="Run stock selective layers by this package's ops meanwhile.")
]
Device = Annotated[str, typer.Option(help="As torch names it; auto takes a GPU if there is one.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script, and of scripts that stand for one of its commands."""
    try:
        app(argv, prog_name=None if argv is None else "hf-compressm")
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error


@app.callback()
def quiet() -> None:
    """State-space models that shrink while they train."""
    logging.disable_progress_bar()
    if not HF_HUB_DISABLE_PROGRESS_BARS:  # the variable has priority, and huggingface_hub would warn
        enable_progress_bars(GROUP)


@app.command()
def inspect(
    model: Model,
    tau: Annotated[list[float], typer.Option(help="Tolerance to try; may be given several times.")] = [0.01, 0.05, 0.1],  # noqa: B006
    data: Data = None,
    task_options: TaskOptions = None,
    data_dir: DataDir = None,
    batches: Batches = 2,  # of as many the callback makes its decisions
    batch_size: BatchSize = DataSource.batch_size,
    length: Length = None,
    seed: Seed = 0,
    device: Device = "auto",
    fast_ops: FastOps = True,
    imports: Imports = [],  # noqa: B006
    plot: Annotated[Path | None, typer.Option(help="SVG file to write: the spectra, and what would be kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how many states each layer has, needs in exact arithmetic, and would keep at some tolerances.

    Nothing is changed. Selective layers (Mamba and kin) are ranked on --data.

    Example: hf-compressm inspect outputs/stdlib_mamba --data stdlib_bytes --plot spectra.svg

    Exit code 1: it cannot be done; standard error says why. Exit code 2: wrong usage.
    """
    _import_all(imports)
    source = _source(data, task_options, data_dir, batches, batch_size, length, seed)
    found = inspect_model(model, tau, source, device, fast_ops)
    if plot is not None:
        spectra = [layer.singular_values for layer in found.layers]
        plot.write_text(tolerances_plot(spectra, found.kept()), encoding="utf-8")
    typer.echo(json.dumps(found.as_record()) if as_json else found.table())


@app.command()
def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: report.html in the folder.")
    ] = None,
) -> None:
    """Write one HTML page about a training run: sizes, losses, cuts, speed and spectra.

    It works while the run goes on, from its newest checkpoint. The page needs no network and no script.

    Example: hf-compressm report outputs/digits_mimo_ssm -o report.html

    Exit code 1: it cannot be done; standard error says why. Exit code 2: wrong usage.
    """
    typer.echo(f"saved to {write_report(run, output)}")


@app.command()
def card(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for README.md and its plot. Default: the run's own.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's, as on the hub. Default: the folder's.")] = None,
    full_size: Annotated[
        Path | None, typer.Option(help="Folder of the same run with --no_compress, to compare with.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="What it was made from, as on the hub.")] = None,
) -> None:
    """Write the model card of a training run, README.md, from what the run recorded.

    Example: hf-compressm card outputs/digits_mimo_ssm --full-size outputs/full

    Exit code 1: it cannot be done; standard error says why. Exit code 2: wrong usage.
    """
    written = write_card(run, output, name=name, full_size=full_size, base_model=base_model)
    typer.echo(f"saved to {written}")


@app.command("compress")
def compress_command(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the compressed model.")],
    data: Data = None,
    tau: Annotated[float | None, typer.Option(help="Share of the sum of singular values that may go.")] = None,
    target: Annotated[
        float | None,
        typer.Option("--target-state-size", "--target", help="Mean number of states per layer to reach."),
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of every layer's states to keep.")] = None,
    min_state_size: Annotated[int, typer.Option(help="Fewest states that a layer may be left with.")] = 1,
    multiple_of: Annotated[int, typer.Option(help="Round state sizes up to a multiple of this.")] = 1,
    uniform: Annotated[
        bool | None, typer.Option(help="Cut all layers to one common size. Default: only where the class needs it.")
    ] = None,
    refit_steps: Annotated[
        int, typer.Option(help="Steps in which each reduced selective layer is refitted to the full one's outputs.")
    ] = STEPS,
    task_options: TaskOptions = None,
    data_dir: DataDir = None,
    batches: Batches = DataSource.batches,
    batch_size: BatchSize = DataSource.batch_size,
    length: Length = None,
    seed: Seed = 0,
    device: Device = "auto",
    fast_ops: FastOps = True,
    imports: Imports = [],  # noqa: B006
    to_stock: Annotated[bool, typer.Option("--to-stock", help="Write a plain transformers model.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Print the held-out loss before and after.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")] = False,
) -> None:
    """Cut the states of a trained model and save the result.

    How much: one of --tau, --target-state-size and --fraction. Selective models also need --data.

    Example: hf-compressm compress outputs/mamba --data stdlib_bytes --target-state-size 16 --output small --evaluate

    Exit code 1: it cannot be done; standard error says why. Exit code 2: wrong usage.
    """
    _import_all(imports)
    job = CompressionJob(
        model=model,
        output=output,
        policy=_policy(tau, target, fraction),
        constraints=SizeConstraints(minimum=min_state_size, multiple_of=multiple_of, uniform=uniform),
        data=_source(data, task_options, data_dir, batches, batch_size, length, seed),
        refit_steps=refit_steps,
        device=device,
        stock=to_stock,
        evaluate=evaluate,
        overwrite=overwrite,
        fast_ops=fast_ops,
    )
    typer.echo(f"{summary(run_job(job))}\nsaved to {output}")


@app.command("export")
def export_command(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to write; complete, or not there if something fails.")],
    to: Annotated[
        Form,
        typer.Option(
            help="stock: a plain transformers model, layers padded to one size, for Mamba and Mamba-2 language models. "
            "remote-code: this package's class with its own size per layer, and the code that loads it anywhere."
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a saved model as a folder that loads without this package.

    Both forms load with transformers' Auto classes; remote-code wants trust_remote_code=True where this package is not
    installed. Tokenizer, card and plots are taken along.

    Example: hf-compressm export outputs/small small-stock --to stock

    Exit code 1: it cannot be done; standard error says why. Exit code 2: wrong usage.
    """
    done = export(model, output, to, overwrite)
    _report(dataclasses.asdict(done) | {"output": str(output)}, f"{_described(done)}\nsaved to {output}", as_json)


@app.command("push")
def push_command(
    model: Model,
    repo_id: Annotated[str, typer.Argument(help="Repository: NAME in your own namespace, or NAMESPACE/NAME.")],
    to: Annotated[
        Form | None, typer.Option(help="As for export. Default: stock for stock models, remote-code for others.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a repository that only its owners see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, created if need be. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit. Default: Upload CLASS.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence after which the hub is given up.")] = TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Put a saved model on the Hugging Face hub, in one commit.

    Log in once with `hf auth login`, or set HF_TOKEN; the token is never printed or written. If the upload is
    interrupted, the repository holds what it held before; the same command again completes it.

    Example: hf-compressm push outputs/small my-name/small-mamba --private

    Exit code 1: it cannot be done; standard error says why. Exit code 2: wrong usage.
    """
    done = push(model, repo_id, to=to, private=private, revision=revision, message=message, timeout=timeout)
    _report(dataclasses.asdict(done), f"{_described(done)}\npushed to {done.url} as {done.commit[:8]}", as_json)


def _import_all(names: Sequence[str]) -> None:
    for name in names:
        try:
            import_user_module(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error


def _described(done: Exported) -> str:
    return f"{done.architecture}, {done.form.value}, states {' '.join(map(str, done.state_sizes))}"


def _report(content: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(content) if as_json else text)


def _policy(tau: float | None, target: float | None, fraction: float | None) -> Policy:
    given = {Energy: tau, Target: target, Fraction: fraction}
    chosen: list[Policy] = [policy(value) for policy, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise typer.BadParameter(
            f"give exactly one of --tau, --target-state-size and --fraction, not {'several' if chosen else 'none'}"
        )
    return chosen[0]


def _source(
    data: str | None,
    task_options: str | None,
    data_dir: str | None,
    batches: int,
    batch_size: int,
    length: int | None,
    seed: int,
) -> DataSource | None:
    if data is None:
        if task_options is not None or data_dir is not None:
            raise typer.BadParameter("--task-options and --data-dir belong to the task that --data names")
        return None
    options: Any = {}
    if task_options is not None:
        try:
            options = json.loads(task_options)
        except json.JSONDecodeError:
            options = None
        if not isinstance(options, dict):
            raise typer.BadParameter(
                f'--task-options takes a JSON object such as {{"length": 256}}; got {task_options}'
            )
    return DataSource(
        name=data,
        options=options,
        data_dir=data_dir,
        batches=batches,
        batch_size=batch_size,
        length=length,
        seed=seed,
    )
