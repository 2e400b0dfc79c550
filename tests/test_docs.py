"""The documentation is true: its programs run, its commands parse, its links lead somewhere, its messages exist."""

from __future__ import annotations

import argparse
import ast
import json
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from documents import BLOCK, PAGES, ROOT, blocks, commands, commands_of
from programs import go_offline, run_program
from torch.distributed.run import get_args_parser
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_compressm.cli import app
from hf_compressm.data import load_task
from hf_compressm.runs.evaluation import parse_evaluation
from hf_compressm.runs.finetuning import parse_finetune
from hf_compressm.runs.pretraining import parse_run


def program(page: Path, shell: bool = True) -> str:
    """The page's Python as one program, and its commands where they stand between."""
    lines = []
    for language, content in blocks(page):
        if language == "python":
            lines.append(content)
        elif language == "bash" and shell:
            for words in commands(content):
                assert words[0] == "hf-compressm", words
                lines.append(f"from hf_compressm.cli import app; app({words[1:]!r}, standalone_mode=False)")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_tutorial_runs_in_order(tmp_path, monkeypatch, capsys):
    go_offline(monkeypatch, tmp_path / "cache")
    run_program(program(ROOT / "docs/tutorial.md"), tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    written = {path.relative_to(tmp_path / "outputs").as_posix() for path in tmp_path.rglob("outputs/**/*")}
    assert {"tutorial/report.html", "spectra.svg", "mamba-shell/config.json", "mamba-own/config.json"} <= written
    assert re.search(r"^\[CompreSSM\] Step 15: states \[64, 64\] .* -> .*, error bound <= .* per layer, .* s$",
                     printed, re.MULTILINE)  # fmt: skip


@pytest.mark.slow
def test_the_series_page_runs_in_order(tmp_path, monkeypatch, capsys):
    go_offline(monkeypatch, tmp_path / "cache")
    page = ROOT / "docs/time_series.md"
    run_program(program(page, shell=False), tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    for written in ("model.safetensors", "preprocessor_config.json", "modeling_mimo_ssm.py"):
        assert (tmp_path / "outputs/demand" / written).is_file()
    found = re.search(r"^test (\{.*\})$", printed, re.MULTILINE)
    scores = ast.literal_eval(found[1])
    assert scores["mase"] < 1, "worse than the seasonal naive forecast"
    assert re.search(r"^\(1, 3, 24, 1\) \(1, 3, 72, 1\)$", printed, re.MULTILINE)
    assert re.search(r"^states: \[\(1, \d+\), \(1, \d+\)\]$", printed, re.MULTILINE)
    config = next(content for language, content in blocks(page) if language == "yaml")
    (tmp_path / "run.yaml").write_text(config)
    run = parse_run([str(tmp_path / "run.yaml")])
    options = run.task_options | {"files": str(tmp_path / "demand.csv")}
    assert len(load_task("series", **options).test) > 0


@pytest.mark.slow
def test_the_adapter_of_the_page_is_right_trains_and_serves_the_shell(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs/adapters.md"
    go_offline(monkeypatch, tmp_path / "cache")
    run_program(program(page, shell=False), tmp_path, monkeypatch)
    above, below, _ = page.read_text().partition("## Is it right?")
    assert below
    (tmp_path / "decay.py").write_text("\n".join(content for _, content in BLOCK.findall(above)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    # The program has registered the same classes in this process.
    for auto in (AutoConfig, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "register", partial(auto.register, exist_ok=True))
    shown = [words for language, content in blocks(page) if language == "bash" for words in commands(content)]
    for words in shown:
        assert words[0] == "hf-compressm"
        app(words[1:], standalone_mode=False)
    assert [words[1] for words in shown] == ["inspect", "compress", "report"]
    assert json.loads((tmp_path / "outputs/decay-small/config.json").read_text())["state_sizes"] == [4, 4]
    assert (tmp_path / "outputs/decay/report.html").exists() and "mixers.1" in capsys.readouterr().out


def test_the_settings_that_are_recommended_exist():
    for language, content in blocks(ROOT / "docs/choosing.md"):
        if language == "python":
            exec(content, {})


def messages_in_sources() -> list[str]:
    """Every text of the package that is not a docstring, with a NUL where a value is put in."""
    texts = []
    for path in sorted((ROOT / "hf_compressm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                texts.append(node.value)
    return texts


def occurs(quoted: str, texts: list[str]) -> bool:
    """Whether a message, with `...` for what varies, begins one of the texts."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("...")), re.DOTALL)
    return any(pattern.match(text) for text in texts)


def test_every_quoted_message_is_one_of_the_package():
    texts = messages_in_sources()
    quoted = [content.strip() for language, content in blocks(ROOT / "docs/troubleshooting.md") if language == "text"]
    assert len(quoted) >= 15 and len(set(quoted)) == len(quoted)
    assert [message for message in quoted if len(message.replace("...", "")) < 12] == []
    assert [message for message in quoted if not occurs(message, texts)] == []
    known = next(message for message in quoted if "compressed" in message)
    assert not occurs(known.replace("compressed", "squeezed"), texts)


STAND_INS = {"CONFIG": "configs/runs/digits_mimo_ssm.yaml", "TASK": "digits"}
SCRIPTS = {
    "scripts/pretrain.py": parse_run,
    "scripts/finetune.py": parse_finetune,
    "scripts/evaluate_model.py": parse_evaluation,
    "scripts/compress.py": lambda words: parsed_by_the_command(["compress", *words]),
}


def parsed_by_the_command(words: list[str]) -> None:
    name, *options = words
    typer.main.get_command(app).commands[name].make_context(name, options)


class ParsedError(Exception):
    """A benchmark's options were accepted; it need not run."""


def parsed_by_the_script(script: str, options: list[str], monkeypatch) -> None:
    accept = argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **named):
        accept(self, *arguments, **named)
        raise ParsedError

    with monkeypatch.context() as patch, pytest.raises(ParsedError):
        patch.syspath_prepend(str((ROOT / script).parent))
        patch.setattr("sys.argv", [script, *options])
        patch.setattr("argparse.ArgumentParser.parse_args", stop)
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check(words: list[str], monkeypatch) -> None:
    """Raise unless the program that is called takes these arguments, and the files of this repository exist."""
    while re.fullmatch(r"\w+=\S+", words[0]):
        words = words[1:]
    words = [STAND_INS.get(word.removesuffix(".yaml"), word) for word in words]
    missing = [word for word in words if word.startswith(("configs/", "scripts/")) and not (ROOT / word).exists()]
    assert not missing, f"{missing} of {words}"
    program, *rest = words
    if program in ("accelerate", "torchrun"):
        launcher = get_args_parser() if program == "torchrun" else launch_command_parser()
        given = launcher.parse_args(rest if program == "torchrun" else rest[1:])
        check([given.training_script, *given.training_script_args], monkeypatch)
    elif program == "python":
        check(rest, monkeypatch)
    elif program in SCRIPTS:
        try:
            SCRIPTS[program](rest)
        except SystemExit as stopped:  # it has printed what was asked for, such as --help
            assert stopped.code == 0
    elif program.startswith(("scripts/benchmarks/", "scripts/reproduce.py")):
        parsed_by_the_script(program, rest, monkeypatch)
    elif program == "hf-compressm":
        parsed_by_the_command(rest)
    elif program == "pip":
        extras = {extra for word in rest for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")}
        known = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)
        assert known and all(re.search(rf"^{extra} = ", known.group(1), re.M) for extra in extras), words
        assert rest[:3] == ["install", "-c", "constraints.txt"] and (ROOT / "constraints.txt").exists()
    else:
        assert words == ["pytest"], f"no check for {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(page):
        try:
            check(words, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


def test_a_wrong_option_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for wrong in (
        "python scripts/pretrain.py CONFIG --tow 0.1",
        "hf-compressm inspect MODEL --tow 0.1",
        "python scripts/benchmarks/resume.py --tow 1",
        "accelerate launch --tow scripts/pretrain.py CONFIG",
        "torchrun --nproc_per_node 2 scripts/evaluate_model.py MODEL --tow 1",
        "python scripts/no_such_script.py",
    ):
        with pytest.raises((Exception, SystemExit)):
            check(shlex.split(wrong), monkeypatch)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_first_page_leads_to_all_others():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in text] == []
