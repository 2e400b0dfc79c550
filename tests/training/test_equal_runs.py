"""Two equal runs save equal bytes; times are in the log. Checkpoints of earlier versions, with times, still serve."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import arguments, small_model
from test_two_trainings import HALF, checkpoint, make_trainer
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compressm import CompreSSMCallback, MimoSSMConfig, MimoSSMForCausalLM, compress, state_sizes
from hf_compressm.report import write_report
from hf_compressm.surgery import history
from hf_compressm.surgery.record_keys import STATE_FILE
from hf_compressm.training import DurableCheckpoints, verify_checkpoint
from hf_compressm.training.checkpoints.durable import MANIFEST_NAME

CUT, LAST = 4, 6
TIMED = {"trainer_state.json", "training_args.bin"}
"""Files of the Trainer's own that hold its log, with times, or the name of the output folder."""


def language_model():
    torch.manual_seed(0)
    config = MimoSSMConfig(vocab_size=7, hidden_size=6, num_hidden_layers=2, state_sizes=12, r_min=0.3, r_max=0.9)
    return MimoSSMForCausalLM(config)


def train(folder, **settings):
    ids = torch.randint(0, 7, (32, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-4}  # a ranking that stays
    args = arguments(folder, max_steps=LAST, save_strategy="steps", save_steps=2, **evaluated)
    callbacks = [CompreSSMCallback(**HALF, **settings), DurableCheckpoints()]
    trainer = Trainer(language_model(), args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train()
    trainer.save_model(folder / "final")
    return trainer


def keys(tree) -> set:
    if isinstance(tree, dict):
        return set(tree).union(*map(keys, tree.values()))
    return set().union(*map(keys, tree)) if isinstance(tree, list) else set()


@pytest.mark.parametrize(
    "settings",
    [
        {"cut_steps": [CUT], "rollback": True},
        {"trigger": "stability", "stability_interval": 0.17, "stability_threshold": 0.3, "window_end": 1.0},
    ],
    ids=["rollback", "stability"],
)
def test_two_equal_runs_save_equal_bytes(tmp_path, settings):
    one, two = (train(tmp_path / name, **settings) for name in ("one", "two"))
    assert state_sizes(one.model) == [6, 6] and not keys(history(one.model)) & {"seconds", "time"}
    for part in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "final"):
        first, second = tmp_path / "one" / part, tmp_path / "two" / part
        names = {path.name for path in first.iterdir()}
        assert names == {path.name for path in second.iterdir()} and {"generation_config.json"} < names
        for name in names - TIMED - {MANIFEST_NAME}:
            assert (first / name).read_bytes() == (second / name).read_bytes(), (part, name)
        if part != "final":
            exported, sealed = [], []
            for folder in (first, second):
                state = json.loads((folder / "trainer_state.json").read_text())
                exported.append(json.dumps(state["stateful_callbacks"]["CompreSSMCallback"]))
                files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
                sealed.append({name: entry for name, entry in files.items() if name not in TIMED})
            assert exported[0] == exported[1] and sealed[0] == sealed[1] and len(sealed[0]) >= 5
    assert STATE_FILE in {path.name for path in (tmp_path / "one" / "checkpoint-4").iterdir()}
    assert all(run.state.log_history and "compression/seconds" in keys(run.state.log_history) for run in (one, two))


def test_two_equal_cuts_by_hand_save_equal_bytes(tmp_path):
    records = []
    for name in ("one", "two"):
        records.append(compress(model := small_model(), target=5))
        model.save_pretrained(tmp_path / name)
    assert records[0] == records[1] and "seconds" not in records[0]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_checkpoint_of_an_earlier_version_with_times_loads_resumes_and_reports(tmp_path):
    trainer = make_trainer(tmp_path, CompreSSMCallback(cut_steps=[CUT, 7], **HALF), save_steps=2)
    trainer.train()
    folder = checkpoint(tmp_path, LAST)
    config, state = (json.loads((folder / name).read_text()) for name in ("config.json", "trainer_state.json"))
    saved = state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["saved"]
    for records in (config["compression_history"], saved["history"]):
        records[0]["seconds"] = 0.1234
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trainer_state.json").write_text(json.dumps(state))
    verify_checkpoint(folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert history(loaded)[0]["seconds"] == 0.1234 and compress(loaded, target=2)["layers"][0]["new_size"] == 2
    again = make_trainer(tmp_path / "again", CompreSSMCallback(cut_steps=[CUT, 7], **HALF), seed=3)
    again.train(resume_from_checkpoint=str(folder))
    for one, two in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, two)
    records = history(again.model)
    assert records[0].pop("seconds") == 0.1234 and records == history(trainer.model)
    again.save_model()
    again.save_state()
    assert "Step" in write_report(tmp_path / "again").read_text()
