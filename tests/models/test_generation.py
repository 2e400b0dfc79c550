"""What transformers' own generation tests check, for every class of this package that generates.

Its sdist does not carry them: each test here is one or several of `GenerationTesterMixin`, by value where it can be.
"""

import copy

import pytest
import torch
from own_models import CAUSAL, Own, V
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

CLASSES = pytest.mark.parametrize("name", CAUSAL)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
CACHES = ("cache", "cache_params", "past_key_values")
"""Names of a cache in the versions of transformers."""


def made(name, **fields):
    """A model whose logits differ enough for one token to be the best."""
    model = Own(name).model(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embeddings.weight"):
                parameter.mul_(10)
    model.generation_config.bos_token_id = 1
    return model


def prompt(name, batch=2):
    return Own(name).ids(batch)[:, :5]


def greedy(model, ids, steps=6):
    """Token after token by whole forward passes, without a cache."""
    for _ in range(steps):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def cache_of(output):
    return next((key, output[key]) for key in CACHES if output.get(key) is not None)


@CLASSES
def test_classes_generate(name):
    assert issubclass(Own(name).cls, GenerationMixin) and Own(name).cls.can_generate()


@CLASSES
def test_greedy_with_and_without_a_cache_and_again(name):
    model, ids = made(name), prompt(name)
    expected = greedy(model, ids)
    for options in ({}, {"use_cache": False}, {}):
        assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


@CLASSES
def test_outputs_as_objects(name):
    model, ids = made(name), prompt(name)
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    output = model.generate(ids, **GREEDY, **asked)
    full = model(output.sequences).logits
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == 6
    for step, logits in enumerate(output.logits):
        assert torch.allclose(logits, full[:, 4 + step], atol=1e-3), step
    assert [len(states) for states in output.hidden_states] == [3] * 6
    assert output.hidden_states[0][0].shape[:2] == (2, 5) and output.hidden_states[1][0].shape[:2] == (2, 1)
    assert output.past_key_values is not None or cache_of(output)


@CLASSES
@pytest.mark.parametrize(
    "options", [{"do_sample": True, "top_k": 0}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}]
)
def test_sampling_and_beams_do_not_depend_on_the_cache(name, options):
    model, ids = made(name), prompt(name)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(model.generate(ids, **(GREEDY | {"use_cache": use_cache, "num_return_sequences": 2} | options)))
    assert found[0].shape == (4, 11) and torch.equal(*found)


@CLASSES
def test_scores_of_beams_are_those_of_their_tokens(name):
    model, ids = made(name), prompt(name)
    asked = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    output = model.generate(ids, **GREEDY, **asked)
    with torch.no_grad():
        log_probs = model(output.sequences).logits[:, 4:-1].log_softmax(-1)
    total = log_probs.gather(-1, output.sequences[:, 5:, None]).sum((1, 2))
    assert torch.allclose(output.sequences_scores, total, atol=1e-3)
    transitions = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    assert torch.allclose(transitions.sum(1), total, atol=1e-3)


@CLASSES
def test_from_nothing_and_from_embeddings(name):
    model, ids = made(name), prompt(name)
    start = torch.ones(1, 1, dtype=torch.int64)
    assert torch.equal(model.generate(**GREEDY), greedy(model, start))
    embeds = model.get_input_embeddings()(ids)
    for options in ({}, {"num_beams": 2}):
        expected = model.generate(ids, **GREEDY, **options)[:, 5:]
        assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY, **options), expected)
        both = model.generate(ids, inputs_embeds=embeds, **GREEDY, **options)
        assert torch.equal(both[:, 5:], expected)


@CLASSES
def test_left_padding(name):
    model, ids = made(name), prompt(name)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    padded = torch.nn.functional.pad(ids, (3, 0), value=9)
    found = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(found[:, 8:], greedy(model, ids)[:, 5:])


@CLASSES
def test_going_on_from_a_returned_cache(name):
    model, ids = made(name), prompt(name)
    expected = greedy(model, ids)
    first = model.generate(ids, **(GREEDY | {"max_new_tokens": 3}), return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    key = "cache_params" if "Mamba" in name else "past_key_values"
    assert torch.equal(model.generate(first.sequences, **(GREEDY | {"max_new_tokens": 3, key: cache})), expected)
    output = model(ids, use_cache=True)
    key, cache = cache_of(output)
    following = output.logits[:, -1:].argmax(-1)
    again = model(following, use_cache=True, **{key: cache})
    assert torch.equal(torch.cat([following, again.logits.argmax(-1)], 1), expected[:, 5:7])


@CLASSES
def test_what_needs_states_to_go_back_is_refused(name):
    model, ids = made(name), prompt(name, 1)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(ids, **GREEDY, **options)


@CLASSES
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_other_kinds_of_caches_change_nothing(name, kind):
    model, ids = made(name), prompt(name)
    expected = greedy(model, ids)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GREEDY, cache_implementation=kind), expected)


@CLASSES
def test_prefill_in_pieces_and_compiled(name):
    model, ids = made(name, num_hidden_layers=1, state_sizes=[3]), Own(name).ids(2)
    expected = greedy(model, ids)
    try:  # the versions in which a cache of this kind cannot be made beforehand say so
        assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=3), expected)
    except ValueError as error:
        assert "cache" in str(error).lower()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@CLASSES
def test_logits_of_some_positions(name):
    model, ids = made(name), prompt(name)
    full = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, full[:, -2:], atol=1e-5)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]], atol=1e-5)
    assert torch.equal(model.generate(ids, **GREEDY, logits_to_keep=1), greedy(model, ids))


class Only(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([7]), 0.0)


@CLASSES
def test_processors_and_criteria(name):
    model, ids = made(name), prompt(name)
    free = greedy(model, ids)
    forced = model.generate(ids, **GREEDY, logits_processor=LogitsProcessorList([Only()]))
    assert (forced[:, 5:] == 7).all()
    short = model.generate(ids, **GREEDY, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(7)]))
    assert torch.equal(short, free[:, :7])
    banned = int(free[0, 5])
    assert not (model.generate(ids, **GREEDY, bad_words_ids=[[banned]])[:, 5:] == banned).any()
    ended = model.generate(ids, **GREEDY, eos_token_id=banned)[0, 5:]
    assert ended[0] == banned and (ended[1:] == 0).all()
    assert model.generate(ids, **GREEDY, repetition_penalty=1.5).max() < V


class Collector:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@CLASSES
def test_streams(name):
    model, ids, streamer = made(name), prompt(name, 1), Collector()
    output = model.generate(ids, **GREEDY, streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.ended


@CLASSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name, dtype):
    model, ids = made(name).to(dtype), prompt(name)
    assert model.generate(ids, **GREEDY).shape == (2, 11)
    expected = greedy(model, ids)
    if dtype is torch.float64:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
