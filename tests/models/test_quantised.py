"""Weights quantised while a model is loaded: it generates, and a cut of what is quantised is refused."""

import pytest
import torch
from mimo_models import config as mimo_config
from own_delta_models import own as delta
from own_minimax_models import own as minimax
from selective_models import own as selective
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_compressm import MimoSSMForCausalLM, compress, state_sizes

IDS = torch.randint(1, 20, (2, 20), generator=torch.Generator().manual_seed(1))
MODELS = {
    "mamba": lambda: selective("mamba"),
    "mamba2": lambda: selective("mamba2"),
    "mimo": lambda: MimoSSMForCausalLM(mimo_config(vocab_size=20)).eval(),
    "gated_delta": delta,
    "minimax": minimax,
}


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes(**bits):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**bits)


KINDS = {
    "torchao": torchao,
    "eight bits": lambda: bitsandbytes(load_in_8bit=True),
    "four bits": lambda: bitsandbytes(load_in_4bit=True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_generates_with_quantised_weights(kind, name, tmp_path):
    quantised = KINDS[kind]()
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised).eval()
    changed = [key for key, p in loaded.named_parameters() if type(p) is not torch.nn.Parameter]
    assert changed
    with torch.no_grad():
        expected, found = model(input_ids=IDS).logits, loaded(input_ids=IDS).logits
        steps = loaded.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None)
        whole = loaded(input_ids=steps[:, :-1]).logits[:, IDS.shape[1] - 1 :].argmax(-1)
    likeness = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert likeness > (0.5 if kind == "four bits" else 0.95)
    assert torch.equal(steps[:, IDS.shape[1] :], whole)
    before = state_sizes(loaded)
    if name in ("mamba2", "mimo"):  # what their cuts replace is not quantised
        compress(loaded, [{"input_ids": IDS}], target=2, refit_steps=0)
        assert max(state_sizes(loaded)) < max(before)
        return
    with pytest.raises(ValueError, match="quanti"):
        compress(loaded, [{"input_ids": IDS}], target=2, refit_steps=0)
    assert state_sizes(loaded) == before
