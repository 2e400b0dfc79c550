"""Groups of options that the commands of `hf-compressm` share.

This module loads neither torch nor transformers; see `arguments`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .arguments import DataSource, as_mapping

if TYPE_CHECKING:
    from ..reduction import SizeConstraints
    from ..surgery import Policy

RUNTIMES = "[llama.cpp|vllm|sglang|mamba_ssm]"
"""Those of `models.runtimes`, which help does not wait for."""


def take_groups(function: Callable[..., None], begin: Callable[[], None]) -> Callable[..., None]:
    """Make a function for typer whose options are those of `function`, and of its groups the fields.

    Args:
        function: a command. An argument whose type is a dataclass is a group of options, one for each field.
        begin: called before the command.
    """
    hints, parameters = get_type_hints(function, include_extras=True), []
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _fields_as_parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for group, made in groups.items():
            given[group] = made(**{field.name: given.pop(field.name) for field in dataclasses.fields(made)})
        begin()
        function(**given)

    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def _fields_as_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    defaults = {
        field.name: [] if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(group)
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[name], default=default)
        for name, default in defaults.items()
    ]


@dataclass(frozen=True)
class DataOptions:
    """Options about the data that selective layers are ranked on."""

    data: Annotated[
        str | None,
        typer.Option(
            help="Data to rank the states of selective layers on: a registered task, or a text file, parquet file or "
            "folder of them, read with the model's own tokenizer. MIMO SSM models need none."
        ),
    ] = None
    task_options: Annotated[str | None, typer.Option(help="Options of the task, as a JSON object.")] = None
    data_dir: Annotated[str | None, typer.Option(help="Local folder with the task's data, instead of the hub.")] = None
    batches: Annotated[int, typer.Option(help="Number of batches to rank the states on.")] = DataSource.batches
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = DataSource.batch_size
    length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence. Default: what the task says, or 512 for files.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the task's data and of their order.")] = DataSource.seed

    def source(self) -> DataSource | None:
        """Return where the data come from; None if there are none.

        Raises:
            ValueError: if task options are not a JSON object, or are given without data.
        """
        if self.data is None:
            if self.task_options is not None or self.data_dir is not None:
                raise ValueError("--task-options and --data-dir belong to the task that --data names")
            return None
        settings = dataclasses.asdict(self)
        options = as_mapping("--task-options", settings.pop("task_options"))
        return DataSource(name=settings.pop("data"), options=options, **settings)


@dataclass(frozen=True)
class InspectionData(DataOptions):
    """Options about the data to inspect a model on: as many batches as the callback takes."""

    batches: Annotated[int, typer.Option(help="Number of batches to rank the states on.")] = 2


@dataclass(frozen=True)
class ModelOptions:
    """Options about how a model is loaded and run."""

    device: Annotated[
        str, typer.Option(help="Device to run on, as torch names it; auto takes a GPU if there is one.")
    ] = "auto"
    fast_ops: Annotated[
        bool,
        typer.Option("--fast-ops/--no-fast-ops", help="Run stock selective layers by this package's ops meanwhile."),
    ] = True
    imports: Annotated[
        list[str],
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Module, or path of a .py file, that registers a model and an adapter of your own; may be given "
            "several times. Its code is run.",
        ),
    ] = field(default_factory=list)

    def import_modules(self) -> None:
        """Import the user's modules.

        Raises:
            ValueError: if one does not exist.
        """
        from .user_code import import_user_module

        for name in self.imports:
            import_user_module(name)


@dataclass(frozen=True)
class SizeOptions:
    """Options about how many states stay."""

    tau: Annotated[float | None, typer.Option(help="Share of the sum of singular values that may go.")] = None
    target: Annotated[
        float | None,
        typer.Option("--target-state-size", "--target", help="Mean number of states per layer to reach."),
    ] = None
    fraction: Annotated[float | None, typer.Option(help="Share of every layer's states to keep.")] = None
    min_state_size: Annotated[int, typer.Option(help="Smallest number of states that a layer may keep.")] = 1
    multiple_of: Annotated[
        int | None,
        typer.Option(help="Round state sizes up to a multiple of this. Default: what the layers' kernels want."),
    ] = None
    sizes_for: Annotated[
        str | None,
        typer.Option(
            metavar=RUNTIMES,
            help="Cut to state sizes that this runtime takes; a target is rounded down to one.",
        ),
    ] = None
    uniform: Annotated[
        bool | None, typer.Option(help="Cut all layers to one common size. Default: only if the class needs it.")
    ] = None
    value_size: Annotated[
        int | None,
        typer.Option(
            help="Number of value channels per head to keep in layers with a gated delta rule, after the cut of states "
            "or, without an amount of these, alone. Dearer than states of the same bytes."
        ),
    ] = None

    def constraints(self) -> SizeConstraints:
        """Return what state sizes must satisfy.

        Raises:
            ValueError: if a size is out of its range, the runtime is unknown, or a multiple is given beside it.
        """
        from ..models.runtimes import check_runtime
        from ..reduction import SizeConstraints

        if self.sizes_for is not None:
            check_runtime(self.sizes_for)
        return SizeConstraints(self.min_state_size, self.multiple_of, self.uniform, sizes_for=self.sizes_for)

    def policy(self) -> Policy | None:
        """Return how many states to cut; None if only value channels are to be cut.

        Raises:
            ValueError: if more than one amount is given, or none and no value size, or it is out of its range.
        """
        from ..surgery.policies import choose_policy

        names = ("--tau", "--target-state-size", "--fraction")
        chosen = choose_policy(self.tau, self.target, self.fraction, names)
        if chosen is None and self.value_size is None:
            raise ValueError(f"give exactly one of {names[0]}, {names[1]} and {names[2]}, not none")
        return chosen
