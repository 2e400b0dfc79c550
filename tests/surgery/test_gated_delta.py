"""Cuts of delta-rule layers: key channels go, and what is left is a plain model of transformers."""

import copy
import sys

import pytest
import torch
from delta_models import CONFIGS, KEYS, make
from transformers import AutoModelForCausalLM

from hf_compressm import compress, state_sizes
from hf_compressm.reduction import empirical_singular_values
from hf_compressm.surgery import find_mixers, gather_statistics, measure_model
from hf_compressm.surgery.resize import replace_parameters

FAMILIES = pytest.mark.parametrize("family", sorted(CONFIGS))
IDS = torch.randint(2, 64, (4, 40), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}


def given_to_recurrence(model, mixer, ids, mask=None):
    """q, k, v, g, beta that transformers' own code gives its recurrence in a mixer."""
    module, seen = sys.modules[type(mixer).__module__], []
    name = "torch_chunk_gated_delta_rule"
    original = getattr(module, name)

    def spy(q, k, v, **kwargs):
        seen.append((q, k, v, kwargs["g"], kwargs["beta"]))
        return original(q, k, v, **kwargs)

    setattr(module, name, spy)
    try:
        model(ids, attention_mask=mask, use_cache=False)
    finally:
        setattr(module, name, original)
    q, k, *others = seen[0]
    step = k.shape[2] // mixer.num_k_heads  # older versions repeat the heads of keys before this
    return q[:, :, ::step], k[:, :, ::step], *others


def moments_by_hand(q, k, v, g, beta):
    """Sums over all tokens of q q^T, k k^T and S S^T by the recurrence itself, in float64."""
    q, k, v, g, beta = (part.double() for part in (q, k, v, g, beta))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    times = v.shape[2] // k.shape[2]
    keys = k.repeat_interleave(times, dim=2)
    S = torch.zeros(len(v), v.shape[2], k.shape[3], v.shape[3], dtype=torch.float64)
    P = torch.zeros(k.shape[2], k.shape[3], k.shape[3], dtype=torch.float64)
    for t in range(v.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        missing = v[:, t] - (S.mT @ keys[:, t, :, :, None])[..., 0]
        S = S + beta[:, t, :, None, None] * keys[:, t, :, :, None] * missing[:, :, None]
        P += (S @ S.mT).sum(0).unflatten(0, (-1, times)).sum(1)
    return [torch.einsum("blgm,blgn->gmn", part, part) for part in (q, k)] + [P]


@FAMILIES
def test_statistics_are_those_of_what_the_mixer_gives_its_recurrence(family, monkeypatch):
    monkeypatch.setattr("hf_compressm.surgery.adapters.gated_delta.look_weights", lambda real: real.float())
    model = make(family)
    name, mixer = next((site.name, site.mixer) for site in find_mixers(model))
    with torch.no_grad():
        expected = moments_by_hand(*given_to_recurrence(model, mixer, IDS))
    found = gather_statistics(model, BATCH)[name]
    for sums, by_hand in zip(found.sums, expected, strict=True):
        assert torch.allclose(sums, by_hand, rtol=2e-4, atol=2e-4 * float(by_hand.abs().max()))
    spectrum = measure_model(model, BATCH)[name].spectrum()
    values = torch.stack([empirical_singular_values(P, Q) for Q, _, P in zip(*expected, strict=True)]) / IDS.numel()
    assert torch.allclose(spectrum, values.square().sum(0).sqrt(), rtol=1e-3, atol=1e-5)


def test_statistics_know_the_activation(monkeypatch):
    monkeypatch.setattr("hf_compressm.surgery.adapters.gated_delta.look_weights", lambda real: real.float())
    model = make("qwen3_5")
    for site in find_mixers(model):
        site.mixer.activation = "gelu"
    site = find_mixers(model)[0]
    with torch.no_grad():
        expected = moments_by_hand(*given_to_recurrence(model, site.mixer, IDS))
    found = gather_statistics(model, BATCH, fast_ops=False)[site.name]
    for sums, by_hand in zip(found.sums, expected, strict=True):
        assert torch.allclose(sums, by_hand, rtol=2e-4, atol=2e-4 * float(by_hand.abs().max()))


@FAMILIES
def test_padding_leaves_no_trace_in_the_statistics(family):
    model = make(family)
    name = find_mixers(model)[0].name
    mask = torch.ones_like(IDS)
    mask[0, :13], mask[1, 30:] = 0, 0
    padded = gather_statistics(model, {"input_ids": IDS, "attention_mask": mask})[name]
    one_by_one = gather_statistics(model, [{"input_ids": row[m > 0][None]} for row, m in zip(IDS, mask, strict=True)])[
        name
    ]
    assert padded.tokens == one_by_one.tokens == int(mask.sum())
    assert torch.allclose(padded.sums, one_by_one.sums, rtol=1e-3, atol=1e-4 * float(padded.sums.abs().max()))


@FAMILIES
def test_permuting_the_channels_changes_nothing(family):
    model = make(family)
    full = model(IDS).logits.detach()
    sites = find_mixers(model)
    order = [torch.randperm(KEYS, generator=torch.Generator().manual_seed(head)).tolist() for head in range(2)]
    replace_parameters(sites, {s.name: {n: c.value for n, c in s.adapter.keep(s.mixer, order).items()} for s in sites})
    # Sums of float32 in another order, in a stack of layers with large weights.
    assert (model(IDS).logits - full).abs().max() <= 1e-5 * full.abs().max().clamp(min=1)


@FAMILIES
def test_a_smaller_plain_model_comes_out(family, tmp_path):
    model = make(family)
    mixers = {site.name for site in find_mixers(model)}
    others = {n: p.clone() for n, p in model.named_parameters() if not any(n.startswith(mixer) for mixer in mixers)}
    record = compress(model, BATCH, target=8, refit_steps=0)
    assert state_sizes(model) == [8, 8] and model.config.linear_key_head_dim == 8
    assert all(0 < layer["residual"] < 1 for layer in record["layers"])
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in others.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and torch.equal(loaded(IDS).logits, model(IDS).logits)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        loaded.generate(IDS[:2, :5], use_cache=True, **settings),
        loaded.generate(IDS[:2, :5], use_cache=False, **settings),
    )


@FAMILIES
def test_the_choice_and_the_refit_lower_the_error(family):
    errors = {}
    for selection, steps in (("largest", 0), ("smallest", 0), ("largest", 20)):
        model = make(family)
        full = model(IDS).logits.detach()
        compress(model, BATCH, target=8, refit_steps=steps, selection=selection)
        errors[selection, steps] = (model(IDS).logits - full).square().mean().item()
    assert errors["largest", 20] < errors["largest", 0] < errors["smallest", 0]


@FAMILIES
def test_moments_follow_their_rows_and_training_goes_on(family):
    model = make(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    site = find_mixers(model)[0]
    old = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in site.parameters().items()}
    kept = copy.deepcopy(site.mixer.conv1d.weight.detach())
    compress(model, BATCH, optimizer=optimizer, target=8, refit_steps=0)
    for name, parameter in find_mixers(model)[0].parameters().items():
        moment = optimizer.state[parameter]["exp_avg_sq"]
        assert moment.shape == parameter.shape
        rows = {tuple(row.flatten().tolist()) for row in old[name]}
        assert all(tuple(row.flatten().tolist()) in rows for row in moment), name
    before = find_mixers(model)[0].mixer.conv1d.weight.detach().clone()
    assert all(any(torch.equal(row, other) for other in kept) for row in before)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(before, find_mixers(model)[0].mixer.conv1d.weight)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="cannot rank the 16 states"):
        compress(make("qwen3_5"), {"input_ids": IDS[:1, :9]}, target=8)


def test_a_single_key_that_is_never_read_goes_first():
    model = make("qwen3_5")
    site = find_mixers(model)[0]
    with torch.no_grad():
        for name, channel in (("in_proj_qkv", 3), ("conv1d", 3)):
            weight = getattr(site.mixer, name).weight
            weight[channel] = 0  # of q in head 0
            weight[2 * KEYS + channel] = 0  # of k in head 0
    measured = measure_model(model, BATCH)[site.name]
    kept = site.adapter.reduce(site.mixer, measured, KEYS - 1).changes["conv1d.weight"].gradient[0].rows.tolist()
    assert 3 not in kept and 2 * KEYS + 3 not in kept and len(kept) == 4 * (KEYS - 1) + 32
