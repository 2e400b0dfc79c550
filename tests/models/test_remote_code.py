"""The code that saved models carry: complete, free of this package, and with the same outputs."""

import json
import subprocess
import sys

import bundle
import make
import pytest
import torch
from own_delta_models import config as delta_config
from own_minimax_models import config as minimax_config
from selective_models import COMMON, IDS, OWN, own
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

from hf_compressm import (
    CompreSSMGatedDeltaNetConfig,
    CompreSSMMamba2Config,
    CompreSSMMambaConfig,
    CompreSSMMambaForCausalLM,
    CompreSSMMiniMaxConfig,
    MimoSSMConfig,
)
from hf_compressm.models.heads import new_model
from hf_compressm.models.remote_code import modelling_code

CONFIGS = {
    "gated_deltanet": CompreSSMGatedDeltaNetConfig,
    "mamba": CompreSSMMambaConfig,
    "mamba2": CompreSSMMamba2Config,
    "mimo": MimoSSMConfig,
    "minimax": CompreSSMMiniMaxConfig,
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """Dynamic modules stay in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


def config(kind, **fields):
    if kind in (makers := {"gated_deltanet": delta_config, "minimax": minimax_config}):
        return makers[kind](**({"state_sizes": [3, 8]} | fields))
    if kind == "mimo":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_sizes": [5, 9], "vocab_size": 50}
        return MimoSSMConfig(**(sizes | fields))
    return CONFIGS[kind](**(COMMON | OWN[kind][2] | {"state_sizes": [3, 8, 5]} | fields))


def travelled(model, folder, auto):
    """The model as it loads where this package is not installed."""
    model.save_pretrained(folder)
    reference = json.loads((folder / "config.json").read_text())["auto_map"][auto.__name__]
    cls = get_class_from_dynamic_module(reference, folder)
    assert cls.__module__.startswith("transformers_modules.") and cls.__name__ == type(model).__name__
    experts = model.config._experts_implementation
    return cls.from_pretrained(folder, dtype=model.dtype, experts_implementation=experts).train(model.training)


def as_double(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "A_log" not in name:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model.double()


@KINDS
def test_outputs_gradients_and_generation_are_the_same(kind, tmp_path):
    ours = as_double(AutoModelForCausalLM.from_config(config(kind))).eval()
    theirs = travelled(ours, tmp_path / "model", AutoModelForCausalLM)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    expected, found = (model(IDS, attention_mask=mask, labels=IDS) for model in (ours, theirs))
    assert torch.allclose(found.logits, expected.logits, atol=1e-6)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    assert torch.equal(theirs.generate(IDS, **settings), ours.generate(IDS, **settings))
    (expected.loss + found.loss).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(gradients[name].grad, parameter.grad, atol=1e-6), name


@KINDS
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_other_heads_and_continuous_inputs(kind, auto, tmp_path):
    fields = {"num_channels": 3, "vocab_size": None} if kind == "mimo" else {"num_channels": 3}
    ours = auto.from_config(config(kind, **fields)).eval()
    theirs = travelled(ours, tmp_path / "model", auto)
    values = torch.randn(2, 20, 3)
    expected, found = (model(input_values=values, return_dict=True)[0] for model in (ours, theirs))
    assert torch.allclose(found, expected, atol=1e-6)
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]


def test_the_classifier_of_pairs_travels_as_a_sequence_classifier(tmp_path):
    ours = new_model("sequence_pair_classification", config("mimo")).eval()
    theirs = travelled(ours, tmp_path / "model", AutoModelForSequenceClassification)
    pairs = torch.randint(0, 50, (3, 2, 20))
    assert torch.allclose(theirs(pairs).logits, ours(pairs).logits, atol=1e-6)


def test_forecasts_travel(tmp_path):
    fields = {"num_channels": 2, "vocab_size": None, "prediction_length": 3, "quantiles": [0.1, 0.5], "scaling": "std"}
    ours = new_model("forecasting", config("mimo", **fields)).eval()
    theirs = travelled(ours, tmp_path / "model", AutoModelForTimeSeriesPrediction)
    values = torch.randn(2, 20, 2)
    assert torch.allclose(theirs.forecast(values, 8), ours.forecast(values, 8), atol=1e-5)


@KINDS
def test_files_are_whole_and_need_only_torch_and_transformers(kind, tmp_path):
    for name, text in modelling_code(CONFIGS[kind]).items():
        (tmp_path / name).write_text(text)
        foreign = set(get_imports(tmp_path / name)) - sys.stdlib_module_names
        assert foreign <= {"torch", "transformers"}
        assert not any(word in text for word in ("custom_op", "importlib", "HF_COMPRESSM"))
    check = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "E9,F,I",
        "--line-length",
        "120",
        tmp_path,
    ]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_saving_what_was_loaded_keeps_the_code(tmp_path):
    theirs = travelled(own("mamba"), tmp_path / "model", AutoModelForCausalLM)
    type(theirs).register_for_auto_class("AutoModelForCausalLM")  # as the Auto classes do
    theirs.save_pretrained(tmp_path / "again")
    for name in ("modeling_compressm_mamba.py", "configuration_compressm_mamba.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


def test_references_of_a_repository_it_came_from_are_replaced(tmp_path):
    model = own("mamba")
    foreign = {"AutoModelForCausalLM": "other/repo--modeling_compressm_mamba.CompreSSMMambaForCausalLM"}
    model.config.auto_map = foreign | {"AutoTokenizer": ["tokenization.Mine", None]}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved["AutoModelForCausalLM"] == "modeling_compressm_mamba.CompreSSMMambaForCausalLM"
    assert saved["AutoTokenizer"] == ["tokenization.Mine", None]


def test_a_config_alone_carries_the_code_and_can_be_pushed(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(MimoSSMConfig, "push_to_hub", lambda self, repo_id, **kwargs: pushed.append((repo_id, kwargs)))
    config("mimo").save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model", private=True)
    assert {"config.json", "configuration_mimo_ssm.py", "modeling_mimo_ssm.py"} == {
        path.name for path in tmp_path.iterdir()
    }
    assert pushed == [("someone/model", {"private": True})]


def test_a_derived_class_is_left_to_its_author(tmp_path):
    class Mine(CompreSSMMambaConfig):
        pass

    CompreSSMMambaForCausalLM(Mine(**COMMON)).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_the_code_that_models_carry_is_up_to_date():
    assert not make.stale(), f"run {make.COMMAND}, and commit what it changes"


def test_a_stale_file_is_named(monkeypatch, tmp_path):
    made = {path.name: path.read_text() for path in make.FOLDER.iterdir()}
    monkeypatch.setattr(make, "made", lambda: made)
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "other.py.txt").touch()
    (tmp_path / "modeling_mimo_ssm.py.txt").write_text("old")
    (tmp_path / "modeling_compressm_mamba.py.txt").unlink()
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    assert make.stale() == ["modeling_compressm_mamba.py.txt", "modeling_mimo_ssm.py.txt", "other.py.txt"]


def sources(monkeypatch, **texts):
    """Let the bundler read these modules of the package."""
    known = {
        f"{bundle.PACKAGE}.{name}": bundle.Source(f"{bundle.PACKAGE}.{name}", text) for name, text in texts.items()
    }
    monkeypatch.setattr(bundle.Source, "of", known.__getitem__)


def test_definitions_come_before_their_use(monkeypatch):
    sources(
        monkeypatch,
        top="from .middle import f\nfrom .base import Base\n\n\nclass Top(Base):\n    g = f\n",
        middle="from .base import LIMIT\n\n\ndef unused():\n    pass\n\n\n# Why.\ndef f(x=LIMIT):\n    return x\n",
        base='LIMIT = 3\n"""Of everything."""\n\n\nclass Base:\n    """It."""\n',
    )
    text = bundle.Bundle().write(f"{bundle.PACKAGE}.top", "Title.")
    namespace = {}
    exec(text, namespace)
    assert namespace["Top"]().g.__func__.__defaults__ == (3,)
    assert "unused" not in text and "# Why.\ndef f" in text and '"""Of everything."""' in text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"top": "from .a import f as g\nx = g\n", "a": "def f(): pass\n"}, "f of .* is imported as g"),
        ({"top": "from .a import g\ndef f(): return g()\n", "a": "def g(): f()\ndef f(): pass\n"}, "f means .*top and"),
        ({"top": "def f():\n    from .a import g\n    g()\n"}, "imports from this package in line 2"),
    ],
)
def test_what_cannot_be_one_file_is_refused(monkeypatch, texts, message):
    sources(monkeypatch, **texts)
    with pytest.raises(ValueError, match=message):
        bundle.Bundle().write(f"{bundle.PACKAGE}.top", "Title.")
