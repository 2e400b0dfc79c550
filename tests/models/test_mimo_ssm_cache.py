"""`MimoSSMCache` keeps the contract of transformers' `Cache`: each member works, or says that it cannot."""

import copy
import pickle

import pytest
import torch
from mimo_models import B, L, close, token_ids
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hf_compressm.models import MimoSSMCache

WORKING = {
    *("batch_size", "get_max_length", "get_mask_sizes", "get_query_offset", "get_seq_length", "has_previous_state"),
    *("is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_sliding", "is_recording_past"),
    *("activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "reorder_cache", "reset"),
    *("early_initialization", "get_conv_state", "get_recurrent_state", "update_recurrent_state"),
}
REFUSED = {"crop", "offload", "prefetch", "update", "update_conv_state", "update_indexer"}


@pytest.fixture
def ids():
    return token_ids()


@pytest.fixture
def cache(lm, ids):
    with torch.no_grad():
        return lm(ids).past_key_values


def test_every_member_of_the_contract_is_looked_at():
    members = {name for name in dir(Cache) if not name.startswith("_")}
    earlier = {"get_max_cache_shape", "max_batch_size", "max_cache_len"}
    assert members - earlier <= WORKING | REFUSED


def test_before_and_after_the_first_token(lm, ids, cache):
    fresh = MimoSSMCache(2)
    assert len(fresh) == len(fresh.layers) == len(cache) == len(cache.layers) == 2
    for each, seen in ((fresh, 0), (cache, L)):
        assert each.get_seq_length() == each.get_seq_length(1) == each.get_query_offset() == seen
        assert each.get_mask_sizes(3, 0) == each.get_mask_sizes(3, 1) == (seen + 3, 0)
        assert each.get_max_length() == each.get_max_length(0) == -1
        assert each.is_initialized is each.has_previous_state() is each.has_previous_state(1) is bool(seen)
        assert each.batch_size == (B if seen else -1)
        # Of caches that are all linear, `generate` would take it that they count no tokens.
        assert each.is_linear == each.is_sliding == [False, False]
        assert not each.is_compileable and not each.is_croppable
        each.early_initialization(B, 1, 8, torch.float32, torch.device("cpu"))
        each.activate_past_recording()
        assert not each.is_croppable and not any(getattr(layer, "record_past", False) for layer in each.layers)
        if hasattr(Cache, "get_conv_state"):  # not in every version of transformers
            assert each.get_conv_state(0) is None and each.get_recurrent_state(0) is each.states[0]
    assert all(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    assert [tuple(state.shape) for state in cache.states] == [(B, 5), (B, 3)]
    assert all(state is layer.recurrent_states[0] for state, layer in zip(cache.states, cache.layers, strict=True))


def test_what_cannot_be_done_says_so(cache):
    before = [state.clone() for state in cache.states]
    for count in (-1, 2, -L):
        with pytest.raises(RuntimeError, match="a recurrent state cannot be rolled back"):
            cache.crop(count)
    cache.crop(0)  # as generation does where it takes nothing back
    with pytest.raises(NotImplementedError, match="a state in place of keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(NotImplementedError, match="no convolution"):
        cache.update_conv_state(torch.zeros(1), 0)
    assert all(map(torch.equal, before, cache.states)) and cache.get_seq_length() == L


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_go_on_as_those_that_they_were_taken_from(lm, ids, change, rows):
    cache, following = lm(ids[:, :-1]).past_key_values, ids[:, -1:]
    change(cache)
    assert cache.batch_size == len(rows)
    close(lm(following[rows], past_key_values=cache).logits, lm(ids[rows]).logits[:, -1:])
    change(MimoSSMCache(2))  # without effect before the first token


def test_copies_pickles_and_resets_are_of_their_own(lm, ids, cache):
    following, kept = ids[:, :1], [state.clone() for state in cache.states]
    expected = lm(following, past_key_values=copy.deepcopy(cache)).logits
    close(lm(following, past_key_values=pickle.loads(pickle.dumps(cache))).logits, expected)
    assert all(map(torch.equal, kept, cache.states))
    cache.reset()
    assert cache.states == [None, None] and cache.get_seq_length() == 0 and not cache.is_initialized
    close(lm(ids, past_key_values=cache).logits, lm(ids).logits)


def test_states_can_be_set_by_hand(lm, ids, cache):
    other = MimoSSMCache(2)
    for index, state in enumerate(cache.states):
        other.update_recurrent_state(state, index)
    other.seen_tokens = cache.get_seq_length()
    following = ids[:, :1]
    close(lm(following, past_key_values=other).logits, lm(following, past_key_values=cache).logits)


def test_gradients_flow_through_a_cache(lm, ids):
    lm.requires_grad_()
    first = lm(ids[:, :5], use_cache=True)
    second = lm(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    third = lm(ids[:, :2], past_key_values=second.past_key_values, use_cache=True)
    (second.logits.sum() + third.logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


def test_generation_takes_another_path_where_states_would_have_to_go_back(lm, ids):
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": copy.deepcopy(lm)}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            lm.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0, **options)
