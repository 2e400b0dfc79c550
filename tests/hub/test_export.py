"""Export to folders, and pushes that are refused before anything is sent."""

import json
import re

import pytest
import torch
from helpers import small_model
from own_minimax_models import IDS as MINIMAX_IDS
from own_minimax_models import own as own_minimax
from safetensors.torch import load_file, save_file
from selective_models import IDS, STOCK, make, own
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from hf_compressm import CompreSSMMamba2Model, cli, compress, from_stock, state_sizes
from hf_compressm.hub import push


def call(capsys, *argv):
    """Exit code, standard output and standard error of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in argv])
    return stopped.value.code or 0, *capsys.readouterr()


@pytest.fixture
def saved(tmp_path):
    """Function that saves a model and returns its folder."""

    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("form", ["stock", "remote-code"])
def test_both_forms_keep_outputs_and_what_belongs_to_the_model(form, saved, tmp_path, capsys):
    model = own("mamba")
    folder = saved(model.bfloat16())
    for name in ("README.md", "spectra.png", "compression.json", "training_args.bin", "optimizer.pt"):
        (folder / name).write_text("{}")
    code, printed, errors = call(capsys, "export", folder, tmp_path / "out", "--to", form, "--json")
    done = json.loads(printed)
    assert code == 0, errors
    assert done["form"] == form and done["output"] == str(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == set(done["files"]) and {"README.md", "spectra.png", "compression.json"} < files
    assert not {"training_args.bin", "optimizer.pt"} & files
    assert any(name.endswith(".py") for name in files) == (form == "remote-code")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert state_sizes(found) == done["state_sizes"] == ([8] * 3 if form == "stock" else [3, 8, 5])
    assert type(found).__name__ == done["architecture"] and found.dtype == torch.bfloat16
    assert torch.allclose(found.float()(IDS).logits, model.float()(IDS).logits, atol=1e-5)


def test_text_says_what_was_written(saved, tmp_path, capsys):
    _, printed, _ = call(capsys, "export", saved(own("mamba2")), tmp_path / "out", "--to", "remote-code")
    output = tmp_path / "out"
    assert printed == f"CompreSSMMamba2ForCausalLM, remote-code, states 3 8 5\nsaved to {output}\n"


def test_folders_of_earlier_versions_and_other_heads_gain_the_code(saved, tmp_path, capsys):
    for name, model in (("classifier", small_model()), ("base", CompreSSMMamba2Model(own("mamba2").config))):
        folder = saved(model, name)
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
        for path in folder.glob("*.py"):
            path.unlink()
        assert call(capsys, "export", folder, tmp_path / f"{name}-out", "--to", "remote-code")[0] == 0
        written = json.loads((tmp_path / f"{name}-out/config.json").read_text())["auto_map"]
        assert all((tmp_path / f"{name}-out" / f"{ref.partition('.')[0]}.py").exists() for ref in written.values())


def test_a_stock_class_that_cannot_be_cut_is_written_too(saved, tmp_path, capsys):
    model = own_minimax()
    code, printed, errors = call(capsys, "export", saved(model), tmp_path / "out", "--to", "stock")
    assert code == 0 and printed.startswith("MiniMaxForCausalLM, stock, states 8 8\n"), errors
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert torch.allclose(found(MINIMAX_IDS, use_cache=False).logits, model(MINIMAX_IDS).logits, atol=1e-5)


def test_stock_models_stay_stock(saved, tmp_path, capsys):
    folder = saved(make(STOCK, "mamba2"))
    assert call(capsys, "export", folder, tmp_path / "out", "--to", "stock")[0] == 0
    code, _, errors = call(capsys, "export", folder, tmp_path / "other", "--to", "remote-code")
    assert code == 2 and "Mamba2ForCausalLM, a class of transformers itself" in errors and "--to stock" in errors
    assert not (tmp_path / "other").exists()


def mixing():
    model = from_stock(make(STOCK, "mamba2"))
    compress(model, {"input_ids": IDS}, target=4, refit_steps=0)
    return model


NO_STOCK = {
    "no counterpart": (small_model, "MimoSSMForSequenceClassification has no stock counterpart"),
    "mixed states": (mixing, "mixes its states in read_in and read_out"),
    "no state-space layers": (
        lambda: BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
        "MambaMixer",
    ),
}


@pytest.mark.parametrize("case", NO_STOCK)
def test_what_cannot_be_stock_is_refused_with_the_reason(case, saved, tmp_path, capsys):
    build, reason = NO_STOCK[case]
    code, printed, errors = call(capsys, "export", saved(build()), tmp_path / "out", "--to", "stock")
    assert code == 2 and reason in errors and not printed
    assert case == "no state-space layers" or "Use --to remote-code." in errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left behind"


def damaged(folder, what):
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "part of the weights":
        tensors = load_file(folder / "model.safetensors")
        del tensors["backbone.layers.1.mixer.A_log"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif what == "other sizes":
        config = json.loads((folder / "config.json").read_text()) | {"state_sizes": [3, 8, 4]}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Unheard"]}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


DAMAGES = {
    "no config": "holds no config.json, so it is not the folder of a saved model",
    "no weights": "model.safetensors",
    "part of the weights": "lacks weights of its model: backbone.layers.1.mixer.A_log",
    "other sizes": "does not fit its config, whose state_sizes are [3, 8, 4]",
    "unknown class": "was saved as Unheard, which neither this package nor transformers defines",
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("command", ["export", "push"])
def test_folders_that_hold_no_whole_model_are_refused(what, command, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    folder = damaged(saved(own("mamba")), what)
    options = [tmp_path / "out", "--to", "remote-code"] if command == "export" else ["someone/model"]
    code, printed, errors = call(capsys, command, folder, *options)
    assert code == 2 and DAMAGES[what] in errors and not printed and not (tmp_path / "out").exists()


def test_push_is_refused_before_anything_is_sent(saved, tmp_path, capsys, monkeypatch):
    folder = saved(own("mamba"))
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    for name in ("a/b/c", "some one/model", "model.git", "two--dashes"):
        code, _, errors = call(capsys, "push", folder, name)
        assert code == 2 and "repo" in errors.lower() and name in errors, errors
    code, _, errors = call(capsys, "push", folder, "someone/model", "--to", "stick")
    assert code == 2 and errors == "error: --to takes 'remote-code' or 'stock'; got 'stick'\n"
    code, _, errors = call(capsys, "push", folder, "someone/model")
    assert code == 2 and "the push to someone/model stopped: " in errors and "offline" in errors.lower()
    assert "hf_token" not in errors
    monkeypatch.setattr("hf_compressm.hub.upload.get_token", lambda: None)
    code, _, errors = call(capsys, "push", folder, "someone/model")
    assert code == 2 and errors == "error: no token to push with: log in with `hf auth login`, or set HF_TOKEN\n"


def test_a_token_that_the_hub_sends_back_is_not_shown(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("sending failed") from ConnectionError("bad header: Bearer hf_SecretToken")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(RuntimeError, match="sending failed: bad header: Bearer <token>") as stopped:
        push(str(saved(own("mamba"))), "someone/model", token="hf_SecretToken")
    assert stopped.value.__suppress_context__ and stopped.value.__cause__ is None


@pytest.mark.parametrize("command", ["export", "push"])
def test_help_teaches(command, capsys):
    code, printed, _ = call(capsys, command, "--help")
    text = re.sub(r"[\s│]+", " ", printed)
    assert code == 0 and f"Example: hf-compressm {command}" in text and "Exit code 2" in text
    assert "trust_remote_code=True" in text if command == "export" else "hf auth login" in text


@pytest.mark.parametrize("kind", ["own", "stock"])
def test_layers_are_padded_for_a_runtime(kind, saved, tmp_path, capsys):
    fields = {"hidden_size": 64}
    model = own("mamba", state_sizes=[3, 12, 5], **fields) if kind == "own" else make(STOCK, "mamba", **fields)
    argv = ("export", saved(model), tmp_path / "out", "--to", "stock", "--for", "llama.cpp")
    code, printed, errors = call(capsys, *argv)
    assert code == 0 and printed.startswith("MambaForCausalLM, stock, states 16 16 16\n"), errors
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(found(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_size_that_a_runtime_does_not_take_is_refused(saved, tmp_path, capsys):
    model = saved(make(STOCK, "mamba", hidden_size=64, state_size=20))
    code, _, errors = call(capsys, "export", model, tmp_path / "out", "--to", "stock", "--for", "llama.cpp")
    assert code == 2 and not (tmp_path / "out").exists()
    assert errors.splitlines()[-1] == (
        "error: llama.cpp takes a Mamba of 16 states, and the largest layer of this one has 20. Cut it to such a size "
        "first: --target-state-size 16 --sizes-for llama.cpp."
    )
