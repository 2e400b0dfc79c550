"""Cuts of value channels: on request, exact where all stay, and the result is a plain model of transformers."""

import copy

import pytest
import torch
from delta_models import CONFIGS, make, with_lora
from own_delta_models import own
from own_minimax_models import own as minimax
from selective_models import STOCK
from selective_models import make as selective
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from xlstm_models import make as xlstm

from hf_compressm import SizeConstraints, compress, state_sizes
from hf_compressm.surgery import check_value_size, find_mixers, gather_statistics, history, short
from hf_compressm.surgery.resize import replace_parameters
from hf_compressm.surgery.values import value_sites
from hf_compressm.training.checkpoints.resume import attach_resizing

VALUES, HEADS = 8, 4
OWN = "own"
FAMILIES = pytest.mark.parametrize("family", [*sorted(CONFIGS), OWN])
IDS = torch.randint(2, 50, (4, 40), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}


def model_of(family):
    """A model whose gated norms have weights that are not 1."""
    model = own() if family == OWN else make(family)
    generator = torch.Generator().manual_seed(3)
    for site in value_sites(model):
        site.mixer.get_parameter(f"{site.adapter.norm}.weight").data.uniform_(0.5, 1.5, generator=generator)
    return model


def only_values(model):
    return [(layer["old_size"], layer["new_size"]) for layer in history(model)[-1]["layers"]]


@FAMILIES
def test_folding_the_norm_and_permuting_the_channels_of_each_head_is_exact(family):
    for site in value_sites(model_of(family)):
        x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
        full = site.mixer(x)
        full = (full[0] if isinstance(full, tuple) else full).detach()
        order = [torch.randperm(VALUES, generator=torch.Generator().manual_seed(h)).tolist() for h in range(HEADS)]
        changes = site.adapter.keep(site.mixer, order)
        replace_parameters([site], {site.name: {name: change.value for name, change in changes.items()}})
        found = site.mixer(x)
        found = found[0] if isinstance(found, tuple) else found
        assert (site.mixer.get_parameter(f"{site.adapter.norm}.weight") == 1).all()
        # Relative to the largest output: sums of float32 in another order.
        assert (found - full).abs().max() <= 1e-6 * full.abs().max()


@FAMILIES
def test_a_smaller_plain_model_comes_out(family, tmp_path):
    model = model_of(family)
    sizes, keys = state_sizes(model), model.config.linear_key_head_dim
    mixers = {site.name for site in find_mixers(model)}
    others = {n: p.clone() for n, p in model.named_parameters() if not any(n.startswith(mixer) for mixer in mixers)}
    record = compress(model, BATCH, value_size=4, refit_steps=2)
    assert state_sizes(model) == sizes and model.config.linear_key_head_dim == keys
    assert model.config.linear_value_head_dim == 4 and record["event"] == "value_cut"
    assert all(0 < layer["residual"] < 1 for layer in record["layers"]) and history(model) == [record]
    assert only_values(model) == [(VALUES, 4)] * len(sizes)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in others.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert history(loaded) == [short(record)]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = loaded.generate(IDS[:2, :5], use_cache=True, **settings)
    assert torch.equal(cached, loaded.generate(IDS[:2, :5], use_cache=False, **settings))
    again = loaded(IDS[:, :1], use_cache=True)
    step = loaded(IDS[:, 1:2], past_key_values=again.past_key_values, use_cache=True).logits[:, 0]
    assert torch.allclose(step, loaded(IDS[:, :2]).logits[:, 1], atol=1e-4)


@FAMILIES
def test_the_choice_and_the_refit_lower_the_error(family):
    errors = {}
    for selection, steps in (("largest", 0), ("smallest", 0), ("largest", 20)):
        model = model_of(family)
        full = model(IDS).logits.detach()
        compress(model, BATCH, value_size=4, refit_steps=steps, selection=selection)
        errors[selection, steps] = (model(IDS).logits - full).square().mean().item()
    assert errors["largest", 20] < errors["largest", 0] < errors["smallest", 0]


def test_in_a_multimodal_model_the_config_of_the_text_model_changes(tmp_path):
    text = CONFIGS["qwen3_5"]()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text.to_dict(), vision_config=vision)).eval()
    compress(model, BATCH, target=8, value_size=4, refit_steps=0)
    found = model.config.text_config
    assert (found.linear_key_head_dim, found.linear_value_head_dim) == (8, 4)
    assert not hasattr(model.config, "linear_value_head_dim")
    model.save_pretrained(tmp_path)
    loaded = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_values_are_cut_after_keys_and_a_generator_of_batches_serves_both():
    model = make("qwen3_next")
    record = compress(model, (batch for batch in [BATCH]), target=8, value_size=4, refit_steps=0)
    assert state_sizes(model) == [8, 8] and model.config.linear_key_head_dim == 8
    assert model.config.linear_value_head_dim == 4
    assert [record["event"], record["values"]["event"]] == ["cut", "value_cut"]
    assert [one["event"] for one in history(model)] == ["cut", "value_cut"]
    compress(model, BATCH, target=4, refit_steps=0)
    assert state_sizes(model) == [4, 4] and model.config.linear_value_head_dim == 4


def test_all_channels_stay_on_request():
    model = model_of("qwen3_5")
    full = model(IDS).logits.detach()
    compress(model, BATCH, value_size=VALUES)
    assert torch.equal(model(IDS).logits, full) and not history(model)


@pytest.mark.parametrize("family", ["olmo_hybrid", OWN])
def test_statistics_are_those_of_real_tokens(family):
    model = model_of(family)
    sites = value_sites(model)
    mask = torch.ones_like(IDS)
    mask[0, :13], mask[1, :7] = 0, 0
    padded = gather_statistics(model, {**BATCH, "attention_mask": mask}, sites=sites)[sites[0].name]
    rows = [{"input_ids": row[m > 0][None]} for row, m in zip(IDS, mask, strict=True)]
    alone = gather_statistics(model, rows, sites=sites)[sites[0].name]
    assert padded.tokens == alone.tokens == int(mask.sum())
    assert torch.allclose(padded.outputs, alone.outputs, rtol=1e-3, atol=1e-4 * float(alone.outputs.abs().max()))
    assert torch.allclose(padded.power, alone.power, rtol=1e-3)


def test_statistics_are_what_norm_and_gate_put_out():
    model = model_of("qwen3_5")
    site = value_sites(model)[0]
    seen = []
    handle = site.mixer.norm.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    o, z = (part.unflatten(0, (*IDS.shape, HEADS)).double() for part in seen[0])
    n = o / (o.square().mean(-1, keepdim=True) + site.mixer.norm.variance_epsilon).sqrt()
    y = site.mixer.norm.weight.detach().double() * n * F.silu(z)
    found = site.adapter.measure(site.mixer, gather_statistics(model, BATCH, sites=[site])[site.name])
    expected = torch.einsum("blhv,blhw->hvw", y, y) / IDS.numel()
    assert torch.allclose(found.Y, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    assert torch.allclose(found.power, n.square().mean((0, 1)), rtol=1e-3)
    columns = site.mixer.out_proj.weight.detach().double().unflatten(1, (HEADS, VALUES))
    assert torch.allclose(found.W, torch.einsum("dhv,dhw->hvw", columns, columns))


@FAMILIES
def test_a_channel_without_values_goes_first_and_without_a_trace(family):
    model = model_of(family)
    for site in value_sites(model):
        site.mixer.get_submodule(site.adapter.norm).__dict__.update(variance_epsilon=0.0, eps=0.0)
        rows = [VALUES * head + 3 for head in range(HEADS)]
        site.mixer.conv1d.weight.data[2 * 2 * site.mixer.head_k_dim :][rows] = 0
    full = model(IDS, labels=IDS)
    full.loss.backward()
    compress(model, BATCH, value_size=VALUES - 1, refit_steps=0)
    carried = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model(IDS, labels=IDS)
    found.loss.backward()
    assert torch.allclose(found.logits, full.logits, atol=1e-4 * float(full.logits.detach().abs().max()))
    mixers = tuple(site.name for site in value_sites(model))
    for name, parameter in model.named_parameters():
        # The gradient of the norm's weight is a sum over heads, of which each now keeps the part of other channels.
        if name in carried and name.startswith(mixers) and "norm.weight" not in name:
            scale = float(parameter.grad.abs().max())
            assert torch.allclose(carried[name], parameter.grad, atol=1e-3 * scale, rtol=1e-3), name


@FAMILIES
def test_moments_follow_and_training_goes_on(family):
    model = model_of(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    site = value_sites(model)[0]
    old = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in site.parameters().items()}
    compress(model, BATCH, optimizer=optimizer, value_size=4, refit_steps=0)
    for name, parameter in value_sites(model)[0].parameters().items():
        moment = optimizer.state[parameter]["exp_avg_sq"]
        assert moment.shape == parameter.shape == parameter.grad.shape and (moment >= 0).all()
        if name not in (f"{site.adapter.norm}.weight", f"{site.adapter.read_out}.weight"):
            rows = {tuple(row.flatten().tolist()) for row in old[name]}
            assert all(tuple(row.flatten().tolist()) in rows for row in moment), name
    before = {name: p.detach().clone() for name, p in value_sites(model)[0].parameters().items()}
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in value_sites(model)[0].parameters().items())


def test_adapters_follow_but_for_those_that_read_values_out():
    base = model_of("qwen3_5")
    model = with_lora(base, "in_proj_qkv", "in_proj_z")
    merged = copy.deepcopy(model).merge_and_unload()
    for cut in (model, merged):
        compress(cut, BATCH, value_size=4, refit_steps=0)
    assert torch.allclose(model.eval()(IDS).logits, merged.eval()(IDS).logits, atol=1e-4)
    around = with_lora(base, "out_proj")
    before = copy.deepcopy(around.state_dict())
    with pytest.raises(ValueError, match=r"out_proj has an adapter on it, whose inputs are the value channels"):
        compress(around, BATCH, target=8, value_size=4)
    assert all(torch.equal(value, before[name]) for name, value in around.state_dict().items())


@pytest.mark.parametrize(
    ("size", "constraints", "message"),
    [
        (0, None, "must lie between 1 and the present number of value channels 32"),
        (33, None, "must lie between 1 and the present number of value channels 32"),
        (24, None, "must be a multiple of 16; got 24"),
        (24, SizeConstraints(multiple_of=10), "must be a multiple of 10; got 24"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_changes(size, constraints, message):
    model = make("qwen3_5", linear_value_head_dim=32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress(model, BATCH, target=8, value_size=size, constraints=constraints)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_value_size(model, 16, SizeConstraints())
    check_value_size(model, 24, SizeConstraints(multiple_of=1))


@pytest.mark.parametrize("family", ["mamba", "xlstm", "minimax"])
def test_layers_without_value_channels_are_refused(family):
    model = {"mamba": lambda: selective(STOCK, "mamba"), "xlstm": xlstm, "minimax": minimax}[family]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="value_size is for layers with a gated delta rule"):
        compress(model, BATCH, target=2, value_size=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shared_frozen_and_unknown_parameters_and_few_tokens_are_refused():
    model = model_of("qwen3_5")
    for site in find_mixers(model):
        site.mixer.in_proj_z.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="in_proj_z.weight is frozen"):
        compress(model, BATCH, value_size=4, optimizer=optimizer)
    for site in find_mixers(model):
        site.mixer.in_proj_z.weight.requires_grad_(True)
        site.mixer.out_proj.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="out_proj.weight is frozen .*, and value channels are its columns"):
        compress(model, BATCH, target=8, value_size=4, optimizer=optimizer)
    first, second = find_mixers(model)
    second.mixer.in_proj_z.weight = first.mixer.in_proj_z.weight
    with pytest.raises(ValueError, match="in_proj_z.weight is shared"):
        compress(model, BATCH, value_size=4)
    with pytest.raises(ValueError, match="the calibration data is too short"):
        compress(model_of("qwen3_5"), {"input_ids": IDS[:1, :7]}, value_size=4)
    with pytest.raises(ValueError, match="pass calibration batches"):
        compress(model_of("qwen3_5"), value_size=4)


def test_weights_of_the_smaller_model_do_not_load_into_the_larger():
    small, large = model_of("qwen3_5"), model_of("qwen3_5")
    compress(small, BATCH, value_size=4, refit_steps=0)
    attach_resizing(large)
    with pytest.raises(ValueError, match=r"of another model: .*norm.weight has shape \(4,\)"):
        large.load_state_dict(small.state_dict())
