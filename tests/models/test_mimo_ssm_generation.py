"""MimoSSM models: caches and generation."""

import copy

import pytest
import torch
from mimo_models import B, L, V, close, token_ids
from transformers import (
    DynamicCache,
)

from hf_compressm.models import (
    MimoSSMCache,
)


def test_cache_equals_full_forward(lm):
    ids = token_ids()
    full = lm(ids).logits
    cache, pieces = None, []
    for piece in ids.split([4, 1, 1, 5], 1):
        outputs = lm(piece, past_key_values=cache)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    close(torch.cat(pieces, 1), full)
    assert cache.get_seq_length() == L and [s.shape for s in cache.states] == [(B, 5), (B, 3)]
    assert cache.batch_size == B and len(cache) == 2 and cache.get_max_length() == -1
    before = [s.clone() for s in cache.states]
    lm(ids[:, :2], past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == L and all(map(torch.equal, before, cache.states))


@torch.no_grad()
def test_cache_rows(lm):
    ids = token_ids()
    cache, next_ids = lm(ids).past_key_values, token_ids(B, 1)
    expected = lm(next_ids, past_key_values=copy.deepcopy(cache)).logits
    order = torch.tensor([2, 0, 0, 1])
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(order)
    close(lm(next_ids[order], past_key_values=reordered).logits, expected[order])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    close(
        lm(next_ids.repeat_interleave(2, 0), past_key_values=repeated).logits,
        expected.repeat_interleave(2, 0),
    )
    with pytest.raises(RuntimeError, match="rolled back"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized and cache.batch_size == -1
    close(lm(ids, past_key_values=cache).logits, lm(ids).logits)


def test_cache_of_another_kind_is_refused(lm):
    with pytest.raises(TypeError, match="must be a MimoSSMCache"):
        lm(token_ids(), past_key_values=DynamicCache())


def greedy(model, ids, steps, mask=None):
    """Reference: the whole sequence anew for every token."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


OPTIONS = {"pad_token_id": V - 1, "eos_token_id": None}


def test_generate_greedy_is_recurrent(lm):
    ids, lengths = token_ids(), []
    handle = lm.backbone.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generated = lm.generate(ids, max_new_tokens=7, do_sample=False, **OPTIONS)
    handle.remove()
    assert lengths == [L] + [1] * 6
    assert torch.equal(generated, greedy(lm, ids, 7))
    assert torch.equal(lm.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False, **OPTIONS), generated)
    chunked = lm.generate(
        ids,
        max_new_tokens=7,
        do_sample=False,
        prefill_chunk_size=4,
        past_key_values=MimoSSMCache(2),
        **OPTIONS,
    )
    assert torch.equal(chunked, generated)


def test_generate_scores_equal_full_forward(lm):
    ids = token_ids()
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2}):
        result = lm.generate(
            ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **options, **OPTIONS
        )
        full = lm(result.sequences).logits
        close(torch.stack(result.logits, 1), full[:, L - 1 : -1])


def test_generate_sampling_does_not_depend_on_the_cache(lm):
    ids, results = token_ids(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(lm.generate(ids, max_new_tokens=7, do_sample=True, use_cache=use_cache, **OPTIONS))
    assert torch.equal(*results)


def test_generate_beam_search(lm):
    ids = token_ids()
    options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "num_return_sequences": 2, **OPTIONS}
    cached, anew = (
        lm.generate(ids, use_cache=use_cache, return_dict_in_generate=True, output_scores=True, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    close(cached.sequences_scores, anew.sequences_scores)
    # Otherwise no beam changed places and reordering was not tested.
    assert any((row[row >= 0] != row[row >= 0][0]).any() for row in cached.beam_indices % 4)


def test_generate_with_left_padding(lm):
    ids = token_ids()
    mask = torch.ones_like(ids)
    for row, n in enumerate([0, 5, 10]):
        ids[row, :n], mask[row, :n] = V - 1, 0
    for inputs in ({"attention_mask": mask}, {}):
        generated = lm.generate(ids, max_new_tokens=5, do_sample=False, **inputs, **OPTIONS)
        for row, n in enumerate([0, 5, 10]):
            assert torch.equal(generated[row, n:], greedy(lm, ids[row : row + 1, n:], 5)[0])


def test_generate_goes_on_from_a_returned_cache(lm):
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"do_sample": False, "return_dict_in_generate": True, **OPTIONS}
    whole = lm.generate(ids, attention_mask=mask, max_new_tokens=9, **options).sequences
    first = lm.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
    assert first.past_key_values.get_seq_length() == L + 4
    longer = torch.cat([mask, mask.new_ones(B, 5)], 1)
    lengths = []
    handle = lm.backbone.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    rest = lm.generate(
        first.sequences,
        attention_mask=longer,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        **options,
    )
    handle.remove()
    assert torch.equal(rest.sequences, whole) and lengths == [1] * 4
