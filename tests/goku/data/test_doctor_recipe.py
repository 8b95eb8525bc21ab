"""The doctor on recipes and runs, against what `prepare`, the trainer's packs and the files themselves say."""

from __future__ import annotations

import copy
import io
import json
import statistics
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku.batch import BatchBuilder
from goku.caching import cache_text
from goku.data import DataError, MixedDataset, prepare
from goku.data import survey as survey_module
from goku.data.stage_report import RecipeReport, StageReport
from goku.packing import efficiency, partition, sample_cost
from goku.parallelize import ParallelContext
from goku.recipe import Recipe, Stage, load_recipe
from goku.recipe_doctor import doctor_recipe
from goku.run_config import RunConfig, load_run_config
from goku.text import TextCache, load_text_encoder

HEADER = 1000  # bytes that a cached file may have beside its tensors


def picture(path: Path, seed: int, height: int, width: int, caption: str | None) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def media(
    tmp_path_factory: pytest.TempPathFactory,
    write_video: Callable[..., Path],
    gradient: Callable[[int, int, int], np.ndarray],
) -> Path:
    """Four datasets, one of each form, of stills and clips, sound and not."""
    root = tmp_path_factory.mktemp("doctor")
    for form in ("sidecars", "table", "lists", "tar", "loose", "held"):
        (root / form).mkdir()
    for n in range(6):
        picture(root / f"sidecars/still{n}.png", n, 32 + 16 * n, 64, f"still number {n}")
    (root / "sidecars/twin.png").write_bytes((root / "sidecars/still0.png").read_bytes())
    (root / "sidecars/twin.txt").write_text("still number 0")
    (root / "sidecars/other.png").write_bytes((root / "sidecars/still1.png").read_bytes())
    (root / "sidecars/other.txt").write_text("the same still, told otherwise")
    (root / "sidecars/empty<i>.png").touch()
    (root / "sidecars/empty<i>.txt").write_text("nothing")
    picture(root / "sidecars/untold.png", 90, 48, 48, None)
    picture(root / "sidecars/odd.png", 91, 49, 65, "of an odd size")
    for n, frames in enumerate((5, 9, 13, 21, 1)):
        write_video(root / f"table/clip{n}.mp4", gradient(frames, 48 + 16 * n, 96), fps=12)
    (root / "table/broken.mp4").write_text("no video")
    rows: list[dict[str, Any]]
    rows = [{"path": f"clip{n}.mp4", "text": f"clip number {n}"} for n in range(5)]
    rows += [{"path": "clip3.mp4", "text": "its second part", "start_frame": 8}]
    rows += [{"path": "broken.mp4", "text": "broken"}]
    (root / "table/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(3):
        picture(root / f"lists/{n}.png", 20 + n, 64, 48 + 16 * n, None)
    (root / "lists/images.txt").write_text("0.png\n1.png\n2.png\n")
    (root / "lists/prompts.txt").write_text("a\nb\nstill number 2\n")
    with tarfile.open(root / "tar/shard-0000.tar", "w") as tar:
        for n in range(3):
            picture(root / f"loose/{n}.png", 30 + n, 64, 64, None)
            content = (root / f"loose/{n}.png").read_bytes()
            for name, part in ((f"{n}.png", content), (f"{n}.txt", f"member {n}".encode())):
                header = tarfile.TarInfo(name)
                header.size = len(part)
                tar.addfile(header, io.BytesIO(part))
    picture(root / "held/a.png", 50, 64, 64, "held out")
    write_video(root / "held/b.mp4", gradient(17, 80, 80), fps=12)
    (root / "held/b.txt").write_text("held out and moving")
    return root


def tree(media: Path, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "seed": 3,
        "sources": {
            "stills": {"path": str(media / "sidecars")},
            "clips": {"path": str(media / "table")},
            "more": {"path": str(media / "lists")},
            "packed": {"path": str(media / "tar")},
        },
        "unseen": str(media / "held"),
        "vae": {"path": str(out / "vae"), "model": {"channels": 4}, "train": {}},
        "text": {"tiny_dim": 8, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 1, "heads": 2, "text_dim": 8, "latent_channels": 4},
        "data": {"skip_bad": True, "workers": 0, "max_frames": 9},
        "packing": {"tokens_per_step": 96, "tokens_per_pack": 60},
        "train": {"steps": 50},
        "stages": {
            "images": {
                "mix": {
                    "stills": {"image": 3}, "more": {"image": 1.5}, "packed": {"image": 1}
                },
                "data": {"image_pixels": "48x64", "min_image_pixels": 2100},
            },
            "joint": {
                "mix": {"stills": {"image": 1}, "clips": {"image": 0.5, "video": 2}},
                "data": {"image_pixels": "64x64", "video_pixels": "48x64", "min_frames": 1},
                "carry": {"optimizer": True},
            },
            "everything": {"data": {"image_pixels": "48x64", "video_pixels": "32x64"}},
            "long": {
                "mix": {"clips": {"video": 1}},
                "data": {
                    "video_pixels": "48x64", "max_frames": 21, "fps": 6.0, "min_frames": 3,
                    "min_video_pixels": 5000, "max_seconds": 1.2,
                },
            },
            "i2v": {
                "mix": {"clips": {"video": 1}},
                "data": {"video_pixels": "48x64"},
                "model": {"condition": "frames"},
                "conditioning": {"first": 0.5, "both": 0.5},
            },
        },
    }  # fmt: skip


@pytest.fixture
def recipe(media: Path, tmp_path: Path) -> Recipe:
    return load_recipe(tree(media, tmp_path / "run"))


def stage_of(report: RecipeReport, name: str) -> StageReport:
    return next(stage for stage in report.stages if stage.name == name)


def grown(folder: Path) -> tuple[int, int]:
    """(files, bytes) of the tensors below `folder`."""
    files = list(folder.rglob("*.safetensors"))
    return len(files), sum(file.stat().st_size for file in files)


def trained(config: RunConfig, dataset: Any, vae: Any, steps: int) -> dict[str, Any]:
    """What training would do, by plain loops over the dataset that `prepare` gave."""
    held = config.model.condition == "frames"
    builder = BatchBuilder(
        dataset, vae, config.flow, config.packing, config.seed, torch.device("cpu"),
        conditioning=config.conditioning if held else None,
    )  # fmt: skip
    stream, tokens = dataset.stream(config.seed), builder.tokens
    position = 0
    laid_out: list[tuple[int, int]] = []
    while len(laid_out) < steps or position < len(tokens):
        begin, total = position, 0
        while total + tokens[stream.item(position)] <= config.packing.tokens_per_step:
            total += tokens[stream.item(position)]
            position += 1
        laid_out.append((begin, position))
    # As the doctor: the steps of the first epoch and of train.steps.
    packs = []
    for begin, end in laid_out:
        lengths = [tokens[stream.item(p)] for p in range(begin, end)]
        costs = [sample_cost(n, config.model.dim, text_dim=config.model.text_dim) for n in lengths]
        packs.append((partition(lengths, costs, 1, config.packing.tokens_per_pack)[0], lengths))
    return {
        "tokens": tokens,
        "epoch": sum(begin < len(tokens) for begin, _ in laid_out),
        "samples": laid_out[steps - 1][1],
        "samples_per_step": position / len(laid_out),
        "packs_per_step": statistics.mean(len([p for p in plan if p]) for plan, _ in packs),
        "efficiency": statistics.mean(
            efficiency(plan, lengths, config.packing.tokens_per_pack) for plan, lengths in packs
        ),
        "drawn": [stream.item(p) for p in range(1024)],
    }


def test_every_stage_is_what_prepare_and_training_make_of_it(
    recipe: Recipe, vae: Any, tmp_path: Path
) -> None:
    report = doctor_recipe(recipe)
    assert not (tmp_path / "run").exists()  # nothing is written
    assert report.ok, report.to_text()
    cache = tmp_path / "cache"
    texts = TextCache(cache / "text", load_text_encoder(recipe.vae.text))
    before = Counter[str]()
    for stage, told in zip(recipe.stages, report.stages, strict=True):
        dataset = _prepared(stage.config, vae, texts, cache)
        _same_items(stage, told, report, dataset)
        _same_steps(stage.config, told, dataset, vae)
        before = _same_cache(told, cache, before)
    total = report.cache
    assert total.latent_files == before["latents files"]
    assert total.frame_files == before["frames files"]
    assert total.text_files == before["text files"]
    assert total.shared == 0
    assert sum(stage.cache.total - stage.cache.shared for stage in report.stages) == total.total


def _prepared(config: RunConfig, vae: Any, texts: TextCache, cache: Path) -> Any:
    """The stage's dataset, with the held-out one beside it in the cache."""
    from goku.prepare import unseen_data

    frames = config.conditioning.frames if config.model.condition == "frames" else ()
    held = unseen_data(config)
    assert held is not None
    prepare(held, vae, texts, cache_dir=cache, frames=frames)
    return prepare(config.data, vae, texts, cache_dir=cache, frames=frames)


def _same_items(stage: Stage, told: StageReport, report: RecipeReport, dataset: Any) -> None:
    made = dataset.report
    assert told.sums()["listed"] == made.listed
    assert told.used == made.used == len(dataset.items)
    modalities = Counter(item.modality for item in dataset.items)
    assert (told.sums()["images"], told.sums()["videos"]) == (
        modalities["image"],
        modalities["video"],
    )
    assert dict(told.sizes) == Counter(
        f"{i.modality} {i.frames} x {i.height} x {i.width}" for i in dataset.items
    )
    by_source = {source.name: source.images + source.videos for source in told.sources}
    assert by_source == dict.fromkeys(by_source, 0) | Counter(i.source for i in dataset.items)
    assert told.sums()["quarantined"] == len(made.problems)
    several = len(stage.config.data.sources or {}) > 1
    found = {
        (f"{row.source}:" * several + row.name, row.text, row.kind)
        for row in report.quarantined
        if stage.name in row.stages
    }
    assert found == {(p.name, p.reason, p.kind) for p in made.problems}
    assert told.quarantined == Counter(p.kind for p in made.problems)
    remarks = {
        (f"{row.source}:" * several + row.name, row.text)
        for row in report.remarks
        if stage.name in row.stages and row.source != "unseen"
    }
    assert remarks == {(remark.name, remark.text) for remark in made.remarks}
    dropped = Counter[str]()
    for entry in made.dropped:
        for row in told.dropped:
            own = entry.name.startswith(f"{row.source}:") or not several
            dropped[f"{row.source} {row.reason}"] += own and entry.reason.endswith(row.reason)
    assert dropped == {f"{row.source} {row.reason}": row.count for row in told.dropped}
    assert sum(row.count for row in told.dropped) == len(made.dropped) == told.sums()["dropped"]


def _same_steps(config: RunConfig, told: StageReport, dataset: Any, vae: Any) -> None:
    really = trained(config, dataset, vae, told.steps)
    assert told.tokens_in_all == sum(really["tokens"])
    assert told.tokens_per_sample["max"] == max(really["tokens"])
    packing = told.packing
    assert packing is not None
    assert packing.steps_per_epoch == really["epoch"]
    assert (told.samples, told.samples_counted) == (really["samples"], True)
    assert told.epochs == pytest.approx(really["samples"] / len(dataset.items))
    assert packing.samples_per_step == pytest.approx(really["samples_per_step"])
    assert packing.packs_per_step == pytest.approx(really["packs_per_step"])
    assert packing.efficiency == pytest.approx(really["efficiency"])
    if isinstance(dataset, MixedDataset) and dataset.config.mix:
        drawn = Counter(
            f"{dataset.items[i].source}/{dataset.items[i].modality}" for i in really["drawn"]
        )
        assert {group.name: group.drawn for group in told.groups} == drawn
        assert sum(group.asked for group in told.groups) == pytest.approx(1)
        for group in told.groups:
            assert abs(group.asked - group.drawn / 1024) < 1 / 1024
    else:
        assert told.groups == ()


def _same_cache(told: StageReport, cache: Path, before: Counter[str]) -> Counter[str]:
    """What the stage added to the real cache is what the doctor said it would."""
    now = Counter[str]()
    for kind in ("latents", "frames", "text"):
        now[f"{kind} files"], now[f"{kind} bytes"] = grown(cache / kind)
    added = sum(
        now[f"{kind} bytes"] - before[f"{kind} bytes"] for kind in ("latents", "frames", "text")
    )
    files = sum(
        now[f"{kind} files"] - before[f"{kind} files"] for kind in ("latents", "frames", "text")
    )
    new = told.cache.total - told.cache.shared
    assert new <= added <= new + HEADER * files
    assert (new == 0) == (files == 0)
    return now


def test_the_first_frame_of_a_vae_that_is_not_causal_is_cached_too(
    media: Path, vae: Any, tmp_path: Path
) -> None:
    written = tree(media, tmp_path / "run")
    written["stages"] = {"i2v": written["stages"]["i2v"]}
    (tmp_path / "run/vae").mkdir(parents=True)
    facts = {"_class_name": "AutoencoderKLHunyuanVideo"}
    (tmp_path / "run/vae/config.json").write_text(json.dumps(facts))
    recipe = load_recipe(written)
    told = doctor_recipe(recipe).stages[0]
    vae.causal = False
    cache = tmp_path / "cache"
    texts = TextCache(cache / "text", load_text_encoder(recipe.vae.text))
    _prepared(recipe.stages[0].config, vae, texts, cache)
    files, nbytes = grown(cache / "frames")
    assert told.cache.frame_files == files > 0
    assert told.cache.frames <= nbytes <= told.cache.frames + HEADER * files
    causal = doctor_recipe(load_recipe(written, [f"vae.path={tmp_path / 'none'}"])).stages[0]
    assert causal.cache.frame_files == files // 2


def looks(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Counts of whole decodings and of headers read, by path."""
    decoded, probed = Counter[str](), Counter[str]()
    for name, counter in (("decode_record", decoded), ("probe", probed)):
        original = getattr(survey_module, name)

        def counting(
            record: Any, config: Any, original: Any = original, counter: Any = counter
        ) -> Any:
            counter[f"{Path(record.path).name}@{record.start_frame}"] += 1
            return original(record, config)

        monkeypatch.setattr(survey_module, name, counting)
    return decoded, probed


def test_stages_do_not_decode_again(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four stages see the same frames of a clip; the one with other frames looks anew, at clips alone."""
    written = tree(media, tmp_path / "run")
    written["stages"]["long"]["mix"]["stills"] = {"image": 1}
    recipe = load_recipe(written)
    decoded, probed = looks(monkeypatch)
    seen: list[tuple[int, int]] = []
    doctor_recipe(recipe, progress=lambda done, total: seen.append((done, total)))
    assert probed == {}
    assert decoded["still0.png@0"] == 1
    assert decoded["clip3.mp4@0"] == decoded["clip3.mp4@8"] == 2
    assert decoded["0.png@0"] == 2  # of lists and of the archive, which are two files
    assert max(decoded.values()) == 2
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    # Every file that was decoded, the empty one, and the clip that is none, twice.
    assert len(seen) == decoded.total() + 1


def test_the_quick_look_reads_headers_alone(
    recipe: Recipe, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = doctor_recipe(recipe)
    decoded, probed = looks(monkeypatch)
    quick = doctor_recipe(recipe, quick=True)
    assert decoded == {}
    assert max(probed.values()) == 2
    assert quick.quick
    assert any("quick look" in note for note in quick.stages[0].notes)
    # Equal files are not compared: the twin counts as an item, everything else is the same.
    assert {row.kind for row in whole.quarantined} - {row.kind for row in quick.quarantined} == {
        "duplicate"
    }
    for one, other in zip(whole.stages, quick.stages, strict=True):
        twins = one.quarantined.get("duplicate", 0)
        assert other.used == one.used + twins
        assert [row for row in other.dropped if row.source != "stills"] == [
            row for row in one.dropped if row.source != "stills"
        ]


def test_one_stage_and_a_plain_run(recipe: Recipe) -> None:
    alone = doctor_recipe(recipe, stage="joint")
    assert [stage.name for stage in alone.stages] == ["joint"]
    whole = doctor_recipe(recipe)
    told = stage_of(whole, "joint")
    assert replace(alone.stages[0].cache, shared=0) == replace(told.cache, shared=0)
    assert replace(alone.stages[0], cache=told.cache) == told
    run = doctor_recipe(recipe.stage("joint").config)
    assert replace(run.stages[0], name="joint", start="images") == alone.stages[0]
    with pytest.raises(ValueError, match="joint"):
        doctor_recipe(recipe, stage="joynt")
    with pytest.raises(ValueError, match="a run has none"):
        doctor_recipe(recipe.stage("joint").config, stage="joint")
    with pytest.raises(ValueError, match="ranks is 0"):
        doctor_recipe(recipe, ranks=0)


def test_packs_are_those_of_so_many_ranks(recipe: Recipe) -> None:
    """sp processes share a pack; the others take packs of their own."""
    alone, four = (
        doctor_recipe(recipe, stage="joint"),
        doctor_recipe(recipe, stage="joint", ranks=4),
    )
    stage = recipe.stage("joint")
    shared = replace(stage.config, parallel=replace(stage.config.parallel, sp=2))
    pairs = doctor_recipe(shared, ranks=4)
    packings = [report.stages[0].packing for report in (alone, four, pairs)]
    assert [packing.ranks for packing in packings if packing] == [1, 4, 2]
    first, second, third = packings
    assert first
    assert second
    assert third
    assert second.packs_per_step > third.packs_per_step >= first.packs_per_step
    assert second.steps_per_epoch == first.steps_per_epoch
    refused = doctor_recipe(shared, ranks=3)
    assert any("does not divide the 3 processes" in r for r in refused.stages[0].reasons)


SHORT: dict[str, Any] = {"stills": {"image": 1}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"skip_bad": False}}, ["items cannot be used", "data.skip_bad: true goes on"]),
        ({"data": {"min_image_pixels": 10**6}}, ["nothing is left to train on", "min_image_pixels"]),
        ({"mix": {"packed": {"image": 1, "video": 1}}}, ["mix.packed.video is 1", "no video"]),
        ({"mix": {**SHORT, "more": {"image": 1e-5}}}, ["mix: more/image", "too little"]),
        (
            {
                "data": {"max_frames": 21}, "mix": {"clips": {"video": 1}}, "packing": {"tokens_per_pack": 40},
            },
            ["clip3.mp4: 6 x 3 x 3 = 54 tokens, over tokens_per_pack=40"],
        ),
        ({"parallel": {"sp": 9}}, ["parallel.sp = 9 or more"]),
        ({"mix": {"gone": {"image": 1}}}, ["gone: no such file or folder"]),
        (
            {
                "mix": {"clips": {"video": 1}},
                "data": {"max_frames": 21, "video_pixels": "48x64"},
                "packing": {"overlong": "cut", "tokens_per_pack": 40},
                "model": {"condition": "frames"},
                "conditioning": {"last": 1.0},
            },
            ["so that its last frame cannot be given"],
        ),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_train_says_why(
    media: Path, tmp_path: Path, vae: Any, text: Any, changes: dict[str, Any], words: list[str]
) -> None:
    """In the words of what would stop the training."""
    written = tree(media, tmp_path / "run")
    del written["unseen"]
    written["sources"]["gone"] = {"path": str(tmp_path / "gone")}
    own: dict[str, Any] = {"mix": copy.deepcopy(SHORT), **changes}
    own["data"] = {"image_pixels": "48x64", "video_pixels": "48x64", **own.get("data", {})}
    written["stages"] = {"good": {"mix": SHORT}, "bad": own}
    recipe = load_recipe(written)
    report = doctor_recipe(recipe)
    assert not report.ok
    assert stage_of(report, "good").ok
    told = stage_of(report, "bad")
    assert any(all(word in reason for word in words) for reason in told.reasons), told.reasons
    assert report.verdict == "1 of 2 stages cannot train: bad."
    assert "cannot train" in report.to_text()
    config = recipe.stage("bad").config

    def train() -> None:
        dataset = prepare(config.data, vae, text, cache_dir=tmp_path / "cache")
        dataset.stream(config.seed)
        condition = config.conditioning if config.model.condition == "frames" else None
        sharding: Any = type("Shards", (), {"size": config.parallel.sp})
        BatchBuilder(
            dataset, vae, config.flow, config.packing, 0, torch.device("cpu"),
            sharding=sharding, conditioning=condition,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"\w") as error:
        train()
    said = error.value.summary if isinstance(error.value, DataError) else str(error.value)
    assert any(said in reason for reason in told.reasons), (said, told.reasons)


def test_the_vae_the_text_encoder_and_the_held_out_data_count(media: Path, tmp_path: Path) -> None:
    written = tree(media, tmp_path / "run")
    written["stages"] = {"images": written["stages"]["images"]}
    assert doctor_recipe(load_recipe(written)).ok
    del written["vae"]["train"]
    (reason,) = doctor_recipe(load_recipe(written)).stages[0].reasons
    assert "run/vae, which holds no VAE" in reason
    written["vae"]["train"] = {}
    written["text"] = {"path": str(tmp_path / "flan")}
    for quick in (False, True):
        report = doctor_recipe(load_recipe(written), quick=quick)
        assert any("flan" in reason and "text" in reason for reason in report.stages[0].reasons)
        assert not report.cache.texts_measured
        # The longest captions have 14 characters, 4 a token, and the end's.
        assert report.cache.texts <= report.cache.text_files * (4 + 1) * 8 * 4
    written["text"] = {"tiny_dim": 8, "tiny_heads": 2}
    held = tmp_path / "held"
    held.mkdir()
    (held / "a.png").touch()
    (held / "a.txt").write_text("empty")
    written["unseen"] = str(held)
    report = doctor_recipe(load_recipe(written))
    assert report.stages[0].reasons == ("unseen: data.sources: 1 of 1 item cannot be used",)
    assert [(row.source, row.name) for row in report.quarantined if row.source == "unseen"] == [
        ("unseen", "a.png")
    ]
    # Nothing that the mix and the limits leave is no fault: training goes on without that loss.
    written["stages"]["images"]["mix"] = {"stills": {"image": 1}}
    for other, limits in ((media / "table", {}), (media / "held", {"min_image_pixels": 4097})):
        written["unseen"] = str(other)
        written["stages"]["images"]["data"] = {"image_pixels": "48x64", **limits}
        report = doctor_recipe(load_recipe(written))
        assert report.ok, report.to_text()
        assert any("no unseen loss" in note for note in report.stages[0].notes)
    written["unseen"] = str(tmp_path / "nowhere")
    report = doctor_recipe(load_recipe(written))
    (reason,) = report.stages[0].reasons
    assert reason.startswith(
        f"unseen: {tmp_path / 'nowhere'}: no such file or folder; allowed: a folder"
    )


def test_a_long_run_is_reckoned_from_its_mean_step(recipe: Recipe) -> None:
    stage = recipe.stage("joint").config
    told = {}
    for steps in (50, 10**6):
        config = replace(stage, train=replace(stage.train, steps=steps))
        told[steps] = doctor_recipe(config).stages[0]
    assert told[50].samples_counted
    assert not told[10**6].samples_counted
    assert (
        "take about"
        in doctor_recipe(replace(stage, train=replace(stage.train, steps=10**6))).to_text()
    )
    mean = told[50].samples / 50
    assert told[10**6].samples / 10**6 == pytest.approx(mean, rel=0.05)
    assert sum(group.passes * group.items for group in told[10**6].groups) == pytest.approx(
        told[10**6].samples
    )


def test_json_says_it_all(recipe: Recipe) -> None:
    report = doctor_recipe(recipe, path="recipe.yaml")
    content = json.loads(report.to_json())
    rest = ("ok", "quick", "stages", "quarantined", "remarks", "cache", "notes")
    assert set(content) == {"path", *rest}
    assert content["path"] == "recipe.yaml"
    stage = content["stages"][1]
    assert set(stage) == {
        "name", "ok", "listed", "images", "videos", "dropped", "quarantined", "start", "steps", "reasons", "notes",
        "sources", "unseen", "dropped_by_limit", "quarantined_by_kind", "sizes", "durations", "tokens", "seconds",
        "tokens_per_sample", "tokens_in_all", "packing", "samples", "samples_counted", "epochs", "groups", "cache",
    }  # fmt: skip
    told = report.stages[1]
    assert stage["dropped"] == told.sums()["dropped"]
    assert sum(row["count"] for row in stage["dropped_by_limit"]) == stage["dropped"]
    assert sum(stage["sizes"].values()) == sum(stage["tokens"].values()) == told.used
    assert sum(stage["durations"].values()) == stage["videos"]
    assert stage["cache"]["total"] == told.cache.total
    names = [row["name"] for row in content["quarantined"]]
    assert names == [row.name for row in report.quarantined]
    text = report.to_text()
    for row in report.quarantined:
        assert f"{row.name}: [{row.kind}] {row.text}" in text
    assert text.splitlines()[-1] == "Every stage can train."


def test_a_run_of_one_dataset_without_a_mix(
    media: Path, tmp_path: Path, vae: Any, text: Any
) -> None:
    written = tree(media, tmp_path / "run")
    for key in ("sources", "stages", "unseen"):
        del written[key]
    written["data"] |= {"path": str(media / "table"), "video_pixels": "48x64"}
    config = load_run_config(written)
    report = doctor_recipe(config)
    dataset = prepare(config.data, vae, text, cache_dir=tmp_path / "cache")
    (told,) = report.stages
    assert (told.name, told.groups, report.verdict) == ("run", (), "Ready for training.")
    assert told.used == len(dataset.items) == 6
    assert {row.name: row.text for row in report.quarantined} == {
        problem.name: problem.reason for problem in dataset.report.problems
    }
    _same_steps(config, told, dataset, vae)


def test_the_prompts_of_the_validation_are_counted(media: Path, tmp_path: Path) -> None:
    size, file = {"height": 32, "width": 32, "num_frames": 1}, tmp_path / "cases.json"
    cases = [size | {"caption": "a case"}, size | {"caption": "another", "negative": "ugly"}]
    file.write_text(json.dumps({"data": cases}))
    config = load_recipe(tree(media, tmp_path / "run")).stages[0].config
    without = doctor_recipe(config).cache
    drawn = replace(config, validation=replace(config.validation, file=str(file), every=5))
    with_cases = doctor_recipe(drawn).cache
    # As many files as `goku cache text` makes.
    alone = ParallelContext(0, 1, torch.device("cpu"), None)
    summary = cache_text(drawn, alone, load_text_encoder(config.text))
    assert with_cases.text_files == without.text_files + 3 == summary.made
    assert with_cases.texts <= summary.bytes <= with_cases.texts + HEADER * summary.made
