"""Models that torch.compile wraps or compiles in place are measured and cut as they are without it."""

import copy

import pytest
import torch
from selective_models import OWN, make

from hf_compressm import compress, state_sizes
from hf_compressm.surgery import history
from hf_compressm.surgery.wrappers import class_name, plain_name, plain_state_dict

BATCH = {"input_ids": torch.arange(1, 33).view(2, 16)}
WAYS = {
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: model.compile(backend="eager") or model,
    "a block in place": lambda model: model.backbone.layers[0].compile(backend="eager") or model,
}


def evaluate(model):
    with torch.no_grad():
        return model(**BATCH, use_cache=False, logits_to_keep=1).logits  # as calibration passes do


@pytest.mark.parametrize("way, kind", [("wrapped", "mamba"), ("in place", "mamba"), ("a block in place", "mamba2")])
def test_a_cut_after_a_compiled_evaluation(way, kind):
    torch.manual_seed(0)
    plain = make(OWN, kind).eval()
    compiled = WAYS[way](copy.deepcopy(plain))
    evaluate(compiled)  # what is compiled here has no place for the hooks that measure
    compress(plain, [BATCH], tau=0.2)
    record = compress(compiled, [BATCH], tau=0.2)
    assert state_sizes(compiled) == state_sizes(plain)
    assert history(compiled) == history(plain) and record["layers"][0]["name"] == "backbone.layers.0.mixer"
    own = plain_state_dict(compiled)
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    torch.testing.assert_close(evaluate(compiled), evaluate(plain))


def test_names_without_wrappers():
    assert plain_name("_orig_mod.a._checkpoint_wrapped_module.b") == "a.b"
    assert plain_name("_orig_mod") == "" and plain_name("a._orig_mod_2") == "a._orig_mod_2"
    assert class_name(torch.compile(torch.nn.Linear(1, 1), backend="eager")) == "Linear"
