"""ONNX files of models run in onnxruntime as the models do in PyTorch, and what has no ONNX form is refused."""

import json
import re

import numpy as np
import pytest
import torch
from documents import ROOT, blocks, commands
from own_models import FIELDS, Own, V
from programs import run_program, run_script
from selective_models import STOCK, make

from hf_compressm import cli, compress
from hf_compressm.deploy import OnnxModel, onnx_files, write_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
"""For float32 logits of some units, summed in another order over 200 steps."""
FAMILIES = [family for family in FIELDS if family in ("CompreSSMMamba", "CompreSSMMamba2", "MimoSSM")]


def ids(*shape):
    return torch.randint(1, V, shape)


def check(model, folder, batch, length, steps=5):
    """Compare a prefill and single steps after it with the model's own logits of the whole text."""
    run, text = OnnxModel(folder, threads=1), ids(batch, length + steps)
    with torch.no_grad():
        expected = model(text, use_cache=False).logits.numpy()
    logits, states = run.read(text[:, :length].numpy(), run.first_states(batch))
    np.testing.assert_allclose(logits[:, -1], expected[:, length - 1], **TOLERANCE)
    for place in range(length, length + steps):
        logits, states = run.read(text[:, place : place + 1].numpy(), states)
        np.testing.assert_allclose(logits[:, 0], expected[:, place], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_run_in_onnxruntime(family, tmp_path):
    model = Own(f"{family}ForCausalLM").model(num_hidden_layers=2, state_sizes=[3, 5]).eval()
    done = write_onnx(model, tmp_path)
    assert done.state_sizes == [3, 5] and done.files == ["prefill.onnx", "step.onnx"]
    for batch in (1, 3):
        for length in (1, 2, 7, 33, 200):
            check(model, tmp_path, batch, length)
    run, text = OnnxModel(tmp_path, threads=1), ids(2, 12).numpy()
    # A text in pieces, and texts that come together after their prefill.
    _, states = run.read(text[:, :7], run.first_states(2))
    logits, states = run.read(text[:, 7:], states)
    alone = [run.read(row[None], run.first_states(1)) for row in text]
    np.testing.assert_allclose(logits, np.concatenate([each for each, _ in alone]), **TOLERANCE)
    for state, parts in zip(states, zip(*(each for _, each in alone), strict=True), strict=True):
        np.testing.assert_allclose(state, np.concatenate(parts), **TOLERANCE)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": 16}
    expected = model.generate(torch.tensor(text), max_new_tokens=16, **settings)
    assert np.array_equal(run.generate(text, 16), expected.numpy())


@pytest.mark.parametrize("kind", STOCK)
def test_stock_models_after_a_cut(kind, tmp_path):
    model = make(STOCK, kind, num_hidden_layers=1)
    compress(model, [{"input_ids": ids(4, 16)}], target=4, refit_steps=0)
    classes = [type(module) for module in model.modules()]
    write_onnx(model, tmp_path, all_logits=True)
    assert [type(module) for module in model.modules()] == classes
    check(model, tmp_path, 2, 70)
    run = OnnxModel(tmp_path, threads=1)
    assert run.read(ids(2, 6).numpy(), run.first_states(2))[0].shape[1] == 6


@pytest.mark.parametrize("name", ["MimoSSMForSequenceClassification", "CompreSSMMambaForTokenClassification"])
def test_classifiers_run_with_padding_anywhere(name, tmp_path):
    channels = {"vocab_size": None, "num_channels": 2} if name.startswith("Mimo") else {}
    config_of = Own(name.replace("ForTokenClassification", "ForSequenceClassification"))
    torch.manual_seed(0)
    import hf_compressm

    model = getattr(hf_compressm, name)(config_of.config(num_hidden_layers=1, state_sizes=[3], **channels)).eval()
    write_onnx(model, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 9), (2, 70)):
        values = torch.randn(batch, length, 2) if channels else ids(batch, length)
        mask = (torch.rand(batch, length) > 0.3).long()
        mask[:, length // 2] = 1
        inputs = {"input_values" if channels else "input_ids": values, "attention_mask": mask}
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        real = mask.bool().numpy() if found.ndim == 3 else slice(None)
        np.testing.assert_allclose(found[real], expected[real], **TOLERANCE)


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in argv])
    return stopped.value.code or 0, *capsys.readouterr()


def test_the_command_writes_a_folder(tmp_path, capsys):
    model = Own("MimoSSMForCausalLM").model(num_hidden_layers=1, state_sizes=[3]).eval()
    model.bfloat16().save_pretrained(tmp_path / "model")
    code, printed, errors = call(capsys, "export", tmp_path / "model", tmp_path / "out", "--to", "onnx", "--json")
    done = json.loads(printed.splitlines()[-1])
    assert code == 0, errors
    assert done["state_sizes"] == [3] and {"prefill.onnx", "step.onnx", "config.json"} <= set(done["files"])
    check(type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval(), tmp_path / "out", 1, 9)
    for options, message in (
        (["--to", "onnx", "--opset", "12"], "opset 12 is too old; torch's exporter writes opset 18 and later"),
        (["--to", "stock", "--opset", "20"], "--opset and --all-logits are for --to onnx, not for --to stock"),
    ):
        code, _, errors = call(capsys, "export", tmp_path / "model", tmp_path / "other", *options)
        assert code == 2 and errors == f"error: {message}\n" and not (tmp_path / "other").exists()


def test_models_without_an_onnx_form_are_refused(tmp_path, monkeypatch):
    model = Own("MimoSSMForCausalLM").model()
    for change, message in (
        (lambda: model.train(), r"in training mode.*call model.eval\(\) first"),
        (lambda: model.eval().double(), r"holds torch.float64; call model.float\(\) first"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            write_onnx(model, tmp_path)
    model.float().config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="a quantised model has no ONNX form; export the model in float32"):
        write_onnx(model, tmp_path)
    for name in ("MimoSSMModel", "MimoSSMForSequencePairClassification", "CompreSSMGatedDeltaNetForCausalLM"):
        with pytest.raises(ValueError, match=f"{name} has no ONNX form; language models and classifiers"):
            write_onnx(Own(name).model().eval(), tmp_path)
    monkeypatch.setattr(onnx_files, "NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(ValueError, match=r'need no_such_package; install with: pip install "hf-compressm\[onnx\]"'):
        write_onnx(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no prefill.onnx; write it with hf-compressm export --to onnx"):
        OnnxModel(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_at_a_tiny_size(tmp_path, capsys, monkeypatch):
    small = "--models mimo_ssm --layers 1 --hidden 8 --states 4 --kept 2 --lengths 1 9 --steps 2 --batch 2 --repeats 1"
    script = ROOT / "scripts/benchmarks/onnx_export.py"
    run_script(script, *small.split(), "--json", str(tmp_path / "found.json"), monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["states"] for row in rows] == [[4], [2]] and "| mimo_ssm, cut | 2 |" in capsys.readouterr().out
    assert all(0 <= row[key] < 1e-4 * row["largest_logit"] for row in rows for key in ("prefill", "steps"))
    assert all(value > 0 for row in rows for pair in row["ms"] for value in pair)


def test_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchao")
    page = ROOT / "docs/deploy.md"
    lines = []
    for language, content in blocks(page):
        if language == "python":
            lines.append(content)
        for words in commands(content) if language == "bash" else []:
            if words[:3] == ["hf-compressm", "export", "outputs/deploy"]:  # others are pip's, or of models elsewhere
                lines.append(f"from hf_compressm.cli import app; app({words[1:]!r}, standalone_mode=False)")
    run_program("\n".join(lines), tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert re.findall(r"^.*True.*$|^\['conv_0.*$", printed, re.MULTILINE) == [
        "tensor(True)", "['conv_0', 'state_0', 'conv_1', 'state_1']", *["True"] * 3
    ]  # fmt: skip
