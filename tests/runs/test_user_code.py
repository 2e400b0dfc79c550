"""Modules of the user's own, by path and by name."""

import sys

import pytest

from hf_compressm import cli
from hf_compressm.runs.user_code import import_user_module


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty present folder; what is imported from it is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_file_is_imported_once_with_what_stands_beside_it(folder):
    (folder / "code").mkdir()
    (folder / "code" / "my_layers.py").write_text("SIZE = 3")
    (folder / "code" / "my_model.py").write_text("import my_layers\ntimes = []\ntimes.append(my_layers.SIZE)")
    for _ in range(2):
        import_user_module("code/my_model.py")
    assert sys.modules["my_model"].times == [3]


def test_a_dotted_name_is_looked_for_in_the_present_folder(folder):
    (folder / "my_package").mkdir()
    (folder / "my_package" / "my_part.py").write_text("here = True")
    import_user_module("my_package.my_part")
    assert sys.modules["my_package.my_part"].here


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such.module", "there is no module no_such.module: give one that Python can import, or the path"),
        ("no_such.py", "there is no file .*no_such.py"),
        ("empty_folder", "empty_folder is a folder without an __init__.py"),
        ("json.py", "json.py has the name of another module, .*; rename the file"),
    ],
)
def test_what_is_not_there_is_told(folder, name, message):
    (folder / "json.py").write_text("")
    (folder / "empty_folder").mkdir()
    with pytest.raises(ValueError, match=message):
        import_user_module(name)


def test_what_the_module_lacks_is_not_taken_for_the_module(folder):
    (folder / "my_model.py").write_text("import not_installed")
    with pytest.raises(ValueError, match="my_model cannot be imported: ModuleNotFoundError: .*'not_installed'"):
        import_user_module("my_model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("x = undefined", "NameError: name 'undefined'"),
        ("\0", "SyntaxError"),
    ],
)
def test_what_fails_in_it_is_told(folder, text, message):
    (folder / "my_mistake.py").write_text(text)
    with pytest.raises(ValueError, match=f"my_mistake.py cannot be imported: {message}"):
        import_user_module("my_mistake.py")


@pytest.mark.parametrize("command", [["inspect", "model"], ["compress", "model", "--output", "out", "--tau", "0.1"]])
def test_the_commands_say_so(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--import", "no_such.py"])
    assert capsys.readouterr().err.startswith("error: there is no file")
