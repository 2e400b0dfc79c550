"""A cut in the middle of accumulation: gradients from before it and after it add up to those of the smaller model."""

import copy
import logging

import pytest
import torch
from helpers import small_model
from selective_models import OWN, make
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM

from hf_compressm import Fraction, compress, use_fast_ops
from hf_compressm.baselines import rival_cut
from hf_compressm.surgery import CutSettings, Snapshot, apply_plan, find_mixers, make_plan, resize_mixers

TOKENS = [torch.randint(1, 50, (3, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
SELECTIVE = ["own-mamba", "own-mamba2", *sorted(CONFIGS)]
KINDS = ["lru", *SELECTIVE]


def build(kind):
    """A model in float64, whose later half of states is to be cut away."""
    torch.manual_seed(0)
    if kind == "lru":
        model = small_model(dropout=0.0)
    elif kind.startswith("own-"):
        model = make(OWN, kind[4:], state_sizes=6)  # a Mamba-2 then has the matrices that its first cut would add
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
        use_fast_ops(model)
        if kind in ("jamba", "granitemoehybrid", "nemotron_h"):
            model.set_experts_implementation("eager")  # the other one knows no float64
    return model.double().eval()


@torch.no_grad()
def silence(model, dead: bool) -> None:
    """The later half of the states is read by nobody, and if `dead` driven by nobody either."""
    for site in find_mixers(model):
        mixer, size = site.mixer, site.state_size
        half = torch.arange(size // 2, size)
        if hasattr(mixer, "C_re"):
            mixer.C_re[:, half] = mixer.C_im[:, half] = 0
            if dead:
                mixer.B_re[half] = mixer.B_im[half] = 0
        elif hasattr(mixer, "x_proj"):
            rank = mixer.x_proj.weight.shape[0] - 2 * size
            mixer.x_proj.weight.mul_(4)
            mixer.x_proj.weight[rank + size + half] = 0
            if dead:
                mixer.x_proj.weight[rank + half] = 0
        elif getattr(mixer, "read_in", None) is not None:
            mixer.read_out[:, half] = 0
            if dead:
                mixer.read_in[:, half] = 0
        else:
            groups, channels = mixer.n_groups, mixer.out_proj.weight.shape[1]
            block = groups * mixer.ssm_state_size if hasattr(mixer, "ssm_state_size") else groups * size
            rows = torch.cat([group * size + half for group in range(groups)])
            places = [channels + block + rows] + [channels + rows] * dead
            for place in places:
                mixer.conv1d.weight[place] = 0
                if mixer.conv1d.bias is not None:
                    mixer.conv1d.bias[place] = 0


def batch(kind, index):
    if kind != "lru":
        return {"input_ids": TOKENS[index], "labels": TOKENS[index]}
    generator = torch.Generator().manual_seed(index)
    values = torch.randn(8, 12, 1, generator=generator, dtype=torch.float64)
    return {"input_values": values, "labels": torch.randint(0, 3, (8,), generator=generator)}


def accumulate(model, kind, *indices):
    for index in indices:
        model(**batch(kind, index)).loss.backward()


def halved(model, kind):
    calibration = None if kind == "lru" else [{"input_ids": tokens} for tokens in TOKENS]
    return make_plan(model, settings=CutSettings(Fraction(0.5)), calibration=calibration)


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def mixer_parameters(model):
    return {f"{site.name}.{name}" for site in find_mixers(model) for name in site.parameters()}


def prepared(kind, dead):
    model = build(kind)
    silence(model, dead)
    for module in model.modules():
        if hasattr(module, "b_layernorm"):
            module.b_layernorm.variance_epsilon = module.c_layernorm.variance_epsilon = 0.0
    return model


# Norms over states see a state that is driven, and for a time-invariant layer correlations between states are not on
# record: both maps are exact only for states that do nothing at all.
CASES = [(kind, True) for kind in KINDS]
CASES += [(kind, False) for kind in SELECTIVE if kind not in ("jamba", "falcon_mamba")]


@pytest.mark.parametrize(("kind", "dead"), CASES)
def test_what_is_accumulated_around_a_lossless_cut_is_the_gradient_of_the_smaller_model(kind, dead):
    model = prepared(kind, dead)
    plan = halved(model, kind)
    small = copy.deepcopy(model)
    apply_plan(small, None, plan)
    with torch.no_grad():
        assert distance(small(**batch(kind, 0)).logits, model(**batch(kind, 0)).logits) < 1e-5
    accumulate(small, kind, 0, 1, 2)
    accumulate(model, kind, 0, 1)
    apply_plan(model, None, plan)
    names = mixer_parameters(model)
    assert names and all(p.grad.shape == p.shape for name, p in model.named_parameters() if name in names)
    accumulate(model, kind, 2)
    wanted = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert distance(parameter.grad, wanted[name].grad) < 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_after_any_cut_gradients_are_those_of_the_plan(kind):
    model = build(kind)
    accumulate(model, kind, 0, 1)
    plan = halved(model, kind)
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if name not in mixer_parameters(model)}
    old = {site.name: {n: p.grad.clone() for n, p in site.parameters().items()} for site in find_mixers(model)}
    apply_plan(model, None, plan)
    for name, gradient in kept.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)
    for site, layer in zip(find_mixers(model), plan.layers, strict=True):
        for name, parameter in site.parameters().items():
            assert torch.allclose(parameter.grad, layer.reduction.changes[name].map_first(old[site.name]), rtol=1e-12)
            assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["lru", "own-mamba", "mamba", "mamba2"])
def test_an_optimizer_step_after_an_accumulation_across_a_cut(kind):
    """The step is that of the smaller model, on which everything is accumulated."""
    model = prepared(kind, dead=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = halved(model, kind)
    small = copy.deepcopy(model)
    apply_plan(small, None, plan)
    accumulate(small, kind, 0, 1)
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    accumulate(model, kind, 0)
    apply_plan(model, optimizer, plan)
    accumulate(model, kind, 1)
    optimizer.step()
    for (name, found), wanted in zip(model.named_parameters(), small.parameters(), strict=True):
        assert distance(found, wanted) < 1e-5, name


def test_compress_and_a_cut_by_score_carry_gradients_too():
    for cut in (
        lambda model: compress(model, [{"input_ids": TOKENS[0]}], target=3, refit_steps=2),
        lambda model: rival_cut(model, "first", 3, [{"input_ids": TOKENS[0]}]),
    ):
        model = build("own-mamba")
        accumulate(model, "own-mamba", 0)
        cut(model)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model, old = build("own-mamba"), {}
    accumulate(model, "own-mamba", 0)
    for site in find_mixers(model):
        old[site.name] = site.mixer.A_log.grad[:, :3].clone()
    rival_cut(model, "first", 3, [{"input_ids": TOKENS[0]}])
    assert all(torch.equal(site.mixer.A_log.grad, old[site.name]) for site in find_mixers(model))


def test_no_gradients_and_some_gradients():
    model = build("own-mamba")
    plan = halved(model, "own-mamba")
    mixers = [site.mixer for site in find_mixers(model)]
    mixers[0].A_log.grad = torch.ones_like(mixers[0].A_log)
    mixers[1].A_log.grad = torch.zeros_like(mixers[1].A_log)
    apply_plan(model, None, plan)
    assert mixers[0].x_proj.weight.grad is None and mixers[2].A_log.grad is None
    assert mixers[0].A_log.grad.abs().sum() > 0 and not mixers[1].A_log.grad.any()
    assert [p for name, p in model.named_parameters() if p.grad is not None and "A_log" not in name] == []


def test_a_missing_gradient_counts_as_zero():
    """In an LRU layer gradients of real and imaginary parts mix: one of them may be missing."""
    found = []
    for missing in (None, 0.0):
        model = build("lru")
        plan = halved(model, "lru")
        accumulate(model, "lru", 0)
        for site in find_mixers(model):
            site.mixer.B_im.grad = None if missing is None else torch.zeros_like(site.mixer.B_im)
        apply_plan(model, None, plan)
        found.append([site.parameters()[name].grad for site in find_mixers(model) for name in ("B_re", "B_im")])
    assert all(torch.equal(one, two) and one.abs().max() > 0 for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["dtype", "sparse"])
def test_gradients_of_another_dtype_or_layout(kind):
    model, wanted = build("own-mamba").float(), build("own-mamba").float()
    for each in (model, wanted):
        accumulate(each, "own-mamba", 0)
    mixers, plan = [site.mixer for site in find_mixers(model)], halved(model, "own-mamba")
    for mixer in mixers:
        gradient = mixer.A_log.grad
        if kind == "dtype":
            mixer.A_log.grad = None
            mixer.A_log.grad_dtype = torch.float64
        mixer.A_log.grad = gradient.double() if kind == "dtype" else gradient.to_sparse()
    for each in (model, wanted):
        apply_plan(each, None, plan)
    for mixer, other in zip(mixers, (site.mixer for site in find_mixers(wanted)), strict=True):
        assert torch.allclose(mixer.A_log.grad.float(), other.A_log.grad, rtol=1e-5)
        assert mixer.A_log.grad.dtype == (torch.float64 if kind == "dtype" else torch.float32)


def test_half_precision_is_mapped_in_float32():
    model, wanted = build("own-mamba").bfloat16(), build("own-mamba").bfloat16()
    plan = halved(model, "own-mamba")
    for each in (model, wanted):
        accumulate(each, "own-mamba", 0)
    old = [{n: p.grad.double() for n, p in site.parameters().items()} for site in find_mixers(model)]
    apply_plan(model, None, plan)
    for site, layer, before in zip(find_mixers(model), plan.layers, old, strict=True):
        for name, parameter in site.parameters().items():
            exact = layer.reduction.changes[name].map_first(before)
            assert parameter.grad.dtype == torch.bfloat16 and distance(parameter.grad.double(), exact) < 4e-3


def test_added_matrices_start_without_a_gradient_and_say_so(caplog):
    torch.manual_seed(0)
    model = make(OWN, "mamba2")
    plan = halved(model, "own-mamba2")
    with caplog.at_level(logging.WARNING):
        apply_plan(copy.deepcopy(model), None, plan)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # optimizer.zero_grad(set_to_none=False)
        apply_plan(copy.deepcopy(model), None, plan)
    assert not caplog.records
    for parameter in model.parameters():
        parameter.grad = None
    accumulate(model, "own-mamba2", 0)
    old = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        apply_plan(model, None, plan)
    assert "adds read_in, read_out, whose gradients nothing on record tells" in caplog.text
    new = dict(model.named_parameters())
    assert all(torch.equal(new[name].grad, gradient) for name, gradient in old.items())
    assert {name.rpartition(".")[2] for name in new.keys() - old.keys()} == {"read_in", "read_out"}
    assert all(new[name].grad is None for name in new.keys() - old.keys())


@pytest.mark.parametrize("kind", ["lru", "own-mamba", "mamba2"])
def test_undoing_a_cut_brings_the_gradients_of_its_snapshot_back(kind):
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    accumulate(model, kind, 0)
    model.get_parameter(next(iter(dict(model.named_parameters())))).grad = None
    old = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    snapshot = Snapshot.take(model, optimizer)
    apply_plan(model, optimizer, halved(model, kind))
    accumulate(model, kind, 1)
    snapshot.restore(model, optimizer)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if old[name] is None else torch.equal(parameter.grad, old[name]), name


def test_other_weights_leave_no_gradient_of_the_former_ones():
    model = build("own-mamba")
    accumulate(model, "own-mamba", 0)
    first = find_mixers(model)[0].name
    resize_mixers(model, {first: 6})
    assert all(parameter.grad is not None for parameter in model.parameters())  # nothing changed
    resize_mixers(model, {first: 3})
    assert all(parameter.grad is None for parameter in model.parameters())
