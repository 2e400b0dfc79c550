"""This package's MiniMax: equal to transformers', cut layers, caches, generation, padding, saving."""

import pytest
import torch
from own_minimax_models import IDS, KEYS, PURE, config, own, stock
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxModel

from hf_compressm import (
    CompreSSMMiniMaxForCausalLM,
    CompreSSMMiniMaxForSequenceClassification,
    CompreSSMMiniMaxModel,
    from_stock,
    to_stock,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}
CUT = {"state_sizes": [3, 8]}
SIZES = pytest.mark.parametrize("fields", [CUT, PURE | {"state_sizes": [3, 8, 5]}], ids=["hybrid", "pure"])
KINDS = pytest.mark.parametrize(
    "fields",
    [{}, PURE, {"sliding_window": 6}, {"tie_word_embeddings": True}],
    ids=["hybrid", "pure", "sliding", "tied"],
)


def cached(output):
    return next(output[name] for name in ("cache", "past_key_values") if output.get(name) is not None)


def close(found, expected, tolerance=1e-5):
    return (found - expected).detach().abs().max() <= tolerance * expected.detach().abs().max().clamp(min=1)


@KINDS
def test_at_full_size_it_is_the_stock_model(fields, tmp_path):
    theirs = stock(**fields)
    ours = from_stock(theirs)
    assert type(ours) is CompreSSMMiniMaxForCausalLM and ours.config.state_sizes == [KEYS] * (
        3 if fields == PURE else 2
    )
    found, expected = (
        model(IDS, labels=IDS, use_cache=False, output_router_logits=True, output_hidden_states=True)
        for model in (ours, theirs)
    )
    assert close(found.logits, expected.logits) and close(found.aux_loss, expected.aux_loss)
    assert all(map(close, found.hidden_states, expected.hidden_states))
    assert close(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert close(ours.get_parameter(name.replace("model.", "backbone.", 1)).grad, parameter.grad), name
    back = to_stock(ours)
    assert type(back) is type(theirs) and back.config.to_dict() == theirs.config.to_dict()
    for (name, tensor), before in zip(back.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(tensor, before), name
    assert torch.equal(back(IDS, use_cache=False).logits, expected.logits)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(from_stock(tmp_path)(IDS).logits, ours(IDS).logits)


def test_a_model_with_grouped_experts_is_converted_whichever_class_is_made_first(tmp_path, monkeypatch):
    theirs = stock()
    theirs.save_pretrained(tmp_path)
    for cls in CompreSSMMiniMaxForCausalLM.__mro__:  # transformers notes there what it has found out of the first
        if "_can_set_experts_implementation_cached_value" in vars(cls):
            monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value")
    first = CompreSSMMiniMaxForCausalLM(config(experts_implementation=None))
    ours = from_stock(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (first, ours, loaded):
        assert model.config._experts_implementation == "grouped_mm"
    assert close(ours(IDS).logits, loaded(IDS, use_cache=False).logits)


@pytest.mark.parametrize(
    "fields", [{"layer_types": ["full_attention", "linear_attention"] * 2, "num_hidden_layers": 4}]
)
def test_it_generates_what_the_stock_model_does_with_padding_too(fields):
    theirs = stock(**fields)
    ours = from_stock(theirs)
    prompt = pad(IDS[:, :6], (3, 0))
    for mask in (torch.ones_like(prompt), (torch.arange(9) >= 3).long().expand(2, 9)):
        both = [model.generate(prompt, attention_mask=mask, **GREEDY) for model in (ours, theirs)]
        assert torch.equal(*both)
    right, mask = pad(IDS, (0, 4)), pad(torch.ones_like(IDS), (0, 4))
    found, expected = (model(right, attention_mask=mask, use_cache=False).logits[:, :20] for model in (ours, theirs))
    assert close(found, expected)


def test_without_a_head_it_is_converted_too():
    theirs = MiniMaxModel(stock().config).eval()
    ours = from_stock(theirs)
    assert type(ours) is CompreSSMMiniMaxModel
    expected = theirs(IDS, use_cache=False).last_hidden_state
    assert close(ours(IDS).last_hidden_state, expected)
    assert torch.equal(to_stock(ours)(IDS, use_cache=False).last_hidden_state, expected)


@pytest.mark.parametrize("fields", [{}, CUT], ids=["full", "cut"])
def test_the_mixer_computes_its_equation(fields):
    mixer = own(**fields).double().backbone.layers[0].self_attn
    hidden = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    q, k, v = mixer.act(mixer.qkv_proj(hidden)).unflatten(-1, (4, 3 * KEYS)).split(KEYS, dim=-1)
    if fields:
        q, k = ((x[..., None, :] @ m.mT)[..., 0, :] for x, m in ((q, mixer.read_out), (k, mixer.read_in)))
    decay = torch.exp(-(0.25 ** torch.arange(1, 5, dtype=torch.float64)) * 1.00001)[:, None, None]
    state, outputs = 0, []
    for t in range(9):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    normed = mixer.norm(torch.stack(outputs, 1).flatten(2))
    expected = mixer.out_proj(mixer.output_gate(hidden).sigmoid() * normed)
    assert close(mixer(hidden)[0], expected, 1e-6)  # the norm and the decays are in float32


def test_a_change_of_basis_changes_nothing():
    model = own()
    expected = model(IDS).logits
    for layer in (model.backbone.layers[0], model.backbone.layers[2]):
        basis = torch.randn(4, KEYS, KEYS, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(KEYS)
        layer.self_attn.read_in = torch.nn.Parameter(basis)
        layer.self_attn.read_out = torch.nn.Parameter(torch.linalg.inv(basis).mT.contiguous())
    assert close(model(IDS).logits, expected)


def test_what_has_no_other_form_is_refused():
    with pytest.raises(ValueError, match=r"layers.0.self_attn has keys and queries in a basis .* a stock MiniMax"):
        to_stock(own(**CUT))
    with pytest.raises(ValueError, match="state_size must be 8, the size of the model's keys"):
        to_stock(own(), state_size=4)
    theirs = stock()
    theirs.model.layers[2].self_attn.slope_rate.mul_(1.1)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn has a slope_rate of its own"):
        from_stock(theirs)


@SIZES
def test_every_layer_has_its_own_size_and_all_parameters_learn(fields):
    model = own(**fields).train()
    mixers = [layer.self_attn for layer in model.backbone.layers if layer.block_type == "linear_attention"]
    assert [mixer.state_size for mixer in mixers] == model.config.state_sizes == fields["state_sizes"]
    model(IDS, labels=IDS, output_router_logits=True).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gradients_are_those_of_finite_differences():
    mixer = own(hidden_size=4, num_attention_heads=2, head_dim=2, state_sizes=1).double().backbone.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    names = ("qkv_proj.weight", "read_in", "read_out", "out_proj.weight", "output_gate.weight")
    values = tuple(mixer.get_parameter(name).detach().clone().requires_grad_() for name in names)
    # The norm computes in float32: finite differences see its rounding.
    mixer.norm = torch.nn.RMSNorm(4, eps=1e-6, dtype=torch.float64)

    def mixed(hidden, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (hidden,))[0]

    assert torch.autograd.gradcheck(mixed, (hidden, *values))


@SIZES
@pytest.mark.parametrize("cut", [1, 5, 19])
@pytest.mark.parametrize("learning", [True, False])
def test_continuing_from_a_cache_equals_the_full_forward(fields, cut, learning):
    model = own(**fields)
    with torch.set_grad_enabled(learning):
        first = model(IDS[:, :cut], use_cache=True)
        second = model(IDS[:, cut:], past_key_values=cached(first), use_cache=True)
        assert close(torch.cat([first.logits, second.logits], 1), model(IDS).logits)
    assert cached(second).layers[0].recurrent_states[0].shape == (2, 4, KEYS, 3)


@SIZES
def test_generation_greedy_beams_and_left_padding(fields):
    model, prompt = own(**fields), IDS[:, :6]
    greedy, expected = model.generate(prompt, **GREEDY), prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, expected)
    assert torch.equal(*(model.generate(prompt, num_beams=3, use_cache=use, **GREEDY) for use in (True, False)))
    mask = pad(torch.ones_like(prompt), (3, 0))
    padded = model.generate(pad(prompt, (3, 0), value=9), attention_mask=mask, **GREEDY)
    assert torch.equal(padded[:, 9:], greedy[:, 6:])


@SIZES
def test_padding_anywhere_leaves_no_trace(fields):
    model = own(**fields)
    real = torch.ones(2, 24, dtype=torch.bool)
    real[0, [0, 9, 10, 23]], real[1, [3, 21, 22, 23]] = False, False
    ids = torch.full((2, 24), 7).masked_scatter(real, IDS)
    found, alone = model(ids, attention_mask=real.long(), use_cache=True), model(IDS, use_cache=True)
    assert close(found.logits[real].view_as(alone.logits), alone.logits)
    for mine, other in zip(cached(found).layers[::2], cached(alone).layers[::2], strict=True):
        assert close(mine.recurrent_states[0], other.recurrent_states[0])


def test_caches_that_do_not_fit_are_refused():
    for ids in (IDS, IDS[:, :1]):
        with torch.no_grad(), pytest.raises(ValueError, match="A cache from before a cut does not fit"):
            own(**PURE, state_sizes=3)(ids, past_key_values=cached(own(**PURE)(IDS, use_cache=True)))
    with pytest.raises(ValueError, match="a MiniMaxCache has no place for the state of layer 0; give the model"):
        own()(IDS, past_key_values=MiniMaxCache(), use_cache=True)


@SIZES
def test_saving_and_loading_keeps_sizes_and_outputs(fields, tmp_path):
    model = own(**fields, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.config.state_sizes == fields["state_sizes"]
    assert loaded.lm_head.weight is loaded.backbone.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    other = config(**fields | {"state_sizes": [4, *fields["state_sizes"][1:]]})
    with pytest.raises(RuntimeError, match=r"does not fit its config, whose state_sizes are \[4, "):
        type(model).from_pretrained(tmp_path, config=other)


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = own(**CUT).train(), own(**CUT).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(IDS, labels=IDS).loss.backward()
    for one, two in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6)


def test_a_classifier_of_continuous_values_ignores_padding(tmp_path):
    torch.manual_seed(0)
    fields = config(num_channels=2, num_labels=3, pooling="mean", **CUT)
    model = CompreSSMMiniMaxForSequenceClassification(fields).eval()
    values = torch.randn(2, 9, 2)
    expected = model(input_values=values).logits
    mask = pad(torch.ones(2, 9), (2, 3))
    assert close(model(input_values=pad(values, (0, 0, 2, 3), value=5.0), attention_mask=mask).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_values=values).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state_sizes": [3]}, r"or a list of one per layer; got \[3\] for linear-attention layers=2"),
        ({"state_sizes": 9}, "state_sizes must not exceed head_dim"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"] * 3}, "the former at least once"),
        ({"layer_types": None, "full_attention_interval": -1}, "full_attention_interval must be >= 0"),
        ({"hidden_act": "prelu"}, "hidden_act must be an activation without parameters"),
        ({"pooling": "first"}, "pooling must be one of mean, last"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_defaults_of_the_config():
    fields = config(head_dim=None, layer_types=None, num_hidden_layers=9)
    assert fields.layer_types == [*["linear_attention"] * 7, "full_attention", "linear_attention"]
    assert fields.head_dim == 8 and fields.state_sizes == [8] * 8
