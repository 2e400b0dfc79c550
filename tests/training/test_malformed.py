"""Malformed checkpoints, made from good ones: a clear error each, no code run, the good one beside untouched."""

import hashlib
import random
import re
import shutil
from pathlib import Path

import damage
import pytest
import torch
from damage import callback_tree, drop, edit, empty, put, remove, saved, tensors, torch_content, truncate, write
from helpers import error_of, random_damage

from hf_compressm.data import load_task
from hf_compressm.runs.pretraining import build_model, build_trainer, parse_run, run_pretraining
from hf_compressm.training import newest_checkpoint, verify_checkpoint, verify_manifest, write_manifest
from hf_compressm.training.checkpoints.durable import MANIFEST_NAME

ROOT = Path(__file__).resolve().parents[2]
GOOD = ROOT / "configs" / "runs" / "digits_narrow.yaml"
CONFIG, WEIGHTS, TRAINER, CALLBACK = (
    *("config.json", "model.safetensors", "trainer_state.json", "compression_state.safetensors"),
)
OPTIMIZER, SCHEDULER, RNG = "optimizer.pt", "scheduler.pt", "rng_state.pth"


def go_on(folder, resume: str, *options: str) -> None:
    run_pretraining(parse_run([
        *(str(GOOD), "--output_dir", str(folder), "--resume", resume, "--max_steps", "9", "--save_strategy", "no"),
        *("--model", '{"state_sizes": 16, "hidden_size": 4}', "--cut_steps", "3", "--rollback", "true"),
        *("--eval_on_start", "true", "--eval_steps", "50", "--use_cpu", "true", "--disable_tqdm", "true", *options),
    ]))  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    go_on(folder, "auto", "--save_strategy", "steps", "--save_steps", "4", "--max_steps", "8")
    assert {CONFIG, WEIGHTS, TRAINER, CALLBACK, OPTIMIZER, SCHEDULER, RNG} <= set(hashes(folder / "checkpoint-8"))
    return folder


@pytest.fixture
def spoilt(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy")) / "checkpoint-8"


def hashes(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def first_layer(content):
    return content["history"][-1]["layers"][0]


def other_names(content):
    return {f"other.{key}": value for key, value in content.items()}


def wider(content):
    return {key: torch.zeros(2, *value.shape) for key, value in content.items()}


CHECKPOINTS = {
    "sizes": (CONFIG, put(state_sizes=[9]), "disagree with its config.json"),
    "sizes of two layers": (CONFIG, put(state_sizes=[6, 6]), "config.json cannot be read.*state_sizes"),
    "word for sizes": (CONFIG, put(state_sizes="many"), "config.json cannot be read.*state_sizes"),
    "negative sizes": (CONFIG, put(state_sizes=[-6]), "config.json cannot be read.*state_sizes"),
    "NaN features": (CONFIG, put(hidden_size=float("nan")), "config.json cannot be read.*hidden_size"),
    "null features": (CONFIG, put(hidden_size=None), "config.json cannot be read"),
    "another layer": (CONFIG, put(num_hidden_layers=2, state_sizes=[6, 6]), "layers.1.* is missing"),
    "no JSON": (CONFIG, write(b"{"), "config.json cannot be read"),
    "a list": (CONFIG, write(b"[1]"), "config.json cannot be read"),
    "no text": (CONFIG, write(b"\xff\x00"), "config.json cannot be read"),
    "empty config": (CONFIG, empty, "config.json cannot be read"),
    "no config": (CONFIG, remove, "holds no config.json"),
    "no model type": (CONFIG, drop("model_type"), "config.json cannot be read.*model_type"),
    "unknown model type": (CONFIG, put(model_type="mimo"), "config.json cannot be read.*unknown model_type 'mimo'"),
    "model type of a list": (CONFIG, put(model_type=[1]), "config.json cannot be read"),
    "foreign code": (CONFIG, damage.foreign_code, "config.json cannot be read.*unknown model_type 'evil'"),
    "history in config": (CONFIG, put(compression_history=[{"layers": 3}]), "config.json cannot be read.*event"),
    "half the weights": (WEIGHTS, truncate, "model.safetensors cannot be read"),
    "empty weights": (WEIGHTS, empty, "model.safetensors cannot be read"),
    "no weights": (WEIGHTS, remove, "holds no model.safetensors"),
    "long header": (WEIGHTS, write(b"\xff" * 64), "model.safetensors cannot be read"),
    "other names": (WEIGHTS, tensors(other_names), "is missing"),
    "other shapes": (WEIGHTS, tensors(wider), r"the config wants"),
    "a pickle": (WEIGHTS, damage.raw_pickle, "model.safetensors cannot be read"),
    "a torch pickle": (WEIGHTS, damage.torch_pickle, "model.safetensors cannot be read"),
    "pytorch_model.bin": (WEIGHTS, damage.pickled_weights, "holds no model.safetensors.*safetensors only"),
    "index": ("model.safetensors.index.json", write(b"{}"), "index.json cannot be read.*weight_map"),
    "index of elsewhere": (
        "model.safetensors.index.json", write(b'{"weight_map": {"a": "../x"}}'), "not the name of a file",
    ),
    "index of nothing": ("model.safetensors.index.json", write(b'{"weight_map": {"a": "x"}}'), "holds no x"),
    "broken state": (TRAINER, truncate, "trainer_state.json cannot be read"),
    "no state": (TRAINER, remove, "holds no trainer_state.json"),
    "unknown field": (TRAINER, put(evil=1), "trainer_state.json cannot be read.*evil"),
    "word for step": (TRAINER, put(global_step="five"), "trainer_state.json cannot be read: global_step"),
    "negative step": (TRAINER, put(global_step=-1), "trainer_state.json cannot be read: global_step"),
    "number for log": (TRAINER, put(log_history=3), "trainer_state.json cannot be read: log_history"),
    "log of numbers": (TRAINER, put(log_history=[3]), "trainer_state.json cannot be read.*log_history"),
    "number for best": (TRAINER, put(best_model_checkpoint=3), "trainer_state.json cannot be read: best_model"),
    "list of callbacks": (TRAINER, put(stateful_callbacks=[1]), "trainer_state.json cannot be read"),
    "no attributes": (
        TRAINER, edit(lambda c: c["stateful_callbacks"].update(CompreSSMCallback={})), "callback's entry .* malformed",
    ),
    "other sizes": (TRAINER, saved(lambda s: first_layer(s).update(new_size=7)), r"ends with state sizes \[7\]"),
    "no layers": (TRAINER, saved(lambda s: s["history"][-1].pop("layers")), "callback's entry .* malformed: .*layers"),
    "no reference": (TRAINER, saved(lambda s: s["judging"].pop("reference")), "callback's entry .* malformed"),
    "half the callback's file": (CALLBACK, truncate, "compression_state.safetensors cannot be read"),
    "no tree": (CALLBACK, tensors(lambda c: {}), "compression_state.safetensors cannot be read"),
    "a pickle for it": (CALLBACK, damage.raw_pickle, "compression_state.safetensors cannot be read"),
    "another model's copy": (CALLBACK, tensors(wider), "compression_state.safetensors cannot be read"),
    "unknown parts": (CALLBACK, callback_tree(lambda t: t["snapshot"].pop("sizes")), "compression_state.*sizes"),
    "tensor missing": (
        CALLBACK, callback_tree(lambda t: t["snapshot"]["tensors"].pop("backbone.norm.bias")), "norm.bias is missing",
    ),
    "other mixers": (
        CALLBACK, callback_tree(lambda t: t["snapshot"].update(sizes={"a": 3})), "compression_state.*state sizes",
    ),
    "copy's moments": (
        CALLBACK, callback_tree(lambda t: damage.wider_moments({"state": t["snapshot"]["optimizer"]})), "other weights",
    ),
    "another model's ranking": (
        CALLBACK, callback_tree(lambda t: t.update(tracker={"streak": 1, "measurements": {"a": {}}})), "ranks .* of a",
    ),
    "optimizer runs code": (OPTIMIZER, damage.torch_pickle, "optimizer.pt cannot be read.*could run code; none was"),
    "optimizer is a pickle": (OPTIMIZER, damage.raw_pickle, "optimizer.pt cannot be read.*could run code; none was"),
    "half an optimizer": (OPTIMIZER, truncate, "optimizer.pt cannot be read"),
    "empty optimizer": (OPTIMIZER, empty, "optimizer.pt cannot be read"),
    "a list for optimizer": (OPTIMIZER, torch_content(lambda c: [1]), "optimizer.pt cannot be read"),
    "other optimizer": (OPTIMIZER, torch_content(damage.wider_moments), "optimizer.pt cannot be read.*other weights"),
    "scheduler runs code": (SCHEDULER, damage.torch_pickle, "scheduler.pt cannot be read.*could run code; none was"),
    "other scheduler": (SCHEDULER, torch_content(lambda c: {}), "scheduler.pt cannot be read.*last_epoch"),
    "generators run code": (RNG, damage.torch_pickle, "rng_state.pth cannot be read.*could run code; none was"),
    "other generators": (RNG, torch_content(lambda c: c | {"python": 3}), "rng_state.pth cannot be read"),
    "manifest": (MANIFEST_NAME, truncate, "manifest.json cannot be read"),
    "manifest of a list": (MANIFEST_NAME, write(b'{"files": [1]}'), "manifest.json cannot be read"),
    "deep manifest": (MANIFEST_NAME, write(b"[" * 100_000), "manifest.json cannot be read"),
    "short manifest": (MANIFEST_NAME, edit(lambda c: c["files"].pop(WEIGHTS) and c), "does not cover model.safe"),
    "manifest's size": (MANIFEST_NAME, edit(lambda c: c["files"][WEIGHTS].update(bytes=3)), "bytes instead of 3"),
    "manifest's hash": (MANIFEST_NAME, edit(lambda c: c["files"][WEIGHTS].update(sha256=3)), "model.safetensors is da"),
}  # fmt: skip


@pytest.mark.parametrize("name, spoil, message", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_malformed_checkpoints(name, spoil, message, spoilt, tmp_path, caplog):
    spoil(spoilt / name, tmp_path / "evil")
    if name != MANIFEST_NAME:
        write_manifest(spoilt)
    beside, before = spoilt.parent / "checkpoint-4", hashes(spoilt.parent / "checkpoint-4")
    said = error_of(lambda: go_on(spoilt.parent, str(spoilt)))
    assert re.search(message, said, re.DOTALL), said
    with caplog.at_level("WARNING"):
        assert newest_checkpoint(spoilt.parent) == beside
    assert "skipped the checkpoint of step 8" in caplog.text
    assert hashes(beside) == before and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, CALLBACK])
def test_a_run_goes_on_from_the_good_one_by_itself(name, spoilt, tmp_path, caplog):
    damage.raw_pickle(spoilt / name, tmp_path / "evil")
    write_manifest(spoilt)
    beside, before = spoilt.parent / "checkpoint-4", hashes(spoilt.parent / "checkpoint-4")
    with caplog.at_level("WARNING"):
        go_on(spoilt.parent, "auto")
    assert f"going on from {beside}" in caplog.text and "skipped the checkpoint of step 8" in caplog.text
    assert hashes(beside) == before and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", [OPTIMIZER, SCHEDULER, RNG, "training_args.bin", WEIGHTS])
def test_the_trainer_itself_runs_no_code_either(name, spoilt, tmp_path):
    damage.torch_pickle(spoilt / name, tmp_path / "evil")
    argv = ["--task", "digits", "--output_dir", str(tmp_path / "out"), "--max_steps", "9", "--use_cpu", "true"]
    run = parse_run(
        [
            str(GOOD),
            *argv,
            "--model",
            '{"state_sizes": 16, "hidden_size": 4}',
            "--eval_strategy",
            "no",
            "--cut_steps",
            "3",
        ]
    )
    task = load_task("digits")
    trainer, _ = build_trainer(run, task, build_model(run, task))
    try:
        trainer.train(resume_from_checkpoint=str(spoilt))
    except Exception as error:
        assert name != "training_args.bin", error
    else:
        assert name == "training_args.bin"  # never read
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_model_are_named(spoilt):
    run = [str(GOOD), "--output_dir", str(spoilt.parent), "--resume", "auto", "--use_cpu", "true", "--max_steps", "9"]
    said = error_of(lambda: run_pretraining(parse_run([*run, "--model", '{"state_sizes": 16, "hidden_size": 8}'])))
    assert "the weights are of another model" in said and "this model wants" in said


@pytest.mark.parametrize(
    "name", [CONFIG, WEIGHTS, TRAINER, CALLBACK, OPTIMIZER, SCHEDULER, RNG, "training_args.bin", MANIFEST_NAME]
)
def test_random_damage_to_a_checkpoint(name, spoilt):
    path, good = spoilt / name, (spoilt / name).read_bytes()
    spoilt_files = []
    for seed in range(20):
        path.write_bytes(good)
        random_damage(path, random.Random(seed))
        spoilt_files.append(path.read_bytes())
        assert error_of(lambda: verify_manifest(spoilt))
    (spoilt / MANIFEST_NAME).unlink()
    for seed, content in enumerate(spoilt_files if name != MANIFEST_NAME else []):
        path.write_bytes(content)
        try:
            verify_checkpoint(spoilt)
        except Exception:
            assert error_of(lambda: verify_checkpoint(spoilt)), seed
            continue
        if name in (CONFIG, TRAINER, CALLBACK) and seed < 8:  # what passes can be gone on from
            go_on(spoilt.parent, str(spoilt))
