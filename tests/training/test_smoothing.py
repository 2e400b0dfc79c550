"""Label smoothing where the Trainer would not shift the labels of a causal model."""

import pytest
import torch
from helpers import arguments, small_data, small_model
from transformers import MambaConfig, MambaForCausalLM, Trainer

from hf_compressm import CompreSSMCallback, MimoSSMConfig, MimoSSMForCausalLM

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
DATA = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 20, (8, 6))]


class Named(MambaForCausalLM):
    """Of a name that transformers does not know."""


def mimo():
    return MimoSSMForCausalLM(MimoSSMConfig(**SIZES, state_sizes=4))


def stock(cls=MambaForCausalLM):
    return cls(MambaConfig(**SIZES, state_size=4, pad_token_id=0))


def train(model, folder, data=DATA, **settings):
    args = arguments(folder, max_steps=8, label_smoothing_factor=0.1, **settings)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[CompreSSMCallback(window_end=0.5)])
    trainer.train()
    return trainer


@pytest.mark.parametrize("make", [mimo, stock])
def test_behind_torch_compile_it_is_refused_before_the_first_step(make, tmp_path):
    model = make()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="labels that are not shifted.* sees OptimizedModule"):
        train(model, tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_class_that_transformers_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels that are not shifted.* sees Named"):
        train(stock(Named), tmp_path)


@pytest.mark.parametrize(("make", "data"), [(mimo, DATA), (stock, DATA), (small_model, small_data())])
def test_others_train(make, data, tmp_path):
    assert train(make(), tmp_path, data).state.global_step == 8
