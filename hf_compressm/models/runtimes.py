"""What other runtimes' own sources accept of a Mamba or Mamba-2, as data. docs/deploy.md has the same as a table.

Only what was read is here; `Runtime.read` says where. A size or field that a runtime does not check is not limited.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .convert import from_stock, to_stock

KINDS = {"mamba": "mamba", "compressm_mamba": "mamba", "mamba2": "mamba2", "compressm_mamba2": "mamba2"}
"""`model_type` of a config -> the kind whose rules hold for it."""
NAMES = {"mamba": "Mamba", "mamba2": "Mamba-2"}


@dataclass(frozen=True)
class StateSizes:
    """Numbers of states that a kernel takes.

    Attributes:
        listed: the only ones, ascending; empty if they follow from the other two.
        multiple_of: they are multiples of this, >= 1.
        largest: none is larger; None for no limit.
    """

    listed: tuple[int, ...] = ()
    multiple_of: int = 1
    largest: int | None = None

    def up_to(self, limit: int) -> tuple[int, ...]:
        """Those that are at most `limit`, ascending."""
        if self.listed:
            return tuple(size for size in self.listed if size <= limit)
        top = limit if self.largest is None else min(limit, self.largest)
        return tuple(range(self.multiple_of, top + 1, self.multiple_of))

    def next(self, size: int) -> int | None:
        """The smallest that holds `size` states; None if none does."""
        return next(
            (found for found in self.up_to(size + max((*self.listed, self.multiple_of))) if found >= size), None
        )

    def __str__(self) -> str:
        if self.listed:
            return " or ".join(map(str, self.listed))
        counts = "any number" if self.multiple_of == 1 else f"multiples of {self.multiple_of}"
        return counts if self.largest is None else f"{counts} up to {self.largest}"


@dataclass(frozen=True)
class Rule:
    """What one field of a stock config has to be.

    Attributes:
        field: name of the field; "intermediate_size" is the inner size of a config without that field too.
        allowed: its values; empty if it is to be a multiple.
        multiple_of: it is a multiple of this.
    """

    field: str
    allowed: tuple[Any, ...] = ()
    multiple_of: int = 1

    def broken(self, config: Any) -> str | None:
        """What is wrong with a config, as part of a sentence; None if nothing is."""
        found: Any = getattr(config, self.field, None)
        if found is None and self.field == "intermediate_size":
            found = int(config.expand * config.hidden_size)
        found = tuple(found) if isinstance(found, list) else found
        if self.allowed and found not in self.allowed:
            return f"{self.field} = {' or '.join(map(str, self.allowed))}; this one has {found}"
        if not self.allowed and found % self.multiple_of:
            return f"{self.field} a multiple of {self.multiple_of}; this one has {found}"
        return None


@dataclass(frozen=True)
class Runtime:
    """What one runtime takes.

    Attributes:
        sizes: kind -> numbers of states.
        rules: kind -> what else its source checks, or leaves out so that outputs would differ.
        read: files that this was read from, with version or commit.
    """

    sizes: dict[str, StateSizes]
    rules: dict[str, tuple[Rule, ...]]
    read: tuple[str, ...]


_ANY = StateSizes()
_UP_TO_256 = StateSizes(largest=256)
_SILU = Rule("hidden_act", ("silu", "swish"))
_WIDTHS = Rule("conv_kernel", (2, 3, 4))
_UNCLAMPED = Rule("time_step_limit", ((0.0, float("inf")),))
_EXPAND = Rule("expand", (2,))
_BIASES = (Rule("use_bias", (False,)), Rule("use_conv_bias", (True,)))
_INNER = Rule("intermediate_size", multiple_of=128)

RUNTIMES = {
    "llama.cpp": Runtime(
        sizes={"mamba": StateSizes((16,)), "mamba2": StateSizes((128, 256))},
        rules={
            "mamba": (_SILU, *_BIASES, _EXPAND, _INNER),
            "mamba2": (_SILU, *_BIASES, _EXPAND, _UNCLAMPED, _INNER, Rule("head_dim", multiple_of=16)),
        },
        read=(
            "ggml-org/llama.cpp 02fd6ee: ggml/src/ggml-cuda/ssm-scan.cu",
            "ggml-org/llama.cpp 0c1e57098, as in llama-cpp-python 0.3.36: ggml/src/ggml-cuda/ggml-cuda.cu, "
            "ggml/src/ggml-cuda/ssm-conv.cu, ggml/src/ggml-cpu/ops.cpp, src/models/mamba.cpp, "
            "src/models/mamba2.cpp, src/models/mamba-base.cpp, conversion/mamba.py",
        ),
    ),
    "vllm": Runtime(
        sizes={"mamba": _UP_TO_256, "mamba2": _ANY},
        rules={"mamba": (_SILU,), "mamba2": (_SILU, _UNCLAMPED)},
        read=(
            "vllm-project/vllm 04f947b: csrc/mamba/mamba_ssm/selective_scan_fwd.cu",
            "vllm-project/vllm 007ad21: vllm/model_executor/layers/mamba/ops/mamba_ssm.py",
            "vllm-project/vllm 057727a: vllm/model_executor/layers/mamba/ops/ssd_combined.py",
            "vllm-project/vllm 055e47c: vllm/model_executor/models/mamba2.py",
            "vllm-project/vllm 00f9a14: vllm/model_executor/models/mamba.py",
        ),
    ),
    "sglang": Runtime(
        sizes={"mamba": _ANY, "mamba2": _ANY},
        rules={"mamba": (_SILU, _WIDTHS), "mamba2": (_SILU, _WIDTHS, _UNCLAMPED)},
        read=(
            "sglang 0.5.23: sglang/srt/models/mamba.py, falcon_mamba.py and mamba2.py",
            "sglang 0.5.23: sglang/srt/layers/attention/mamba/mamba1.py and mamba.py",
            "sglang 0.5.23: sglang/kernels/ops/mamba/triton_ops/mamba_ssm.py, ssd_combined.py and ssd_chunk_scan.py",
            "sglang 0.5.23: sglang/kernels/jit/csrc/mamba/causal_conv1d.cuh",
        ),
    ),
    "mamba_ssm": Runtime(
        sizes={"mamba": _UP_TO_256, "mamba2": StateSizes(multiple_of=8)},
        rules={
            "mamba": (_SILU, _WIDTHS),
            "mamba2": (_SILU, _WIDTHS, Rule("num_heads", multiple_of=8)),
        },
        read=(
            "state-spaces/mamba 6d531f2: csrc/selective_scan/selective_scan.cpp",
            "state-spaces/mamba 03a38fb: mamba_ssm/modules/mamba2.py",
            "Dao-AILab/causal-conv1d 018489d: csrc/causal_conv1d.cpp",
        ),
    ),
}
"""Name -> what the runtime takes."""


def check_runtime(name: str) -> None:
    """Check the name of a runtime.

    Raises:
        ValueError: if it is unknown, with the nearest known one.
    """
    if name not in RUNTIMES:
        near = difflib.get_close_matches(str(name).lower(), RUNTIMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown runtime {name!r}{hint} Known are {', '.join(RUNTIMES)}.")


def runtime_sizes(name: str, config: Any) -> StateSizes:
    """Numbers of states that a runtime takes of models like the one of this config.

    Raises:
        ValueError: if the runtime is unknown, or the architecture is none whose rules were read.
    """
    check_runtime(name)
    kind = getattr(config, "model_type", None)
    if kind not in KINDS:
        raise ValueError(
            f"what {name} takes of the architecture {kind} is not known here; it is for {', '.join(sorted(KINDS))}"
        )
    return RUNTIMES[name].sizes[KINDS[kind]]


def padded_size(name: str, config: Any, sizes: Sequence[int]) -> int:
    """The number of states, the same in all layers, with which a runtime takes a model.

    Args:
        name: of the runtime.
        config: of the model, own or stock.
        sizes: present number of states of each layer.

    Raises:
        ValueError: if the runtime takes none that is large enough, or the config breaks another of its rules.
    """
    allowed, kind = runtime_sizes(name, config), KINDS[config.model_type]
    found = allowed.next(max(sizes))
    if found is None:
        raise ValueError(
            f"{name} takes a {NAMES[kind]} of {allowed} states, and the largest layer of this one has {max(sizes)}. "
            f"Cut it to such a size first: --target-state-size {allowed.up_to(max(sizes))[-1]} --sizes-for {name}."
        )
    check_rules(name, config)
    return found


def check_rules(name: str, config: Any, only_values: bool = False) -> None:
    """Check what a runtime wants of a config besides the number of states.

    Args:
        name: of the runtime.
        config: of the model, own or stock.
        only_values: leave out the multiples, which only kernels for GPUs want.

    Raises:
        ValueError: if a rule is broken.
    """
    kind = KINDS[config.model_type]
    for rule in RUNTIMES[name].rules[kind]:
        if (rule.allowed or not only_values) and (wrong := rule.broken(config)) is not None:
            raise ValueError(f"{name} needs a {NAMES[kind]} with {wrong}, which padding cannot change.")


def to_stock_for(name: str, model: Any) -> Any:
    """The stock form of a model with the next number of states that a runtime takes.

    Further states have zero input and zero output, so outputs stay equal.

    Args:
        name: of the runtime.
        model: own or stock Mamba or Mamba-2, which is not changed. A stock one that needs no padding is returned.

    Raises:
        ValueError: if the runtime is unknown or takes no such model, or the model has no stock form.
    """
    size = padded_size(name, model.config, getattr(model.config, "state_sizes", None) or [model.config.state_size])
    if type(model).__module__.startswith("transformers."):
        if size == model.config.state_size:
            return model
        model = from_stock(model)
    try:
        return to_stock(model, size)
    except TypeError as error:
        raise ValueError(f"{name} runs stock models only: {error}") from error
