"""The compression program, in this process: what it writes, what it prints, what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from delta_models import make as delta_model
from helpers import small_model
from selective_models import OWN, STOCK, make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_compressm import cli, state_sizes
from hf_compressm.data.text_files import text_task
from hf_compressm.models.compressm_mamba import CompreSSMMambaForSequenceClassification
from hf_compressm.models.saved import load_model, load_tokenizer
from hf_compressm.runs import compression as runs_compression
from hf_compressm.runs.data_source import DataSource, evaluate, load_data

LINES = [f"value_{index % 7} = function({index}, name={index * index % 11})\n" for index in range(120)]
WORDS = ["value", "function", "name", "=", "(", ")", ",", "_"] + [str(index) for index in range(130)]
QUICK = ["--batches", "2", "--batch-size", "2", "--length", "32", "--refit-steps", "2"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(LINES))
    return str(tmp_path / "corpus.txt")


@pytest.fixture
def saved(tmp_path):
    """Function that saves a byte-level model of a table and returns its folder."""

    def save(table=STOCK, kind="mamba", tokenizer=None, dtype=torch.float32, **fields):
        model = make(table, kind, **({"vocab_size": 256} | fields)).to(dtype)
        for name, parameter in model.named_parameters():  # initial values make all states alike
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5)
        model.save_pretrained(tmp_path / "model")
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def word_tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", "<eos>", *WORDS])}, "?"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<eos>")


def call(capsys, *argv):
    """Exit code, standard output and standard error of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in argv])
    return stopped.value.code or 0, *capsys.readouterr()


def compressed(capsys, tmp_path, model, *argv):
    """The output folder of a call that succeeds, and what was printed."""
    code, printed, errors = call(capsys, "compress", model, "--output", tmp_path / "small", *argv)
    assert code == 0, errors
    return tmp_path / "small", printed


def plain_logits(folder, ids):
    """Logits of a model that a transformers without this package loads as its own class; tests/hub loads one so."""
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and not list(folder.glob("*.py"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    assert type(model).__module__.startswith("transformers.models.")
    return model(ids).logits


IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))


def test_a_stock_model_stays_one(saved, text, tmp_path, capsys):
    folder, printed = compressed(
        capsys, tmp_path, saved(), "--data", text, "--target-state-size", "4", "--evaluate", *QUICK
    )
    assert printed.splitlines()[-1] == f"saved to {folder}"
    found, model = plain_logits(folder, IDS), AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "MambaForCausalLM" and state_sizes(model) == [4, 4, 4]
    assert model.config.state_size == 4
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(IDS).logits
    assert 0 < (found - full).square().mean() < 0.5 * full.square().mean()


def test_uneven_own_mamba_to_stock_keeps_outputs(saved, text, tmp_path, capsys):
    model = saved(OWN, state_sizes=[3, 8, 5])
    cut = ["--data", text, "--target", "4", *QUICK]
    folder, _ = compressed(capsys, tmp_path, model, *cut)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(set(state_sizes(expected))) > 1
    folder, printed = compressed(capsys, tmp_path, model, *cut, "--to-stock", "--overwrite")
    assert torch.allclose(plain_logits(folder, IDS), expected(IDS).logits, atol=1e-5)
    largest = max(state_sizes(expected))
    assert f"written as MambaForCausalLM, every layer padded to {largest} states" in printed
    assert json.loads((folder / "compression.json").read_text())["sizes_after"] == [largest] * 3


def test_own_mamba2_to_stock_is_converted_before_the_cut(saved, text, tmp_path, capsys):
    options = ["--data", text, "--fraction", "0.5", "--to-stock", "--no-fast-ops", *QUICK]  # no kernel to compile
    folder, _ = compressed(capsys, tmp_path, saved(OWN, "mamba2"), *options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Mamba2ForCausalLM" and state_sizes(model) == [4, 4, 4]


def test_table_and_record_say_what_was_lost(saved, text, tmp_path, capsys):
    folder, printed = compressed(
        capsys, tmp_path, saved(), "--data", text, "--target", "4", "--evaluate", "--seed", "3", *QUICK
    )
    record = json.loads((folder / "compression.json").read_text())
    assert record["sizes_before"] == [8, 8, 8] and record["sizes_after"] == [4, 4, 4]
    assert record["settings"]["policy"] == {"policy": "target", "mean_state_size": 4.0}
    assert record["settings"]["data"]["seed"] == 3 and record["settings"]["refit_steps"] == 2
    layers = record["history"][-1]["layers"]
    for layer in layers:
        row = next(line for line in printed.splitlines() if line.startswith(layer["name"] + " "))
        assert row.split()[1:] == ["8", "4", "residual", f"{layer['residual']:.4g}"]
    before, after = (record["evaluation"][when]["loss"] for when in ("before", "after"))
    assert before != after and f"held-out loss: {before:.4f} -> {after:.4f}" in printed
    assert "calibrated on 128 positions" in printed


def test_held_out_loss_is_that_of_all_counted_tokens(saved, text):
    task = text_task(text, length=32, sequences=70)
    model = load_model(saved())
    found = evaluate(model, task, batch_size=4)
    ids = task.test[:]["input_ids"]
    assert len(ids) % 4, "the last batch is to be a smaller one"
    assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert found["nats_per_byte"] == pytest.approx(found["loss"], rel=1e-5)


def test_task_with_options_and_half_precision(saved, tmp_path, capsys):
    options = json.dumps({"num_train": 32, "num_validation": 1, "num_test": 8, "num_kv_pairs": 4})
    folder, printed = compressed(
        capsys, tmp_path, saved(dtype=torch.bfloat16), "--data", "mqar", "--task-options", options, "--tau", "0.3",
        "--evaluate", *QUICK,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and state_sizes(model)[0] < 8
    assert re.search(r"held-out accuracy: 0\.\d+ -> 0\.\d+", printed)


def test_mimo_model_needs_no_data_and_has_a_bound(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "model")
    folder, printed = compressed(capsys, tmp_path, tmp_path / "model", "--fraction", "0.5")
    assert printed.count("bound ") == 2 and "residual" not in printed
    assert json.loads((folder / "compression.json").read_text())["sizes_after"] == [6, 6]


def test_value_channels_go_on_request(text, tmp_path, capsys):
    delta_model("qwen3_next", vocab_size=256).save_pretrained(tmp_path / "model")
    options = ["--data", text, "--value-size", "4", *QUICK]
    folder, printed = compressed(capsys, tmp_path, tmp_path / "model", *options)
    config, found = AutoConfig.from_pretrained(folder), json.loads((folder / "compression.json").read_text())
    assert (config.linear_key_head_dim, config.linear_value_head_dim) == (16, 4)
    assert found["sizes_before"] == found["sizes_after"] == [16, 16] and found["settings"]["policy"] is None
    assert "values before" in printed and "states before" not in printed
    assert plain_logits(folder, IDS).isfinite().all()
    folder, printed = compressed(capsys, tmp_path, tmp_path / "model", *options, "--target", "8", "--overwrite")
    config, found = AutoConfig.from_pretrained(folder), json.loads((folder / "compression.json").read_text())
    assert (config.linear_key_head_dim, config.linear_value_head_dim) == (8, 4)
    assert found["sizes_after"] == [8, 8] and [record["event"] for record in found["history"]] == ["cut", "value_cut"]
    assert "values before" in printed and "states before" in printed


def test_tokenizer_is_used_and_saved(saved, text, tmp_path, capsys):
    tokenizer = word_tokenizer()
    model = saved(vocab_size=len(tokenizer), tokenizer=tokenizer)
    folder, _ = compressed(capsys, tmp_path, model, "--data", text, "--target", "4", *QUICK)
    assert AutoTokenizer.from_pretrained(folder)(LINES[3]).input_ids == tokenizer(LINES[3]).input_ids
    ids = text_task(text, load_tokenizer(model), length=32, sequences=2).train[0]["input_ids"]
    assert ids.tolist() == tokenizer("".join(LINES)).input_ids[:32]


def test_a_task_that_tokenises_uses_the_tokenizer_of_the_model(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(" = Title = \n" + "".join(LINES))
    tokenizer = word_tokenizer()
    folder = saved(vocab_size=len(tokenizer) + 4, tokenizer=tokenizer)
    source = DataSource(name="wikitext", data_dir=str(tmp_path), length=32)
    task = load_data(source, load_model(folder), load_tokenizer(folder))
    expected = tokenizer("<eos> = Title = \n" + "".join(LINES)).input_ids
    assert task.train[0]["input_ids"].tolist() == expected[:32]


def test_folders_and_parquet_are_read_document_by_document(tmp_path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").write_text("no")
    (folder / "a.txt").write_text("one\n")
    (folder / "deep/c.txt").write_text("four")
    Dataset.from_dict({"text": ["two", "", "three"], "url": ["x", "y", "z"]}).to_parquet(folder / "b.parquet")
    task = text_task(folder, length=4, sequences=9)
    rows = [*task.train, *task.test]
    assert b"".join(bytes(row["input_ids"].tolist()) for row in rows) == b"one\n\0two\0three\0four\0"[:20]
    assert len(task.test) == 1 and all(torch.equal(row["input_ids"], row["labels"]) for row in rows)
    Dataset.from_dict({"a": ["x"], "b": ["y"]}).to_parquet(folder / "b.parquet")
    with pytest.raises(
        ValueError, match="needs a column 'text', or exactly one column of strings; its columns are a, b"
    ):
        text_task(folder, length=4)


def test_as_much_is_held_out_as_there_is_to_spare(text):
    assert len(Path(text).read_bytes()) // 32 == 116
    for sequences, parts in ((10, (10, 10)), (100, (100, 16)), (170, (105, 11))):
        task = text_task(text, length=32, sequences=sequences)
        assert (len(task.train), len(task.test)) == parts


def test_inspect_measures_selective_models_on_data(saved, text, capsys):
    model = saved()
    code, printed, _ = call(capsys, "inspect", model, "--data", text, "--tau", "0.3", *QUICK[:-2])
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert code == 0 and len(rows) == 3 and all(row[1] == "8" and 0 < int(row[-1]) < 8 for row in rows)
    code, _, errors = call(capsys, "inspect", model)
    assert code == 2 and "can only be ranked on data: give --data a task or a text file" in errors


TARGET = ["--target", "4"]
REFUSALS = {
    "no policy": (["--data", "TEXT"], "exactly one of --tau, --target-state-size and --fraction, not none"),
    "two policies": (["--data", "TEXT", "--tau", "0.1", *TARGET], "not several"),
    "options that are no object": (["--data", "mqar", "--task-options", "[1]", *TARGET], "takes a JSON object"),
    "options without a task": (["--task-options", "{}", *TARGET], "belong to the task"),
    "no data": (TARGET, "give --data a task"),
    "unknown data": (["--data", "nothing", *TARGET], "neither a file or folder nor a task; the tasks are aan"),
    "options of a file": (["--data", "TEXT", "--task-options", '{"seed": 1}', *TARGET], "is a file or folder"),
    "unknown option": (["--data", "mqar", "--task-options", '{"x": 1}', *TARGET], "does not take x"),
    "task for other inputs": (["--data", "digits", *TARGET], "for models with num_channels 1; this one has None"),
    "short text": (["--data", "TEXT", "--length", "4000", *TARGET], "is too short: its 3731 bytes"),
    "few tokens": (["--data", "TEXT", "--batches", "1", "--batch-size", "1", "--length", "5", *TARGET], "too short"),
    "no batch": (["--data", "TEXT", "--batches", "0", *TARGET], "batches and batch_size must be at least 1"),
    "target above": (["--data", "TEXT", "--target", "8"], "the model has only 8 states per layer"),
    "target below": (
        ["--data", "TEXT", "--min-state-size", "6", *TARGET],
        "is 4, below min_state_size, 6",
    ),
    "uneven": (["--data", "TEXT", "--no-uniform", *TARGET], "uniform=False cannot be met"),
    "values of states": (["--data", "TEXT", "--value-size", "4"], "value_size is for layers with a gated delta rule"),
    "nothing to cut": (["--data", "TEXT", "--tau", "1e-6", *QUICK], "nothing to cut: no layer would lose 5%"),
    "unknown device": (["--data", "TEXT", "--device", "abacus", *TARGET], "abacus"),
    "absent device": (["--data", "TEXT", "--device", "cuda:99", *TARGET], "there is no device 'cuda:99'"),
    "binary": (["--data", "BINARY", *TARGET, *QUICK], "is not text in UTF-8"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_and_write_nothing(case, saved, text, tmp_path, capsys):
    options, message = REFUSALS[case]
    tokenizer = word_tokenizer() if case == "binary" else None
    (tmp_path / "bytes.bin").write_bytes(bytes(range(256)))
    model = saved(tokenizer=tokenizer)
    present = sorted(tmp_path.iterdir())
    options = [{"TEXT": text, "BINARY": tmp_path / "bytes.bin"}.get(option, option) for option in options]
    code, _, errors = call(capsys, "compress", model, "--output", tmp_path / "small", *options)
    assert code == 2 and message in errors and errors.splitlines()[-1].startswith("error: "), errors
    assert sorted(tmp_path.iterdir()) == present


def test_models_that_do_not_fit_are_refused(saved, text, tmp_path, capsys):
    def error(model, *options):
        code, _, errors = call(capsys, "compress", model, "--output", tmp_path / "small", *TARGET, *options)
        assert code == 2 and not (tmp_path / "small").exists()
        return errors

    assert "no tokenizer" in error(saved(vocab_size=50), "--data", text)
    assert "for models with vocab_size 256; this one has 50" in error(saved(vocab_size=50), "--data", "mqar")
    assert "has 140 tokens, the model embeddings for 50" in error(
        saved(vocab_size=50, tokenizer=word_tokenizer()), "--data", text
    )
    small_model().save_pretrained(tmp_path / "mimo")
    assert "reads continuous values, not text" in error(tmp_path / "mimo", "--data", text)
    assert "nothing to evaluate on" in error(tmp_path / "mimo", "--evaluate")
    assert "no stock counterpart" in error(tmp_path / "mimo", "--to-stock")
    classifier = CompreSSMMambaForSequenceClassification(make(OWN, "mamba", vocab_size=256).config)
    classifier.save_pretrained(tmp_path / "classifier")
    assert "has no loss on it" in error(tmp_path / "classifier", "--data", "mqar", "--evaluate")
    assert "error:" in error(tmp_path / "absent", "--data", text)


def test_output_folder_is_complete_or_not_there(tmp_path, capsys, monkeypatch):
    small_model().save_pretrained(tmp_path / "model")
    output, argv = tmp_path / "small", ["compress", tmp_path / "model", "--fraction", "0.5", "--output"]

    def fail(*args, **kwargs):
        assert not output.exists() and list(tmp_path.glob(".small.partial-*/config.json"))
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("hf_compressm.runs.compression.describe_policy", fail)
        code, _, errors = call(capsys, *argv, output)
    assert code == 2 and "the disk is full" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert call(capsys, *argv, output)[0] == 0
    (output / "old.txt").write_text("old")
    code, _, errors = call(capsys, *argv, output)
    assert code == 2 and "not empty; choose another folder or pass --overwrite" in errors
    assert (output / "old.txt").exists()
    assert call(capsys, *argv, output, "--overwrite")[0] == 0
    assert not (output / "old.txt").exists() and (output / "compression.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]


def test_overwrite_touches_neither_the_model_nor_what_is_none(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("")
    for output, message in ((".", "holds the model"), ("model", "is or holds"), ("photos", "holds no model")):
        argv = ["compress", tmp_path / "model", "--fraction", "0.5", "--output", tmp_path / output, "--overwrite"]
        code, _, errors = call(capsys, *argv)
        assert code == 2 and message in errors
    assert (tmp_path / "photos/one.jpg").exists() and (tmp_path / "model/model.safetensors").exists()


def test_a_quantised_layer_is_refused_before_the_data_is_read(saved, text, tmp_path, capsys, monkeypatch):
    load = runs_compression.load_model

    def quantised(*arguments):
        model = load(*arguments)
        weight = model.backbone.layers[1].mixer.x_proj.weight
        model.backbone.layers[1].mixer.x_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
        return model

    monkeypatch.setattr(runs_compression, "load_model", quantised)
    monkeypatch.setattr(runs_compression, "load_data", None)
    code, _, error = call(capsys, "compress", saved(), "--data", text, "--target-state-size", 4,
                          "--output", tmp_path / "out", *QUICK)  # fmt: skip
    assert code and "layers.1.mixer.x_proj.weight is a quantised weight (torch.int8)" in " ".join(error.split())
    assert not (tmp_path / "out").exists()
