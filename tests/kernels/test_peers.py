"""detect_apex on folders laid out like NVIDIA's apex and like the unrelated package."""

import sys
import types
from pathlib import Path

import pytest

from goku_kernels.peers import Apex, detect_apex

RAISES = "raise AssertionError('imported')\n"  # detection must not run the package


def package(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(RAISES)


def distribution(folder: Path, version: str) -> None:
    info = folder / f"apex-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return tmp_path


def test_nvidia(site):
    package(site, "apex", "apex/normalization", "apex/multi_tensor_apply")
    (site / "amp_C.py").write_text(RAISES)
    distribution(site, "0.1")
    found = detect_apex()
    assert found == Apex("nvidia", "0.1", str(site / "apex"), ("amp_C",))
    assert str(found) == "NVIDIA apex 0.1 (amp_C)"
    assert "apex" not in sys.modules


def test_nvidia_without_compiled_modules(site):
    package(site, "apex", "apex/normalization", "apex/multi_tensor_apply")
    found = detect_apex()
    assert (found.kind, found.version, found.compiled) == ("nvidia", None, ())
    assert "without compiled modules" in str(found)


def test_the_package_of_the_index(site):
    package(site, "apex", "apex/models", "apex/views")
    distribution(site, "0.9.10.dev0")
    found = detect_apex()
    assert found == Apex("unrelated", "0.9.10.dev0", str(site / "apex"))
    assert "not NVIDIA's" in str(found)


def test_a_single_module_of_that_name(site):
    (site / "apex.py").write_text(RAISES)
    found = detect_apex()
    assert (found.kind, found.location) == ("unrelated", str(site / "apex.py"))


def test_absent(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    assert detect_apex() == Apex("absent")
    assert str(detect_apex()) == "apex is not installed"


def test_a_stub_without_a_spec_is_not_apex(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    assert detect_apex() == Apex("absent")
