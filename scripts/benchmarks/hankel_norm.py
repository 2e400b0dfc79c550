"""Time a training step with the Hankel nuclear norm in the loss, a plain step, and a step of a compressed model.

    python scripts/benchmarks/hankel_norm.py --threads 1
    python scripts/benchmarks/hankel_norm.py --shapes scifar --device cuda

At the shapes of the paper's tasks, on random data: `plain` is a step at full size, `regularised` one with
`HankelNormCallback`'s penalty, `by autograd` one whose penalty is the sum of svdvals(R^H L), with the Gramians' factors
from `eigh`, all differentiated by PyTorch, `compressed` a plain one after `compress` to the paper's size. Before that
the two penalties and their gradients are compared.
"""

import argparse
import copy
import statistics

import torch
from common import in_turns, largest_difference, machine, machine_line, parse, shown, spread, warn_of_noise, write_json

from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification, compress
from hf_compressm.baselines.hankel_norm import hankel_nuclear_norm, layer_systems
from hf_compressm.layers.lru import LRU
from hf_compressm.reduction import controllability_gramian, observability_gramian

WEIGHT = 1e-3
SHAPES = {
    # layers, features, states, their number after compression, length, channels, batch
    "digits": (3, 64, 256, 64, 64, 1, 50),
    "smnist": (1, 8, 256, 28, 784, 1, 50),
    "scifar": (6, 512, 384, 93, 1024, 3, 50),
}


def by_autograd(layers: list[LRU]) -> torch.Tensor:
    """The penalty as one would write it down."""
    total = torch.zeros((), dtype=torch.float64)
    for poles, B, C in zip(*layer_systems(layers), strict=True):
        factors = []
        for gramian in (controllability_gramian(poles, B), observability_gramian(poles, C)):
            values, vectors = torch.linalg.eigh(gramian)
            factors.append(vectors * values.clamp(min=1e-12).sqrt())
        total = total.to(poles.device) + torch.linalg.svdvals(factors[1].mH @ factors[0]).sum()
    return total


def in_closed_form(layers: list[LRU]) -> torch.Tensor:
    return hankel_nuclear_norm(*layer_systems(layers)).sum()


def model_of(shape: str, device: str, batch: int | None):
    layers, features, states, small, length, channels, usual = SHAPES[shape]
    torch.manual_seed(0)
    config = MimoSSMConfig(
        num_channels=channels,
        num_labels=10,
        hidden_size=features,
        num_hidden_layers=layers,
        state_sizes=states,
        r_min=0.5,
        r_max=0.99,
        norm="batch",
    )
    model = MimoSSMForSequenceClassification(config).to(device)
    count = batch or usual
    values = torch.randn(count, length, channels, device=device)
    return model, {"input_values": values, "labels": torch.arange(count, device=device) % 10}, small


def check() -> None:
    """Raise unless both penalties have the same value and gradient, on small layers that autograd can do accurately."""
    torch.manual_seed(0)
    layers = [LRU(8, 6, r_min=0.5, r_max=0.9).double() for _ in range(2)]
    for penalty in (in_closed_form, by_autograd):
        penalty(layers).backward()
        found = [parameter.grad for layer in layers for name, parameter in layer.named_parameters() if name != "D"]
        if penalty is in_closed_form:
            expected = [grad.clone() for grad in found]
        for layer in layers:
            layer.zero_grad()
    difference = largest_difference(found, expected)
    if not difference < 1e-6:
        raise SystemExit(f"the gradients of the two penalties differ by {difference:.1e}; nothing is timed")
    print(f"gradients of the two penalties differ by {difference:.1e} of the largest entry")


def step_of(model, batch, penalty=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    layers = [module for module in model.modules() if isinstance(module, LRU)]

    def step() -> None:
        loss = model(**batch).loss
        if penalty is not None:
            loss = loss + (WEIGHT * penalty(layers)).float()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["digits", "smnist"])
    parser.add_argument("--batch", type=int, help="sequences in a batch (default: 50)")
    parser.set_defaults(sizes=[1])
    options = parse(parser, repeats=15)
    check()
    rows = []
    for shape in options.shapes:
        model, batch, small = model_of(shape, options.device, options.batch)
        cut = copy.deepcopy(model)
        compress(cut, target=small)
        works = {
            "plain": step_of(model, batch),
            "regularised": step_of(copy.deepcopy(model), batch, in_closed_form),
            "by autograd": step_of(copy.deepcopy(model), batch, by_autograd),
            "compressed": step_of(cut, batch),
        }
        seconds = in_turns(works, options.repeats, options.budget)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"\n{shape}: {SHAPES[shape][2]} states, compressed to {small}; ms, relative to plain and to compressed")
        for name, values in seconds.items():
            rows.append({"shape": shape, "work": name, "times": spread(values)})
            print(
                f"{name:12} {shown(rows[-1]['times'])} {medians[name] / medians['plain']:7.2f} "
                f"{medians[name] / medians['compressed']:7.2f}"
            )
    warn_of_noise(rows)
    print("\n" + machine_line(options.device))
    if options.json:
        write_json(options.json, {"machine": machine(options.device), "rows": rows})


if __name__ == "__main__":
    main()
