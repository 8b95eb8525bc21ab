"""What decides whether `make test` runs the tests of shipped configurations and of mutants again."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import triton

HERE = Path(__file__).parent
NAMES = ("shipped", "mutants")


def loaded():
    spec = importlib.util.spec_from_file_location("verified_here", HERE / "verified.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """The module, looking at copies of the kernels and of the tests."""
    module = loaded()
    shutil.copy(HERE.parent / "conftest.py", tmp_path)
    for name in ("KERNELS", "HERE"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        copied = shutil.copytree(getattr(module, name), tmp_path / name, ignore=ignored)
        monkeypatch.setattr(module, name, Path(copied))
    monkeypatch.setattr(module, "RECORD", tmp_path / "verified.json")
    return module


@pytest.mark.parametrize("name", NAMES)
def test_copies_elsewhere_are_the_same_sources(verified, name):
    assert verified.fingerprint(name) == loaded().fingerprint(name)


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("shipped", "compiled/conftest.py"),
        ("mutants", "interpreter/conftest.py"),
        ("mutants", "test_mutants.py"),
        ("mutants", "../conftest.py"),
    ],
)
def test_any_change_of_a_kernel_a_configuration_or_a_test_is_seen(verified, name, test):
    assert not verified.is_verified(name)
    verified.main(name)
    assert verified.is_verified(name)
    for path in (
        verified.KERNELS / "triton" / "segments.py",
        verified.KERNELS / "triton" / "configs" / "qk_norm_rope.json",
        verified.HERE / test,
    ):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n")
        assert not verified.is_verified(name), path
        path.write_bytes(whole)
        moved = path.rename(path.with_stem("other"))
        assert not verified.is_verified(name), path
        moved.rename(path)
        assert verified.is_verified(name)


def test_one_says_nothing_of_the_other(verified):
    verified.main("shipped")
    assert not verified.is_verified("mutants")
    verified.main("mutants")
    (verified.HERE / "test_mutants.py").write_text("")
    assert verified.is_verified("shipped")
    assert not verified.is_verified("mutants")


@pytest.mark.parametrize("name", NAMES)
def test_another_version_of_triton_has_verified_nothing(verified, monkeypatch, name):
    verified.main(name)
    first = json.loads(verified.RECORD.read_text())[name]
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    assert not verified.is_verified(name)
    verified.main(name)
    assert "triton 9.9.9" in verified.versions(name)
    assert json.loads(verified.RECORD.read_text()) == {
        name: first | {verified.versions(name): verified.fingerprint(name)}
    }


def test_mutants_depend_on_what_computes_them(verified, monkeypatch):
    for module in (torch, numpy):
        with monkeypatch.context() as patch:
            before = {name: verified.versions(name) for name in NAMES}
            patch.setattr(module, "__version__", "0.0.1")
            assert verified.versions("mutants") != before["mutants"]
            assert verified.versions("shipped") == before["shipped"]
