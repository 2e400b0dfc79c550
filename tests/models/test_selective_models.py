"""This package's Mamba and Mamba-2 models: equal to the stock ones, caches, generation, padding, saving."""

import copy

import pytest
import torch
from selective_models import COMMON, HEADS, IDS, OWN, STOCK, make, own
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compressm import CompreSSMMamba2ForSequenceClassification, CompreSSMMambaForSequenceClassification

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


@KINDS
def test_at_full_size_it_is_the_stock_model(kind):
    stock, ours = make(STOCK, kind), make(OWN, kind)
    assert all(torch.equal(p, ours.get_parameter(name)) for name, p in stock.named_parameters())  # same start
    losses = [model(IDS, labels=IDS).loss for model in (stock, ours)]
    assert torch.allclose(stock(IDS).logits, ours(IDS).logits, atol=2e-6)
    for loss in losses:
        loss.backward()
    for name, parameter in stock.named_parameters():
        assert torch.allclose(parameter.grad, ours.get_parameter(name).grad, atol=1e-5), name


def test_mamba2_with_identities_is_the_stock_model_too():
    ours = make(OWN, "mamba2")
    expected = ours(IDS).logits
    for layer in ours.backbone.layers:
        eye = torch.eye(8).expand(layer.mixer.n_groups, 8, 8)
        layer.mixer.read_in, layer.mixer.read_out = (torch.nn.Parameter(eye.clone()) for _ in range(2))
    assert torch.allclose(ours(IDS).logits, expected, atol=1e-6)


@KINDS
def test_every_layer_has_its_own_size_and_all_parameters_learn(kind):
    model = own(kind).train()
    assert [layer.mixer.state_size for layer in model.backbone.layers] == [3, 8, 5] == model.config.state_sizes
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@KINDS
@pytest.mark.parametrize("cut", [1, 2, 5, 19])
@pytest.mark.parametrize("learning", [True, False])
def test_going_on_from_a_cache_equals_the_full_forward(kind, cut, learning):
    model = own(kind)
    with torch.set_grad_enabled(learning):
        full = model(IDS).logits
        first = model(IDS[:, :cut], use_cache=True)
        second = model(IDS[:, cut:], cache_params=first.cache_params, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), full, atol=3e-6)


def token_by_token(model, ids):
    """Logits, one token at a time behind a cache."""
    options, logits = {}, []
    for token in ids.split(1, dim=1):
        output = model(token, use_cache=True, **options)
        options = {"cache_params": output.cache_params}
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@KINDS
def test_gradients_flow_through_single_tokens_behind_a_cache(kind):
    model = own(kind)
    expected = torch.autograd.grad(model(IDS, use_cache=False).logits.sin().sum(), list(model.parameters()))
    found = torch.autograd.grad(token_by_token(model, IDS).sin().sum(), list(model.parameters()))
    for name, one, other in zip(dict(model.named_parameters()), found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5 + 1e-4 * float(other.abs().max())), name


@KINDS
def test_generation_greedy_beam_sampling_and_left_padding(kind):
    model, prompt = own(kind), IDS[:, :6]
    settings = {"max_new_tokens": 8, "do_sample": False}
    greedy, expected = model.generate(prompt, **settings), prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, expected)
    beams = [model.generate(prompt, num_beams=3, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*beams)
    samples = []
    for use in (True, False):
        torch.manual_seed(0)
        samples.append(model.generate(prompt, max_new_tokens=8, do_sample=True, top_k=0, use_cache=use))
    assert torch.equal(*samples)
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = (torch.arange(9) >= 3).long().expand(2, 9)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 9:], greedy[:, 6:])


@KINDS
def test_padding_on_either_side_leaves_real_tokens_alone(kind):
    model = own(kind)
    plain = model(IDS).logits
    for pad, place in (((4, 0), slice(4, None)), ((0, 4), slice(0, 20))):
        mask = torch.nn.functional.pad(torch.ones_like(IDS), pad)
        found = model(torch.nn.functional.pad(IDS, pad, value=7), attention_mask=mask).logits
        assert torch.allclose(found[:, place], plain, atol=3e-6)


@KINDS
def test_saving_and_loading_keeps_sizes_ties_and_outputs(kind, tmp_path):
    model = own(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.config.state_sizes == [3, 8, 5]
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    config = copy.deepcopy(model.config)
    config.state_sizes = [3, 7, 5]
    with pytest.raises(RuntimeError, match=r"does not fit its config, whose state_sizes are \[3, 7, 5\]"):
        type(model).from_pretrained(tmp_path, config=config)


@KINDS
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        model = own(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("cls", [CompreSSMMambaForSequenceClassification, CompreSSMMamba2ForSequenceClassification])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_classifier_of_continuous_values_ignores_padding(cls, pooling, tmp_path):
    fields = COMMON | (HEADS if "2" in cls.__name__ else {})
    config = cls.config_class(**fields, num_channels=2, num_labels=3, pooling=pooling)
    model = cls(config).eval()
    values = torch.randn(4, 10, 2)
    padded = torch.nn.functional.pad(values, (0, 0, 0, 5))
    mask = (torch.arange(15) < 10).long().expand(4, 15)
    expected = model(input_values=values, labels=torch.tensor([0, 1, 2, 0]))
    assert expected.loss.isfinite() and expected.logits.shape == (4, 3)
    assert torch.allclose(model(input_values=padded, attention_mask=mask).logits, expected.logits, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_values=values).logits, expected.logits)


@KINDS
def test_bfloat16_runs(kind):
    model = own(kind).bfloat16()
    assert model(IDS).logits.isfinite().all()
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)


@KINDS
def test_nonsense_configs_are_refused(kind):
    _, config, extra = OWN[kind]
    for wrong in ([3, 8], [3, 0, 5], ["a"] * 3):
        with pytest.raises(ValueError, match="state_sizes must be one integer >= 1, or a list of one per layer"):
            config(**COMMON, **extra, state_sizes=wrong)
    with pytest.raises(ValueError, match="pooling must be one of mean, last"):
        config(**COMMON, **extra, pooling="max")
    if kind == "mamba2":
        with pytest.raises(ValueError, match="must not exceed state_size"):
            config(**COMMON, **extra, state_sizes=9)
    with pytest.raises(ValueError, match="leave config.num_channels out"):
        make(OWN, kind, num_channels=2)
