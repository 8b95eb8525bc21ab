from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

import goku.data.dataset
from goku.data import DataConfig, prepare
from goku.data.collector import collector_paused


def test_the_collector_works_again_afterwards() -> None:
    assert gc.isenabled()
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_dataset_is_put_together_without_it_and_encoded_with_it(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def watched(name: str) -> None:
        real = getattr(goku.data.dataset, name)

        def call(*arguments: Any, **how: Any) -> Any:
            seen[name] = gc.isenabled()
            return real(*arguments, **how)

        monkeypatch.setattr(goku.data.dataset, name, call)

    watched("sources_of")
    watched("dataset_of")
    encode = vae.encode

    def encoded(video: Any) -> Any:
        seen["encode"] = gc.isenabled()
        return encode(video)

    monkeypatch.setattr(vae, "encode", encoded)
    prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    assert seen == {"sources_of": False, "encode": True, "dataset_of": False}
    assert gc.isenabled()
