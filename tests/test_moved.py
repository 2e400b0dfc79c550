"""Old import paths still work, and say where the names are now."""

import importlib
import sys
import warnings

import pytest

from hf_compressm.moved import MODULES, NAMES


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_module_has_the_names_of_the_new_ones(old):
    with pytest.warns(DeprecationWarning, match=rf"hf_compressm\.{old} is now hf_compressm\.") as caught:
        sys.modules.pop(f"hf_compressm.{old}", None)
        module = importlib.import_module(f"hf_compressm.{old}")
    assert any(str(warning.filename).endswith(("__init__.py", "test_moved.py")) for warning in caught)
    for new in MODULES[old]:
        source = importlib.import_module(f"hf_compressm.{new}")
        public = getattr(source, "__all__", None) or [
            name for name, value in vars(source).items() if getattr(value, "__module__", "") == source.__name__
        ]
        assert all(getattr(module, name) is getattr(source, name) for name in public if not name.startswith("_"))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in sorted(NAMES) for name in NAMES[package]])
def test_a_name_that_has_left_a_package_is_found(package, name):
    module = importlib.import_module(f"hf_compressm.{package}")
    with pytest.warns(DeprecationWarning, match=rf"hf_compressm\.{package}\.{name} is now"):
        assert getattr(module, name) is not None


def test_what_did_not_move_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module("hf_compressm.surgery.adapters.lru")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_compressm.surgery.nothing")
