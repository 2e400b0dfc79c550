"""What a cut sends between ranks has the size that docs/scale.md says."""

import pickle

import pytest
import torch
from helpers import small_model
from selective_models import IDS, OWN, STOCK, make

from hf_compressm import Fraction
from hf_compressm.surgery import CutSettings, Team, gather_statistics, make_plan
from hf_compressm.training.calibration import calibration_batches

OVERHEAD = 10_000
"""Bytes of names and of pickle's own per layer, at most."""


class Given(Team):
    """Statistics that are there already."""

    def __init__(self, statistics):
        self.statistics = statistics

    def gather(self, model, batches, recordings, fast_ops):
        return self.statistics


def planned(model, statistics):
    plan = make_plan(model, settings=CutSettings(Fraction(0.5)), team=Given(statistics))
    return plan.layers[0].new_size, len(pickle.dumps([plan, None]))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("table, kind", [(OWN, "mamba"), (OWN, "mamba2"), (STOCK, "mamba2")])
def test_selective_layers(table, kind, size):
    heads = {"num_heads": size // 4} if kind == "mamba2" else {}
    model = make(table, kind, state_size=size, hidden_size=size, num_hidden_layers=1, **heads)
    statistics, sent = gather_statistics(model, {"input_ids": IDS.repeat(16, 4)}), []
    N, F, I = size, size, 2 * size
    G = getattr(model.config, "n_groups", 1)
    for found in statistics.values():
        found.sum_with(lambda tensor: sent.append(tensor.numel() * tensor.element_size()))
    assert sum(sent) == 8 * (2 * G * N * N + G * N + 2) and len(sent) == 1
    r, found = planned(model, statistics)
    if kind == "mamba":
        R = model.config.time_step_rank
        expected = 4 * I * r + 8 * (r * N + (R + 2 * r) * (I + 2 * (R + 2 * N)))
    elif table is OWN:
        expected = 16 * G * r * N
    else:
        rows, convolved = 3 * I + 4 * G * r + size // 4, I + 2 * G * r
        expected = 4 * ((rows - convolved) * F + convolved * (model.config.conv_kernel + 1)) + 8 * rows
    assert 0 < found - expected - 8 * N < OVERHEAD


@pytest.mark.parametrize("N, H", [(32, 16), (64, 16), (64, 80)])
def test_time_invariant_layers(N, H):
    r, found = planned(small_model(state_sizes=N, hidden_size=H, layers=1), {})
    assert 0 < found - 8 * (14 * r * N + 12 * r * H + N) < OVERHEAD


def test_a_rank_reads_only_its_own_calibration_data():
    read = []

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            read.append(index)
            return torch.tensor(index)

    loader = torch.utils.data.DataLoader(Items(), batch_size=2)
    parts = [torch.cat(calibration_batches(loader, 3, 5, rank, 4)).tolist() for rank in range(4)]
    assert sorted(read) == sorted(sum(parts, [])) and len(set(read)) == 4 * 3 * 2
    assert torch.cat(calibration_batches(loader, 12, 5)).tolist() == [
        item for turn in range(3) for part in parts for item in part[2 * turn : 2 * turn + 2]
    ]
