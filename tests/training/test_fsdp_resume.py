"""Checkpoints under FSDP2 on gloo: a resumed run equals the uninterrupted one, across cuts, formats and world sizes."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING  # what such metadata hold

from hf_compressm.surgery.wrappers import plain_name
from hf_compressm.training import newest_checkpoint, verify_manifest
from hf_compressm.training.checkpoints.sharded_files import saved_weight_shapes, sharded_weight_shapes

PROGRAM = Path(__file__).with_name("fsdp_resuming.py")
FORMATS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


def result(folder, rank=0):
    return torch.load(folder / f"result{rank}.pt")


def difference(one, other, kind):
    assert one[kind].keys() == other[kind].keys()
    return max(float((one[kind][name] - other[kind][name]).abs().max()) for name in one[kind])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trainings on two processes: whole, resumed in both formats, with the best model, from DDP, of a lost shard."""
    root = tmp_path_factory.mktemp("runs")
    # DDP first: Accelerate leaves in the environment that FSDP is wanted.
    first = [{"folder": str(root / "ddp")}, *({"folder": str(root / form), "format": form} for form in FORMATS)]
    run_ranks(2, PROGRAM, json.dumps(first))
    lost = root / "lost" / "checkpoint-6"
    shutil.copytree(root / "SHARDED_STATE_DICT" / "checkpoint-6", lost)
    next((lost / "pytorch_model_fsdp_0").glob("__1_*.distcp")).unlink()
    jobs = []
    for form in FORMATS:
        at = str(root / form / "checkpoint-6")
        jobs.append({"folder": str(root / f"resumed {form}"), "format": form, "resume": at})
        jobs.append({"folder": str(root / f"best {form}"), "format": form, "best": True})
        jobs.append({"folder": str(root / f"compiled {form}"), "format": form, "resume": at, "compiled": True})
    jobs.append({"folder": str(root / "from ddp"), "format": FORMATS[0], "resume": str(root / "ddp" / "checkpoint-6")})
    at = str(root / FORMATS[0] / "checkpoint-6")
    jobs.append({"folder": str(root / "of the other format"), "format": FORMATS[1], "resume": at})
    jobs.append({"folder": str(root / "of a lost shard"), "format": FORMATS[1], "resume": str(lost)})
    run_ranks(2, PROGRAM, json.dumps(jobs))
    return root


@pytest.mark.parametrize("form", FORMATS)
def test_a_resumed_run_equals_the_uninterrupted_one(form, runs):
    expected, found = result(runs / form), result(runs / f"resumed {form}")
    assert found["error"] == "" and found["sharded"]
    assert [record["step"] for record in found["history"]] == [4, 9]
    assert found["history"] == expected["history"] and found["sizes"] == expected["sizes"]
    assert difference(expected, found, "weights") == difference(expected, found, "moments") == 0.0


@pytest.mark.parametrize("form", FORMATS)
def test_a_compiled_model_goes_on_and_is_saved_under_the_names_of_one_that_is_not(form, runs):
    expected, found = result(runs / form), result(runs / f"compiled {form}")
    assert found["error"] == "" and found["sharded"] and found["sizes"] == expected["sizes"]
    for kind in ("weights", "moments"):
        clean = {plain_name(name): value for name, value in found[kind].items()}
        assert difference(expected, {kind: clean}, kind) < 1e-6
    folders = runs / form / "checkpoint-12", runs / f"compiled {form}" / "checkpoint-12"
    saved = [{name: t.shape for name, t in saved_weight_shapes(folder).items()} for folder in folders]
    assert saved[0] == saved[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    names = [[layer["name"] for cut in c["compression_history"] for layer in cut["layers"]] for c in configs]
    assert names[0] == names[1]
    assert configs[0]["architectures"] == configs[1]["architectures"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_best_model_is_loaded_across_a_cut(form, runs):
    best = result(runs / f"best {form}")
    saved = sharded_weight_shapes(runs / form / "checkpoint-6")
    assert [record["step"] for record in best["history"]] == [4]
    assert all(best["weights"][name].shape == saved[name].shape for name in best["weights"])
    assert best["sizes"] != result(runs / form)["sizes"]


def test_a_checkpoint_of_ddp_goes_on_under_fsdp2(runs):
    expected, found = result(runs / "ddp"), result(runs / "from ddp")
    assert found["error"] == "" and found["sharded"] and found["sizes"] == expected["sizes"]
    assert difference(expected, found, "weights") < 1e-5 and difference(expected, found, "moments") < 1e-5


@pytest.mark.parametrize("processes", [1, 4])
def test_a_checkpoint_of_two_processes_goes_on_with_another_number(processes, runs, tmp_path):
    jobs = [
        {"folder": str(tmp_path / form), "format": form, "resume": str(runs / form / "checkpoint-6")}
        for form in FORMATS
    ]
    run_ranks(processes, PROGRAM, json.dumps(jobs))
    for form in FORMATS:
        expected, found = result(runs / form), result(tmp_path / form)
        assert found["error"] == "" and found["sizes"] == expected["sizes"]
        assert difference(expected, found, "weights") < 1e-4


def test_a_lost_shard_is_named_on_all_ranks(runs):
    for rank in range(2):
        assert (
            "__1_0.distcp is missing: the shards of one rank are not there"
            in result(runs / "of a lost shard", rank)["error"]
        )


def test_the_other_format_is_refused_by_name(runs):
    for rank in range(2):
        assert (
            "Set fsdp_state_dict_type in fsdp_config to FULL_STATE_DICT"
            in result(runs / "of the other format", rank)["error"]
        )


def test_manifests_cover_shards_and_the_newest_whole_checkpoint_is_found(runs, tmp_path):
    run = shutil.copytree(runs / "SHARDED_STATE_DICT", tmp_path / "run")
    newest = run / "checkpoint-12"
    config = json.loads((newest / "config.json").read_text())
    assert config["state_sizes"] == result(run)["sizes"] and len(config["compression_history"]) == 2
    files = json.loads((newest / "checkpoint_manifest.json").read_text())["files"]
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert {f"{folder}/.metadata", f"{folder}/__0_0.distcp", f"{folder}/__1_0.distcp"} <= files.keys()
    assert newest_checkpoint(run) == newest
    extra = newest / "optimizer_0" / "__2_0.distcp"
    extra.write_bytes(b"")
    with pytest.raises(ValueError, match="does not cover optimizer_0/__2_0.distcp"):
        verify_manifest(newest)
    extra.unlink()
    shard = newest / "optimizer_0" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert newest_checkpoint(run) == run / "checkpoint-6"


@pytest.mark.parametrize("content", [b"cos\nsystem\n(S'touch ran'\ntR.", b"cbuiltins\ngetattr\n(S'a'\nS'upper'\ntR."])
def test_metadata_that_could_run_code_is_refused(content, runs, tmp_path):
    folder = shutil.copytree(runs / "SHARDED_STATE_DICT" / "checkpoint-6", tmp_path / "checkpoint-6")
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="could run code"):
        sharded_weight_shapes(folder)


def test_metadata_of_the_first_python_3_11_are_read(runs, tmp_path, monkeypatch):
    folder = shutil.copytree(runs / "SHARDED_STATE_DICT" / "checkpoint-6", tmp_path / "checkpoint-6")
    file = folder / "pytorch_model_fsdp_0" / ".metadata"
    expected = sharded_weight_shapes(folder)
    loaded = pickle.loads(file.read_bytes())
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    file.write_bytes(pickle.dumps(loaded))
    found = sharded_weight_shapes(folder)
    assert b"getattr" in file.read_bytes() and found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
