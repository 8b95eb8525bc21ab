"""The recipe: what a stage resolves to, what it starts from, errors by their place in the file, the shipped recipes."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goku.conditioning import drop_rates
from goku.config import ConfigError, dump, load, to_dict
from goku.data import MixConfig, SourceConfig
from goku.dry_run import describe_recipe
from goku.model import PRESETS
from goku.recipe import CarryConfig, is_recipe, load_recipe, stage_seed
from goku.run_config import load_run_config

CONFIGS = Path(__file__).parents[2] / "configs"
BASE: dict[str, Any] = {
    "out": "runs/a",
    "seed": 7,
    "sources": {"stills": {"path": "media/a"}, "clips": {"path": "media/b", "form": "lists"}},
    "vae": {"path": "vae"},
    "text": {"tiny_dim": 32},
    "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
    "data": {"max_frames": 9},
    "flow": {"text_drop": 0.2},
    "packing": {"tokens_per_step": 64, "tokens_per_pack": 32},
    "stages": {
        "first": {"mix": {"stills": {"image": 1}}, "data": {"image_pixels": "64x32"}},
        "second": {
            "mix": {"clips": {"video": 2}, "stills": {"image": 1.5}},
            "data": {"image_pixels": 1024, "video_pixels": "32x64"},
            "flow": {"shift": 3.0},
            "carry": {"optimizer": True},
        },
        "third": {"from": "first", "model": {"condition": "frames"}},
    },
}


def _recipe(*overrides: str, **stages: Any) -> Any:
    tree = copy.deepcopy(BASE)
    tree["stages"] |= stages
    return load_recipe(tree, overrides)


def test_a_stage_is_its_keys_over_the_shared_ones() -> None:
    """Against the run written out by hand."""
    first, second, third = _recipe().stages
    shared = {key: BASE[key] for key in ("vae", "text", "packing")}
    assert second.config == load_run_config(
        {
            **shared,
            "out": "runs/a/stages/second",
            "seed": stage_seed(7, "second"),
            "model": BASE["model"],
            "data": {
                "max_frames": 9,
                "cache": "runs/a/cache",
                "image_pixels": 1024,
                "video_pixels": 2048,
                "sources": {
                    "clips": {"path": "media/b", "form": "lists"},
                    "stills": {"path": "media/a"},
                },
                "mix": {"clips": {"video": 2.0}, "stills": {"image": 1.5}},
            },
            "flow": {"text_drop": 0.2, "shift": 3.0},
        }
    )
    assert first.config.data.sources == {"stills": SourceConfig(path="media/a")}
    assert first.config.data.mix == {"stills": MixConfig(image=1.0)}
    assert first.config.data.image_pixels == 64 * 32
    # Without a mix: everything, as it comes.
    assert list(third.config.data.sources) == ["stills", "clips"]
    assert third.config.data.mix is None
    assert third.config.model == replace(first.config.model, condition="frames")
    assert [stage.index for stage in (first, second, third)] == [0, 1, 2]
    assert [stage.name for stage in (first, second, third)] == ["first", "second", "third"]


def test_a_stage_starts_from_the_one_before_unless_it_says_otherwise() -> None:
    starts = [stage.start for stage in _recipe().stages]
    assert starts == [None, "first", "first"]
    fourth = {"fourth": {}, "fresh": {"from": None}, "other": {"from": "/data/run"}}
    recipe = _recipe(**fourth)
    assert [stage.start for stage in recipe.stages[3:]] == ["third", None, "/data/run"]
    assert [s.starts_from_folder for s in recipe.stages] == [False] * 5 + [True]
    assert [s.carry for s in recipe.stages[1:3]] == [CarryConfig(optimizer=True), CarryConfig()]
    # Nothing carried is a fresh model, too.
    assert _recipe(anew={"carry": {"weights": "none"}}).stages[3].start is None


def test_seeds_differ_by_stage_and_depend_on_nothing_else() -> None:
    seeds = [stage.config.seed for stage in _recipe().stages]
    assert len(set(seeds)) == 3
    for stage in _recipe().stages:
        digest = hashlib.sha256(f"7:{stage.name}".encode()).hexdigest()
        assert stage.config.seed == int(digest[:16], 16)
    assert _recipe("seed=8").stages[0].config.seed not in seeds
    shorter = {**BASE, "stages": {"third": BASE["stages"]["third"] | {"from": None}}}
    assert load_recipe(shorter).stages[0].config.seed == seeds[2]
    # A carried stream is drawn with the seed that it was begun with.
    carried = _recipe(fourth={"from": "second", "carry": {"stream": True}})
    assert carried.stages[3].config.seed == seeds[1]


@given(st.integers(0, 2**64 - 1), st.text(min_size=1, max_size=8))
def test_a_stage_seed_is_a_seed(seed: int, name: str) -> None:
    assert 0 <= stage_seed(seed, name) < 2**64
    assert stage_seed(seed, name) == stage_seed(seed, name) != stage_seed(seed, name + "x")


def test_overrides_reach_stages_and_what_they_share() -> None:
    recipe = _recipe("stages.second.train.steps=5", "optimizer.lr=0.5", "seed=3", "out=elsewhere")
    assert [stage.config.train.steps for stage in recipe.stages] == [1000, 5, 1000]
    assert {stage.config.optimizer.lr for stage in recipe.stages} == {0.5}
    assert recipe.stages[1].config.out == "elsewhere/stages/second"
    assert recipe.stages[1].config.data.cache == "elsewhere/cache"
    assert _recipe("data.cache=kept").stages[1].config.data.cache == "kept"
    # What is written down beside the stages is read back as the same recipe.
    assert load_recipe(load_recipe(recipe.tree).tree).stages == recipe.stages


def test_what_covers_all_stages_for_a_vae() -> None:
    vae = _recipe(
        "stages.second.data.max_frames=13", "stages.second.packing.tokens_per_pack=64"
    ).vae
    assert (vae.out, vae.seed) == ("runs/a", 7)
    assert vae.data.max_frames == 13
    assert vae.packing.tokens_per_pack == 64
    assert vae.data.mix is None  # the third stage takes everything
    assert set(vae.data.sources) == {"stills", "clips"}
    assert (vae.data.image_pixels, vae.data.video_pixels) == (65536, 65536)  # as the third's
    tree = copy.deepcopy(BASE)
    del tree["stages"]["third"]
    vae = load_recipe(tree, ["stages.second.data.min_frames=5"]).vae
    assert vae.data.mix == {"stills": MixConfig(image=1.5), "clips": MixConfig(video=2.0)}
    assert (vae.data.image_pixels, vae.data.video_pixels) == (2048, 2048)
    assert vae.data.min_frames == 1


def test_what_any_stage_draws_the_vae_is_trained_on() -> None:
    """Also where a later stage draws less of it, or none."""
    tree = copy.deepcopy(BASE)
    del tree["stages"]["third"]
    vae = load_recipe(
        tree, ["stages.second.mix.stills.image=0", "stages.second.mix.stills.video=1"]
    ).vae
    assert vae.data.mix["stills"] == MixConfig(image=1.0, video=1.0)


def test_one_dataset_may_be_named_as_a_run_names_it() -> None:
    tree = copy.deepcopy(BASE) | {"data": {"path": "media"}, "stages": {"only": {}}}
    del tree["sources"]
    (stage,) = load_recipe(tree).stages
    assert stage.config.data.path == "media"
    assert stage.config.data.sources is None
    assert stage.config.data.mix is None


def test_unseen_may_be_a_source() -> None:
    held = {"path": "media/c"}
    tree = copy.deepcopy(BASE)
    tree["sources"]["held"] = held
    for stage in load_recipe(tree, ["unseen=held"]).stages:
        assert stage.config.unseen == "media/c"
        assert "held" not in stage.config.data.sources  # the third has no mix, and takes all others
    assert set(load_recipe(tree, ["unseen=held"]).stages[2].config.data.sources) == {
        "stills",
        "clips",
    }
    assert set(load_recipe(tree).stages[2].config.data.sources) == {"stills", "clips", "held"}
    assert _recipe("unseen=folder").stages[0].config.unseen == "folder"
    first, second, _ = load_recipe(tree, ["stages.second.unseen=held"]).stages
    assert (first.config.unseen, second.config.unseen) == (None, "media/c")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["unseen=stills"], r"stages\.first\.mix\.stills: .*`unseen` holds this source out"),
        (["unseen=clips"], r"^unseen: found 'clips'; .*a path alone, not form"),
        (["stages.third.unseen=clips"], r"^stages\.third\.unseen: .*a path alone, not form"),
        (
            ["stages.second.carry.schedule=true", "stages.second.optimizer.schedule=cosine"],
            r"^stages\.second\.carry\.schedule: found True; allowed: with optimizer.schedule: constant",
        ),
        (["optimizer.schedule_offset=5"], r"schedule_offset: found 5; carry\.schedule sets it"),
    ],
)
def test_what_is_held_out_or_set_by_the_recipe_is_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(copy.deepcopy(BASE), overrides)


def test_a_recipe_that_holds_its_only_source_out_has_nothing_to_train_on() -> None:
    tree = copy.deepcopy(BASE) | {"sources": {"all": {"path": "media"}}, "stages": {"only": {}}}
    with pytest.raises(ValueError, match=r"^unseen: found 'all'; is the only source"):
        load_recipe(tree, ["unseen=all"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.second.flow.shift=0"], r"^stages\.second\.flow: found .*shift"),
        (["stages.second.flow.shfit=1.0"], r"^stages\.second\.flow\.shfit: .*did you mean .*shift"),
        (["stages.second.flwo.shift=1"], r"^stages\.second\.flwo: .*did you mean flow\?"),
        (["stages.second.train.steps=many"], r"^stages\.second\.train\.steps: .*an integer"),
        (["stages.second.model.preset=huge"], r"^stages\.second\.model\.preset: .*goku-2b"),
        (["stages.second.out=x"], r"^stages\.second\.out: .*belongs to the whole recipe"),
        (["stages.second.seed=1"], r"^stages\.second\.seed: .*belongs to the whole recipe"),
        (["stages.second.vae.path=x"], r"^stages\.second\.vae: .*belongs to the whole recipe"),
        (["stages.second.text.tiny_dim=8"], r"^stages\.second\.text: .*belongs to the whole"),
        (["stages.second.from=third"], r"^stages\.second\.from: found 'third'; must be an earlier"),
        (["stages.third.from=frist"], r"^stages\.third\.from: .*did you mean first\?"),
        (["stages.first.from=second"], r"^stages\.first\.from: .*no stage stands before it"),
        (["stages.third.from=3"], r"^stages\.third\.from: .*must be a string or null"),
        (["stages.second.carry.weights=all"], r"^stages\.second\.carry\.weights: .*one of"),
        (["stages.second.carry.emma=true"], r"^stages\.second\.carry\.emma: .*did you mean .*ema"),
        (["stages.third.carry.weights=none"], r"^stages\.third\.carry\.weights: .*carries weights"),
        (["stages.first.carry.ema=true"], r"^stages\.first\.carry: .*nothing to carry"),
        (["stages.second.from=null"], r"^stages\.second\.carry: .*nothing to carry"),
        (
            ["stages.second.from=/a/run", "stages.second.carry.stream=true"],
            r"^stages\.second\.carry\.stream: .*whose seed is known; not /a/run",
        ),
        (["stages.second.mix.stils.image=1"], r"^stages\.second\.mix\.stils: .*mean stills\?"),
        (["stages.second.mix={}"], r"^stages\.second\.mix: .*must name a source"),
        (["stages.second.mix.stills.image=-1"], r"^stages\.second\.mix\.stills: .*at least 0"),
        (["stages.second.mix.stills.imgae=1"], r"^stages\.second\.mix\.stills\.imgae: .*image"),
        (["sources.stills.path=''"], r"^sources\.stills: .*names no dataset"),
        (["sources.stills.paht=x"], r"^sources\.stills\.paht: .*did you mean .*path"),
        (["data.path=media"], r"^data\.path: .*either `sources` or data\.path"),
        (["data.mix.stills.image=1"], r"^data\.mix: .*outside of `data`"),
        (
            ["stages.frist.train.steps=3"],
            r"^stages\.frist: .*none of this name; did you mean first\?",
        ),
        (["sources.stils.path=x"], r"^sources\.stils: .*none of this name; did you mean stills\?"),
        (["data.sources.x.path=1"], r"^data\.sources: .*outside of `data`"),
        (["optimizer.lr=0"], r"^optimizer: .*lr is 0.*\(in the stage first\)"),
        (["packing.tokens_per_pack=65"], r"^packing: .*\(in the stage first\)"),
        (["stgaes.first.x=1"], r"^stgaes: .*unknown key of a recipe; did you mean stages\?"),
        (["stages=null"], r"^stages: .*one stage at least"),
        (["stages={}"], r"^stages: .*one stage at least"),
        (["stages.first=3"], r"^stages\.first: found 3; must be a section"),
        (["stages={'../x': {}}"], r"a name without dots"),
        (["stages={'a b': {}}"], r"^stages\.a b: .*letters, digits"),
        (["seed=-1"], r"^seed: found -1; allowed: 0 to"),
        (["seed=true"], r"^seed: found True; must be an integer"),
        (["out=null"], r"^out: found None; must be a string"),
        (["stages.first.train.device=cuda"], r"^train\.device: .*one kind of device"),
    ],
)
def test_errors_name_the_key_as_it_stands_in_the_file(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _recipe(*overrides)


def test_a_mix_without_sources_and_a_stage_that_is_none() -> None:
    tree = copy.deepcopy(BASE) | {"data": {"path": "media"}}
    del tree["sources"]
    with pytest.raises(ConfigError, match=r"stages\.first\.mix: .*no `sources` to draw from"):
        load_recipe(tree)
    assert _recipe().stage("second").name == "second"
    with pytest.raises(
        ValueError, match=r"stage is 'secnd'; did you mean second\? Known are first"
    ):
        _recipe().stage("secnd")


def test_what_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump(BASE))
    assert is_recipe(path)
    assert load_recipe(path).source == path
    assert load_recipe(path).stages == _recipe().stages
    path.write_text("out: x\n")
    assert not is_recipe(path)
    path.write_text("stages: [\n")  # no YAML: reading it as a run says so
    assert not is_recipe(path)
    assert not is_recipe(tmp_path / "absent.yaml")
    assert not is_recipe(tmp_path)


# ---- the shipped recipes

# The paper, its authors' code, derived from these, or ours with its source.
_MARK = re.compile(r"#.*(\[P\]|\[C\]|\[D\]|ours: .{4,})")


def _leaf_lines(path: Path) -> list[str]:
    """Every line of the file that gives a value."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    return [
        line
        for line in lines
        if not line.lstrip().startswith("#") and not line.split("#")[0].rstrip().endswith(":")
    ]


@pytest.mark.parametrize("name", ["goku-2b", "goku-8b"])
def test_every_value_says_whose_it_is(name: str) -> None:
    lines = _leaf_lines(CONFIGS / f"{name}.yaml")
    assert len(lines) > 80
    assert [line for line in lines if not _MARK.search(line)] == []
    # Nothing stands on a line that gives no value.
    count = sum(1 for _ in _leaves(load(CONFIGS / f"{name}.yaml")))
    assert len(lines) <= count <= len(lines) + 4


def _leaves(tree: dict[str, Any]) -> Any:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


@pytest.mark.parametrize(
    ("name", "sp"), [("goku-2b", [1, 1, 2, 8, 8, 8, 8]), ("goku-8b", [1, 2, 4, 8, 8, 8, 8])]
)
def test_the_papers_recipe(name: str, sp: list[int]) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    stages = {stage.name: stage for stage in recipe.stages}
    joint = ["joint-288", "joint-480", "joint-720"]
    assert list(stages) == ["t2i", *joint, "tune-t2i", "tune-t2v", "i2v"]
    starts = [stage.start for stage in recipe.stages]
    assert starts == [None, "t2i", "joint-288", "joint-480", "joint-720", "joint-720", "tune-t2v"]
    for stage in recipe.stages:
        data, packing = stage.config.data, stage.config.packing
        condition = "frames" if stage.name == "i2v" else "none"
        assert stage.config.model == replace(PRESETS[name], condition=condition)
        assert (data.fps, data.max_frames) == (24.0, 241)
        # The longest clip of the stage fits into a pack, and takes more than half of it.
        assert data.mix is not None
        draws = any(weights.video for weights in data.mix.values())
        pixels = data.video_pixels if draws else data.image_pixels
        longest = pixels // 256 * (61 if draws else 1)
        assert longest <= packing.tokens_per_pack
        if draws:
            assert packing.tokens_per_pack < 1.1 * longest
        assert packing.tokens_per_step >= packing.tokens_per_pack
    pixels = [(480 * 864, 480 * 864), (720 * 1280, 720 * 1280)]
    sizes = [stages[n].config.data for n in joint]
    assert [(d.image_pixels, d.video_pixels) for d in sizes] == [(288 * 512, 288 * 512), *pixels]
    assert [d.min_video_pixels for d in sizes] == [0, 480 * 864, 720 * 1280]
    assert [stage.config.parallel.sp for stage in recipe.stages] == sp
    assert stages["i2v"].config.train.steps == 10_000
    assert [stages[n].carry.optimizer for n in stages] == [False, False, True, True, *[False] * 3]


@pytest.mark.parametrize("name", ["goku-2b", "goku-8b"])
def test_image_to_video_drops_as_its_source(name: str) -> None:
    """Text, image and both in 5 % of the samples each; the other stages' text as before."""
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    config = recipe.stage("i2v").config
    rates = drop_rates(config.conditioning, config.flow.text_drop)
    assert rates == pytest.approx((0.05, 0.05, 0.05), abs=5e-5)
    drops = {s.config.flow.text_drop for s in recipe.stages if s.name != "i2v"}
    assert drops == {0.1}


def test_the_tiny_recipe_has_every_stage_of_the_papers() -> None:
    tiny, big = (load_recipe(CONFIGS / f"{name}.yaml") for name in ("tiny", "goku-2b"))
    assert [(s.name, s.start) for s in tiny.stages] == [(s.name, s.start) for s in big.stages]
    for ours, theirs in zip(tiny.stages, big.stages, strict=True):
        assert ours.config.model.condition == theirs.config.model.condition
        shifts = ours.config.flow.shift, theirs.config.flow.shift
        assert shifts[0] == shifts[1]


def test_the_dry_run_is_a_table_and_one_run() -> None:
    recipe = load_recipe(CONFIGS / "tiny.yaml", ["out=absent"])
    text = describe_recipe(recipe)
    table, run = text.split("\n\n# stage ", 1)
    head, *rows = (re.split(r" {2,}", line) for line in table.splitlines())
    assert head[:4] == ["stage", "from", "carry", "steps"]
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(by_name) == [stage.name for stage in recipe.stages]
    assert by_name["t2i"]["from"] == by_name["t2i"]["carry"] == "-"
    assert by_name["joint-480"]["carry"] == "model+ema+optimizer+schedule"
    assert by_name["joint-480"]["video pixels"] == f"{48 * 80:,}"
    assert by_name["i2v"]["steps"] == "300"
    assert by_name["i2v"]["image pixels"] == by_name["t2i"]["video pixels"] == "-"
    assert {row["status"] for row in by_name.values()} == {"fresh"}
    which = "the one of the largest packs; --stage NAME shows another"
    assert run.startswith(f"t2i, {which}\nout: absent/stages/t2i\n")
    assert "frames dropped" not in run
    chosen = describe_recipe(recipe, "i2v")
    shares = "text alone 8.55%, frames alone 8.55%, both 5.95%"
    assert f"{shares} of clips" in chosen
    assert shares in (CONFIGS / "tiny.yaml").read_text()  # its comment
    assert "# stage i2v\nout: absent/stages/i2v\n" in chosen
    body = chosen.split("# stage i2v\n")[1].split("\n\nparameters")[0]
    assert to_dict(load_run_config(load_text(body))) == to_dict(recipe.stage("i2v").config)
    with pytest.raises(ValueError, match="did you mean i2v"):
        describe_recipe(recipe, "i2w")


def load_text(text: str) -> dict[str, Any]:
    """YAML as the config reader reads it."""
    import yaml

    return yaml.safe_load(text)
