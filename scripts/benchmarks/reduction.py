"""Check balanced truncation on random systems, then time it on six large layers.

    python scripts/benchmarks/reduction.py
    python scripts/benchmarks/reduction.py --systems 300 --repeats 5 --json reduction.json

Correctness: systems of N 8-384 states and H 1-64 inputs and outputs, poles up to |pole| = 0.9999, plain and degenerate.
Each is cut to several orders; the H-infinity error is taken over a dense grid of frequencies that includes the angle
of every pole. Singular values are compared with those from scipy's Lyapunov solver. Time: one reduction of six layers
of N=384, H=512 to 96 states each, against the same reduction by matrix square roots in numpy and scipy.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from common import machine
from tqdm.auto import tqdm

from hf_compressm.layers.lru import LRU
from hf_compressm.reduction import balance, gramian_factor, truncate
from hf_compressm.surgery.adapters.lru import LRUAdapter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from random_systems import KINDS, random_system


def draw(index: int):
    generator = torch.Generator().manual_seed(index)
    N = int(torch.randint(3, 9, (), generator=generator))
    N = 8 if index == 0 else min(384, int(2**N * (1 + torch.rand((), generator=generator))))
    H = int(2 ** (6 * torch.rand((), generator=generator)))
    radius = [0.9, 0.99, 0.999, 0.9999][int(torch.randint(4, (), generator=generator))]
    kind = KINDS[index % len(KINDS)]
    return kind, random_system(kind, N, H, radius, generator)


def gain(first, second) -> float:
    """Largest singular value of the difference of two frequency responses."""
    grid = torch.linspace(-math.pi, math.pi, 512, dtype=torch.float64)
    worst = 0.0
    for omega in torch.cat([grid, first.poles.angle(), second.poles.angle()]).split(128):
        gap = first.frequency_response(omega) - second.frequency_response(omega)
        worst = max(worst, float(torch.linalg.matrix_norm(gap, 2).max()))
    return worst


def scipy_values(system) -> torch.Tensor:
    A, B, C = np.diag(system.poles.numpy()), system.B.numpy(), system.C.numpy()
    P = scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)
    Q = scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)
    L, R = (gramian_factor(torch.from_numpy((G + G.conj().T) / 2)) for G in (P, Q))
    values = torch.linalg.svdvals(R.mH @ L)
    return torch.nn.functional.pad(values, (0, system.order - len(values)))


def check(count: int) -> dict:
    worst = {
        "error_over_bound": 0.0,
        "excess": -math.inf,
        "scipy": 0.0,
        "radius": 0.0,
        "not_finite": 0,
        "cuts": 0,
    }
    for index in tqdm(range(count), desc="random systems"):
        _, system = draw(index)
        balancing = balance(system)
        top = float(balancing.singular_values[0])
        worst["scipy"] = max(worst["scipy"], float((balancing.spectrum() - scipy_values(system)).abs().max()) / top)
        for order in sorted({1, balancing.rank // 4, balancing.rank // 2, balancing.rank} - {0}):
            truncation = truncate(balancing, range(order))
            finite = all(torch.isfinite(torch.view_as_real(t)).all() for t in truncation.system)
            error = gain(system, truncation.system)
            worst["cuts"] += 1
            worst["not_finite"] += not finite
            worst["radius"] = max(worst["radius"], float(truncation.system.poles.abs().max()))
            worst["excess"] = max(worst["excess"], (error - truncation.bound) / top)
            if truncation.bound > 1e-9 * top:
                worst["error_over_bound"] = max(worst["error_over_bound"], error / truncation.bound)
    return worst


def numpy_reduction(poles, B, C, order):
    """Balancing by matrix square roots, as a plain numpy implementation does it."""
    P = (B @ B.conj().T) / (1 - np.outer(poles, poles.conj()))
    Q = (C.conj().T @ C) / (1 - np.outer(poles.conj(), poles))
    root = scipy.linalg.sqrtm(P)
    U, values, _ = np.linalg.svd(root @ Q @ root)
    T = root @ U * values ** (-0.25)
    Ti = np.linalg.solve(T, np.eye(len(poles)))
    A = (Ti * poles) @ T
    mu, V = np.linalg.eig(A[:order, :order])
    return mu, np.linalg.solve(V, (Ti @ B)[:order]), (C @ T)[:, :order] @ V


def timings(repeats: int) -> dict:
    layers = [LRU(512, 384, r_min=0.5, r_max=0.999) for _ in range(6)]
    adapter = LRUAdapter()
    systems = [[t.numpy() for t in layer.system()] for layer in layers]
    ours, numpys = [], []
    for _ in tqdm(range(repeats), desc="timing"):
        began = time.perf_counter()
        for layer in layers:
            adapter.reduce(layer, adapter.measure(layer), 96)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        for system in systems:
            numpy_reduction(*system, 96)
        numpys.append(time.perf_counter() - began)
    return {"ours_s": statistics.median(ours), "ours_all_s": ours, "numpy_s": statistics.median(numpys)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    worst, times = check(options.systems), timings(options.repeats)
    print(f"{options.systems} systems, {worst['cuts']} cuts")
    print(f"  largest error / bound                            {worst['error_over_bound']:.4f}")
    print(f"  largest (error - bound) / largest singular value {worst['excess']:.1e}")
    print(f"  singular values against scipy, of the largest    {worst['scipy']:.1e}")
    print(f"  largest |pole|                                   {worst['radius']:.6f}")
    print(f"  results with NaN or infinity                     {worst['not_finite']}")
    print(f"six layers, N=384, H=512 -> 96 states, {torch.get_num_threads()} threads, median of {options.repeats}")
    print(f"  this package   {times['ours_s']:.2f} s")
    print(f"  numpy, sqrtm   {times['numpy_s']:.2f} s  ({times['numpy_s'] / times['ours_s']:.1f} x)")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"correctness": worst, "time": times, "machine": machine()}, file, indent=2)


if __name__ == "__main__":
    main()
