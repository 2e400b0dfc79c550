"""Compare three ways to treat the optimizer's moments at a cut: carry them, crop them, or reset them.

    python scripts/benchmarks/moments.py --seeds 5 --keep 0.5 0.25 0.1

A model is trained on `digits` at full size; then copies of it are cut to the same states and trained on with the same
batches. `carried` maps the moments through the adjoint of the reduction; `cropped` keeps the first rows of the old
ones, which belong to another basis; `reset` forgets them. Printed is the mean training loss over the steps after the
cut.
"""

import argparse
import copy
import json
import statistics

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_compressm import Fraction, MimoSSMConfig, MimoSSMForSequenceClassification, SizeConstraints, compress
from hf_compressm.data import load_task
from hf_compressm.report.text_tables import markdown_table, mean_and_deviation
from hf_compressm.surgery import find_mixers

METHODS = ("carried", "cropped", "reset")


def batches(task, seed: int):
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(task.train, batch_size=50, shuffle=True, drop_last=True, generator=generator)
    while True:
        yield from loader


def make_optimizer(model, name: str, lr: float):
    cls = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    options = {"momentum": 0.9} if name == "sgd" else {}
    return cls(model.parameters(), lr=lr, weight_decay=0.0, **options)


def train(model, optimizer, stream, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(**next(stream)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def cut(model, optimizer, keep: float, method: str) -> None:
    """Cut, then replace the carried moments by those of another method."""
    old = {
        (site.name, name): copy.deepcopy(dict(optimizer.state[parameter]))
        for site in find_mixers(model)
        for name, parameter in site.parameters().items()
    }
    compress(model, optimizer=optimizer, policy=Fraction(keep), constraints=SizeConstraints(minimum_change=0.0))
    if method == "carried":
        return
    for site in find_mixers(model):
        for name, parameter in site.parameters().items():
            if method == "reset":
                optimizer.state.pop(parameter, None)
                continue
            window = tuple(slice(size) for size in parameter.shape)
            optimizer.state[parameter] = {
                key: value[window].clone() if torch.is_tensor(value) and value.ndim else copy.deepcopy(value)
                for key, value in old[site.name, name].items()
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="shares of the states kept")
    parser.add_argument("--before", type=int, default=100, help="steps before the cut")
    parser.add_argument("--after", type=int, default=50, help="steps after the cut")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    task = load_task("digits")
    losses: dict[tuple[float, str], list[float]] = {(k, m): [] for k in options.keep for m in METHODS}
    uncut: list[float] = []
    for seed in tqdm(range(options.seeds), desc="seeds"):
        torch.manual_seed(seed)
        config = MimoSSMConfig(
            hidden_size=64, num_hidden_layers=2, state_sizes=64, r_min=0.5, dropout=0.0, **task.model_kwargs
        )
        model = MimoSSMForSequenceClassification(config).train()
        optimizer = make_optimizer(model, options.optimizer, options.lr)
        stream = batches(task, seed)
        train(model, optimizer, stream, options.before)
        following = [next(stream) for _ in range(options.after)]
        for keep, method in [(None, None), *losses]:
            twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
            twin_optimizer = make_optimizer(twin, options.optimizer, options.lr)
            twin_optimizer.load_state_dict(state)
            if keep is not None:
                cut(twin, twin_optimizer, keep, method)
            mean = statistics.mean(train(twin, twin_optimizer, iter(following), options.after))
            (uncut if keep is None else losses[keep, method]).append(mean)
    print(
        f"mean training loss over {options.after} steps after a cut at step {options.before}, {options.optimizer}, "
        f"{options.seeds} seeds (without a cut: {statistics.mean(uncut):.4f})"
    )
    rows = []
    for keep in options.keep:
        cells = [mean_and_deviation(losses[keep, m], 4) for m in METHODS]
        wins = sum(losses[keep, "carried"][s] <= min(losses[keep, m][s] for m in METHODS) for s in range(options.seeds))
        rows.append([f"{keep:.0%}", *cells, f"{wins} of {options.seeds}"])
    print(markdown_table(["states kept", *METHODS, "carried lowest"], rows))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"uncut": uncut, **{f"{k} {m}": v for (k, m), v in losses.items()}}, file, indent=2)


if __name__ == "__main__":
    main()
