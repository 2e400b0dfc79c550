"""ONNX files of six language models beside PyTorch: largest difference of logits, and speed in onnxruntime.

    python scripts/benchmarks/onnx_export.py
    python scripts/benchmarks/onnx_export.py --models mamba --layers 1 --hidden 32 --states 8 --kept 3 --lengths 1 70

The models are this package's Mamba, Mamba-2 and MimoSSM with random weights, before and after a cut of every layer to
--kept states. The difference is over all tokens of a prefill of each length, and over --steps single steps after it
that start from the prefill's states; it is also given in units of the largest logit. Reference is the model's own
forward of the whole text in float32. Times are medians over --repeats runs, of a prefill of the longest length and of
a single step at batch 1 and --batch, on --threads threads in both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, write_json

import hf_compressm
from hf_compressm import compress
from hf_compressm.compatibility import cache_keyword
from hf_compressm.deploy import OnnxModel, write_onnx
from hf_compressm.report.text_tables import markdown_table

FAMILIES = {"mamba": "CompreSSMMamba", "mamba2": "CompreSSMMamba2", "mimo_ssm": "MimoSSM"}
VOCABULARY = 512
COLUMNS = ("model", "states", "prefill: largest difference", "steps: largest difference", "prefill, ms: ours",
           "onnxruntime", "step, ms: ours", "onnxruntime", "step of a batch, ms: ours", "onnxruntime")  # fmt: skip


def new_model(kind: str, args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    fields = {"vocab_size": VOCABULARY, "hidden_size": args.hidden, "num_hidden_layers": args.layers}
    fields |= {"state_sizes": args.states}
    if kind != "mimo_ssm":
        fields |= {"state_size": args.states, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "mamba2":
        fields |= {"num_heads": 8, "head_dim": args.hidden // 4, "n_groups": 1}
    config = getattr(hf_compressm, f"{FAMILIES[kind]}Config")(**fields)
    return getattr(hf_compressm, f"{FAMILIES[kind]}ForCausalLM")(config).eval()


def cut(model: Any, kept: int) -> Any:
    smaller = copy.deepcopy(model)
    batches = [{"input_ids": torch.randint(1, VOCABULARY, (4, 128))}]
    compress(smaller, batches, target=kept, refit_steps=0)
    return smaller


@torch.no_grad()
def differences(model: Any, run: OnnxModel, lengths: list[int], steps: int) -> tuple[float, float, float]:
    """Largest absolute differences of a prefill and of single steps, and the largest logit."""
    prefill, single, scale = 0.0, 0.0, 0.0
    for length in lengths:
        text = torch.randint(1, VOCABULARY, (2, length + steps))
        expected = model(text, use_cache=False).logits.numpy()
        session = run.sessions["prefill"]
        names = [value.name for value in session.get_inputs()]
        inputs = [text[:, :length].numpy(), *run.first_states(2)]
        logits, *states = session.run(None, dict(zip(names, inputs, strict=True)))
        prefill = max(prefill, float(np.abs(logits - expected[:, :length]).max()))
        for place in range(length, length + steps):
            logits, states = run.read(text[:, place : place + 1].numpy(), states)
            single = max(single, float(np.abs(logits[:, 0] - expected[:, place]).max()))
        scale = max(scale, float(np.abs(expected).max()))
    return prefill, single, scale


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


@torch.no_grad()
def speeds(model: Any, run: OnnxModel, length: int, batch: int, repeats: int) -> list[tuple[float, float]]:
    """Milliseconds, ours and onnxruntime's, of a prefill and of a single step of one text and of a batch."""
    text = torch.randint(1, VOCABULARY, (1, length))
    states = run.first_states(1)
    found = [
        (
            median_ms(lambda: model(text, use_cache=True, logits_to_keep=0), repeats),
            median_ms(lambda: run.read(text.numpy(), states), repeats),
        )
    ]
    for count in dict.fromkeys((1, batch)):
        token = torch.randint(1, VOCABULARY, (count, 1))
        output = model(token, use_cache=True)
        options = {cache_keyword(type(model).forward): getattr(output, cache_keyword(type(output))), "use_cache": True}
        _, states = run.read(token.numpy(), run.first_states(count))
        ours = median_ms(lambda token=token, options=options: model(token, **options), 10 * repeats)
        theirs = median_ms(lambda token=token, states=states: run.read(token.numpy(), states), 10 * repeats)
        found.append((ours, theirs))
    return found


def measured(name: str, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        states = write_onnx(model, Path(folder), all_logits=True).state_sizes
        run = OnnxModel(folder, args.threads)
        prefill, single, scale = differences(model, run, args.lengths, args.steps)
        if max(prefill, single) > args.tolerance * scale:
            raise SystemExit(f"{name}: logits differ by {max(prefill, single):.1e}, of up to {scale:.1f}")
        times = speeds(model, run, max(args.lengths), args.batch, args.repeats)
    row = {"model": name, "states": states, "prefill": prefill, "steps": single, "largest_logit": scale}
    return row | {"ms": times}


def cells(row: dict[str, Any]) -> list[str]:
    errors = [f"{row[key]:.1e} ({row[key] / row['largest_logit']:.1e})" for key in ("prefill", "steps")]
    return [row["model"], str(row["states"][0]), *errors, *(f"{value:.2f}" for pair in row["ms"] for value in pair)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--hidden", type=int, default=256, help="features, a multiple of 4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--states", type=int, default=128)
    parser.add_argument("--kept", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 7, 33, 200, 513, 2048])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference in units of the largest logit"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    described = machine() | {name: metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    rows = []
    for kind in args.models:
        model = new_model(kind, args)
        for name, each in ((kind, model), (f"{kind}, cut", cut(model, args.kept))):
            rows.append(measured(name, each, args))
            print(*cells(rows[-1]), sep=" | ", flush=True)
    print(markdown_table(COLUMNS, [cells(row) for row in rows]))
    if args.json:
        write_json(args.json, {"machine": described, "rows": rows})


if __name__ == "__main__":
    main()
