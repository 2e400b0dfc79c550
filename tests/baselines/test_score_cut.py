"""Cuts by published scores: the scores by hand, what is left of a model and its optimizer, and the callback."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from helpers import arguments, small_data, small_model
from transformers import MambaConfig, MambaForCausalLM, Trainer

from hf_compressm import state_sizes
from hf_compressm.baselines import (
    LTI_METHODS,
    METHODS,
    RivalCutCallback,
    gather_rival_statistics,
    rival_cut,
    rival_selection,
)
from hf_compressm.layers.lru import LRU
from hf_compressm.surgery import find_mixers, history, selective_signals


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, state_size=6, use_cache=False)
    )


def tokens(count=16, length=10):
    ids = torch.randint(0, 9, (count, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")


BATCH = [tokens()[:4]]


def lru_of(model):
    return next(module for module in model.modules() if isinstance(module, LRU))


@pytest.mark.parametrize("method,power", [("last", 2), ("aire", 1)])
def test_scores_of_modes_by_hand(method, power):
    layer = lru_of(small_model())
    poles, B, C = layer.system()
    decay = (1 - abs(poles)) ** 2 if power == 2 else 1 - abs(poles) ** 2
    scores = [float(B[i].norm() ** 2 * C[:, i].norm() ** 2 / decay[i]) for i in range(12)]
    expected = sorted(sorted(range(12), key=lambda i: -scores[i])[:5])
    found = gather_rival_statistics(small_model())
    assert rival_selection(method, next(iter(found.values())), 5) == [expected]


@pytest.mark.parametrize("method", LTI_METHODS)
def test_a_cut_layer_is_the_layer_without_the_other_modes(method):
    model = small_model()
    whole = copy.deepcopy(model)
    selections = {
        name: rival_selection(method, system, 4, torch.Generator().manual_seed(3))[0]
        for name, system in gather_rival_statistics(model).items()
    }
    rival_cut(model, method, 4, generator=torch.Generator().manual_seed(3))
    assert state_sizes(model) == model.config.state_sizes == [4, 4] and history(model)[-1]["score"] == method
    kept = next(iter(selections.values()))
    old, new = lru_of(whole), lru_of(model)
    with torch.no_grad():
        gone = [i for i in range(12) if i not in kept]
        old.C_re[:, gone], old.C_im[:, gone] = 0, 0
    u = torch.randn(2, 20, 6)
    torch.testing.assert_close(new(u)[0], old(u)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_score_cuts_a_mamba(method):
    model = mamba()
    rival_cut(model, method, 2, BATCH, generator=torch.Generator().manual_seed(0))
    assert state_sizes(model) == [2, 2] and model(**BATCH[0]).loss.isfinite()


@torch.no_grad()
def test_ghosts_score_is_the_energy_of_what_is_read_out():
    model, seen = mamba(), []
    site = find_mixers(model)[0]
    with site.mixer.register_forward_pre_hook(lambda mixer, args: seen.append(args[0])):
        model(**BATCH[0])
    signals = selective_signals(site.mixer, seen[0], None)
    # h_t = sum over s <= t of exp(A (dt_{s+1} + ... + dt_t)) dt_s B_s u_s, all pairs at once.
    clock = signals.dt.cumsum(1)
    elapsed = clock[:, :, None] - clock[:, None]
    causal = torch.ones(10, 10).tril()[None, :, :, None, None]
    decay = (elapsed[..., None] * signals.A).clamp(max=0).exp() * causal
    drive = (signals.dt * signals.u)[..., None] * signals.B[:, :, 0, None]
    h = torch.einsum("btsin,bsin->btin", decay, drive)
    expected = (h.square().sum(2) * signals.C[:, :, 0].square()).sum((0, 1))
    found = gather_rival_statistics(model, BATCH)[site.name]
    torch.testing.assert_close(found.energy[0].float(), expected, rtol=1e-4, atol=1e-8)
    assert rival_selection("ghost", found, 3) == [sorted(expected.topk(3).indices.tolist())]


@pytest.mark.parametrize("kind", ["lru", "mamba"])
def test_moments_follow_and_training_goes_on(kind):
    model, data = (mamba(), tokens()) if kind == "mamba" else (small_model(dropout=0.0), small_data())
    batch = data[:8]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    site, name = ("A_log", "A_log") if kind == "mamba" else ("nu_log", "nu_log")
    old = next(p for key, p in model.named_parameters() if key.endswith(site))
    moment = optimizer.state[old]["exp_avg"].clone()
    found = gather_rival_statistics(model, [batch])
    kept = rival_selection("first", next(iter(found.values())), 3)[0]
    rival_cut(model, "first", 3, optimizer=optimizer, statistics=found)
    optimizer.zero_grad()
    new = next(p for key, p in model.named_parameters() if key.endswith(name))
    expected = moment[:, kept] if kind == "mamba" else moment[kept]
    torch.testing.assert_close(optimizer.state[new]["exp_avg"], expected)
    before, losses = new.detach().clone(), [step() for _ in range(15)]
    assert losses[-1] < losses[0] and not torch.equal(before, new)


@pytest.mark.parametrize("kind", ["lru", "mamba"])
def test_the_callback_walks_to_its_target_and_logs(tmp_path, kind):
    model, data = (mamba(), tokens(64)) if kind == "mamba" else (small_model(), small_data())
    method, target = ("ghost", 2) if kind == "mamba" else ("last", 3)
    callback = RivalCutCallback(method, target, cut_steps=[3, 6])
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[callback])
    trainer.train()
    assert state_sizes(model) == [target, target]
    assert [record["layers"][0]["new_size"] for record in history(model)] == ([3, 2] if kind == "mamba" else [6, 3])
    logged = [entry for entry in trainer.state.log_history if "compression/loss_after" in entry]
    assert [entry["step"] for entry in logged] == [3, 6] and json.dumps(logged)


def test_the_default_schedule_is_that_of_the_callback(tmp_path):
    model = small_model()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=40), train_dataset=small_data(), callbacks=[RivalCutCallback("aire", 2)]
    )
    trainer.train()
    assert [record["step"] for record in history(model)] == [1, 2, 3, 4]


def test_bad_input_is_refused(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="unknown method 'ghost'; allowed for this layer are first"):
        rival_cut(model, "ghost", 3)
    with pytest.raises(ValueError, match="order must lie between 1 and 12.*got 0"):
        rival_cut(model, "last", 0)
    with pytest.raises(ValueError, match="no mixer 'nowhere'; it has "):
        rival_cut(model, "last", {"nowhere": 3})
    with pytest.raises(ValueError, match="'random' needs a generator"):
        rival_cut(model, "random", 3)
    assert state_sizes(model) == [12, 12] and not history(model)
    with pytest.raises(ValueError, match="unknown method 'lost'"):
        RivalCutCallback("lost", 3)
    with pytest.raises(ValueError, match="target"):
        RivalCutCallback("last", 0)
