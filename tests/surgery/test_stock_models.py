"""Compression of plain transformers models of every supported family, and refusals of the others."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
from stock_models import CONFIGS, given_to_scan
from transformers import (
    AutoModelForCausalLM,
    KimiLinearConfig,
    MiniMaxConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    ZambaConfig,
)

from hf_compressm import SizeConstraints, compress, state_sizes
from hf_compressm.surgery import find_mixers, selective_signals, short, supported_mixers
from hf_compressm.surgery.adapters.base import refused_mixers

FAMILIES = pytest.mark.parametrize("family", sorted(CONFIGS))
IDS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))
FIELDS = {"nemotron_h": "ssm_state_size", "mamba": "state_size", "mamba2": "state_size", "falcon_mamba": "state_size"}


def make(family, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    generator = torch.Generator().manual_seed(2)
    for site in find_mixers(model):  # stock initial values make the state-space path vanish beside the others
        for name, parameter in site.mixer.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.data.normal_(std=2 * parameter[0].numel() ** -0.5, generator=generator)
    return model


@FAMILIES
def test_signals_are_what_the_mixer_gives_its_scan(family):
    model = make(family)
    mixer = find_mixers(model)[0].mixer
    mask = torch.ones_like(IDS)
    mask[:2, :5] = 0
    with torch.no_grad():
        hidden, mask_of_mixer, expected = given_to_scan(model, mixer, IDS, mask)
        signals = selective_signals(mixer, hidden, mask_of_mixer)
    for name, value in expected.items():
        assert torch.allclose(getattr(signals, name), value, atol=1e-5), name


@FAMILIES
def test_a_smaller_plain_model_comes_out(family, tmp_path):
    model = make(family)
    others = {name: p.clone() for name, p in model.named_parameters() if ".mamba" not in name and ".mixer" not in name}
    record = compress(model, {"input_ids": IDS}, target=8, refit_steps=0)
    assert state_sizes(model) == [8] * len(record["layers"])
    assert getattr(model.config, FIELDS.get(family, "mamba_d_state")) == 8
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in others.items())
    small = model(IDS).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, small)
    assert loaded.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)
    assert loaded.config.compression_history == [short(record)]


@FAMILIES
def test_a_mild_cut_changes_less_than_a_harsh_one(family):
    errors = []
    for target in (15, 12, 4):
        model = make(family)
        full = model(IDS).logits.detach()
        compress(model, {"input_ids": IDS}, target=target, refit_steps=0)
        errors.append((model(IDS).logits.detach() - full).square().mean())
    assert 3 * errors[0] < 1.5 * errors[1] < errors[2]


@FAMILIES
def test_refit_lowers_the_error_of_the_outputs(family):
    outputs = []
    for steps in (0, 30):
        model = make(family)
        full = model(IDS).logits.detach()
        compress(model, {"input_ids": IDS}, target=3, refit_steps=steps)
        outputs.append((model(IDS).logits.detach() - full).square().mean())
    assert outputs[1] < 0.9 * outputs[0]


def test_the_chosen_subset_beats_others():
    """On average over models: on so few tokens one random choice may happen to be as good."""
    errors = dict.fromkeys(("largest", "random", "smallest"), 0.0)
    for selection in errors:
        for seed in range(3):
            model = make("mamba", seed)
            full = model(IDS).logits.detach()
            generator = torch.Generator().manual_seed(seed)
            compress(model, {"input_ids": IDS}, target=4, refit_steps=0, selection=selection, generator=generator)
            errors[selection] += float((model(IDS).logits - full).detach().square().mean())
    assert errors["largest"] < 0.95 * min(errors["random"], errors["smallest"])


def test_sizes_stay_uniform_and_uneven_ones_are_refused():
    model = make("mamba")
    with pytest.raises(ValueError, match="one state size for all layers, so uniform=False cannot be met.*from_stock"):
        compress(model, {"input_ids": IDS}, target=8, constraints=SizeConstraints(uniform=False))
    compress(model, {"input_ids": IDS}, target=7, constraints=SizeConstraints(multiple_of=4), refit_steps=0)
    assert state_sizes(model) == [4, 4]


@pytest.mark.parametrize(
    "config, reason",
    [
        (ZambaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
                     intermediate_size=32, num_attention_heads=4, n_mamba_heads=2), "Zamba2 is supported"),
        (RecurrentGemmaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                              intermediate_size=32, lru_width=32), "one state per channel"),
        (RwkvConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2, context_length=8), "one state per channel"),
        (MiniMaxConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                       num_key_value_heads=1, intermediate_size=16, num_local_experts=2),
         "for softmax attention.*CompreSSMMiniMaxForCausalLM.*from_stock"),
        (KimiLinearConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
                          linear_num_heads=2, linear_head_dim=16, pad_token_id=0, layer_types=["linear_attention"],
                          intermediate_size=16), "one number for the size of keys and values"),
    ],
)  # fmt: skip
def test_other_recurrent_models_are_refused_with_the_reason(config, reason):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"no layer that can be compressed. .*{reason}.*Supported mixer classes"):
        compress(model, {"input_ids": IDS})


def test_a_size_that_the_installed_convolution_kernel_cannot_run_is_refused(monkeypatch):
    model = make("bamba")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "causal_conv1d" or find_spec(name))
    with pytest.raises(ValueError, match="causal_conv1d is installed .* with 1 states. Set multiple_of=2"):
        compress(model, {"input_ids": IDS}, target=5, constraints=SizeConstraints(multiple_of=1))
    assert state_sizes(model) == [16, 16]
    compress(model, {"input_ids": IDS}, target=5, refit_steps=0)
    assert state_sizes(model) == [4, 4]


RECURRENT = re.compile(r"recurrent_state|ssm_state|linear_cache|mlstm_backend|rwkv_linear|rg_lru")
"""What the forward of a layer with a recurrent state speaks of in transformers."""


def test_every_recurrent_layer_of_transformers_is_supported_or_refused_with_a_reason():
    served = {*supported_mixers(), *refused_mixers()}
    unknown = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if RECURRENT.search(text) else ():
            if not isinstance(node, ast.ClassDef) or node.name.endswith(("Model", "ForCausalLM", "Rglru")):
                continue
            forwards = [inner for inner in node.body if getattr(inner, "name", "").endswith("forward")]
            name = f"transformers.models.{path.parent.name}.{path.stem}.{node.name}"
            if any(RECURRENT.search(ast.unparse(forward)) for forward in forwards) and name not in served:
                unknown.append(name)
    assert not unknown, "write an adapter for these, or give the reason in surgery/adapters/refusals.py"
