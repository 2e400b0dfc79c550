"""Mistakes of users: each program says in one line what is wrong, exits with 2, and has built and written nothing."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from helpers import small_model
from selective_models import STOCK, make
from transformers import Trainer

from hf_compressm import cli
from hf_compressm.files import no_empty_folder
from hf_compressm.runs.arguments import WHILE_TRAINING, errors_as_lines

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ["--task", "digits", "--output_dir", "OUT", "--use_cpu", "true"]
FINETUNE = ["--model", "MODEL", "--data", "TEXT", "--output_dir", "OUT", "--use_cpu", "true"]
EVALUATE = ["MODEL", "--data", "TEXT", "--cpu"]
COMPRESS = ["compress", "MODEL", "--output", "OUT", "--target", "4"]


def series(files: str) -> list[str]:
    return [*PRETRAIN, "--task", "series", "--task_options", json.dumps({"files": files, "inputs": "a", "target": "b"})]


MISTAKES = {
    "misspelt option": ("pretrain", [*PRETRAIN, "--learning_rat2", "1"], "unknown option --learning_rat2; did"),
    "misspelt with =": ("pretrain", [*PRETRAIN, "--tua=0.1"], "unknown option --tua; did you mean --tau?"),
    "word too many": ("pretrain", [*PRETRAIN, "--fp16", "false", "more"], "'more' belongs to no option"),
    "word for a number": ("pretrain", [*PRETRAIN, "--max_steps", "many"], "max_steps.*invalid int value: 'many'"),
    "no file": ("pretrain", ["nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    "no mapping": ("pretrain", ["TEXT"], "is not a file of options in YAML|must hold a mapping"),
    "misspelt in a file": ("pretrain", ["RUN"], "unknown option 'tua'; did you mean 'tau'?"),
    "no task": ("pretrain", ["--output_dir", "OUT"], "no task given"),
    "unknown task": ("pretrain", [*PRETRAIN, "--task", "didgits"], "unknown task 'didgits'; did you mean 'digits'?"),
    "task option": ("pretrain", [*PRETRAIN, "--task_options", '{"length": 3}'], "does not take length"),
    "no JSON": ("pretrain", [*PRETRAIN, "--task_options", "["], r"--task_options takes a JSON object .* got '\['"),
    "no object": ("pretrain", [*PRETRAIN, "--model", "[1]"], "--model takes a JSON object"),
    "field of the model": (
        "pretrain", [*PRETRAIN, "--model", '{"hiden_size": 4}'], "no field 'hiden_size'; did you mean 'hidden_size'?",
    ),
    "size of the model": ("pretrain", [*PRETRAIN, "--model", '{"hidden_size": -4}'], "hidden_size must be an integer"),
    "architecture": ("pretrain", [*PRETRAIN, "--model_type", "mimo_sms"], "did you mean 'mimo_ssm'?"),
    "target above": (
        "pretrain", [*PRETRAIN, "--policy", "target", "--target_state_size", "999"], "model has only 256 states",
    ),
    "target above, xLSTM": (
        "pretrain",
        [*PRETRAIN, "--model_type", "xlstm", "--model", '{"hidden_size": 128, "qk_dim_factor": 2.0, "num_heads": 4}',
         "--policy", "target", "--target_state_size", "64"], "model has only 64 states",
    ),
    "time steps": ("pretrain", [*PRETRAIN, "--time_steps", "0.1", "0.001"], "0 < smallest <= largest; got .0.1, 0.001"),
    "tau out of range": ("pretrain", [*PRETRAIN, "--tau", "7"], "tau must lie strictly between 0 and 1"),
    "NaN": ("pretrain", [*PRETRAIN, "--learning_rate", "nan"], "learning_rate must be a finite number"),
    "no steps": ("pretrain", [*PRETRAIN, "--max_steps", "0"], "max_steps must be at least 1, or -1 .*; got 0"),
    "fewer steps": ("pretrain", [*PRETRAIN, "--max_steps", "-5"], "max_steps must be at least 1, or -1 .*; got -5"),
    "negative interval": ("pretrain", [*PRETRAIN, "--logging_steps", "-1"], "logging_steps must be greater than 0"),
    "beta": ("pretrain", [*PRETRAIN, "--adam_beta1", "2"], "adam_beta1 must be below 1; got 2.0"),
    "epsilon": ("pretrain", [*PRETRAIN, "--adam_epsilon", "-1"], "adam_epsilon must be greater than 0; got -1.0"),
    "smoothing": ("pretrain", [*PRETRAIN, "--label_smoothing_factor", "5"], "must be below 1; got 5.0"),
    "seed of data": ("pretrain", [*PRETRAIN, "--data_seed", "-1"], "data_seed must be at least 0; got -1"),
    "window": ("pretrain", [*PRETRAIN, "--window_start", "2"], "0 <= window_start < window_end; got 2.0"),
    "steps of cuts": ("pretrain", [*PRETRAIN, "--cut_steps", "-5"], "cut_steps must be optimizer steps >= 1"),
    "policy": ("pretrain", [*PRETRAIN, "--policy", "targt"], "invalid choice: 'targt'"),
    "schedule of rates": ("pretrain", [*PRETRAIN, "--lr_scheduler_type", "cosin"], "invalid choice: 'cosin'"),
    "deepspeed": ("pretrain", [*PRETRAIN, "--deepspeed", "nowhere.json"], "deepspeed"),
    "import: none": ("pretrain", [*PRETRAIN, "--import", "nowhere.py"], "there is no file .*nowhere.py"),
    "import: syntax": ("pretrain", [*PRETRAIN, "--import", "SYNTAX"], "cannot be imported: SyntaxError: invalid"),
    "import: no module": ("pretrain", [*PRETRAIN, "--import", "xml.nowhere"], "there is no module xml.nowhere"),
    "help on nothing": ("pretrain", ["--help", "didgits"], "unknown task 'didgits'; did you mean 'digits'?"),
    "options of another task": (
        "pretrain", [*PRETRAIN, "--task", "text", "--task_options", '{"inputs": ["a"]}'], "'text' does not take inputs",
    ),
    "type of an option": (
        "pretrain", [*PRETRAIN, "--task", "text", "--task_options", '{"streaming": "yes"}'], "must be of type bool",
    ),
    "streamed without an end": (
        "pretrain", [*PRETRAIN, "--task", "text", "--task_options", '{"streaming": true}'], "the run needs max_steps",
    ),
    "no columns": (
        "pretrain", [*PRETRAIN, "--task", "series", "--task_options", '{"files": "CSV"}'], "needs its option",
    ),
    "no such table": ("pretrain", series("nowhere.csv"), "no file matches 'nowhere.csv'"),
    "empty table": ("pretrain", series("EMPTY"), "cannot read .*empty.txt: it reads .parquet, .csv, .tsv, .npz"),
    "only a header": ("pretrain", series("CSV"), "head.csv cannot be read as csv: it has no rows"),
    "half an archive": ("pretrain", series("NPZ"), "half.npz cannot be read as npz: it is no archive"),
    "output holds a model": ("pretrain", [*PRETRAIN, "--output_dir", "MODEL"], "holds a model that no run of training"),
    "output without a name": ("pretrain", [*PRETRAIN, "--output_dir", ""], "output_dir is empty"),
    "token": ("pretrain", [*PRETRAIN, "--hub_token", "hf_secret"], "would be saved and pushed"),
    "output is a file": ("pretrain", [*PRETRAIN, "--output_dir", "TEXT"], "is a file; the output must be a folder"),
    "output below a file": ("pretrain", [*PRETRAIN, "--output_dir", "TEXT/out"], "cannot be made: .* is a file"),
    "output not writable": ("pretrain", [*PRETRAIN, "--output_dir", "/proc/out"], "/proc cannot be written to"),
    "no data folder": (
        "pretrain", [*PRETRAIN, "--task", "smnist", "--data_dir", "nowhere"], "data_dir is not a folder: nowhere",
    ),
    "no tokenizer folder": (
        "pretrain", [*PRETRAIN, "--task", "wikitext", "--task_options", '{"tokenizer": "./words"}'],
        "there is no folder ./words to read the tokenizer from",
    ),
    "nothing to resume": ("pretrain", [*PRETRAIN, "--resume_from_checkpoint", "true"], "holds no checkpoint"),
    "resume twice": (
        "pretrain", [*PRETRAIN, "--resume_from_checkpoint", "a", "--resume", "b"], "give --resume or --resume_from",
    ),
    "no model": ("finetune", FINETUNE[2:], "no model given"),
    "no data": ("finetune", FINETUNE[:2], "no data given"),
    "heal: option": ("finetune", [*FINETUNE, "--keep_fractoin", "1"], "did you mean --keep_fraction?"),
    "two amounts": ("finetune", [*FINETUNE, "--tau", "0.1", "--keep_fraction", "0.5"], "not several"),
    "no folder": ("finetune", [*FINETUNE, "--model", "./nowhere"], "there is no folder ./nowhere to read the model"),
    "not on the hub": ("finetune", [*FINETUNE, "--model", "no/where"], "neither a folder nor a model that the hub"),
    "not a model": ("finetune", [*FINETUNE, "--model", "FOLDER"], "holds no config.json"),
    "empty text": ("finetune", [*FINETUNE, "--data", "EMPTY"], "holds no text"),
    "data unknown": ("finetune", [*FINETUNE, "--data", "stdlib_byte"], "did you mean 'stdlib_bytes'?"),
    "heal: target above": ("finetune", [*FINETUNE, "--target_state_size", "8"], "model has only 8 states per layer"),
    "heal: target below": (
        "finetune", [*FINETUNE, "--target_state_size", "4", "--min_state_size", "5"], "below min_state_size, 5",
    ),
    "LoRA no JSON": ("finetune", [*FINETUNE, "--lora", "{"], "--lora takes a JSON object"),
    "field of LoRA": ("finetune", [*FINETUNE, "--lora", '{"rank": 4}'], "peft.LoraConfig has no field 'rank'"),
    "LoRA: word": ("finetune", [*FINETUNE, "--lora", '{"r": "x"}'], "r of peft.LoraConfig must be a number; got 'x'"),
    "heal: over another": (
        "finetune", [*FINETUNE, "--output_dir", "MIMO"], "holds a model that no run of training wrote there",
    ),
    "heal: share": ("finetune", [*FINETUNE, "--keep_fraction", "2"], "strictly between 0 and 1; got 2.0"),
    "heal: file": ("finetune", [*FINETUNE, "--model", "TEXT"], "holds no config.json"),
    "over the model": ("finetune", [*FINETUNE, "--output_dir", "MODEL"], "is or holds the model that is to be read"),
    "score: file": ("evaluate_model", ["TEXT", *EVALUATE[1:]], "holds no config.json"),
    "score: no config": ("evaluate_model", ["FOLDER", *EVALUATE[1:]], "holds no config.json"),
    "score: adapter": ("evaluate_model", ["ADAPTER", *EVALUATE[1:]], "adapter_config.json of .* names no base model"),
    "score: no weights": ("evaluate_model", ["WEIGHTLESS", *EVALUATE[1:]], "holds no weights of its adapter"),
    "score: no name": ("evaluate_model", ["MODEL", "--data", ""], "the name of the data is empty"),
    "score: length": ("evaluate_model", [*EVALUATE, "--length", "-5"], "length must be at least 2; got -5"),
    "score: type": ("evaluate_model", ["MODEL", "--data", "text", "--task_options", '{"length": "x"}'], "of type int"),
    "score: no JSON": ("evaluate_model", [*EVALUATE, "--task_options", "["], "--task_options takes a JSON object"),
    "score: option": ("evaluate_model", [*EVALUATE, "--batchsize", "3"], "did you mean --batch_size?"),
    "no such split": ("evaluate_model", [*EVALUATE, "--split", "tset"], "invalid choice: 'tset'"),
    "score: no data": ("evaluate_model", ["MODEL"], "required: --data"),
    "score: no batch": ("evaluate_model", [*EVALUATE, "--batch_size", "0"], "at least 1; got 8 and 0"),
    "score: empty": ("evaluate_model", [*EVALUATE, "--data", "EMPTY"], "holds no text"),
    "score: no folder": ("evaluate_model", [*EVALUATE, "--output", "OUT/a.json"], "no folder .* to write a.json to"),
    "score: a folder": ("evaluate_model", [*EVALUATE, "--output", "FOLDER"], "is a folder; the output must be a file"),
    "command": (None, ["compres", "MODEL"], "No such command 'compres'.*compress"),
    "cut: option": (None, [*COMPRESS, "--min-state-siz", "3"], "unknown option --min-state-siz; did you mean"),
    "cut: no model": (None, ["compress", "--output", "OUT"], "Missing argument '(MODEL|model)'"),
    "cut: word": (None, [*COMPRESS, "--target", "four"], "Invalid value for '--target-state-size'"),
    "cut: no policy": (None, COMPRESS[:4], "exactly one of --tau, --target-state-size and --fraction, not none"),
    "cut: no JSON": (None, [*COMPRESS, "--data", "mqar", "--task-options", "["], "--task-options takes a JSON object"),
    "cut: target above": (None, [*COMPRESS, "--target", "9"], "model has only 8 states per layer"),
    "cut: occupied": (None, [*COMPRESS, "--output", "FOLDER"], "is not empty; choose another folder or pass"),
    "cut: empty": (None, [*COMPRESS, "--data", "EMPTY"], "holds no text"),
    "cut: length": (None, [*COMPRESS, "--data", "TEXT", "--length", "1"], "length must be at least 2; got 1"),
    "look: tau": (None, ["inspect", "MODEL", "--tau", "2"], "tau must lie strictly between 0 and 1; got 2.0"),
    "look: plot": (None, ["inspect", "MODEL", "--plot", "OUT/a.svg"], "there is no folder .* to write a.svg to"),
    "no run": (None, ["report", "FOLDER"], "holds no run"),
    "unknown form": (None, ["export", "MODEL", "OUT", "--to", "stick"], "--to takes 'remote-code' or 'stock' or"),
    "name on the hub": (None, ["push", "MODEL", "a/b/c"], "Repo id must be"),
    "no suite": ("reproduce", ["nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    "suite: option": ("reproduce", ["SUITE", "--worker-s", "1"], "unknown option --worker-s; did you mean --workers?"),
    "suite: task": ("reproduce", ["SUITE", "--tasks", "chess"], "chess"),
    "suite: output": ("reproduce", ["SUITE", "--output", "TEXT"], "is a file; the output must be a folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a model, texts and files of options, under the names that the mistakes have for them."""
    folder = tmp_path_factory.mktemp("mistakes")
    make(STOCK, "mamba", vocab_size=256).save_pretrained(folder / "model")
    small_model().save_pretrained(folder / "mimo")
    (folder / "text.txt").write_text("a: [" + "It is a truth universally acknowledged. " * 40)
    (folder / "empty.txt").write_text("")
    (folder / "folder").mkdir()
    (folder / "folder" / "photo.jpg").write_text("")
    (folder / "run.yaml").write_text(yaml.safe_dump({"task": "digits", "tua": 0.1}))
    (folder / "syntax.py").write_text("def f(:")
    (folder / "head.csv").write_text("a,b\n")
    (folder / "half.npz").write_bytes(b"PK\x03\x04" + bytes(50))
    for name, content in {"adapter": {}, "weightless": {"base_model_name_or_path": "x", "peft_type": "LORA"}}.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(content))
    names = {"MODEL": "model", "TEXT": "text.txt", "EMPTY": "empty.txt", "FOLDER": "folder", "RUN": "run.yaml"}
    names |= {"MIMO": "mimo", "SYNTAX": "syntax.py", "CSV": "head.csv", "NPZ": "half.npz"}
    names |= {"ADAPTER": "adapter", "WEIGHTLESS": "weightless"}
    names = {short: str(folder / name) for short, name in names.items()} | {"OUT": str(folder / "out")}
    config = str(ROOT / "configs" / "runs" / "digits_narrow.yaml")
    suite = {"seeds": 1, "tasks": {"narrow": {"config": config, "methods": {"full": {"method": "full"}}}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder, names | {"SUITE": str(folder / "suite.yaml")}


@pytest.fixture(scope="module")
def programs():
    """Program -> its `main`, of a list of arguments."""
    names = ("pretrain", "finetune", "evaluate_model", "reproduce")
    return {None: cli.main} | {name: runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"] for name in names}


@pytest.fixture(autouse=True)
def no_bars(tmp_path_factory, monkeypatch):
    """Bars of what is read before the mistake is found are no message, and what `datasets` reads stays here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def put(names: dict[str, str], words: list[str]) -> list[str]:
    words = [re.sub('"(CSV|NPZ|EMPTY)"', lambda found: json.dumps(names[found[1]]), word) for word in words]
    return [names.get(word.split("/")[0], word.split("/")[0]) + word[len(word.split("/")[0]) :] for word in words]


@pytest.mark.parametrize("case", MISTAKES)
def test_one_line_and_nothing_built(case, workspace, programs, tmp_path, monkeypatch, capsys):
    program, words, message = MISTAKES[case]
    folder, names = workspace
    monkeypatch.chdir(tmp_path)

    def build(*_, **__):
        raise AssertionError("nothing may be built before the mistake is found")

    monkeypatch.setattr(torch.nn.Module, "__init__", build)
    monkeypatch.setattr(datasets.Dataset, "from_dict", build)
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        programs[program](put(names, words))
    printed, errors = capsys.readouterr()
    assert ended.value.code == 2 and not printed
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert re.search(message, errors), errors
    assert contents(folder) == before and not list(tmp_path.iterdir())


def test_the_traceback_is_shown_on_demand(programs, workspace, capsys):
    with pytest.raises(SystemExit, match="2"):
        programs["evaluate_model"](put(workspace[1], [*EVALUATE, "--traceback", "--batch_size", "0"]))
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("Traceback") and errors[-1].startswith("error: batches and batch_size must be")


@pytest.mark.parametrize("error", [KeyError("x"), ModuleNotFoundError("no x", name="x"), AttributeError("x")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), errors_as_lines([]):
        raise error


def fail_in(function: str, error: Exception) -> None:
    """Raise an error in a function of the Trainer's module, while it trains."""
    scope = {"__name__": "transformers.trainer", "error": type(error)(*error.args)}  # without an earlier traceback
    exec(f"def {function}():\n    raise error\ndef train():\n    {function}()\ntrain()", scope)


@pytest.mark.parametrize(
    "error", [TypeError("no argument 'x'"), ValueError("no argument 'x'"), KeyError("no argument 'x'")]
)
def test_what_the_trainer_is_given_for_later_counts_too(error, capsys):
    for function in ("create_scheduler", "create_optimizer", "_determine_best_metric"):
        with pytest.raises(SystemExit, match="2"), errors_as_lines([]):
            fail_in(function, error)
        assert capsys.readouterr().err == "error: no argument 'x'\n"
    with pytest.raises(type(error)), errors_as_lines([]):
        fail_in("training_step", error)


def test_the_trainer_has_these_functions():
    assert all(hasattr(Trainer, name) for name in WHILE_TRAINING)


def test_an_empty_folder_is_taken_away_again(tmp_path):
    (tmp_path / "there").mkdir()
    for made, left in (("new/below", False), ("there", True), ("full", True)):
        with pytest.raises(ValueError, match="x"), no_empty_folder(tmp_path / made):
            (tmp_path / made).mkdir(parents=True, exist_ok=True)
            if made == "full":
                (tmp_path / made / "file").touch()
            raise ValueError("x")
        assert (tmp_path / made.split("/")[0]).exists() == left
    with no_empty_folder(tmp_path / "fine"):
        (tmp_path / "fine").mkdir()
    assert (tmp_path / "fine").exists()


def raise_in(module: str, error: Exception) -> None:
    """Raise an error in a module, called by the Trainer's."""
    scope = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", scope)
    trainer = {"__name__": "transformers.trainer", "fail": scope["fail"]}
    exec("def train():\n    fail()\ntrain()", trainer)


def test_while_the_trainer_trains_only_this_packages_errors_count(capsys):
    with pytest.raises(SystemExit, match="2"), errors_as_lines([]):
        raise_in("hf_compressm.training.callback", ValueError("the window holds no step"))
    assert capsys.readouterr().err == "error: the window holds no step\n"
    with pytest.raises(SystemExit, match="2"), errors_as_lines([]):
        raise_in("datasets.packaged_modules.json.json", RuntimeError("a line of a stream is broken"))
    assert capsys.readouterr().err == "error: a line of a stream is broken\n"
    for module, error in (("torch.nn.functional", ValueError("x")), ("hf_compressm.layers.lru", RuntimeError("x"))):
        with pytest.raises(type(error), match="x"), errors_as_lines([]):
            raise_in(module, error)


def test_other_processes_give_the_first_one_time(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("hf_compressm.runs.arguments.time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"), errors_as_lines([]):
            raise ValueError("two\nlines")
    assert len(waited) == 1 and capsys.readouterr().err == "error: two lines\n" * 2
