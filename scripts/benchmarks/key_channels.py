"""How much the loss rises when key or value channels of delta-rule layers are removed after training.

    python scripts/benchmarks/key_channels.py --seeds 3 --models outputs/key_channels
    python scripts/benchmarks/key_channels.py --seeds 3 --models outputs/key_channels --values
    python scripts/benchmarks/key_channels.py --seeds 1 --steps 20 --orders 16

For every seed a small Qwen3.5 model with gated delta-rule layers only (hidden size 96, 2 layers, 2 key heads, 4 value
heads, 64 key channels, 32 value channels, transformers' own class) is trained on bytes of Python's standard library, or
read from --models. Its time steps start between 0.001 and 0.1, so that states outlast more than a few tokens. Then each
method keeps some channels of a copy, chosen on the same calibration batches, and the test loss is measured without
further training:

    subset           this package's choice, by pivots of the second moments of queries and keys
    subset, refitted  the same with this package's refit on the calibration batches
    write and erase matrices  this package's class, made of the model by from_stock, in the best basis; and refitted
    DRRQR            rank-revealing QR of queries and keys before their normalisation (arXiv 2602.04852), after training
    DRRQR, normalised  the same behind the normalisation
    key norms        largest rows of the projection of keys
    P times Q        largest products of the diagonals of the states' and the queries' moments (the kind of GHOST)
    sensitivity      largest mean square of the derivative of a sequence's loss by a factor on the channel of query and
                     key before their normalisation (the kind of Taylor and Fisher scores); needs labels and gradients
    first, random    controls

With --values value channels go in place of key channels, by the rows "pivots" (this package's choice), with and without
the refit, "energy" (largest mean square of a channel's part of the layer's output), first and random. All of them have
the read-out that this package makes of what stays.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import machine, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from hf_compressm import SizeConstraints, compress, from_stock
from hf_compressm.baselines import gather_rival_statistics
from hf_compressm.baselines.key_scores import qr_pivots
from hf_compressm.data import load_task
from hf_compressm.reduction.interpolative import pivoted_states
from hf_compressm.report.text_tables import markdown_table, mean_and_deviation
from hf_compressm.surgery import find_mixers, measure_model
from hf_compressm.surgery.resize import replace_parameters, write_sizes
from hf_compressm.surgery.statistics import gather_statistics
from hf_compressm.surgery.values import value_sites

KEYS, HEADS = 64, 2
VALUES = 32
LENGTH, BATCH = 128, 8
Batches = list[dict[str, Tensor]]


def new_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        **{"vocab_size": 256, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 24},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["linear_attention"] * 2},
        **{"linear_num_key_heads": HEADS, "linear_num_value_heads": 4, "linear_key_head_dim": KEYS},
        **{"linear_value_head_dim": VALUES, "tie_word_embeddings": True, "use_cache": False},
    )
    model = Qwen3_5ForCausalLM(config)
    for site in find_mixers(model):
        steps = torch.exp(torch.rand(4) * math.log(100) + math.log(0.001))
        site.mixer.dt_bias.data = steps + torch.log(-torch.expm1(-steps))
    return model


def trained(seed: int, data: Tensor, steps: int, folder: Path | None) -> Any:
    """The model trained by AdamW with a warm-up and a cosine; kept in the folder, if any, to be trained once only."""
    if folder is not None and (folder / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, use_cache=False).eval()
    model, generator = new_model(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 30) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        tokens = data[torch.randint(len(data), (BATCH,), generator=generator)]
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def loss_of(model: Any, tokens: Tensor) -> float:
    return statistics.mean(float(model(input_ids=part, labels=part).loss) for part in tokens.split(32))


def sensitivities(model: Any, batches: Batches) -> dict[str, Tensor]:
    """Mixer's name -> (key heads, channels): sums over sequences of the squared derivatives of their losses."""
    names = [site.name for site in find_mixers(model)]  # in the order in which a forward pass runs them
    factors: list[Tensor] = []

    def with_factors(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        factors.append(torch.ones(len(query), 1, HEADS, KEYS, requires_grad=True))
        each = factors[-1].repeat_interleave(query.shape[2] // HEADS, dim=2)
        return rule(query * each, key * each, *args, **kwargs)

    model, rule = copy.deepcopy(model), modeling_qwen3_5.torch_chunk_gated_delta_rule
    with mock.patch.object(modeling_qwen3_5, rule.__name__, with_factors):
        for batch in batches:
            (model(**batch, labels=batch["input_ids"]).loss * len(batch["input_ids"])).backward()
    squares = [factor.grad.square().sum((0, 1)) for factor in factors if factor.grad is not None]
    return {name: torch.stack(squares[index :: len(names)]).sum(0) for index, name in enumerate(names)}


def choices(
    model: Any, batches: list[dict[str, Tensor]], seed: int
) -> dict[str, Callable[[Any, int], list[list[int]]]]:
    """Method -> function of a mixer's site and an order that gives the channels of each key head to keep."""
    measured = measure_model(model, batches)
    raw = {name: found.raw for name, found in gather_rival_statistics(model, batches).items()}
    sensitive = sensitivities(model, batches)
    generator = torch.Generator().manual_seed(seed)

    def largest(scores: Tensor, order: int) -> list[list[int]]:
        return [sorted(row.topk(order).indices.tolist()) for row in scores]

    def key_norms(site: Any, order: int) -> list[list[int]]:
        rows = site.mixer.in_proj_qkv.weight[site.mixer.key_dim : 2 * site.mixer.key_dim].detach()
        return largest(rows.norm(dim=1).unflatten(0, (HEADS, KEYS)), order)

    def products(site: Any, order: int) -> list[list[int]]:
        found = measured[site.name]
        return largest(found.P.diagonal(dim1=1, dim2=2) * found.Q.diagonal(dim1=1, dim2=2), order)

    return {
        "DRRQR": lambda site, order: [qr_pivots(moment, order) for moment in raw[site.name]],
        "DRRQR, normalised": lambda site, order: [
            qr_pivots(Q + K, order) for Q, K in zip(measured[site.name].Q, measured[site.name].K, strict=True)
        ],
        "pivots by P and Q": lambda site, order: [
            pivoted_states(P, Q, order) for P, Q in zip(measured[site.name].P, measured[site.name].Q, strict=True)
        ],
        "key norms": key_norms,
        "P times Q": products,
        "sensitivity": lambda site, order: largest(sensitive[site.name], order),
        "first": lambda site, order: [list(range(order))] * HEADS,
        "random": lambda site, order: [
            torch.randperm(KEYS, generator=generator)[:order].tolist() for _ in range(HEADS)
        ],
    }


def by_compress(
    model: Any, batches: list[dict[str, Tensor]], test: Tensor, name: str, steps: int, **size: int
) -> dict[str, float]:
    """Rise of the test loss by this package's choice, in closed form and refitted."""
    full, found = loss_of(model, test), {}
    for row, count in ((name, 0), (f"{name}, refitted", steps)):
        reduced = copy.deepcopy(model)
        compress(reduced, batches, constraints=SizeConstraints(multiple_of=1), refit_steps=count, **size)
        found[row] = loss_of(reduced, test) - full
    return found


def value_rises(
    model: Any, batches: list[dict[str, Tensor]], test: Tensor, order: int, seed: int, steps: int
) -> dict[str, float]:
    """Method -> rise of the test loss in nats a byte, for value channels."""
    full, found = loss_of(model, test), by_compress(model, batches, test, "pivots", steps, value_size=order)
    generator = torch.Generator().manual_seed(seed)
    gathered = gather_statistics(model, batches, sites=value_sites(model))
    choices = {
        "energy": lambda Y, W: (Y.diagonal() * W.diagonal()).topk(order).indices,
        "first": lambda Y, W: torch.arange(order),
        "random": lambda Y, W: torch.randperm(VALUES, generator=generator)[:order],
    }
    for name, choose in choices.items():
        reduced = copy.deepcopy(model)
        sites, values = value_sites(reduced), {}
        for site in sites:
            measured = site.adapter.measure(site.mixer, gathered[site.name])
            kept = [sorted(choose(Y, W).tolist()) for Y, W in zip(measured.Y, measured.W, strict=True)]
            changes = site.adapter.reduce_to_kept(site.mixer, measured, kept).changes
            values[site.name] = {key: change.value for key, change in changes.items()}
        replace_parameters(sites, values)
        write_sizes(reduced, sites)
        found[name] = loss_of(reduced, test) - full
    return found


def rises(
    model: Any, batches: list[dict[str, Tensor]], test: Tensor, order: int, seed: int, steps: int
) -> dict[str, float]:
    """Method -> rise of the test loss in nats a byte."""
    full, found = loss_of(model, test), by_compress(model, batches, test, "subset", steps, target=order)
    found |= by_compress(from_stock(model), batches, test, "write and erase matrices", steps, target=order)
    for name, choose in choices(model, batches, seed).items():
        reduced = copy.deepcopy(model)
        sites = find_mixers(reduced)
        changes = {site.name: site.adapter.keep(site.mixer, choose(site, order)) for site in sites}
        values = {name: {key: change.value for key, change in parts.items()} for name, parts in changes.items()}
        replace_parameters(sites, values)
        write_sizes(reduced, sites)
        found[name] = loss_of(reduced, test) - full
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--values", action="store_true", help="remove value channels in place of key channels")
    parser.add_argument("--orders", type=int, nargs="+", help="channels to keep; default: 32 16 8, of values 16 8")
    parser.add_argument("--refit-steps", type=int, default=60)
    parser.add_argument("--models", type=Path, help="folder in which the trained models are kept")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    size, measure = (VALUES, value_rises) if options.values else (KEYS, rises)
    orders = options.orders or [order for order in (32, 16, 8) if order < size]
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    rows: dict[str, dict[int, list[float]]] = {}
    losses = []
    for seed in range(options.seeds):
        task = load_task("stdlib_bytes", seed=seed, length=LENGTH)
        data, test = torch.tensor(task.train[:4064]["input_ids"]), torch.tensor(task.test[:96]["input_ids"])
        folder = None if options.models is None else options.models / f"seed{seed}"
        model = trained(seed, data[:4000], options.steps, folder)
        losses.append(loss_of(model, test))
        print(f"seed {seed}: test loss {losses[-1]:.4f} at full size", flush=True)
        batches = [{"input_ids": part} for part in data[4000:].split(16)]
        for order in orders:
            for name, rise in measure(model, batches, test, order, seed, options.refit_steps).items():
                rows.setdefault(name, {}).setdefault(order, []).append(rise)
    header = ["channels kept", *(f"{size} -> {order}" for order in orders)]
    table = [[name, *(mean_and_deviation(row[order], 4) for order in orders)] for name, row in rows.items()]
    print(markdown_table(header, table))
    if options.json:
        write_json(options.json, {"machine": machine(), "full": losses, "rises": rows})


if __name__ == "__main__":
    main()
