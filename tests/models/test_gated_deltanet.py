"""This package's Gated DeltaNet: equal to transformers' Qwen3.5, cut layers, caches, generation, padding, saving."""

import copy

import pytest
import torch
from own_delta_models import FIELDS, IDS, KEYS, PURE, config, lively, own, stock
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3_5TextModel

from hf_compressm import (
    CompreSSMGatedDeltaNetForCausalLM,
    CompreSSMGatedDeltaNetForSequenceClassification,
    CompreSSMGatedDeltaNetModel,
    from_stock,
    to_stock,
)

SIZES = pytest.mark.parametrize(
    "fields", [{"state_sizes": [3, 8]}, PURE | {"state_sizes": [3, 8, 5]}], ids=["hybrid", "pure"]
)
CACHES = ("cache", "past_key_values")


def cache_of(output):
    return next(output[name] for name in CACHES if name in output)


def close(found, expected, tolerance=1e-6):
    return (found - expected).detach().abs().max() <= tolerance * expected.detach().abs().max().clamp(min=1)


@pytest.mark.parametrize("fields", [{}, PURE], ids=["hybrid", "pure"])
@pytest.mark.parametrize("start", ["fresh", "lively"])
def test_at_full_size_it_is_the_stock_model(fields, start, tmp_path):
    theirs = stock(start == "lively", **fields)
    # With large weights, norms of small outputs make the rounding of transformers' float32 a hundred times larger.
    logit_error, gradient_error = (1e-6, 1e-6) if start == "fresh" else (1e-5, 5e-4)
    ours = from_stock(theirs)
    assert type(ours) is CompreSSMGatedDeltaNetForCausalLM
    # transformers' own cache of linear attention alone cannot be asked for its length.
    losses = [model(IDS, labels=IDS, use_cache=False).loss for model in (theirs, ours)]
    expected = theirs(IDS, use_cache=False).logits
    assert close(ours(IDS).logits, expected, logit_error)
    for loss in losses:
        loss.backward()
    gradients = {name.replace("backbone.", "model."): p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert close(gradients[name], parameter.grad, gradient_error), name
    back = to_stock(ours)
    assert type(back) is type(theirs) and back.config.to_dict() == theirs.config.to_dict()
    assert torch.equal(back(IDS, use_cache=False).logits, expected)
    if not fields:
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(ours.generate(IDS, **settings), theirs.generate(IDS, **settings))
    theirs.save_pretrained(tmp_path)
    assert torch.equal(from_stock(tmp_path)(IDS).logits, ours(IDS).logits)


def test_without_a_head_it_is_converted_too():
    theirs = Qwen3_5TextModel(stock().config).eval()
    ours = from_stock(theirs)
    assert type(ours) is CompreSSMGatedDeltaNetModel
    assert close(ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state)
    assert torch.equal(to_stock(ours)(IDS).last_hidden_state, theirs(IDS).last_hidden_state)


def test_identities_change_nothing_and_a_change_of_basis_neither():
    model = own()
    expected = model(IDS).logits
    for layer in (model.backbone.layers[0], model.backbone.layers[2]):
        basis = torch.linalg.qr(torch.randn(2, KEYS, KEYS, generator=torch.Generator().manual_seed(0)))[0]
        basis = basis + 0.2 * torch.eye(KEYS)
        layer.linear_attn.read_in = torch.nn.Parameter(basis)
        layer.linear_attn.read_out = torch.nn.Parameter(torch.linalg.inv(basis).mT.contiguous())
    assert close(model(IDS).logits, expected, 1e-5)


def test_a_cut_basis_has_no_stock_form():
    with pytest.raises(ValueError, match=r"layers.0.linear_attn has keys and queries in a basis of their own"):
        to_stock(own(state_sizes=[3, 8]))
    with pytest.raises(ValueError, match="state_size must be 8, the size of the model's keys"):
        to_stock(own(), state_size=16)


@SIZES
def test_every_layer_has_its_own_size_and_all_parameters_learn(fields):
    model = own(**fields).train()
    mixers = [layer.linear_attn for layer in model.backbone.layers if layer.block_type == "linear_attention"]
    assert [mixer.state_size for mixer in mixers] == model.config.state_sizes == fields["state_sizes"]
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@SIZES
@pytest.mark.parametrize("cut", [1, 5, 19])
@pytest.mark.parametrize("learning", [True, False])
def test_continuing_from_a_cache_equals_the_full_forward(fields, cut, learning):
    model = own(**fields)
    with torch.set_grad_enabled(learning):
        full = model(IDS).logits
        first = model(IDS[:, :cut], use_cache=True)
        second = model(IDS[:, cut:], past_key_values=cache_of(first), use_cache=True)
    assert close(torch.cat([first.logits, second.logits], 1), full, 1e-5)


@SIZES
def test_generation_greedy_beam_sampling_and_left_padding(fields):
    model, prompt = own(**fields), IDS[:, :6]
    settings = {"max_new_tokens": 8, "do_sample": False}
    greedy, expected = model.generate(prompt, **settings), prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, expected)
    beams = [model.generate(prompt, num_beams=3, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*beams)
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = (torch.arange(9) >= 3).long().expand(2, 9)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 9:], greedy[:, 6:])


@SIZES
def test_padding_anywhere_leaves_no_trace(fields):
    model = own(**fields)
    mask = torch.ones(2, 26, dtype=torch.long)
    for row, places in enumerate(([0, 1, 2, 11, 12, 25], [4, 5, 13, 23, 24, 25])):
        mask[row, places] = 0
    ids = torch.full((2, 26), 7)
    ids[mask.bool()] = IDS.flatten()
    found = model(ids, attention_mask=mask, use_cache=True)
    assert close(found.logits[mask.bool()].view(2, 20, -1), model(IDS).logits, 1e-5)
    longer = torch.cat([mask, torch.tensor([[1], [0]])], 1)  # the second sequence gets padding alone
    model(ids[:, :1], attention_mask=longer, past_key_values=cache_of(found), use_cache=True)
    plain = cache_of(model(IDS, use_cache=True))
    found = cache_of(found)
    for layer, other in zip(found.layers[::2], plain.layers[::2], strict=True):
        assert close(layer.recurrent_states[0][1], other.recurrent_states[0][1], 1e-5)
        assert close(layer.conv_states[0][1], other.conv_states[0][1], 1e-5)


@SIZES
def test_saving_and_loading_keeps_sizes_ties_and_outputs(fields, tmp_path):
    model = own(**fields, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.config.state_sizes == fields["state_sizes"]
    assert loaded.lm_head.weight is loaded.backbone.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    other = copy.deepcopy(model.config)
    other.state_sizes = [4, *fields["state_sizes"][1:]]
    with pytest.raises(RuntimeError, match=r"does not fit its config, whose state_sizes are \[4, "):
        type(model).from_pretrained(tmp_path, config=other)


def test_a_cache_from_before_a_cut_is_refused():
    for ids in (IDS, IDS[:, :1]):
        with torch.no_grad(), pytest.raises(ValueError, match="A cache from before a cut does not fit"):
            cache = cache_of(own(**PURE)(IDS, use_cache=True))
            own(**PURE, state_sizes=3)(ids, past_key_values=cache)


def test_a_cache_from_before_a_cut_of_values_is_refused():
    for ids in (IDS, IDS[:, :1]):
        with torch.no_grad(), pytest.raises(ValueError, match="the cached inputs of layer 0 have .* begin with a new"):
            cache = cache_of(own(**PURE)(IDS, use_cache=True))
            own(**PURE | {"linear_value_head_dim": 4})(ids, past_key_values=cache)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = own(state_sizes=[3, 8]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_classifier_of_continuous_values_ignores_padding(pooling, tmp_path):
    fields = config(num_channels=2, num_labels=3, pooling=pooling, state_sizes=[3, 8])
    torch.manual_seed(0)
    model = lively(CompreSSMGatedDeltaNetForSequenceClassification(fields)).eval()
    values = torch.randn(2, 9, 2)
    expected = model(input_values=values).logits
    padded = torch.nn.functional.pad(values, (0, 0, 2, 3), value=5.0)
    mask = torch.nn.functional.pad(torch.ones(2, 9), (2, 3))
    assert close(model(input_values=padded, attention_mask=mask).logits, expected, 1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_values=values).logits, expected)
    with pytest.raises(ValueError, match="this model reads input_values"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="input_values are for models with config.num_channels"):
        own()(input_values=values)


def test_new_models_remember():
    torch.manual_seed(0)
    model = CompreSSMGatedDeltaNetForCausalLM(config(linear_num_value_heads=64, **PURE))
    mixer = model.backbone.layers[0].linear_attn
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 0.000999 and steps.max() <= 0.1001 and 0.005 < steps.median() < 0.02
    assert mixer.A_log.exp().min() >= 0.01 and mixer.A_log.exp().max() <= 16
    assert (-mixer.A_log.exp() * steps).exp().median() > 0.85


def test_softmax_attention_at_an_interval():
    types = {"layer_types": None, "num_hidden_layers": 4}
    assert config(**types, full_attention_interval=2).layer_types == ["linear_attention", "full_attention"] * 2
    assert config(**types).layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert config(**types, full_attention_interval=0, state_sizes=4).state_sizes == [4] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"state_sizes": [3]},
            r"state_sizes must be one integer >= 1, or a list of one per layer; got \[3\] for linear",
        ),
        ({"state_sizes": 9}, "state_sizes must not exceed linear_key_head_dim"),
        ({"state_sizes": [0, 3]}, "state_sizes must be one integer >= 1"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads must be a multiple of linear_num_key_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"] * 3}, "the former at least once"),
        ({"layer_types": ["linear_attention"] * 2}, "for each of num_hidden_layers=3"),
        ({"layer_types": None, "full_attention_interval": -1}, "full_attention_interval must be >= 0"),
        ({"layer_types": None, "full_attention_interval": 1}, "the former at least once"),
        ({"hidden_act": "prelu"}, "hidden_act must be an activation without parameters"),
        ({"pooling": "first"}, "pooling must be one of mean, last"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_fields_are_saved(tmp_path):
    fields = config(state_sizes=[3, 8], pooling="mean", time_step_max=0.5)
    fields.save_pretrained(tmp_path)
    again = type(fields).from_pretrained(tmp_path)
    assert again.to_dict() == fields.to_dict() and again.layer_types == FIELDS["layer_types"]
