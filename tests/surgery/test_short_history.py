"""Configs keep a short history; the rest is in memory, in the Trainer's state and in compression.json."""

import copy
import json
from pathlib import Path

import pytest
from helpers import arguments, small_data, small_model
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compressm import CompreSSMCallback, compress, state_sizes
from hf_compressm.report import read_run
from hf_compressm.runs.compression import CompressionJob, compress_saved_model
from hf_compressm.surgery import Target, history, original_sizes, set_history, short, with_details


def trainer(folder, settings):
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
    return Trainer(small_model(), args, train_dataset=small_data(32, 6), callbacks=[CompreSSMCallback(**settings)])


def test_a_saved_config_has_sizes_and_steps_and_no_singular_values(tmp_path):
    model = small_model()
    record = compress(model, tau=0.3, step=5)
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["compression_history"]
    assert kept == [short(record)] and "singular_values" not in (tmp_path / "config.json").read_text()
    assert all(layer.keys() == {"name", "old_size", "new_size", "bound", "residual"} for layer in kept[0]["layers"])
    assert history(model) == history(copy.deepcopy(model)) == [record] != kept
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert original_sizes(loaded) == [12, 12] and state_sizes(loaded) == state_sizes(model)
    set_history(loaded, with_details(history(loaded), [record]))
    assert history(loaded) == [record]


def test_a_config_of_an_earlier_version_loads_with_all_that_it_has(tmp_path):
    model = small_model()
    record = compress(model, tau=0.3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"compression_history": [record]}))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert history(loaded) == [record]
    again = compress(loaded, target=3)
    assert history(loaded) == [record, again]
    loaded.save_pretrained(tmp_path)
    assert "singular_values" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("removed", [(), ("compression.json",)])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_checkpoint_has_the_rest_beside_it_and_goes_on_without(tmp_path, removed, earlier):
    settings = {"tau": 0.3, "cut_steps": [2, 5], "calibration_batches": 1}
    whole = trainer(tmp_path / "run", settings)
    whole.train()
    folder = tmp_path / "run" / "checkpoint-3"
    full = json.loads((folder / "compression.json").read_text())["history"]
    assert full == history(whole.model)[:1] and full[0]["layers"][0]["singular_values"]
    at_end = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert at_end["history"] == history(whole.model) and at_end["settings"]["tau"] == 0.3
    for name in removed:
        (folder / name).unlink()
    if earlier:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"compression_history": full}))
    resumed = trainer(tmp_path / "again", settings)
    resumed.train(resume_from_checkpoint=str(folder))
    assert history(resumed.model) == history(whole.model) and state_sizes(resumed.model) == state_sizes(whole.model)


def test_a_second_cut_keeps_the_details_of_the_first(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    source = tmp_path / "model"
    for index, target in enumerate((6, 3)):
        output = tmp_path / f"cut_{index}"
        compress_saved_model(CompressionJob(model=str(source), output=output, policy=Target(target), device="cpu"))
        source = output
    records = json.loads((Path(source) / "compression.json").read_text())["history"]
    assert len(records) == 2 and all(layer["singular_values"] for record in records for layer in record["layers"])
    assert [len(layer.spectra) for layer in read_run(source).layers()] == [2, 2]
