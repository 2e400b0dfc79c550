"""Stock delta-rule mixers by this package's recurrence: outputs, gradients, caches and copies as without it."""

import copy

import pytest
import torch
from delta_models import CONFIGS, make
from peft import LoraConfig, get_peft_model

from hf_compressm import compress, state_sizes, use_fast_ops
from hf_compressm.models.automatic import by_fast_ops
from hf_compressm.models.fast_ops import mixer_class, uncalled_layers
from hf_compressm.surgery import find_mixers

FAMILIES = pytest.mark.parametrize("family", sorted(CONFIGS))
IDS = torch.randint(2, 64, (3, 70), generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-4
"""Relative to the largest entry: float32 sums over chunks of another size, through three layers."""


def pair(family):
    stock = make(family)
    fast = copy.deepcopy(stock)
    names = use_fast_ops(fast)
    assert names == [site.name for site in find_mixers(stock)]
    return stock, fast


def close(one, two):
    return (one - two).abs().max() <= TOLERANCE * two.abs().max().clamp(min=1e-3)


@FAMILIES
def test_outputs_and_gradients_are_those_of_the_stock_model(family):
    stock, fast = pair(family)
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    for model in (stock, fast):
        model(IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert close(fast(IDS, attention_mask=mask).logits, stock(IDS, attention_mask=mask).logits)
    for (name, one), two in zip(fast.named_parameters(), stock.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) and (two.grad is None or close(one.grad, two.grad)), name


@FAMILIES
def test_generation_and_cached_tokens_are_those_of_the_stock_model(family):
    stock, fast = pair(family)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    assert torch.equal(fast.generate(IDS[:, :20], **settings), stock.generate(IDS[:, :20], **settings))
    assert torch.equal(fast.generate(IDS[:1, :20], num_beams=2, **settings), stock.generate(IDS[:1, :20], num_beams=2, **settings))  # fmt: skip  # noqa: E501
    with torch.no_grad():
        found = []
        for model in (stock, fast):
            cache = model(IDS[:, :30], use_cache=True).past_key_values
            found.append([model(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(30, 33)])
    assert all(close(one, two) for one, two in zip(*found, strict=True))


def test_switching_back_and_copies():
    stock, fast = pair("qwen3_5")
    again = copy.deepcopy(fast)
    assert close(again(IDS).logits, stock(IDS).logits)
    assert all(type(site.mixer) is not mixer_class(site.mixer) for site in find_mixers(again))
    use_fast_ops(again, enable=False)
    assert torch.equal(again(IDS).logits, stock(IDS).logits)


def test_a_cut_model_runs_by_it():
    stock, fast = pair("qwen3_next")
    for model in (stock, fast):
        compress(model, {"input_ids": IDS}, target=8, refit_steps=0, fast_ops=False)
    assert state_sizes(fast) == [8, 8] and close(fast(IDS).logits, stock(IDS).logits)


def test_packed_sequences_are_refused_or_left_to_the_stock_forward():
    stock, fast = pair("qwen3_5")
    mixer = find_mixers(fast)[0].mixer
    hidden, ends = torch.randn(1, 12, 32), torch.tensor([0, 5, 12])
    with pytest.raises(ValueError, match="sequences packed into one are not kept apart"):
        mixer(hidden, cu_seq_lens_q=ends)
    with by_fast_ops(stock):
        lent = find_mixers(stock)[0].mixer
        assert type(lent) is not mixer_class(lent)
        with pytest.raises(ValueError, match="flash-linear-attention"):  # transformers' own refusal
            lent(hidden, cu_seq_lens_q=ends)


def test_an_adapter_on_the_convolution_is_as_without_it():
    _, fast = pair("qwen3_5")
    assert uncalled_layers(find_mixers(fast)[0].mixer) == ["conv1d"]
    tuned = get_peft_model(fast, LoraConfig(target_modules=["in_proj_qkv"]))
    assert tuned(IDS).logits.isfinite().all()
