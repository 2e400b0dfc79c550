"""Cuts of xLSTM layers: any basis of key space is exact, and the result is a plain model of transformers."""

import pytest
import torch
import xlstm_models
from transformers import AutoModelForCausalLM, xLSTMConfig
from transformers.models.xlstm import modeling_xlstm
from xlstm_models import KEYS

from hf_compressm import SizeConstraints, compress, state_sizes
from hf_compressm.surgery import find_mixers, gather_statistics
from hf_compressm.surgery.resize import replace_parameters

IDS = torch.randint(2, 64, (3, 40), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}
MODES = pytest.mark.parametrize("mode", ["single", "fused"])


@pytest.fixture
def make(monkeypatch):
    def build(mode="single"):
        if mode == "fused":  # transformers' own initialisation of this mode fails; its checkpoints load
            monkeypatch.setattr(modeling_xlstm.xLSTMPreTrainedModel, "_init_weights", lambda self, module: None)
        model = xlstm_models.make(mode)
        for site in find_mixers(model) if mode == "fused" else ():
            site.mixer.ifgate_preact.bias.data = torch.tensor([-10.0, -10.0, 3.0, 6.0])  # as in the other mode
        return model

    return build


@MODES
def test_any_basis_of_the_keys_is_exact(make, mode):
    model = make(mode)
    full = model(IDS).logits.detach()
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for _ in range(2):
        L = torch.eye(KEYS) + 0.3 * KEYS**-0.5 * torch.randn(KEYS, KEYS, generator=generator)
        pairs.append((L.double(), torch.linalg.inv(L.double()).T))
    sites = find_mixers(model)
    changes = {site.name: site.adapter.in_basis(site.mixer, pairs) for site in sites}
    replace_parameters(sites, {name: {n: c.value for n, c in found.items()} for name, found in changes.items()})
    assert (model(IDS).logits - full).abs().max() <= 1e-5 * full.abs().max()


@MODES
def test_a_smaller_plain_model_comes_out(make, mode, tmp_path):
    model = make(mode)
    full, errors = model(IDS).logits.detach(), {}
    for selection, steps in (("largest", 20), ("largest", 0), ("random", 0), ("smallest", 0)):
        model = make(mode)
        generator = torch.Generator().manual_seed(0)
        compress(model, BATCH, target=32, refit_steps=steps, selection=selection, generator=generator)
        errors[selection, steps] = (model(IDS).logits - full).square().mean().item()
    assert sorted(errors.values()) == list(errors.values())
    model = make(mode)
    compress(model, BATCH, target=32, refit_steps=0)
    assert state_sizes(model) == [32, 32] and model.config.qk_dim_factor == 1.0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and torch.equal(loaded(IDS).logits, model(IDS).logits)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = [loaded.generate(IDS[:, :8], use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*tokens)


def test_sizes_are_those_that_the_cache_can_hold(make):
    model = make()
    compress(model, BATCH, target=5, refit_steps=0)
    assert state_sizes(model) == [32, 32]
    model = make()
    with pytest.raises(ValueError, match="multiples of 64 keys of all 2 heads .* Set multiple_of=32, or leave it out"):
        compress(model, BATCH, target=40, constraints=SizeConstraints(multiple_of=8))
    assert state_sizes(model) == [KEYS, KEYS]


@pytest.mark.parametrize(("hidden", "heads", "order"), [(4096, 8, 24), (1000, 3, 7), (96, 4, 5), (49, 7, 1)])
def test_the_factor_in_the_config_gives_the_rows(make, hidden, heads, order):
    config = xLSTMConfig(hidden_size=hidden, num_heads=heads)
    find_mixers(make())[0].adapter.write_config(config, [order])
    assert int(config.hidden_size * config.qk_dim_factor) == heads * order


@MODES
def test_states_are_those_of_the_step_that_transformers_has(make, mode, monkeypatch):
    monkeypatch.setattr("hf_compressm.surgery.adapters.xlstm.look_weights", lambda real: real.float())
    model = make(mode)
    seen = []
    step = modeling_xlstm.mlstm_recurrent_step_native
    site = find_mixers(model)[0]
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4))

    def spy(**kwargs):
        output, state = step(**kwargs)
        seen.append((output, *state, kwargs["query"]))
        return output, state

    site.mixer.mlstm_backend._inference_fn.keywords["mlstm_step_kernel"] = spy
    state = None
    with torch.no_grad():
        for t in range(hidden.shape[1]):
            _, state = site.mixer(hidden[:, t : t + 1], state)
    statistics = site.adapter.statistics(site.mixer)
    statistics.observe(site.mixer, hidden, None)
    expected = torch.zeros(2, KEYS, KEYS, dtype=torch.float64)
    for output, C, n, m, query in seen:
        scaled = query * KEYS**-0.5
        divisor = torch.maximum((n * scaled).sum(-1, keepdim=True).abs(), (-m).exp())[..., None]
        parts = torch.cat([C, (n * output.norm(dim=-1, keepdim=True))[..., None]], dim=-1) / divisor
        expected += (parts @ parts.mT).double().sum(0)
    assert len(seen) == hidden.shape[1] and torch.allclose(statistics.sums[2], expected, rtol=1e-3)


def test_gathering_and_refitting_take_layers_that_return_their_state(make):
    model = make()
    recordings = {}
    gather_statistics(model, BATCH, recordings)
    assert all(recording.outputs[0].shape == (3, 40, 64) for recording in recordings.values())
