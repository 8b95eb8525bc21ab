"""What a run prepares before its first step: datasets listed, held-out ones that may be empty, what is set aside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku import config as parser
from goku.data import DataError
from goku.parallelize import ParallelContext
from goku.prepare import check_sources, prepare_datasets, prepare_vae
from goku.run_config import RunConfig, load_run_config
from goku.vae import GokuVAE, VAEConfig

ALONE = ParallelContext(0, 1, torch.device("cpu"), None)
TINY_VAE = {"stem_width": 8, "width": 8, "encoder_depth": 1, "decoder_depth": 1}


def pictures(folder: Path, sizes: list[int], seed: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    GokuVAE(VAEConfig(**TINY_VAE), seed=3).save(folder)
    return folder


@pytest.fixture
def tree(tmp_path: Path, vae: Path) -> dict[str, Any]:
    """A run on two pictures, of which two others are held out."""
    return {
        "out": str(tmp_path / "run"),
        "unseen": str(pictures(tmp_path / "unseen", [32, 48], 1)),
        "data": {
            "path": str(pictures(tmp_path / "media", [32, 64], 0)),
            "image_pixels": 1024,
            "video_pixels": 1024,
            "max_frames": 5,
            "workers": 0,
            "skip_bad": True,
        },
        "vae": {"path": str(vae), "model": TINY_VAE},
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
        "packing": {"tokens_per_step": 48, "tokens_per_pack": 24},
        "train": {"device": "cpu"},
    }


def loaded(tree: dict[str, Any], **data: Any) -> RunConfig:
    return load_run_config(tree | {"data": tree["data"] | data})


def test_a_bad_item_of_each_dataset_has_its_line(tree: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("media", "unseen"):
        (tmp_path / folder / "1.png").write_bytes(b"")
    run = loaded(tree)
    for _ in range(2):
        training, unseen, _ = prepare_datasets(run, ALONE, prepare_vae(run, ALONE))
        assert unseen is not None
        assert [len(training), len(unseen)] == [1, 1]
        rows = map(json.loads, (tmp_path / "run/quarantine.jsonl").read_text().splitlines())
        assert [(row["source"], row["name"]) for row in rows] == [
            ("", "1.png"),
            ("unseen", "1.png"),
        ]


def test_an_item_too_large_is_named_where_others_are_left_out(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Before the VAE is trained, too: what cannot be decoded moves no name to another item."""
    (tmp_path / "media/0.png").write_bytes(b"")
    vae = tree["vae"] | {"path": str(tmp_path / "new"), "train": {"steps": 1}}
    packing = {"tokens_per_step": 3, "tokens_per_pack": 3}
    run = load_run_config(tree | {"vae": vae, "packing": packing})
    with pytest.raises(ValueError, match=r"^1\.png: 1 x 2 x 2 = 4 tokens"):
        prepare_vae(run, ALONE)


def test_a_vae_is_trained_on_what_the_limits_leave(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture of one token is too small for two processes, but the run takes none of that size."""
    folder = pictures(tmp_path / "small", [16, 32, 48], 2)
    vae = tree["vae"] | {"path": str(tmp_path / "new"), "train": {"steps": 1}}
    data = tree["data"] | {"path": str(folder), "min_image_pixels": 1024}
    prepare_vae(load_run_config(tree | {"vae": vae, "data": data, "parallel": {"sp": 2}}), ALONE)
    assert "training the VAE on 2 items" in capsys.readouterr().err


def test_limits_may_leave_nothing_that_is_unseen(tree: dict[str, Any], capsys: Any) -> None:
    run = loaded(tree, min_image_pixels=64 * 64)
    training, unseen, _ = prepare_datasets(run, ALONE, prepare_vae(run, ALONE))
    assert [item.name for item in training.items] == ["1.png"]
    assert unseen is None
    assert f"unseen: nothing of {run.unseen} is left by the mix and the limits" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    # Where some are left, they are used; where all are bad, that is an error.
    run = loaded(tree, min_image_pixels=48 * 48)
    unseen = prepare_datasets(run, ALONE, prepare_vae(run, ALONE))[1]
    assert unseen is not None
    assert [item.name for item in unseen.items] == ["1.png"]
    for file in Path(str(run.unseen)).glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="2 of 2 items cannot be used"):
        prepare_datasets(loaded(tree), ALONE, prepare_vae(run, ALONE))


def test_sources_are_listed_before_anything_else(tree: dict[str, Any], tmp_path: Path) -> None:
    check_sources([loaded(tree), loaded(tree)], ALONE)
    assert not (tmp_path / "run").exists()
    media = str(tmp_path / "media")

    def refused(match: str, **data: Any) -> None:
        with pytest.raises(DataError, match=match):
            check_sources([loaded(tree), loaded(tree, **data)], ALONE)

    refused("nowhere: no such file", path=str(tmp_path / "nowhere"))
    several = {"path": None, "sources": {"a": {"path": media}, "b": {"path": media}}}
    mix = {"a": {"image": 1}, "b": {"image": 1, "video": 2}}
    refused(r"mix\.b\.video is 2, but .*media lists no video", **several, mix=mix)
    clips = {"a": {"video": 1}}
    refused("none of 2 items can be used: mix.a gives images no weight", **several, mix=clips)
    check_sources([loaded(tree, **several, mix={"b": {"image": 1}})], ALONE)
    (tmp_path / "media/0.txt").unlink()
    refused("1 of 2 items cannot be used", skip_bad=False)
    check_sources([loaded(tree)], ALONE)
    # Of a run that goes on in a stream, or has begun, the list of items decides; of held-out data there is none.
    gone = loaded(tree, path=str(tmp_path / "nowhere"))
    check_sources([gone], ALONE, carried=[gone])
    begun = load_run_config(
        tree | {"out": str(tmp_path / "begun"), "data": parser.to_dict(gone)["data"]}
    )
    (tmp_path / "begun/checkpoints/step_1").mkdir(parents=True)
    check_sources([begun], ALONE)
    shutil.rmtree(tmp_path / "unseen")
    for config, carried in ((gone, [gone]), (begun, [])):
        with pytest.raises(DataError, match="unseen: no such file or folder"):
            check_sources([config], ALONE, carried)
    with pytest.raises(DataError, match="unseen: no such file or folder"):
        check_sources([loaded(tree)], ALONE)
