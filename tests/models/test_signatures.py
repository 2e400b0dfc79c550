"""Forward passes take what those of the stock classes take, by position and by name."""

import inspect

import pytest
import torch
from own_models import CAUSAL, CLASSIFIERS, MODELS, STEPS, Own
from transformers import Mamba2ForCausalLM, Mamba2Model, MambaForCausalLM, MambaModel

STOCK = {f"CompreSSM{cls.__name__}": cls for cls in (MambaModel, Mamba2Model, MambaForCausalLM, Mamba2ForCausalLM)}


def parameters(cls):
    return inspect.signature(cls.forward).parameters


@pytest.mark.parametrize("name", (*MODELS, *CAUSAL, *CLASSIFIERS, *STEPS))
def test_arguments_are_written_out(name):
    found = parameters(Own(name).cls)
    assert not any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in found.values())
    assert list(found)[1] == "input_ids" and "attention_mask" in found
    assert ("labels" in found) is not name.endswith("Model")
    assert ("input_values" in found) is not name.endswith("ForCausalLM")


@pytest.mark.parametrize("name", STOCK)
def test_positions_are_those_of_the_stock_class(name):
    ours, stock = (parameters(cls) for cls in (Own(name).cls, STOCK[name]))
    named = [key for key, each in stock.items() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    for own, key in zip(list(ours), named, strict=False):
        assert own == key or {own, key} == {"cache", "cache_params"}  # one thing by the names of two versions
        assert ours[own].default == stock[key].default


@pytest.mark.parametrize("name", [name for name in MODELS if name in STOCK])
def test_further_arguments_by_position(name):
    model = Own(name).model().eval()
    ids = Own(name).ids(2)
    embeds = model.embeddings(ids)
    expected = model(ids, use_cache=True)
    assert torch.equal(model(None, embeds).last_hidden_state, expected.last_hidden_state)
    found = model(ids, None, None, True, True, False)  # use_cache, output_hidden_states, return_dict
    assert isinstance(found, tuple) and torch.equal(found[0], expected[0]) and len(found[-1]) == 3


@pytest.mark.parametrize("name", (*MODELS, *CAUSAL, *CLASSIFIERS, *STEPS))
def test_hidden_states_come_out_where_the_config_says_so(name):
    own = Own(name)
    model, ids = own.model().eval(), own.ids(batch=2)
    assert model(input_ids=ids).hidden_states is None
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    model.config.output_hidden_states = True
    found = model(input_ids=ids).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and len(found) > 1
    assert model(input_ids=ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("name", CAUSAL)
def test_labels_that_are_shifted_already_reach_the_loss(name):
    own = Own(name)
    model, ids = own.model().eval(), own.ids(batch=2)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(input_ids=ids, labels=ids, shift_labels=shifted).loss, expected)
    assert abs(model(input_ids=ids, labels=ids, shift_labels=ids).loss - expected) > 1e-4
