"""What decides whether `make test` compiles the shipped configurations again."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent / "compiled"


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """The module, looking at copies of the kernels and of the tests."""
    spec = importlib.util.spec_from_file_location("verified_copy", HERE / "verified.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("KERNELS", "HERE"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        copied = shutil.copytree(getattr(module, name), tmp_path / name, ignore=ignored)
        monkeypatch.setattr(module, name, Path(copied))
    monkeypatch.setattr(module, "RECORD", tmp_path / "verified.json")
    return module


def test_copies_elsewhere_are_the_same_sources(verified):
    spec = importlib.util.spec_from_file_location("verified_original", HERE / "verified.py")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    assert verified.fingerprint() == original.fingerprint()


def test_any_change_of_a_kernel_a_configuration_or_a_test_is_seen(verified):
    assert not verified.is_verified()
    verified.main()
    assert verified.is_verified()
    for path in (
        verified.KERNELS / "triton" / "segments.py",
        verified.KERNELS / "triton" / "configs" / "qk_norm_rope.json",
        verified.HERE / "conftest.py",
    ):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n")
        assert not verified.is_verified(), path
        path.write_bytes(whole)
        moved = path.rename(path.with_stem("other"))
        assert not verified.is_verified(), path
        moved.rename(path)
        assert verified.is_verified()


def test_another_version_of_triton_has_verified_nothing(verified, monkeypatch):
    verified.main()
    first = json.loads(verified.RECORD.read_text())
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    assert not verified.is_verified()
    verified.main()
    assert json.loads(verified.RECORD.read_text()) == first | {"9.9.9": verified.fingerprint()}
