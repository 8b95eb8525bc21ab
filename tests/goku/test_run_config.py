"""The run's config: presets, overrides, what a resume may change, and messages that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from goku.config import ConfigError, difference, dump, to_dict
from goku.model import PRESETS
from goku.run_config import (
    _ADDED,
    RunConfig,
    TrainConfig,
    _stands_for,
    load_run_config,
    model_differences,
    resume_differences,
)

BASE: dict[str, Any] = {
    "out": "runs/a",
    "data": {"path": "media"},
    "vae": {"path": "vae"},
    "text": {"tiny_dim": 32},
    "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
    "packing": {"tokens_per_step": 64, "tokens_per_pack": 32},
}


def _config(*overrides: str) -> RunConfig:
    return load_run_config(BASE, overrides)


def test_a_file_and_a_mapping_give_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(BASE))
    assert load_run_config(path) == load_run_config(str(path)) == _config()
    # What is written beside a checkpoint is read back as the same run.
    changed = _config("optimizer.betas=[0.8, 0.9]", "model.axes_dim=[4, 6, 6]", "data.fps=12")
    path.write_text(dump(changed))
    assert load_run_config(path) == changed != _config()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_the_model_and_its_fields_can_be_replaced(name: str) -> None:
    alone = {**BASE, "model": {"preset": name}}
    fitting = [f"vae.model.channels={PRESETS[name].latent_channels}", "text.path=t5"]
    assert load_run_config(alone, fitting).model == PRESETS[name]
    # By the file or by an override, which may come in any order.
    overrides = ["model.depth=3", f"model.preset={name}", "model.text_dim=77", *fitting]
    deeper = load_run_config(BASE | {"model": {}}, overrides).model
    assert to_dict(deeper) == to_dict(PRESETS[name]) | {"depth": 3, "text_dim": 77}
    assert alone["model"] == {"preset": name}  # the caller's mapping is not changed


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"model.preset: found 'goku-3b'.*goku-1b, goku-2b"):
        _config("model.preset=goku-3b")


def test_overrides_replace_what_the_file_says_and_later_ones_win() -> None:
    config = _config("optimizer.lr=3e-4", "train.steps=7", "train.steps=9", "out=runs/b")
    assert config.optimizer.lr == 3e-4
    assert config.train == TrainConfig(steps=9)
    assert config.out == "runs/b"
    assert _config("data.fps=12").data.fps == 12.0
    assert _config("data.fps=12", "data.fps=null").data.fps is None
    assert _config().vae.train is None
    assert _config("vae.train.steps=5").vae.train is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sed=1"], r"sed: found 1; unknown key.*did you mean seed\?"),
        (["tokens_per_pack=4"], r"did you mean packing.tokens_per_pack\?"),
        (["train.stpes=4"], r"train.stpes.*did you mean train.steps\?"),
        (["seed=-1"], r"seed is -1; allowed: 0 to 2\*\*64 - 1"),
        (["seed=18446744073709551616"], r"seed is 18446744073709551616; allowed"),
        (["seed=1.5"], r"seed: found 1.5; must be an integer"),
        (["seed=true"], r"seed: found True; must be an integer"),
        (["out=null"], r"out: found None; must be a string"),
        (["train.precision=half"], r"train.precision: found 'half'.*auto, float32, bfloat16"),
        (["train.device=tpu"], r"train.device: found 'tpu'.*auto, cpu, cuda"),
        (["train.log_every=0"], r"train.log_every is 0; allowed: >= 1"),
        (["train.keep_checkpoints=0"], r"train.keep_checkpoints is 0; allowed: >= 1"),
        (["train.checkpoint_every=-1"], r"train.checkpoint_every is -1; allowed: >= 0"),
        (["train.max_skipped_steps=-1"], r"train.max_skipped_steps is -1; allowed: >= 0"),
        (["vae.model.channels=8"], r"latent_channels is 16, but vae.model.channels is 8"),
        (["packing.tokens_per_pack=65"], r"tokens_per_pack=65 must not exceed tokens_per_step=64"),
        (["model.text_dim=64"], r"model.text_dim is 64, .*text.tiny_dim = 32.*text.path"),
        (["model.patch=[2,2,1]"], r"model.patch is \[2, 2, 1\]; allowed: \[1, 2, 2\]"),
        (["model.heads=3"], r"heads is 3: allowed are divisors of dim = 32"),
        (["optimizer.lr=0"], r"optimizer.lr is 0"),
        (["ema.decay=1"], r"ema.decay is 1"),
        (["flow.text_drop=2"], r"text_drop is 2"),
        (["model=8"], r"model: found 8; must be a section with dim, depth"),
        (["train"], r"section.key=value"),
    ],
)
def test_errors_name_the_key_the_value_and_what_is_allowed(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(*overrides)


@pytest.mark.parametrize("section", ["out", "data", "vae", "model", "packing"])
def test_what_has_no_default_must_be_given(section: str) -> None:
    rest = {name: value for name, value in BASE.items() if name != section}
    with pytest.raises(ConfigError, match=rf"^{section}: found nothing; must be"):
        load_run_config(rest)


# --- resume ---------------------------------------------------------------------------------------

FREE = [
    "validation.guidance=3.0",
    "kernels.backend=torch",
    "kernels.deterministic=false",
    "out=runs/b",
    "unseen=other",
    "data.path=moved/media",
    "data.workers=7",
    "data.read_ahead=0",
    "data.cache=cache",
    "data.verify=size",
    "data.max_lost=5",
    "data.skip_bad=true",
    "vae.path=moved/vae",
    "vae.train.steps=9",
    "text.path=t5",
    "packing.tokens_per_pack=64",
    "parallel.dp_replicate=2",
    "parallel.sp=2",
    "sharding.param_dtype=float32",
    "sharding.cpu_offload=true",
    "activation_checkpointing.mode=full",
    "train.steps=9999",
    "train.device=cpu",
    "train.log_every=3",
    "train.eval_every=3",
    "train.eval_items=3",
    "train.eval_times=3",
    "train.sample_every=3",
    "train.sample_captions=3",
    "train.sample_steps=3",
    "train.checkpoint_every=3",
    "train.checkpoint_mode=sync",
    "train.keep_checkpoints=3",
    "train.keep_checkpoints_every=3",
    "train.max_skipped_steps=3",
    "train.tensorboard=true",
]
BOUND = [
    "seed=1",
    "data.image_pixels=1024",
    "data.video_pixels=1024",
    "data.max_frames=5",
    "data.fps=12",
    "data.upscale=true",
    "data.max_seconds=3.0",
    "data.min_image_pixels=100",
    "data.min_video_pixels=100",
    "data.min_frames=5",
    "data.motion_caption='{caption} {motion}'",
    "data.follow_links=true",
    "data.max_source_pixels=100",
    "vae.model.width=8",
    "text.max_tokens=5",
    "text.tiny_seed=5",
    "model.depth=3",
    "model.qk_norm=head",
    "model.condition=frames",
    "conditioning.first=2.0",
    "conditioning.last=0.5",
    "conditioning.both=0.5",
    "conditioning.drop=0.5",
    "conditioning.drop_both=0.5",
    "flow.text_drop=0.2",
    "flow.shift=3.0",
    "packing.tokens_per_step=128",
    "packing.overlong=cut",
    "optimizer.lr=1.0",
    "optimizer.betas=[0.9, 0.99]",
    "optimizer.schedule=cosine",
    "optimizer.schedule_offset=5",
    "ema.decay=0.5",
    "train.precision=float32",
]


@pytest.mark.parametrize("override", FREE)
def test_free_on_resume(override: str) -> None:
    before, after = _config(), _config(override)
    # Something did change, in both directions, and neither is held against the run.
    assert difference(to_dict(before), to_dict(after))
    assert resume_differences(to_dict(before), after) == []
    assert resume_differences(to_dict(after), before) == []


@pytest.mark.parametrize("override", BOUND)
def test_bound_on_resume(override: str) -> None:
    framed = ["model.condition=frames"] if override.startswith("conditioning.") else []
    before, after = _config(*framed), _config(*framed, override)
    key = override.split("=")[0]
    for saved, current in ((before, after), (after, before)):
        (line,) = resume_differences(to_dict(saved), current)
        assert line in difference(to_dict(saved), to_dict(current))
        assert line.startswith(f"{key}: ")


def test_which_frames_are_given_is_free_where_a_model_takes_none() -> None:
    before, after = _config(), _config("conditioning.drop=0.5", "conditioning.both=1.0")
    assert resume_differences(to_dict(before), after) == []
    (line,) = resume_differences(to_dict(after), _config("model.condition=frames"))[:1]
    assert line == "model.condition: none -> frames"


def test_every_key_is_free_or_bound() -> None:
    """Each section of a run is in one of the two lists above; a new one needs its place."""
    sections = {override.split("=")[0].split(".")[0] for override in FREE + BOUND}
    assert sections == set(to_dict(_config()))
    train = {override.split("=")[0] for override in FREE + BOUND if override.startswith("train.")}
    assert train == {f"train.{name}" for name in to_dict(TrainConfig())}
    data = {override.split("=")[0] for override in FREE + BOUND if override.startswith("data.")}
    # Sources and their mix stand in the place of data.path: their test is the next one.
    apart = {"data.sources", "data.mix"}
    assert data | apart == {f"data.{name}" for name in to_dict(_config().data)}


def test_of_several_sources_only_the_folders_may_change() -> None:
    data = {
        "sources": {"a": {"path": "media"}, "b": {"path": "clips"}},
        "mix": {"a": {"image": 1.0}, "b": {"video": 2.0}},
    }
    mixed = {**BASE, "data": data}
    saved = to_dict(load_run_config(mixed))

    def changed(*overrides: str) -> list[str]:
        return resume_differences(saved, load_run_config(mixed, overrides))

    assert changed("data.sources.a.path=moved") == []
    assert changed("data.sources.b.form=lists") == ["data.sources.b.form: auto -> lists"]
    assert changed("data.mix.b.video=1.0") == ["data.mix.b.video: 2.0 -> 1.0"]
    assert [line.split(":")[0] for line in changed("data.mix=null")] == [
        "data.mix",
        *(f"data.mix.{name}.{kind}" for name in "ab" for kind in ("image", "video")),
    ]
    # One dataset is not several: what has no counterpart is said key by key.
    lines = resume_differences(to_dict(_config()), load_run_config(mixed))
    assert "data.sources: null -> (absent)" in lines


def test_free_names_are_whole_keys() -> None:
    """ "out" frees neither "outer" nor anything that merely begins with it."""
    saved = to_dict(_config()) | {"outer": 1, "training": {"x": 1}}
    assert resume_differences(saved, _config()) == [
        "outer: 1 -> (absent)",
        "training.x: 1 -> (absent)",
    ]


def test_the_length_of_a_run_is_bound_under_a_schedule_that_uses_it() -> None:
    cosine = "optimizer.schedule=cosine"
    saved = to_dict(_config(cosine, "train.steps=10"))
    assert resume_differences(saved, _config(cosine, "train.steps=10", "out=b")) == []
    (line,) = resume_differences(saved, _config(cosine, "train.steps=20"))
    assert line.startswith("train.steps: 10 -> 20")
    assert "cosine" in line
    # From constant to cosine both the schedule and the length are said.
    saved = to_dict(_config("train.steps=10"))
    lines = resume_differences(saved, _config(cosine, "train.steps=20"))
    assert [line.split(":")[0] for line in lines] == ["optimizer.schedule", "train.steps"]


def test_several_differences_are_all_said() -> None:
    lines = resume_differences(
        to_dict(_config()), _config("seed=4", "model.depth=3", "out=b", "train.precision=bfloat16")
    )
    assert lines == ["seed: 0 -> 4", "model.depth: 2 -> 3", "train.precision: auto -> bfloat16"]


def test_a_checkpoint_that_lacks_a_key_is_told() -> None:
    saved = to_dict(_config())
    del saved["model"]["qk_norm"]
    assert resume_differences(saved, _config()) == ["model.qk_norm: (absent) -> full"]
    del saved["train"]
    assert resume_differences(saved, _config())[1:] == ["train.precision: (absent) -> auto"]


def test_a_checkpoint_from_before_a_key_came_means_its_old_behaviour() -> None:
    """For every key of the table: absent is its old meaning, which resumes, and nothing else does."""
    assert _ADDED
    # The one whose default is not what runs did before.
    old_runs = _config("conditioning.drop_both=0")
    for key, old in _ADDED.items():
        saved = to_dict(old_runs)
        *sections, name = key.split(".")
        place = saved
        for section in sections:
            place = place[section]
        found = place.pop(name)
        if key == "conditioning":
            assert found.pop("drop_both") == 0
        assert found == old, key
        before = dump(saved)
        assert resume_differences(saved, old_runs) == []
        assert dump(saved) == before  # what was read from a checkpoint is not changed
    saved = to_dict(_config())
    del saved["optimizer"]["schedule_offset"]
    (line,) = resume_differences(saved, _config("optimizer.schedule_offset=7"))
    assert line == "optimizer.schedule_offset: 0 -> 7"


def test_a_checkpoint_from_before_drop_both_resumes_without_it_alone() -> None:
    framed = "model.condition=frames"
    saved = to_dict(_config(framed))
    del saved["conditioning"]["drop_both"]
    assert resume_differences(saved, _config(framed, "conditioning.drop_both=0")) == []
    (line,) = resume_differences(saved, _config(framed))
    assert line == "conditioning.drop_both: 0.0 -> 0.05"
    # A model that takes no frames never drew it.
    saved["model"]["condition"] = "none"
    assert resume_differences(saved, _config()) == []


def test_a_checkpoint_from_before_image_to_video_resumes_without_it_alone() -> None:
    saved = to_dict(_config())
    del saved["model"]["condition"], saved["conditioning"]
    assert resume_differences(saved, _config()) == []
    assert resume_differences(saved, _config("model.condition=frames", "conditioning.drop=0")) == [
        "model.condition: none -> frames",
        "conditioning.drop: 0.1 -> 0.0",
        "conditioning.drop_both: 0.0 -> 0.05",
    ]
    assert model_differences(saved, _config("model.condition=frames")) == []
    # The other way the weights would not fit.
    given = to_dict(_config("model.condition=frames"))
    assert model_differences(given, _config()) == ["model.condition: frames -> none"]


def test_a_run_of_before_there_were_recipes_resumes() -> None:
    """The config as a checkpoint of then holds it, written by the code of then (commit d2a004e)."""
    saved = json.loads(Path(__file__).with_name("config_before_recipes.json").read_text())
    assert "conditioning" not in saved
    assert resume_differences(saved, _config()) == []
    assert resume_differences(saved, _config("model.depth=3")) == ["model.depth: 2 -> 3"]


def test_free_names_match_part_by_part() -> None:
    assert _stands_for("data.sources.*.path", "data.sources.clips.path")
    assert _stands_for("train", "train.steps")
    assert not _stands_for("data.sources.*.path", "data.sources.clips.form")
    assert not _stands_for("data.sources.*.path", "data.sources.clips")
    assert not _stands_for("data.sources.*.path", "data.sources.path")
    assert not _stands_for("train", "training.steps")


@pytest.mark.parametrize("key", ["image_pixels", "video_pixels"])
def test_pixels_may_be_written_as_a_size(key: str) -> None:
    assert getattr(_config(f"data.{key}=288x512").data, key) == 288 * 512
    assert getattr(_config(f"data.{key}=16x16").data, key) == 256
    for wrong in ("288x", "x512", "288x512x3", "288 x 512", "-16x16", "288X512"):
        with pytest.raises(ConfigError, match=rf"data.{key}: found .*must be an integer"):
            _config(f"data.{key}='{wrong}'")
    with pytest.raises(ConfigError, match=rf"{key}: 64 is less than 256"):
        _config(f"data.{key}=8x8")


def test_what_keeps_weights_from_starting_another_run() -> None:
    saved = to_dict(_config())
    assert model_differences(saved, _config("optimizer.lr=1.0", "seed=3")) == []
    assert model_differences(saved, _config("model.depth=3", "model.qk_norm=head")) == [
        "model.depth: 2 -> 3",
        "model.qk_norm: full -> head",
    ]
