"""How rankings of states are recorded during training and compared with those at its end."""

import json

import pytest
import torch
from datasets import Dataset
from delta_models import make as stock_delta
from helpers import arguments, small_data, small_model
from own_delta_models import own as own_delta
from random_systems import random_system
from selective_models import OWN, STOCK, make
from transformers import Trainer

from hf_compressm import CompreSSMCallback
from hf_compressm.reduction import (
    DiagonalSystem,
    energy_orders,
    hankel_singular_values,
    read_out_correction,
    upper_half_plane,
)
from hf_compressm.reproduction.ranking_stability import RankRecorder, stability_table
from hf_compressm.reproduction.rankings import Ranking, agreement, kept_agreement, match, next_step, rankings
from hf_compressm.surgery import CompreSSMMamba2Adapter, MambaAdapter, find_mixers, measure_mixers
from hf_compressm.surgery.adapters.lru import LRUAdapter
from hf_compressm.surgery.adapters.selective import SelectiveMeasurement

KINDS = pytest.mark.parametrize(
    "kind", ["lru", "own mamba", "own mamba2", "stock mamba", "stock mamba2", "own delta rule", "stock delta rule"]
)
SHARES = (0.0, 0.1, 0.5)


def tokens(count=32, length=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (count, length), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")


def trained(kind, folder, recorder=None, others=(), **settings):
    if kind == "lru":
        model, data = small_model(dropout=0.2), small_data()
    elif kind.endswith("delta rule"):
        model, data = (own_delta() if kind.startswith("own") else stock_delta("qwen3_5")).train(), tokens()
    else:
        origin, name = kind.split()
        model, data = make({"own": OWN, "stock": STOCK}[origin], name, num_hidden_layers=2).train(), tokens()
    args = arguments(folder, **({"max_steps": 10, "learning_rate": 1e-2} | settings))
    callbacks = [*others, *([recorder] if recorder else [])]
    Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
    return model


def lru_ranking(system: DiagonalSystem) -> Ranking:
    mixer = find_mixers(small_model(state_sizes=system.order, hidden_size=system.C.shape[0], layers=1))[0].mixer
    mixer.system = lambda: system
    return rankings(LRUAdapter(), LRUAdapter().measure(mixer))[0]


def selective(seed, N=8, groups=1):
    generator = torch.Generator().manual_seed(seed)
    G, W = torch.randn(2, groups, N, 3 * N, generator=generator, dtype=torch.float64).unbind(0)
    scale = torch.logspace(0, -2, N, dtype=torch.float64)[torch.randperm(N, generator=generator)]
    return SelectiveMeasurement(scale * (G @ G.mT) * scale[:, None], W @ W.mT, torch.ones(groups, N))


SUBSET, BASIS = MambaAdapter("none.None", None), CompreSSMMamba2Adapter()


@KINDS
def test_recording_does_not_change_the_weights_that_training_ends_with(kind, tmp_path):
    recorder = RankRecorder(SHARES)
    with_it, without = trained(kind, tmp_path, recorder), trained(kind, tmp_path)
    for (name, first), second in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(first, second), name
    records = recorder.as_records()
    assert json.loads(json.dumps(records)) == records
    assert [(record["share"], record["step"]) for record in records] == [(0, 0), (0.1, 1), (0.5, 5), (1, 10)]
    names = [site.name for site in find_mixers(with_it)]
    for record in records:
        assert list(record["layers"]) == names and record["mean"]["states"] == record["layers"][names[0]]["states"]
        assert -1 <= record["mean"]["spearman"] <= 1 and 0 <= record["mean"]["kept"]["0.25 N"]["overlap"] <= 1 + 1e-9
        both = [record["layers"][name]["spearman"] for name in names]
        assert record["mean"]["spearman"] == pytest.approx(sum(both) / len(both))
    moved = [record["mean"]["move_over_bound"] for record in records]
    assert all(0 < ratio <= 1 + 1e-6 for ratio in moved[:-1]) and moved[-1] is None


@KINDS
def test_a_ranking_that_does_not_move_agrees_entirely(kind, tmp_path):
    recorder = RankRecorder(SHARES)
    trained(kind, tmp_path, recorder, learning_rate=0.0, max_steps=4)
    for record in recorder.as_records():
        found = record["mean"]
        assert found["spearman"] == found["spearman_all"] == pytest.approx(1, abs=1e-12)
        for kept in found["kept"].values():
            assert kept["stability"] == 1 and kept["overlap"] == pytest.approx(1) == kept["held"]
            assert kept["chance"] == pytest.approx(kept["kept"] / found["states"])
        assert found["move"] in (0, None) and found["move_over_bound"] is None and found["clear_gaps"] is None


def test_the_numbers_of_states_are_those_of_a_cut_at_the_end(tmp_path):
    recorder = RankRecorder((0.5,), tau=0.3, depths=(0.5, 1.0))
    model = trained("lru", tmp_path, recorder)
    for name, measured in measure_mixers(model, {}).items():
        kept = recorder.as_records()[0]["layers"][name]["kept"]
        orders = {"0.5 N": 6, "1 N": 12, "tau 0.3": energy_orders([measured.spectrum()], 0.3)[0]}
        assert {key: found["kept"] for key, found in kept.items()} == orders
        assert kept["1 N"]["overlap"] == pytest.approx(1)  # all of the space


def test_permuted_states_of_a_time_invariant_layer_are_followed():
    generators = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    now, other = (lru_ranking(random_system("plain", 16, 3, 0.95, generator)) for generator in generators)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    shuffled = Ranking(now.P, now.Q, now.right[:, order], now.left[:, order], now.ranked, now.leading)
    partner = match(now, shuffled)
    assert torch.equal(order[partner], torch.arange(16))
    assert abs(agreement(now, shuffled, partner)["spearman"]) < 0.5
    assert kept_agreement(now, now, match(now, now), 4)["held"] == pytest.approx(1)
    assert kept_agreement(other, now, match(other, now), 4)["overlap"] < 0.7


def test_balanced_coordinates_hold_their_squared_singular_values():
    system = upper_half_plane(random_system("plain", 16, 3, 0.95, torch.Generator().manual_seed(0)))[0]
    found, values = lru_ranking(system), hankel_singular_values(system)
    for r in (1, 4, 16):
        assert found.held(found.left[:, :r]) == pytest.approx(float(values[:r].square().sum()), rel=1e-4)
    random = torch.randn(16, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    assert 0 < found.held(random) < found.held(found.left[:, :4])


def test_held_energy_of_a_subset_is_that_of_the_corrected_read_out():
    found = rankings(SUBSET, measured := selective(0))[0]
    kept = found.left[:, :3].argmax(0).tolist()
    K, G, W = read_out_correction(measured.G[0], kept), measured.G[0], measured.W[0]
    assert found.held(found.left[:, :3]) == pytest.approx(float((W * (K.T @ G[kept][:, kept] @ K)).sum()), rel=1e-4)


def test_subsets_are_compared_by_identity():
    now, end = (rankings(SUBSET, selective(seed))[0] for seed in (0, 1))
    order_now, order_end = (ranking.left.argmax(0).tolist() for ranking in (now, end))
    partner = match(now, end)
    assert [order_end[j] for j in partner.tolist()] == order_now
    found = kept_agreement(now, end, partner, 4)
    assert found["overlap"] == pytest.approx(len({*order_now[:4]} & {*order_end[:4]}) / 4)
    assert found["stability"] == pytest.approx(selective(1).agreement(selective(0), 4))


def test_states_that_are_not_ranked_tie():
    silent = selective(0)
    silent.G[:, 3:], silent.G[:, :, 3:] = 0, 0
    now, end = rankings(SUBSET, silent)[0], rankings(SUBSET, selective(1))[0]
    assert now.ranked == 3 >= now.leading and end.ranked == 8
    reordered = Ranking(now.P, now.Q, *[now.left[:, [0, 1, 2, 7, 4, 6, 5, 3]]] * 2, 3, now.leading)
    first, second = (agreement(ranking, end, match(ranking, end))["spearman_all"] for ranking in (now, reordered))
    assert first == pytest.approx(second)


def test_a_change_of_basis_is_compared_by_its_subspace():
    measured = selective(0)
    now, values = rankings(BASIS, measured)[0], measured.spectrum()
    assert now.held(now.left[:, :3]) == pytest.approx(float(values[:3].square().sum()), rel=1e-4)
    mixed = now.right.clone()
    mixed[:, :2] = now.right[:, :2] @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    turned = Ranking(now.P, now.Q, mixed, now.left, now.ranked, now.leading)
    assert kept_agreement(now, turned, match(now, turned), 2)["overlap"] == pytest.approx(1)
    assert kept_agreement(now, turned, match(now, turned), 1)["overlap"] < 0.99
    assert len(rankings(BASIS, selective(0, groups=3))) == 3


def test_too_few_states_to_correlate_and_none_at_all():
    tiny = lru_ranking(random_system("low_rank", 2, 1, 0.5, torch.Generator().manual_seed(0)))
    assert agreement(tiny, tiny, match(tiny, tiny))["spearman"] is None
    empty = Ranking(tiny.P * 0, tiny.Q, tiny.right, tiny.left, 0, 0)
    assert kept_agreement(empty, tiny, match(empty, tiny), 2)["overlap"] is None


def test_neighbours_that_cannot_cross_are_counted():
    eye = torch.eye(3, dtype=torch.float64)
    values = torch.tensor([3.0, 2.0, 1.9], dtype=torch.float64)
    now = Ranking(values.square().diag(), eye, eye, eye, 3, 3)
    after = Ranking((values + torch.tensor([0.2, -0.1, 0.0])).square().diag(), eye, eye, eye, 3, 3)
    found = next_step(now, after)  # gaps 1 and 0.1 against a spread of 0.3
    assert found["clear_gaps"] == 0.5 and found["move_over_bound"] == pytest.approx(1)
    assert found["move"] == pytest.approx(0.2 / 3)


def entry(share, value, ratio):
    kept = {"overlap": value, "chance": 0.25, "stability": value, "held": value, "held_by_chance": 0.125}
    mean = {"spearman": value, "kept": {"0.25 N": kept}, "move_over_bound": ratio, "clear_gaps": ratio}
    return {"share": share, "mean": mean}


def test_the_table_has_means_over_seeds_and_says_what_chance_gives():
    lines = stability_table([entry(0.1, 0.5, 0.25), entry(1.0, 1.0, None), entry(0.1, 0.7, 0.25)]).splitlines()
    assert lines[0].startswith("| share of training | Spearman | overlap, 0.25 N | top-r stability, 0.25 N |")
    assert lines[2] == (
        "| 0.1 | 0.60 ± 0.14 | 0.60 ± 0.14 (0.25) | 0.60 ± 0.14 | 0.60 ± 0.14 (0.12) | 0.25 ± 0.00 | 0.25 ± 0.00 |"
    )
    assert lines[3] == "| 1 | 1.00 | 1.00 (0.25) | 1.00 | 1.00 (0.12) | - | - |"
    with pytest.raises(ValueError, match="no records"):
        stability_table([])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shares": (0.1, 1.5)}, r"shares .* \[0, 1\]; got \(0.1, 1.5\)"),
        ({"depths": (0.0,)}, r"depths.* \(0, 1\]"),
        ({"tau": 1.0}, "tau must lie strictly between 0 and 1; got 1.0"),
        ({"calibration_batches": 0}, "calibration_batches must be >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RankRecorder(**settings)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="training has not reached"):
        RankRecorder().as_records()
    cuts = CompreSSMCallback(cut_steps=[3], policy="fraction", keep_fraction=0.5)
    with pytest.raises(ValueError, match=r"went from \[12, 12\] to \[6, 6\] states"):
        trained("lru", tmp_path, RankRecorder((0.5,)), others=[cuts])
    with pytest.raises(TypeError, match="rankings of int cannot be compared"):
        rankings(SUBSET, 3)


def test_a_resumed_run_is_refused(tmp_path):
    model, data = small_model(), small_data()
    settings = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(model, settings, train_dataset=data).train()
    trainer = Trainer(model, settings, train_dataset=data, callbacks=[RankRecorder()])
    with pytest.raises(ValueError, match="resumed at step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
