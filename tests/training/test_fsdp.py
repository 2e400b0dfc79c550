"""FSDP2 and HSDP over gloo, through an unmodified Trainer and in loops by hand: weights of DDP and of one process."""

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks

from hf_compressm.surgery.wrappers import plain_name

HERE = Path(__file__).resolve().parent
BY_BLOCK = {
    "transformer_layer_cls_to_wrap": ["CompreSSMMamba2Block"],
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}
IN_TWO = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


def train(folder, way, model, processes=2, arguments=None, fsdp=None, callback=None):
    options = ["--arguments", json.dumps(arguments or {}), "--fsdp", json.dumps(fsdp or {})]
    options += ["--callback", json.dumps(callback or {})]
    run_ranks(processes, HERE / "fsdp_training.py", way, model, folder, *options)
    return torch.load(folder / "result.pt")


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    """What DDP makes of a model, trained once for each."""
    made = {}

    def get(model, arguments=None):
        key = model, json.dumps(arguments)
        if key not in made:
            made[key] = train(tmp_path_factory.mktemp(model), "ddp", model, arguments=arguments)
        return made[key]

    return get


def check_equal(found, expected, tolerance=1e-5):
    assert found["sharded"] and not expected["sharded"]
    assert found["sizes"] == expected["sizes"] and len(found["history"]) == 2
    names = [[(layer["name"], layer["new_size"]) for layer in cut["layers"]] for cut in found["history"]]
    assert names == [[(layer["name"], layer["new_size"]) for layer in cut["layers"]] for cut in expected["history"]]
    for kind in ("weights", "moments"):
        clean = {plain_name(name): value for name, value in found[kind].items()}
        assert clean.keys() == expected[kind].keys()
        for name, value in clean.items():
            assert torch.allclose(value, expected[kind][name], atol=tolerance), f"{kind} of {name}"


@pytest.mark.parametrize("processes", [2, 4])
def test_hand_written_loops(processes):
    run_ranks(processes, HERE / "fsdp_checks.py")


@pytest.mark.parametrize(
    "model, fsdp, arguments",
    [
        ("lru", {}, {}),
        ("mamba2", BY_BLOCK | {"fsdp_activation_checkpointing": True, "fsdp_reshard_after_forward": False}, {}),
        (
            "lru",
            {"fsdp_auto_wrap_policy": "NO_WRAP", "fsdp_cpu_ram_efficient_loading": True},
            IN_TWO,
        ),
    ],
    ids=["lru", "by-block-checkpointed", "whole-accumulated"],
)
def test_an_unmodified_trainer_shards_and_cuts(model, fsdp, arguments, replicated, tmp_path):
    check_equal(train(tmp_path, "fsdp", model, arguments=arguments, fsdp=fsdp), replicated(model, arguments))


@pytest.mark.parametrize("model, regions", [("mamba", "false"), ("lru", "true")])
def test_a_compiled_model_is_cut_as_one_that_is_not(model, regions, replicated, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regions)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found, expected = train(tmp_path, "fsdp", model, arguments=compiled), replicated(model, {})
    assert found["compiled"] and not expected["compiled"]
    check_equal(found, expected)


def test_hybrid_shards(replicated, tmp_path):
    found = train(tmp_path, "hsdp", "mamba2", processes=4, arguments={"per_device_train_batch_size": 2})
    check_equal(found, replicated("mamba2"))


def test_models_that_transformers_shards_while_it_loads_them(replicated, tmp_path):
    check_equal(train(tmp_path, "native", "stock-mamba2"), replicated("stock-mamba2"))


def test_the_stability_trigger_and_mixed_precision(tmp_path):
    settings = {"trigger": "stability", "stability_threshold": 0.01, "stability_patience": 1}
    found = train(tmp_path, "fsdp", "mamba", arguments={"bf16": True}, callback=settings)
    assert found["sharded"] and len(found["history"]) == 1 and max(found["sizes"]) < 8
    assert all(value.isfinite().all() for value in found["weights"].values())
