"""Time a training step (forward, backward, AdamW) of MimoSSM and of the same model in JAX, on the CPU.

    python -m venv jax-env && jax-env/bin/pip install jax
    python scripts/benchmarks/jax_lru.py smnist scifar --jax-python jax-env/bin/python --json jax_lru.json

The JAX model is a linear recurrent unit as its users write it: complex matrices, `jax.lax.associative_scan`, all in one
`jit`. With `--real-products` its products are of real matrices, which XLA multiplies faster. Each model lives in a
process of its own; both get the same weights, must give the same logits and gradients, and then take steps in turns.
JAX needs no place in this package's environment, only a Python that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "smnist": {"layers": 1, "N": 256, "H": 8, "L": 784, "batch": 50, "channels": 1},
    "scifar": {"layers": 6, "N": 384, "H": 512, "L": 1024, "batch": 4, "channels": 3},
}
CLASSES = 10
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
TOLERANCE = 2e-3
"""Of logits and gradients, relative to the largest entry: float32 sums over a thousand steps and six layers."""


def torch_model(shape: dict) -> Any:
    from hf_compressm.models import MimoSSMConfig, MimoSSMForSequenceClassification

    config = MimoSSMConfig(
        num_channels=shape["channels"],
        hidden_size=shape["H"],
        num_hidden_layers=shape["layers"],
        state_sizes=shape["N"],
        num_labels=CLASSES,
        dropout=0.0,
    )
    return MimoSSMForSequenceClassification(config).train()


def torch_worker(shape: dict, data: dict) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = torch_model(shape)
    model.load_state_dict({name[2:]: torch.from_numpy(value) for name, value in data.items() if name[:2] == "p:"})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    x, labels = torch.from_numpy(data["x"]), torch.from_numpy(data["labels"])

    def gradients() -> dict:
        output = model(input_values=x, labels=labels)
        output.loss.backward()
        return {"logits": output.logits.detach()} | {name: p.grad for name, p in model.named_parameters()}

    def step() -> None:
        model(input_values=x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return gradients, step


def jax_worker(shape: dict, data: dict, real_products: bool) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weight + bias

    def combine(first: Any, second: Any) -> Any:
        return first[0] * second[0], second[0] * first[1] + second[1]

    def lru(p: Any, prefix: str, u: Any) -> Any:
        """One sequence, (L, H)."""
        nu, theta, gamma, B_re, B_im, C_re, C_im, D = (
            p[f"{prefix}.{name}"] for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D")
        )
        lam = jnp.exp(-jnp.exp(nu) + 1j * jnp.exp(theta))
        gamma = jnp.exp(gamma)[:, None]
        if real_products:
            driven = jax.lax.complex(u @ (B_re * gamma).T, u @ (B_im * gamma).T)
        else:
            driven = jax.vmap(lambda step: ((B_re + 1j * B_im) * gamma) @ step)(u)
        _, h = jax.lax.associative_scan(combine, (jnp.broadcast_to(lam, driven.shape), driven))
        if real_products:
            return h.real @ C_re.T - h.imag @ C_im.T + D * u
        return jax.vmap(lambda state, step: ((C_re + 1j * C_im) @ state).real + D * step)(h, u)

    def sequence(p: Any, x: Any) -> Any:
        x = x @ p["backbone.embeddings.weight"].T + p["backbone.embeddings.bias"]
        for layer in range(shape["layers"]):
            prefix = f"backbone.layers.{layer}"
            y = lru(p, f"{prefix}.mixer", norm(x, p[f"{prefix}.norm.weight"], p[f"{prefix}.norm.bias"]))
            y = jax.nn.gelu(y, approximate=False) @ p[f"{prefix}.out_proj.weight"].T + p[f"{prefix}.out_proj.bias"]
            value, gate = jnp.split(y, 2, -1)
            x = x + value * jax.nn.sigmoid(gate)
        x = norm(x, p["backbone.norm.weight"], p["backbone.norm.bias"])
        return x.mean(0) @ p["score.weight"].T + p["score.bias"]

    def loss(p: Any, x: Any, labels: Any) -> Any:
        logits = jax.vmap(sequence, (None, 0))(p, x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean(), logits

    def adamw(p: Any, m: Any, v: Any, g: Any, count: Any) -> Any:
        (beta1, beta2), lr = ADAMW["betas"], ADAMW["lr"]
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + ADAMW["eps"])
        return p - lr * (update + ADAMW["weight_decay"] * p), m, v

    @jax.jit
    def training_step(p: Any, m: Any, v: Any, count: Any, x: Any, labels: Any) -> Any:
        g = jax.grad(loss, has_aux=True)(p, x, labels)[0]
        new = {name: adamw(p[name], m[name], v[name], g[name], count) for name in p}
        return *({name: value[k] for name, value in new.items()} for k in range(3)), count + 1

    p = {name[2:]: jnp.asarray(value) for name, value in data.items() if name[:2] == "p:"}
    x, labels = jnp.asarray(data["x"]), jnp.asarray(data["labels"])
    zeros = {name: jnp.zeros_like(value) for name, value in p.items()}
    state = [p, zeros, zeros, jnp.float32(1)]

    def gradients() -> dict:
        g, logits = jax.jit(jax.grad(loss, has_aux=True))(p, x, labels)
        return {"logits": logits} | g

    def step() -> None:
        state[:] = jax.block_until_ready(training_step(*state, x, labels))

    return gradients, step


def work(name: str, shape: dict, folder: Path) -> None:
    """A worker: writes logits and gradients, then takes one step for every line it reads and answers the seconds."""
    data = dict(np.load(folder / "data.npz"))
    gradients, step = (
        torch_worker(shape, data) if name == "torch" else jax_worker(shape, data, real_products="real" in name)
    )
    np.savez(folder / f"{name}.npz", **{key: np.asarray(value) for key, value in gradients().items()})
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


class Worker:
    def __init__(self, python: str, name: str, shape: str, folder: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
        # XLA and PyTorch take as many threads as the process has processors; OMP_NUM_THREADS is for PyTorch alone.
        self.process = subprocess.Popen(
            [python, __file__, shape, "--worker", name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if self._answer() != "ready":
            raise RuntimeError(f"the {name} worker did not start; JAX comes with `pip install jax`, see --jax-python")

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def step(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self.process.communicate()


def largest_difference(a: dict, b: dict) -> float:
    return max(float(np.abs(a[key] - b[key]).max() / np.abs(b[key]).max()) for key in b)


def compare(name: str, options: argparse.Namespace) -> dict:
    shape = SHAPES[name]
    rng = np.random.default_rng(0)
    rival = "jax-real" if options.real_products else "jax"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = {f"p:{key}": value.numpy() for key, value in torch_model(shape).state_dict().items()}
        x = rng.standard_normal((shape["batch"], shape["L"], shape["channels"]), np.float32)
        np.savez(folder / "data.npz", x=x, labels=rng.integers(0, CLASSES, shape["batch"]), **weights)
        pythons = {"torch": sys.executable, rival: options.jax_python}
        workers = {key: Worker(python, key, name, folder, options.threads) for key, python in pythons.items()}
        results = [dict(np.load(folder / f"{key}.npz")) for key in workers]
        difference = largest_difference(*results)
        if difference > TOLERANCE:
            raise SystemExit(f"{name}: logits or gradients differ by {difference:.1e} of their size; not timed")
        seconds: dict[str, list[float]] = {key: [] for key in workers}
        for _ in range(options.rounds):
            for key, worker in workers.items():
                seconds[key].append(worker.step())
        for worker in workers.values():
            worker.close()
    ratios = [theirs / mine for mine, theirs in zip(seconds["torch"], seconds[rival], strict=True)]
    for key, values in seconds.items():
        low, middle, high = np.percentile(values, [10, 50, 90])
        print(f"{name:8} {key:9} {middle:.3f} s a step (10 %: {low:.3f}, 90 %: {high:.3f})")
    print(f"{name:8} {rival} / torch = {statistics.median(ratios):.2f}; largest difference {difference:.1e}")
    return {"shape": name, **shape, "seconds": seconds, "ratio": statistics.median(ratios), "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--jax-python", default=sys.executable, help="a Python that has jax")
    parser.add_argument("--real-products", action="store_true", help="real matrix products in the JAX model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, SHAPES[options.shapes[0]], options.folder)
        return
    # Not at the top: a worker's Python may have no torch.
    from common import machine

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    results = [compare(name, options) for name in options.shapes]
    command = [options.jax_python, "-c", "import jax; print(jax.__version__)"]
    jax = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    described = machine() | {"threads": options.threads, "jax": jax}
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    if options.json:
        record = {"machine": described, "results": results}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
