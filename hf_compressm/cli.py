"""The `hf-compressm` command: inspect a model or a run, compress a trained model, and share it.

What the commands run is imported when they run, so that `--help` loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import inspect as introspection
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .runs.arguments import EXIT_CODES, TRACEBACK_HELP, did_you_mean, errors_as_lines
from .runs.command_options import RUNTIMES, DataOptions, InspectionData, ModelOptions, SizeOptions, take_groups

if TYPE_CHECKING:
    from .deploy import GgufExport, OnnxExport
    from .hub import ExportResult, Form

STOCK, ONNX, GGUF = "stock", "onnx", "gguf"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

ClickException: Any = typer.BadParameter.__mro__[2]
"""The base of all errors about wrong usage; typer has click within itself from 0.20 on, and does not export it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script, or a script that stands for one of its commands.

    Args:
        argv: arguments without the program's name. Default: those of this process.

    Raises:
        SystemExit: at the end: 0 if all is well, 2 after an error of the user, of which standard error has one line.
    """
    with errors_as_lines(sys.argv[1:] if argv is None else argv) as words:
        try:
            code = app(words or ["--help"], prog_name="hf-compressm", standalone_mode=False)
        except ClickException as error:
            raise ValueError(_usage_message(error)) from error
        except typer.Abort:
            code = 1
    raise SystemExit(code or 0)


def _usage_message(error: Any) -> str:
    near = getattr(error, "possibilities", None)
    if near is None:
        return error.format_message()
    return f"unknown option {error.option_name}{did_you_mean(error.option_name, near)}"


def _set_progress_bars() -> None:
    """Show this package's progress bars alone."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    from .progress import GROUP

    logging.disable_progress_bar()
    if not HF_HUB_DISABLE_PROGRESS_BARS:  # the variable has priority, and huggingface_hub would warn
        enable_progress_bars(GROUP)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; see `take_groups`."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        taking = take_groups(function, _set_progress_bars)
        taking.__doc__ = f"{introspection.getdoc(function)}\n\n{EXIT_CODES} {TRACEBACK_HELP}"
        app.command(name)(taking)
        return function

    return register


@app.callback()
def describe() -> None:
    """State-space models that shrink while they train."""


Model = Annotated[str, typer.Argument(help="Folder of a saved model, or its name on the hub.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder that a training run wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")]


@command("inspect")
def inspect(
    model: Model,
    *,
    tau: Annotated[list[float], typer.Option(help="Tolerance to try; may be given several times.")] = [0.01, 0.05, 0.1],  # noqa: B006
    data: InspectionData,
    options: ModelOptions,
    plot: Annotated[
        Path | None, typer.Option(help="SVG file to write, with the singular values and what would be kept.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how many states each layer has, how many exact arithmetic needs, and how many some tolerances would keep.

    Nothing is changed. Selective layers (Mamba and kin) are ranked on --data.

    Example: hf-compressm inspect outputs/stdlib_mamba --data stdlib_bytes --plot spectra.svg
    """
    from .files import check_file
    from .report import tolerances_plot
    from .runs.inspection import inspect_model

    options.import_modules()
    if plot is not None:
        check_file(plot)
    found = inspect_model(model, tau, data.source(), options.device, options.fast_ops)
    if plot is not None:
        spectra = [layer.singular_values for layer in found.layers]
        plot.write_text(tolerances_plot(spectra, found.kept()), encoding="utf-8")
    _print(found.as_record(), found.table(), as_json)


@command("report")
def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: report.html in the folder.")
    ] = None,
) -> None:
    """Write one HTML page about a training run: sizes, losses, cuts, speed and singular values.

    The run need not be finished: then its newest checkpoint is read. The page needs no network and no script.

    Example: hf-compressm report outputs/digits_mimo_ssm -o report.html
    """
    from .report import write_report

    typer.echo(f"saved to {write_report(run, output)}")


@command("card")
def card(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for README.md and its plot. Default: the run's own.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model on the hub. Default: the folder's name.")] = None,
    full_size: Annotated[
        Path | None, typer.Option(help="Folder of the same run with --no_compress, to compare with.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Name on the hub of the model that it was made from.")] = None,
) -> None:
    """Write the model card of a training run, README.md, from what the run recorded.

    Example: hf-compressm card outputs/digits_mimo_ssm --full-size outputs/full
    """
    from .report import write_card

    written = write_card(run, output, name=name, full_size=full_size, base_model=base_model)
    typer.echo(f"saved to {written}")


@command("compress")
def compress(
    model: Model,
    *,
    output: Annotated[Path, typer.Option(help="Folder for the compressed model.")],
    data: DataOptions,
    sizes: SizeOptions,
    options: ModelOptions,
    refit_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps in which each reduced selective layer is refitted to the full one's outputs. Default: 60."
        ),
    ] = None,
    to_stock: Annotated[bool, typer.Option("--to-stock", help="Write a plain transformers model.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Print the held-out loss before and after.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut the states of a trained model and save the result.

    How much: one of --tau, --target-state-size and --fraction, or --value-size. Selective models also need --data.

    Example: hf-compressm compress outputs/mamba --data stdlib_bytes --target-state-size 16 --output small --evaluate
    """
    from .runs.compression import CompressionJob, compress_saved_model, summary

    options.import_modules()
    job = CompressionJob(
        model=model,
        output=output,
        policy=sizes.policy(),
        constraints=sizes.constraints(),
        data=data.source(),
        device=options.device,
        stock=to_stock,
        evaluate=evaluate,
        overwrite=overwrite,
        fast_ops=options.fast_ops,
        value_size=sizes.value_size,
        **_given(refit_steps=refit_steps),
    )
    typer.echo(f"{summary(compress_saved_model(job))}\nsaved to {output}")


@command("export")
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to write; if something fails, it is not made.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="[stock|remote-code|onnx|gguf]",
            help="stock: a plain transformers model, layers padded to one size, for Mamba and Mamba-2 language models. "
            "remote-code: this package's class with its own size per layer, and the code that loads it anywhere. "
            "onnx: prefill.onnx and step.onnx with the states as inputs and outputs, or a classifier's model.onnx. "
            "gguf: model.gguf for llama.cpp, of Mamba and Mamba-2 language models.",
        ),
    ],
    runtime: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar=RUNTIMES,
            help="Runtime that is to run the result of --to stock or gguf: layers are padded with states of zeros, "
            "exactly, to the next number that it takes.",
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators, with --to onnx. Default: 20.")] = None,
    all_logits: Annotated[
        bool, typer.Option("--all-logits", help="Let prefill.onnx give logits of all tokens, not of the last alone.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a saved model as a folder that loads without this package.

    stock and remote-code load with transformers' Auto classes; remote-code wants trust_remote_code=True where this
    package is not installed. Tokenizer, card and plots are taken along. onnx runs in onnxruntime, gguf in llama.cpp.

    Example: hf-compressm export outputs/small small-stock --to stock
    """
    _check_only_for(to, [ONNX], opset is not None or all_logits, "--opset and --all-logits are")
    _check_only_for(to, [STOCK, GGUF], runtime is not None, "--for is")
    if to == ONNX:
        from .deploy import save_onnx

        done: Any = save_onnx(model, output, all_logits=all_logits, overwrite=overwrite, **_given(opset=opset))
        text = _describe(done, f"onnx, opset {done.opset}")
    elif to == GGUF:
        from .deploy import save_gguf

        done = save_gguf(model, output, overwrite=overwrite, runtime=runtime)
        text = _describe(done, f"gguf, {done.vocabulary}")
    else:
        from .hub import export

        done = export(model, output, _form(to, ONNX, GGUF), overwrite, runtime)
        text = _describe(done, done.form.value)
    record = dataclasses.asdict(done)
    _print(record | {"output": str(output)}, f"{text}\nsaved to {output}", as_json)


@command("push")
def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(help="Repository: NAME in your own namespace, or NAMESPACE/NAME.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="[stock|remote-code]", help="As for export. Default: stock for stock models, else remote-code."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a repository that only its owners see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if there is none. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit. Default: Upload CLASS.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds without a sign of the hub after which to stop. Default: 120.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a saved model on the Hugging Face hub, in one commit.

    Log in once with `hf auth login`, or set HF_TOKEN; the token is never printed or written. If the upload is
    interrupted, the repository holds what it held before; the same command again completes it.

    Example: hf-compressm push outputs/small my-name/small-mamba --private
    """
    from .hub import push

    form = None if to is None else _form(to)
    settings = _given(to=form, revision=revision, message=message, timeout=timeout)
    done = push(model, repo_id, private=private, **settings)
    _print(
        dataclasses.asdict(done),
        f"{_describe(done, done.form.value)}\npushed to {done.url} as {done.commit[:8]}",
        as_json,
    )


def _check_only_for(to: str, forms: Sequence[str], given: bool, what: str) -> None:
    if given and to not in forms:
        raise ValueError(f"{what} for --to {' or '.join(forms)}, not for --to {to}")


def _form(name: str, *others: str) -> Form:
    """The form of that name; `others` are names that the command knows besides."""
    from .hub import Form

    known = [form.value for form in Form]
    if name not in known:
        raise ValueError(f"--to takes {' or '.join(map(repr, [*known, *others]))}; got {name!r}")
    return Form(name)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: for the others the library has defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _describe(done: ExportResult | OnnxExport | GgufExport, form: str) -> str:
    return f"{done.architecture}, {form}, states {' '.join(map(str, done.state_sizes))}"


def _print(content: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(content) if as_json else text)
