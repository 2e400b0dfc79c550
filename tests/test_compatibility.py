"""One package on several versions of transformers: caches by every name, and no keyword passed over."""

import pytest
import torch
from selective_models import IDS, own
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM, DynamicCache

from hf_compressm import MimoSSMConfig, use_fast_ops
from hf_compressm.compatibility import CACHE_KEYWORDS, HARMLESS_KEYWORDS, PACKED_KEYWORDS
from hf_compressm.models import MimoSSMForCausalLM
from hf_compressm.surgery import find_mixers

FAMILIES = sorted(CONFIGS)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "mimo_ssm":
        return MimoSSMForCausalLM(
            MimoSSMConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, state_sizes=4)
        ).eval()
    if kind in ("mamba", "mamba2"):
        return own(kind)
    stock = AutoModelForCausalLM.from_config(CONFIGS[kind.removeprefix("fast_")]()).eval()
    use_fast_ops(stock)
    return stock


SELECTIVE = ["mamba", "mamba2", *(f"fast_{family}" for family in FAMILIES)]


@pytest.mark.parametrize("name", CACHE_KEYWORDS)
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mimo_ssm"])
@torch.no_grad()
def test_models_go_on_from_a_cache_by_each_name(kind, name):
    for model in (model_of(kind), model_of(kind).backbone):
        if kind == "mimo_ssm" and name == "cache_params":  # a name that no version of transformers uses for it
            continue
        key = "logits" if hasattr(model, "lm_head") else "last_hidden_state"
        whole, first = model(IDS)[key], model(IDS[:, :9], use_cache=True)
        cache = next(first[field] for field in CACHE_KEYWORDS if field in first)
        assert torch.allclose(model(IDS[:, 9:], **{name: cache})[key], whole[:, 9:], atol=3e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mimo_ssm"])
def test_two_different_caches_are_refused(kind):
    model = model_of(kind)
    old = "past_key_values" if kind == "mimo_ssm" else "cache_params"
    one, other = (model(IDS, use_cache=True) for _ in range(2))
    caches = [next(output[field] for field in CACHE_KEYWORDS if field in output) for output in (one, other)]
    model(IDS[:, :1], **{"cache": caches[0], old: caches[0]})
    with pytest.raises(TypeError, match="was given a cache as cache and another as"):
        model(IDS[:, :1], **{"cache": caches[0], old: caches[1]})


@pytest.mark.parametrize("kind", SELECTIVE)
@torch.no_grad()
def test_mixers_take_a_cache_by_either_name(kind):
    model = model_of(kind)
    mixer = find_mixers(model)[0].mixer
    x = torch.randn(2, 7, model.config.hidden_size)
    whole = mixer(x)
    for name in ("cache", "cache_params"):
        cache = DynamicCache(config=model.config)
        parts = [mixer(part, **{name: cache}) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5), name


@pytest.mark.parametrize("kind", SELECTIVE)
def test_mixers_pass_over_no_keyword_that_means_something(kind):
    model = model_of(kind)
    mixer = find_mixers(model)[0].mixer
    x = torch.randn(2, 3, model.config.hidden_size)
    expected = mixer(x)
    assert torch.equal(mixer(x, **dict.fromkeys(HARMLESS_KEYWORDS, True)), expected)
    assert torch.equal(mixer(x, unheard_of=None), expected)
    for name in ("initial_state", "past_key_values", "inference_params"):
        with pytest.raises(TypeError, match=f"does not know the keyword {name}"):
            mixer(x, **{name: x})
    for name in PACKED_KEYWORDS:
        with pytest.raises(ValueError, match=rf"packed into one.*\({name}\)") as refused:
            mixer(x, **{name: x})
        assert ("enable=False" in str(refused.value)) == kind.startswith("fast_")


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_hand_their_mixers_nothing_that_is_refused(family):
    model, seen = model_of(f"fast_{family}"), set()
    for site in find_mixers(model):
        site.mixer.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    model.train()(
        IDS, labels=IDS, num_items_in_batch=torch.tensor(5), output_hidden_states=True, output_attentions=True
    )
    model.eval().generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert seen - HARMLESS_KEYWORDS - {"hidden_states", "attention_mask", "cache", "cache_params"} == set()
    assert seen & {"cache", "cache_params"}
