"""What was shown before, with these very sources and this very Triton, is for `make long`."""

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    spec = importlib.util.spec_from_file_location(
        "verified", Path(__file__).with_name("verified.py")
    )
    verified = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verified)
    for name in verified.TESTS:
        marked = [item for item in items if item.get_closest_marker(name) is not None]
        if marked and verified.is_verified(name):
            for item in marked:
                item.add_marker(pytest.mark.long)
