"""Cuts by published scores on every family of layers, with LoRA, and on data with padding; what is refused."""

import copy

import pytest
import torch
from helpers import arguments, small_data, small_model
from selective_models import IDS, OWN, STOCK, make
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import state_sizes
from hf_compressm.baselines import RivalCutCallback, gather_rival_statistics, rival_cut, rival_selection, score_cut
from hf_compressm.surgery import ReductionError, find_mixers, history

TABLES = {"stock": STOCK, "own": OWN}
MODELS = pytest.mark.parametrize("table, kind", [(t, k) for t in TABLES for k in ("mamba", "mamba2")])
BATCHES = [{"input_ids": IDS}]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def selections(model, method, order):
    found = gather_rival_statistics(model, BATCHES)
    return {name: rival_selection(method, statistics, order) for name, statistics in found.items()}


@torch.no_grad()
def silence(mixer, kept):
    """Let nothing into the states that are not kept, group by group."""
    gone = [8 * group + n for group, chosen in enumerate(kept) for n in range(8) if n not in chosen]
    if hasattr(mixer, "x_proj"):
        mixer.x_proj.weight[mixer.dt_proj.weight.shape[1] + torch.tensor(gone)] = 0
    else:
        rows = mixer.out_proj.weight.shape[1] + torch.tensor(gone)
        mixer.conv1d.weight[rows], mixer.conv1d.bias[rows] = 0, 0


@MODELS
@pytest.mark.parametrize("method", ["ghost", "aire"])
def test_a_cut_model_is_the_model_with_the_other_states_silent(table, kind, method, tmp_path):
    model = make(TABLES[table], kind)
    whole, kept = copy.deepcopy(model), selections(model, method, 3)
    rival_cut(model, method, 3, BATCHES)
    for site in find_mixers(whole):
        silence(site.mixer, kept[site.name])
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), logits(make(TABLES[table], kind)), atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("kind", ["jamba", "falcon_mamba"])
def test_layers_that_normalise_b_and_c_keep_their_other_parameters(kind):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    for site in find_mixers(model):
        for norm in (site.mixer.b_layernorm, site.mixer.c_layernorm):
            if isinstance(norm.weight, torch.nn.Parameter):  # else a constant
                norm.weight.data.uniform_(0.5, 2)
    before = {site.name: copy.deepcopy(site.mixer) for site in find_mixers(model)}
    kept = selections(model, "ghost", 2)
    rival_cut(model, "ghost", 2, BATCHES)
    for site in find_mixers(model):
        old, new, (states,) = before[site.name], site.mixer, kept[site.name]
        rank, size = old.dt_proj.weight.shape[1], old.A_log.shape[1]
        rows = [*range(rank), *(rank + n for n in states), *(rank + size + n for n in states)]
        assert torch.equal(new.x_proj.weight, old.x_proj.weight[rows])
        assert torch.equal(new.A_log, old.A_log[:, states])
        for norm in ("b_layernorm", "c_layernorm"):
            assert torch.equal(getattr(new, norm).weight, getattr(old, norm).weight[states])
        assert torch.equal(new.D, old.D) and torch.equal(new.out_proj.weight, old.out_proj.weight)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_second_cut_and_training_after_it_work(kind):
    model = make(OWN, kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        if step in (2, 4):
            rival_cut(model, "last", 8 - step, BATCHES, optimizer)
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert state_sizes(model) == [4, 4, 4] and losses[-1] < losses[4] < losses[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_lora_follows(kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj"])
    model = peft.get_peft_model(make(STOCK, kind), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    merged = copy.deepcopy(model).merge_and_unload()
    for cut in (model, merged):
        rival_cut(cut, "ghost", 3, BATCHES)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_padding_does_not_count(kind):
    model = make(STOCK, kind)
    pad = torch.nn.functional.pad
    padded = {"input_ids": pad(IDS, (4, 3)), "attention_mask": pad(torch.ones_like(IDS), (4, 3))}
    plain, with_padding = (gather_rival_statistics(model, [batch]) for batch in (BATCHES[0], padded))
    for name, expected in plain.items():
        found = with_padding[name]
        assert found.tokens == expected.tokens == IDS.numel()
        for part in ("energy", "squares", "step", "B", "C"):
            torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-7)


def test_batches_may_differ_in_length():
    model = make(STOCK, "mamba")
    short = {"input_ids": IDS[:, :15]}
    both, long, only = (gather_rival_statistics(model, batches) for batches in ([BATCHES[0], short], BATCHES, [short]))
    for name, found in both.items():
        expected = long[name].squares.clone()
        expected[:15] += only[name].squares
        assert torch.equal(found.squares, expected) and found.tokens == 70


def test_orders_by_layer_need_a_config_that_can_hold_them():
    own, stock = make(OWN, "mamba"), make(STOCK, "mamba")
    name = find_mixers(own)[1].name
    rival_cut(own, "ghost", {name: 3}, BATCHES)
    assert state_sizes(own) == own.config.state_sizes == [8, 3, 8]
    with pytest.raises(ValueError, match=r"one state size for all layers; the orders would leave \[3, 8\]"):
        rival_cut(stock, "ghost", {name: 3}, BATCHES)
    assert state_sizes(stock) == [8, 8, 8]


@pytest.mark.parametrize("kind", ["lru", "mamba"])
def test_weights_that_are_not_finite_are_refused_with_the_layers_name(kind):
    model = make(OWN, "mamba") if kind == "mamba" else small_model()
    site = find_mixers(model)[1]
    next(site.mixer.parameters()).data.view(-1)[0] = torch.nan
    with pytest.raises(ReductionError, match=f"{site.name}: .*NaN"):
        rival_cut(model, "aire", 3, BATCHES if kind == "mamba" else None)
    assert len(set(state_sizes(model))) == 1 and not history(model)


def test_an_adapter_that_cannot_keep_states_is_named(monkeypatch):
    model = small_model()
    monkeypatch.delattr(type(find_mixers(model)[0].adapter), "keep")
    with pytest.raises(TypeError, match="mixer: LRUAdapter cannot keep single states"):
        rival_cut(model, "last", 3)


def run(folder, callback, **settings):
    model = small_model()
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=small_data(), callbacks=[callback])
    trainer.train()
    return trainer


def test_attempts_that_cut_nothing_leave_no_record(tmp_path):
    trainer = run(tmp_path, RivalCutCallback("last", 11), max_steps=40)
    logged = [entry["step"] for entry in trainer.state.log_history if "compression/loss_after" in entry]
    assert state_sizes(trainer.model) == [11, 11]
    assert logged == [record["step"] for record in history(trainer.model)] and len(logged) == 1


def test_random_states_follow_the_runs_seed(tmp_path, monkeypatch):
    drawn = []
    plain = rival_selection

    def spy(*args):
        drawn.append(plain(*args))
        return drawn[-1]

    monkeypatch.setattr(score_cut, "rival_selection", spy)
    for seed in (1, 2, 1):
        run(tmp_path, RivalCutCallback("random", 6, cut_steps=[2]), max_steps=2, seed=seed)
    assert drawn[0:2] == drawn[4:6] != drawn[2:4]


def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(ValueError, match="unknown method 'ghost'; allowed for this layer are first, random, last"):
        run(tmp_path, RivalCutCallback("ghost", 3, cut_steps=[19]))
    monkeypatch.setattr(score_cut, "processes", lambda: 2)
    with pytest.raises(NotImplementedError, match="single process; 2 train"):
        run(tmp_path, RivalCutCallback("last", 3))
