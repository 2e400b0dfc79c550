"""LoRA and DoRA under FSDP2 on gloo: cuts in training, checkpoints of both formats, models saved, finetune.py."""

import json
import os

import pytest
import torch
from forked_ranks import HERE, run_ranks
from gloo_fsdp import LAUNCHER
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from selective_models import IDS, OWN, make
from test_fsdp_resume import FORMATS, difference, result

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trainings on two ranks: under DDP, sharded in both formats, and resumed from these."""
    root = tmp_path_factory.mktemp("adapters")
    jobs = [{"folder": str(root / "ddp")}, {"folder": str(root / "ddp dora"), "dora": True}]
    for form in FORMATS:
        dora = form == FORMATS[1]
        jobs.append({"folder": str(root / form), "format": form, "dora": dora})
        again = {"folder": str(root / f"resumed {form}"), "resume": str(root / form / "checkpoint-4")}
        jobs.append(jobs[-1] | again)
    other = {"format": FORMATS[1], "folder": str(root / "other"), "resume": str(root / FORMATS[0] / "checkpoint-4")}
    jobs.append(other)
    run_ranks(2, HERE / "fsdp_adapters.py", json.dumps(jobs))
    return root


@pytest.mark.parametrize("form, replicated", [(FORMATS[0], "ddp"), (FORMATS[1], "ddp dora")])
def test_cuts_are_those_of_ddp_and_of_a_resumed_run(form, replicated, runs):
    expected, found, resumed = result(runs / replicated), result(runs / form), result(runs / f"resumed {form}")
    assert found["error"] == resumed["error"] == "" and [record["step"] for record in found["history"]] == [2, 6]
    assert found["sizes"] == resumed["sizes"] == expected["sizes"] != [8, 8, 8]
    assert resumed["history"] == found["history"]
    for kind in ("weights", "moments"):
        assert difference(expected, found, kind) < 1e-6
        assert difference(found, resumed, kind) == 0.0


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_saved_is_what_was_trained(form, runs):
    trained = result(runs / form)["weights"]
    adapters = {name: value for name, value in trained.items() if "lora" in name}
    beneath = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in trained.items()
        if name not in adapters
    }
    # The adapter names the folder of its base.
    model = AutoPeftModelForCausalLM.from_pretrained(runs / form / "model").eval()
    found, base = dict(model.named_parameters()), load_file(runs / form / "base" / "model.safetensors")
    assert adapters and beneath.keys() <= base.keys()
    assert all(torch.equal(found[name], value) for name, value in adapters.items())
    assert all(torch.equal(base[name], value) for name, value in beneath.items())
    assert model(IDS).logits.isfinite().all()


def test_the_other_format_is_refused_by_name(runs):
    for rank in range(2):
        assert "Set fsdp_state_dict_type in fsdp_config to FULL_STATE_DICT" in result(runs / "other", rank)["error"]


def test_finetuning_merges_the_weights_of_ddp(tmp_path):
    make(OWN, "mamba", vocab_size=256).save_pretrained(tmp_path / "model")
    words = [
        *(LAUNCHER, "scripts/finetune.py", "configs/runs/finetune/stdlib_mamba.yaml", "--model", tmp_path / "model"),
        *("--task_options", '{"length": 32, "evaluation_bytes": 1024}', "--max_steps", 3, "--calibration_batches", 2),
        *("--refit_steps", 2, "--disable_tqdm", "true", "--use_cpu", "true", "--output_dir"),
    ]
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    # As in configs/accelerate/fsdp2.yaml: ranks other than the first would score and cut a model of random weights.
    sharded |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    run_ranks(2, *words, tmp_path / "ddp")
    run_ranks(2, *words, tmp_path / "fsdp", environment=os.environ | sharded)
    found, expected = (load_file(tmp_path / way / "model.safetensors") for way in ("fsdp", "ddp"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    records = [json.loads((tmp_path / way / "finetuning.json").read_text()) for way in ("ddp", "fsdp")]
    for moment in ("before", "cut", "healed"):
        scores = [record["scores"][moment]["loss"] for record in records]
        assert scores[1] == pytest.approx(scores[0], rel=1e-4)
