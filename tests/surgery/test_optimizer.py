"""Optimizer surgery: position, carried moments, refusals."""

import copy

import pytest
import torch
import transformers.optimization
from helpers import small_data, small_model
from transformers.optimization import Adafactor

from hf_compressm import Energy, Fraction, compress, state_sizes
from hf_compressm.surgery import CutSettings, check_parameters, find_mixers, make_plan, unwrap_optimizer

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "adafactor_beta1": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def batch() -> dict:
    data = small_data()
    return {"input_values": data["input_values"][:32], "labels": data["labels"][:32]}


def steps(model, optimizer, count: int) -> float:
    inputs = batch()
    for _ in range(count):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_every_parameter(name):
    model = small_model(dropout=0.0)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)
    compress(model, optimizer=optimizer, policy=Fraction(0.5))
    assert state_sizes(model) == [6, 6]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in model.parameters()], "every live parameter, in the model's order"
    assert set(optimizer.state) <= set(model.parameters())
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    steps(model, optimizer, 3)
    frozen = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert not frozen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_round_trip_after_a_cut(name):
    model = small_model(dropout=0.0)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 2)
    compress(model, optimizer=optimizer, policy=Fraction(0.5))
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 3), steps(twin, twin_optimizer, 3)
    for (key, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("adamw", "exp_avg", "exp_avg_sq"), ("sgd_momentum", "momentum_buffer", None)],
)
def test_moments_go_through_the_maps_of_the_plan(name, first, second):
    model = small_model(dropout=0.0)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)
    old = {
        site.name: {key: dict(optimizer.state[p]) for key, p in site.parameters().items()}
        for site in find_mixers(model)
    }
    plan = make_plan(model, settings=CutSettings(Fraction(0.5)))
    compress(model, optimizer=optimizer, policy=Fraction(0.5))
    for site, layer in zip(find_mixers(model), plan.layers, strict=True):
        for key, parameter in site.parameters().items():
            change, state = layer.reduction.changes[key], optimizer.state[parameter]
            wanted = change.map_first({k: s[first] for k, s in old[site.name].items()})
            assert torch.allclose(state[first], wanted) and state[first].abs().max() > 0
            if second:
                wanted = change.map_second({k: s[second] for k, s in old[site.name].items()})
                assert torch.allclose(state[second], wanted) and (state[second] >= 0).all()
                assert state["step"] == 3


def test_factored_moments_are_those_of_the_mapped_full_moment():
    model = small_model(dropout=0.0)
    optimizer = OPTIMIZERS["adafactor"](model.parameters())
    steps(model, optimizer, 3)
    site = find_mixers(model)[0]
    full = {}
    for key, p in site.parameters().items():
        s = optimizer.state[p]
        rows = s.get("exp_avg_sq_row")
        full[key] = s["exp_avg_sq"] if rows is None else rows[:, None] * s["exp_avg_sq_col"] / rows.mean()
    change = make_plan(model, settings=CutSettings(Fraction(0.5))).layers[0].reduction.changes["B_re"]
    compress(model, optimizer=optimizer, policy=Fraction(0.5))
    wanted, state = change.map_second(full), optimizer.state[site.mixer.B_re]
    assert torch.allclose(state["exp_avg_sq_row"], wanted.mean(1)) and torch.allclose(
        state["exp_avg_sq_col"], wanted.mean(0)
    )


def test_groups_keep_their_members_and_settings():
    model = small_model()
    named = dict(model.named_parameters())
    ssm = [n for n in named if "mixer" in n]
    rest = [n for n in named if "mixer" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in rest]}, {"params": [named[n] for n in ssm], "lr": 1e-3}], lr=1e-2
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    steps(model, optimizer, 2)
    compress(model, optimizer=optimizer, policy=Energy(0.3))
    named = dict(model.named_parameters())
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(named[n]) for n in ssm]
    steps(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(5e-4)


def test_a_cut_before_the_first_step_and_without_an_optimizer():
    model = small_model()
    compress(model, optimizer=torch.optim.AdamW(model.parameters()), policy=Fraction(0.5))
    compress(model, policy=Fraction(0.25))
    assert state_sizes(model) == [3, 3] and model.config.state_sizes == [3, 3]


class AdamW8bit(torch.optim.AdamW):
    """Stands for a quantised optimizer: same base class, another kind of state."""


def test_unknown_optimizers_are_refused_by_name():
    model = small_model()
    with pytest.raises(TypeError, match="AdamW8bit.*torch.AdamW"):
        compress(model, optimizer=AdamW8bit(model.parameters()))
    assert state_sizes(model) == [12, 12]


def test_wrapped_optimizers_are_unwrapped():
    from accelerate import Accelerator

    model = small_model()
    inner = torch.optim.AdamW(model.parameters())
    assert unwrap_optimizer(Accelerator(cpu=True).prepare(inner)) is inner
    assert isinstance(transformers.optimization.Adafactor(model.parameters()), torch.optim.Optimizer)


def test_frozen_shared_and_missing_parameters_are_refused():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    mixers = [site.mixer for site in find_mixers(model)]
    mixers[0].B_re.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.B_re is frozen"):
        check_parameters(model, optimizer)
    mixers[0].B_re.requires_grad_(True)
    partial = torch.optim.AdamW([p for n, p in model.named_parameters() if "nu_log" not in n])
    with pytest.raises(ValueError, match="nu_log is trainable but in no parameter group"):
        compress(model, optimizer=partial)
    mixers[1].C_re = mixers[0].C_re
    with pytest.raises(ValueError, match="C_re is shared by"):
        compress(model, optimizer=optimizer)
