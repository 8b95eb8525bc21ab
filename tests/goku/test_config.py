"""goku.config: strict parsing, overrides, differences and a YAML that reads back exactly."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from goku.config import ConfigError, difference, dump, load, parse, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    dim: int
    depth: int = 2
    dropout: float = 0.0
    norm: Literal["full", "head"] = "full"
    axes_dim: tuple[int, int, int] = (16, 24, 24)

    def __post_init__(self) -> None:
        if self.dim % 8:
            raise ValueError(f"dim must be a multiple of 8, got {self.dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.99)
    fused: bool = False
    schedule: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    optimizer: Optimizer = Optimizer()
    ema: Optimizer | None = None
    name: str = "run"
    seed: int = 0
    cache: str | None = None
    limit: int | str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)


def build(text: str, tmp_path: Path, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse(Run, load(path, overrides))


def refusal(mapping: Any, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(Run, load(mapping, overrides))
    return caught.value


def test_sections_become_frozen_dataclasses(tmp_path: Path) -> None:
    run = build(
        "model: {dim: 64, axes_dim: [8, 8, 8]}\noptimizer:\n  lr: 1\ntags: [a, b]\n", tmp_path
    )
    assert run.model == Model(dim=64, axes_dim=(8, 8, 8))
    assert run.optimizer.lr == 1.0
    assert type(run.optimizer.lr) is float
    assert run.tags == ["a", "b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("3E8", 3e8), ("-2e+1", -20.0), ("1_0e2", 1000.0), (".5", 0.5), ("2.", 2.0),
     ("1.5e3", 1500.0), (".inf", math.inf), ("-.inf", -math.inf), ("7", 7.0)],
)  # fmt: skip
def test_numbers_people_write(tmp_path: Path, text: str, value: float) -> None:
    assert build(f"model: {{dim: 8}}\noptimizer: {{lr: {text}}}", tmp_path).optimizer.lr == value
    by_override = load({"model": {"dim": 8}}, [f"optimizer.lr={text}"])
    assert parse(Run, by_override).optimizer.lr == value


def test_a_quoted_number_stays_a_string(tmp_path: Path) -> None:
    assert build("model: {dim: 8}\nname: '1e-4'", tmp_path).name == "1e-4"


@pytest.mark.parametrize(
    ("mapping", "path", "words"),
    [
        ({"model": {"dmi": 64}}, "model.dmi", "did you mean model.dim?"),
        ({"model": {"dim": 8}, "optimiser": {}}, "optimiser", "did you mean optimizer?"),
        ({"model": {"dim": 8}, "axes_dim": 2}, "axes_dim", "did you mean model.axes_dim?"),
        ({"model": {"dim": 8}, "betas": 2}, "betas", "did you mean optimizer.betas or ema.betas?"),
        ({"model": {"dim": 8}, "zzz": 2}, "zzz", "Known are model, optimizer, ema"),
        ({"model": {}}, "model.dim", "found nothing; must be an integer"),
        ({}, "model", "must be a section with dim, depth"),
        ({"model": 3}, "model", "found 3; must be a section"),
        ({"model": {"dim": 8.0}}, "model.dim", "found 8.0; must be an integer"),
        ({"model": {"dim": True}}, "model.dim", "found True; must be an integer"),
        ({"model": {"dim": "8"}}, "model.dim", "found '8'; must be an integer"),
        ({"model": {"dim": None}}, "model.dim", "found None; must be an integer"),
        ({"model": {"dim": 8, "dropout": False}}, "model.dropout", "must be a number"),
        ({"model": {"dim": 8, "norm": "layer"}}, "model.norm", "must be one of full, head"),
        ({"model": {"dim": 8, "axes_dim": [1, 2]}}, "model.axes_dim", "must be a list of 3"),
        ({"model": {"dim": 8, "axes_dim": [1, 2, "x"]}}, "model.axes_dim[2]", "found 'x'"),
        ({"model": {"dim": 8, "axes_dim": "abc"}}, "model.axes_dim", "must be a list of 3"),
        ({"model": {"dim": 8}, "optimizer": {"fused": 1}}, "optimizer.fused", "true or false"),
        ({"model": {"dim": 8}, "optimizer": {"betas": [0.9, None]}}, "optimizer.betas[1]", "None"),
        ({"model": {"dim": 8}, "optimizer": {"schedule": {"a": "b"}}}, "optimizer.schedule.a",
         "must be a number"),
        ({"model": {"dim": 8}, "ema": {"lrr": 1}}, "ema.lrr", "did you mean ema.lr?"),
        ({"model": {"dim": 8}, "limit": 1.5}, "limit", "must be an integer or a string or null"),
        ({"model": {"dim": 8}, "name": 3}, "name", "must be a string"),
        ({"model": {"dim": 12}}, "model", "dim must be a multiple of 8, got 12"),
        ({True: 1}, "True", "quote yes, no, on and off"),
        ({"model.dim": 8}, "model.dim", "without dots"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(mapping: Any, path: str, words: str) -> None:
    error = refusal(mapping)
    assert error.path == path
    assert str(error).startswith(f"{path}: ")
    assert words in str(error)


def test_union_keeps_the_type_that_was_written() -> None:
    assert parse(Run, {"model": {"dim": 8}, "limit": 4}).limit == 4
    assert parse(Run, {"model": {"dim": 8}, "limit": "4"}).limit == "4"
    assert parse(Run, {"model": {"dim": 8}, "limit": None}).limit is None


def test_a_field_type_that_cannot_be_read_is_a_programming_error() -> None:
    Odd = dataclasses.make_dataclass("Odd", [("x", set)])
    with pytest.raises(TypeError, match="x: a configuration field cannot have the type"):
        parse(Odd, {"x": 1})
    with pytest.raises(TypeError, match="not a dataclass"):
        parse(dict, {})


def test_overrides() -> None:
    source = {"model": {"dim": 8, "depth": 1}, "cache": "/tmp/x"}
    tree = load(
        source,
        ["model.depth=4", "cache=null", "model.axes_dim=[1, 2, 3]", "optimizer.fused=true",
         "ema.lr=1e-2", "name=a=b", "limit='07'", "model.depth=5", "optimizer.schedule={warm: 1}"],
    )  # fmt: skip
    assert source == {"model": {"dim": 8, "depth": 1}, "cache": "/tmp/x"}, "the source is unchanged"
    run = parse(Run, tree)
    assert (run.model.depth, run.cache, run.model.axes_dim) == (5, None, (1, 2, 3))
    assert run.optimizer.fused is True
    assert run.optimizer.schedule == {"warm": 1.0}
    assert run.ema is not None
    assert run.ema.lr == 0.01
    assert (run.name, run.limit) == ("a=b", "07")


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("model.depth", "model.depth", "must read section.key=value"),
        ("model.depth=", "model.depth", "key=null for none"),
        ("=3", "", "must read section.key=value"),
        ("model..depth=3", "model..depth", "must read"),
        ("model.dim.x=3", "model.dim", "is no section"),
        ("model.depth=[1,", "model.depth", "must be a YAML value"),
        ("model.depht=3", "model.depht", "did you mean model.depth?"),
        ("model.depth=3.5", "model.depth", "must be an integer"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, path: str, words: str) -> None:
    error = refusal({"model": {"dim": 8}}, override)
    assert error.path == path
    assert words in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {dim: 8}\nseed: 1\nseed: 2\n", "the key 'seed' stands twice, first in line 2"),
        ("model: {dim: 8, dim: 16}\n", "stands twice"),
        ("model: {dim: 8\n", "line"),
        ("- 1\n- 2\n", "must be a mapping of sections"),
        ("name: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
        ("? [a]\n: 1\n", "a key must be a plain name"),
        ("on: 1\n", "quote yes, no, on and off"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load(tmp_path / "empty.yaml", ["a.b=1"]) == {"a": {"b": 1}}
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="must be YAML"):
        load(tmp_path / "binary.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"none\.yaml: no such file .*; allowed: a YAML file$"
    ):
        load(tmp_path / "none.yaml")
    (tmp_path / "anchors.yaml").write_text("a: &x {lr: 1}\nb:\n  <<: *x\n  fused: true\n")
    assert load(tmp_path / "anchors.yaml")["b"] == {"lr": 1, "fused": True}


def test_the_safe_loader_of_others_is_left_alone() -> None:
    assert yaml.safe_load("1e-4") == "1e-4"


def test_difference_is_readable() -> None:
    saved = {"model": {"dim": 192, "axes": (1, 2), "gone": "x"}, "a": 1.0, "f": True, "n": math.nan}
    current = {"model": {"dim": 256, "axes": [1, 2], "new": None}, "a": 1, "f": 1, "n": math.nan}
    assert difference(saved, current) == [
        "model.dim: 192 -> 256",
        "model.new: (absent) -> null",
        "f: true -> 1",
        "model.gone: x -> (absent)",
    ]
    assert difference(saved, saved) == []
    assert difference({"a": {}}, {"a": {"b": 1}}) == ["a.b: (absent) -> 1", "a: {} -> (absent)"]
    assert difference({"a": [1, [2, True]]}, {"a": [1, [2, 1]]}) == [
        "a: [1, [2, true]] -> [1, [2, 1]]"
    ]


TEXT = st.text(max_size=12) | st.sampled_from(
    ["1e-4", "null", "yes", "~", "1:30", "- a", "2024-01-01", "a: b", "'", "\n x", "é", "=", "<<"]
)
FINITE = st.floats(allow_nan=False)
OPTIMIZERS = st.builds(
    Optimizer,
    lr=FINITE,
    betas=st.lists(FINITE, max_size=3).map(tuple),
    fused=st.booleans(),
    schedule=st.dictionaries(st.from_regex(r"\A[a-z_]{1,8}\Z"), FINITE, max_size=3),
)
RUNS = st.builds(
    Run,
    model=st.builds(Model, dim=st.integers(0, 1000).map(lambda n: 8 * n), dropout=FINITE,
                    norm=st.sampled_from(["full", "head"])),
    optimizer=OPTIMIZERS,
    ema=st.none() | OPTIMIZERS,
    name=TEXT,
    seed=st.integers(-(2**70), 2**70),
    cache=st.none() | TEXT,
    limit=st.none() | st.integers() | TEXT,
    tags=st.lists(TEXT, max_size=3),
)  # fmt: skip


@given(run=RUNS)
def test_dumped_yaml_reads_back_equal(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump(run), encoding="utf-8")
    again = parse(Run, load(path))
    assert again == run
    assert to_dict(again) == to_dict(run)
    assert difference(to_dict(run), to_dict(again)) == []
    assert all(isinstance(value, dict | list | str | int | float | None)
               for value in to_dict(run).values())  # fmt: skip


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", "\u2028", "x\u2029", "\ufeff", "é", " ", "1e-4"]
)
def test_characters_that_yaml_folds_come_back(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump({"name": text, "tags": [text]}), encoding="utf-8")
    assert load(path) == {"name": text, "tags": [text]}


def test_dump_takes_a_mapping_and_keeps_the_order() -> None:
    assert dump({"b": (1, 2), "a": {"lr": 1e-5}}) == "b:\n- 1\n- 2\na:\n  lr: 1.0e-05\n"


def test_to_dict_wants_an_instance() -> None:
    with pytest.raises(TypeError, match="not an instance of a dataclass"):
        to_dict(Run)
