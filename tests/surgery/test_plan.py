"""Plans, history, snapshots and resizing on whole models."""

import copy
import json
import math

import pytest
import torch
from helpers import small_model
from transformers import AutoModelForSequenceClassification

from hf_compressm import Energy, Fraction, SizeConstraints, Target, compress, state_sizes
from hf_compressm.surgery import (
    CutSettings,
    ReductionError,
    Snapshot,
    apply_plan,
    find_mixers,
    history,
    make_plan,
    original_sizes,
    resize_mixers,
    short,
    sizes_in_state_dict,
)


def loss_of(model, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(8, 12, 1, generator=generator)
    return model(input_values=values, labels=torch.randint(0, 3, (8,), generator=generator)).loss


def test_a_plan_changes_nothing_until_applied():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    plan = make_plan(model, settings=CutSettings(Fraction(0.5)))
    assert plan.cuts and state_sizes(model) == [12, 12] and history(model) == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    apply_plan(model, None, plan, step=7)
    assert state_sizes(model) == model.config.state_sizes == [6, 6]
    with pytest.raises(ValueError, match="the plan was made for"):
        apply_plan(model, None, plan)


def test_a_mild_cut_hardly_changes_the_output_and_a_harsh_one_does():
    moved = []
    values = torch.randn(8, 12, 1)
    for share in (0.9, 0.1):
        model = small_model(state_sizes=40, hidden_size=4).eval()
        before = model(input_values=values).logits
        compress(model, policy=Fraction(share))
        moved.append((model(input_values=values).logits - before).abs().max().item())
    assert moved[0] < 1e-3 and 10 * moved[0] < moved[1]


def test_history_records_the_cut_and_travels_with_the_checkpoint(tmp_path):
    model = small_model()
    record = compress(model, policy=Energy(0.3), step=5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert history(model) == [record] == json.loads(json.dumps([record])) and history(loaded) == [short(record)]
    assert state_sizes(loaded) == state_sizes(model) and original_sizes(loaded) == [12, 12]
    assert record["step"] == 5 and record["policy"] == "energy" and record["tau"] == 0.3
    for layer in record["layers"]:
        assert layer["new_size"] < layer["old_size"] == len(layer["singular_values"])
        assert layer["bound"] == pytest.approx(2 * sum(layer["singular_values"][layer["new_size"] :]), rel=1e-4)
    model.eval(), loaded.eval()
    assert torch.equal(loss_of(model), loss_of(loaded))


def test_target_reaches_the_mean_and_walks_there_in_equal_ratios():
    model = small_model(state_sizes=64, hidden_size=4)
    for left in (2, 1):
        apply_plan(model, None, make_plan(model, settings=CutSettings(Target(16)), attempts_left=left))
    sizes = [[layer["new_size"] for layer in record["layers"]] for record in history(model)]
    assert [sum(s) for s in sizes] == [64, 32]


def test_amounts_have_short_forms():
    sizes = []
    for amount in ({"tau": 0.3}, {"policy": Energy(0.3)}, {"target": 4}, {"policy": Target(4)}):
        model = small_model()
        compress(model, **amount)
        sizes.append(state_sizes(model))
    assert sizes[0] == sizes[1] != sizes[2] == sizes[3]
    with pytest.raises(ValueError, match=r"give one of tau, target and policy; got tau=0.3, target=4"):
        compress(small_model(), tau=0.3, target=4)
    with pytest.raises(ValueError, match="tau must lie strictly between 0 and 1"):
        compress(small_model(), tau=1.0)


def test_fraction_speaks_of_the_original_size():
    model = small_model(state_sizes=64, hidden_size=4)
    for left in (2, 1):
        apply_plan(model, None, make_plan(model, settings=CutSettings(Fraction(0.25)), attempts_left=left))
    assert state_sizes(model) == [16, 16]


def test_nothing_is_cut_where_too_little_would_go():
    model = small_model()
    record = compress(model, policy=Energy(1e-6))
    assert state_sizes(model) == [12, 12] and history(model) == []
    assert all(layer["new_size"] == 12 for layer in record["layers"])


def test_uniform_sizes_and_multiples():
    model = small_model(state_sizes=40)
    compress(model, policy=Energy(0.2), constraints=SizeConstraints(uniform=True, multiple_of=8))
    assert len(set(state_sizes(model))) == 1 and state_sizes(model)[0] % 8 == 0


def test_nan_leaves_the_model_alone_and_names_the_layer():
    model = small_model()
    with torch.no_grad():
        find_mixers(model)[1].mixer.C_re[0, 0] = math.nan
    with pytest.raises(ReductionError, match=r"layers\.1\.mixer: C holds NaN"):
        compress(model, policy=Fraction(0.5))
    assert state_sizes(model) == [12, 12]


@pytest.mark.parametrize("fused", [False, True])
def test_a_snapshot_undoes_a_cut_completely(fused):
    model = small_model(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)

    def train(count):
        for seed in range(count):
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(3)
    snapshot = Snapshot.take(model, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    compress(model, optimizer=optimizer, policy=Fraction(0.25))
    train(3)
    snapshot.restore(model, optimizer)
    assert state_sizes(model) == model.config.state_sizes == [12, 12] and history(model) == []
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], state["state"][index][key]) for key in entry)
    train(1)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_sizes_of_a_state_dict_and_a_contradiction_in_it():
    small = small_model(state_sizes=[5, 7])
    model = small_model()
    state = small.state_dict()
    assert list(sizes_in_state_dict(model, state).values()) == [5, 7]
    resize_mixers(model, sizes_in_state_dict(model, state))
    model.load_state_dict(state)
    assert model.config.state_sizes == [5, 7]
    state["backbone.layers.1.mixer.C_im"] = torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.C_im has shape \(6, 3\), expected \(6, 7\)"):
        sizes_in_state_dict(model, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    model = small_model(state_sizes=32).to(dtype)
    for site in find_mixers(model):
        site.mixer.nu_log.data = site.mixer.nu_log.data.float()
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    compress(model, optimizer=torch.optim.AdamW(model.parameters()), policy=Fraction(0.25))
    assert {name: p.dtype for name, p in model.named_parameters()} == kinds and state_sizes(model) == [8, 8]
