"""What other runtimes take, and stock models with the number of states that they take."""

import pytest
import torch
from selective_models import IDS, OWN, STOCK, make, own

from hf_compressm.models.runtimes import RUNTIMES, StateSizes, check_runtime, padded_size, to_stock_for
from hf_compressm.runs import command_options

WIDE = {"hidden_size": 64}
HEADS = {"num_heads": 8, "head_dim": 16, "n_groups": 1}


@pytest.mark.parametrize(
    ("sizes", "text", "below", "following"),
    [
        (StateSizes((16,)), "16", (16,), {3: 16, 16: 16, 17: None}),
        (StateSizes((128, 256)), "128 or 256", (), {100: 128, 129: 256, 257: None}),
        (StateSizes(largest=8), "any number up to 8", tuple(range(1, 9)), {3: 3, 8: 8, 9: None}),
        (StateSizes(multiple_of=8), "multiples of 8", (8, 16), {3: 8, 17: 24, 800: 800}),
        (StateSizes(), "any number", tuple(range(1, 21)), {3: 3, 1000: 1000}),
    ],
)
def test_sizes_that_a_runtime_takes(sizes, text, below, following):
    assert str(sizes) == text and sizes.up_to(20) == below
    assert {size: sizes.next(size) for size in following} == following


@pytest.mark.parametrize(("runtime", "size"), [("llama.cpp", 16), ("vllm", 12), ("sglang", 12), ("mamba_ssm", 12)])
def test_padding_leaves_the_outputs_of_mamba_alone(runtime, size):
    model = own("mamba", state_sizes=[3, 12, 5], **WIDE)
    found = to_stock_for(runtime, model)
    assert type(found).__name__ == "MambaForCausalLM" and found.config.state_size == size
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert model.config.state_sizes == [3, 12, 5]


@pytest.mark.parametrize(("runtime", "size"), [("llama.cpp", 128), ("vllm", 12), ("sglang", 12), ("mamba_ssm", 16)])
@pytest.mark.parametrize("table", [OWN, STOCK])
def test_padding_leaves_the_outputs_of_mamba2_alone(runtime, size, table):
    fields = WIDE | HEADS | {"state_size": 12} | ({"state_sizes": [12] * 3} if table is OWN else {})
    model = make(table, "mamba2", **fields)
    found = to_stock_for(runtime, model)
    assert type(found).__name__ == "Mamba2ForCausalLM" and found.config.state_size == size
    assert (found is model) == (table is STOCK and size == 12)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("runtime", "fields", "message"),
    [
        (
            "llama.cpp",
            {"state_size": 17, **WIDE},
            "takes a Mamba of 16 states, and the largest layer .* has 17. Cut it",
        ),
        ("vllm", {"state_size": 300}, "takes a Mamba of any number up to 256 states"),
        ("llama.cpp", {}, "intermediate_size a multiple of 128; this one has 64"),
        ("llama.cpp", WIDE | {"use_bias": True}, "use_bias = False; this one has True"),
        ("llama.cpp", WIDE | {"use_conv_bias": False}, "use_conv_bias = True; this one has False"),
        ("llama.cpp", {"hidden_size": 128, "expand": 1}, "expand = 2; this one has 1"),
        ("mamba_ssm", {"conv_kernel": 5}, "conv_kernel = 2 or 3 or 4; this one has 5"),
        ("sglang", {"hidden_act": "relu"}, "hidden_act = silu or swish; this one has relu"),
    ],
)
def test_a_mamba_that_a_runtime_cannot_run_is_refused(runtime, fields, message):
    with pytest.raises(ValueError, match=message):
        to_stock_for(runtime, make(STOCK, "mamba", **fields))


@pytest.mark.parametrize(
    ("runtime", "fields", "message"),
    [
        ("vllm", {"time_step_limit": (0.1, 1.0)}, r"time_step_limit = \(0.0, inf\); this one has \(0.1, 1.0\)"),
        ("llama.cpp", {"num_heads": 16, "head_dim": 8, **WIDE}, "head_dim a multiple of 16; this one has 8"),
        ("mamba_ssm", {"num_heads": 4, "head_dim": 16}, "num_heads a multiple of 8; this one has 4"),
    ],
)
def test_a_mamba2_that_a_runtime_cannot_run_is_refused(runtime, fields, message):
    with pytest.raises(ValueError, match=message):
        padded_size(runtime, make(STOCK, "mamba2", n_groups=1, **fields).config, [8])


def test_unknown_runtimes_and_architectures_are_refused():
    with pytest.raises(ValueError, match="unknown runtime 'llamacpp'; did you mean 'llama.cpp'"):
        check_runtime("llamacpp")
    with pytest.raises(ValueError, match=f"unknown runtime 'x'. Known are {', '.join(RUNTIMES)}"):
        check_runtime("x")
    with pytest.raises(ValueError, match="what vllm takes of the architecture bert is not known here"):
        padded_size("vllm", type("Config", (), {"model_type": "bert"})(), [8])


def test_models_without_a_stock_form_are_refused():
    model = own("mamba2")
    model.backbone.layers[0].mixer.read_in.data.mul_(2)
    with pytest.raises(ValueError, match="mixes its states in read_in and read_out"):
        to_stock_for("vllm", model)


def test_help_names_them_all():
    assert f"[{'|'.join(RUNTIMES)}]" == command_options.RUNTIMES
