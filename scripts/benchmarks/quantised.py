"""Measure test loss and bytes of weights of a model that is cut, quantised, or cut and then quantised.

    python scripts/benchmarks/quantised.py configs/runs/stdlib_mamba.yaml MODEL --target 12

MODEL is a folder that `scripts/pretrain.py` made of that run file, with `--no_compress`. The cut is refitted on
training data. Weights are quantised by transformers while they are loaded: torchao's 8 bits of weights only, and
bitsandbytes' 8 and 4 bits; a package that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from common import machine_line
from selection import loss_of
from torch.utils.data import DataLoader, default_collate
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_compressm import compress
from hf_compressm.data import load_task
from hf_compressm.report.text_tables import markdown_table
from hf_compressm.runs.pretraining import parse_run


def quantisations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and keywords for `from_pretrained`."""
    yield "float32", {}
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        yield "torchao, 8 bits", {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if importlib.util.find_spec("bitsandbytes"):
        yield "bitsandbytes, 8 bits", {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        yield "bitsandbytes, 4 bits", {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters, with the scales that quantised ones hold until the first forward pass."""
    parts = [getattr(p, name, None) for p in model.parameters() for name in ("qdata", "scale", "SCB")]
    inner = sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))
    plain = [p for p in model.parameters() if not hasattr(p, "qdata")]
    states = [getattr(p, "quant_state", None) for p in plain]
    scales = sum(state.absmax.numel() * state.absmax.element_size() for state in states if state is not None)
    return inner + scales + sum(p.numel() * p.element_size() for p in plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("model")
    parser.add_argument("--target", type=int, required=True, help="states, the mean over layers")
    options = parser.parse_args()
    run = parse_run([options.config, "--output_dir", options.model])
    task = load_task(run.arguments.task or "", seed=0, **run.task_options)
    order = torch.Generator().manual_seed(0)
    train = DataLoader(task.train, batch_size=8, shuffle=True, generator=order, collate_fn=default_collate)
    test = list(DataLoader(task.test, batch_size=16, collate_fn=default_collate))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        compress(model, [batch for batch, _ in zip(train, range(4), strict=False)], target=options.target)
        model.save_pretrained(folder)
        for name, source in (("full", options.model), (f"cut to {options.target}", folder)):
            for kind, keywords in quantisations():
                loaded = AutoModelForCausalLM.from_pretrained(source, **keywords).eval()
                size = weight_bytes(loaded)
                rows.append([name, kind, f"{loss_of(loaded, test):.4f}", f"{size:,}"])
    print(machine_line())
    print(markdown_table(["states", "weights", "test loss", "bytes of weights"], rows))


if __name__ == "__main__":
    main()
