"""A whole recipe in one file: the stages of a training, in their order, each an ordinary run that starts from another.

A recipe is a run's YAML with `sources` (datasets by name) and `stages`. A stage is a mapping laid over the sections
that stand beside it, with three keys of its own: `from` (what it starts from), `carry` (what it takes from there) and
`mix` (how often it draws the images and videos of which sources). It resolves to a `RunConfig` whose folder is
OUT/stages/NAME, so that everything that is true of a run is true of a stage.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from goku import config as parser
from goku.data import DataConfig, MixConfig
from goku.run_config import RunConfig, resolve

__all__ = ["CarryConfig", "Recipe", "Stage", "draws", "is_recipe", "load_recipe", "stage_seed"]


@dataclass(frozen=True, kw_only=True)
class CarryConfig:
    """What a stage takes from the checkpoint that it starts from.

    weights: "model" (as they were trained), "ema" (the averaged ones) or "none" (a fresh model, as `from: null`);
    ema: the average and its count of updates (False: it begins at the weights); optimizer: AdamW's moments, with zeros
    for parameters that are new; schedule: the learning-rate schedule counts on from the earlier stage's steps, so that
    there is no second warm-up; stream: the position in the data and the seed (only with equal items and an equal mix).
    """

    weights: Literal["model", "ema", "none"] = "model"
    ema: bool = True
    optimizer: bool = False
    schedule: bool = False
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. config: its run; start: the name of an earlier stage, the folder of a run or of a checkpoint (a name
    with a "/"), or None for a fresh model; index: its place in the recipe, from 0."""

    name: str
    index: int
    config: RunConfig
    start: str | None
    carry: CarryConfig

    @property
    def starts_from_folder(self) -> bool:
        """Whether `start` is a folder rather than a stage."""
        return self.start is not None and "/" in self.start


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All stages in the order of training.

    out: the folder that holds OUT/stages/NAME; vae: a config that covers all stages (every source, the largest sizes),
    by which a VAE of the recipe's own is trained; tree: the recipe as written, overrides included; source: its file.
    """

    out: Path
    seed: int
    stages: tuple[Stage, ...]
    vae: RunConfig
    tree: Mapping[str, Any] = field(repr=False)
    source: Path | None = None

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises ValueError with the nearest names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"stage is {name!r}; {_nearest(name, [s.name for s in self.stages])}")


def is_recipe(path: str | Path) -> bool:
    """Whether the file is a recipe: YAML with the key `stages`. False for what cannot be read or is no YAML, whose
    error is that of reading it as a run."""
    try:
        return "stages" in parser.load(path)
    except (OSError, parser.ConfigError):
        return False


def stage_seed(seed: int, name: str) -> int:
    """The seed of a stage's run, 0 to 2**64 - 1: stages do not repeat each other's noise and order.

    It depends on the recipe's seed and the stage's name alone, so that a stage may be put before or removed.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe's YAML file (or mapping) with dotted overrides ("stages.i2v.train.steps=100").

    Raises ConfigError (a ValueError) that names the key as it stands in the file, such as stages.i2v.flow.shift, the
    value and what is allowed; OSError when the file cannot be read.
    """
    tree = parser.load(source, overrides)
    for key, value in tree.items():
        if key not in _KNOWN:
            hint = _nearest(key, _KNOWN)
            raise parser.ConfigError(key, value, f"unknown key of a recipe; {hint}")
    out, seed = _typed(tree, "out", str), _typed(tree, "seed", int, 0)
    if not 0 <= seed < 2**64:
        raise parser.ConfigError("seed", seed, "allowed: 0 to 2**64 - 1")
    written = _section(tree, "stages")
    if not written:
        raise parser.ConfigError("stages", written, "must have one stage at least")
    _check_no_more(source, overrides)
    shared = {key: value for key, value in tree.items() if key not in ("stages", "sources")}
    shared |= {"out": out, "seed": seed}
    data = _section(shared, "data")
    sources = _sources(tree, data)
    # All stages keep their latents and embeddings in one place, by content.
    shared["data"] = {"cache": str(Path(out) / "cache")} | data
    stages: list[Stage] = []
    for index, (name, value) in enumerate(written.items()):
        _check_name(name, value)
        stages.append(_stage(name, index, value, shared, sources, stages))
    devices = {stage.config.train.device for stage in stages}
    if len(devices) > 1:
        raise parser.ConfigError(
            "train.device", sorted(devices), "all stages run on one kind of device"
        )
    return Recipe(
        out=Path(out),
        seed=seed,
        stages=tuple(stages),
        vae=_covering(out, seed, stages),
        tree=tree,
        source=None if isinstance(source, Mapping) else Path(source),
    )


def _check_no_more(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Dotted overrides change stages and sources, and add none: a misspelt name would be one more, trained last."""
    if not overrides:
        return
    before = parser.load(source)
    for override in overrides:
        path, _, value = override.partition("=")
        section, *names = path.strip().split(".")
        if section not in ("stages", "sources") or not names:
            continue
        there = before.get(section)
        known = list(there) if isinstance(there, Mapping) else []
        if names[0] not in known:
            raise parser.ConfigError(
                f"{section}.{names[0]}",
                value,
                f"the file has none of this name; {_nearest(names[0], known)}",
            )


_STAGE_KEYS = ("from", "carry", "mix")
_SECTIONS = tuple(key.name for key in fields(RunConfig))
_KNOWN = (*_SECTIONS, "sources", "stages")
# One recipe has one VAE, one text encoder and one folder: latents, embeddings and weights of its stages fit together.
_SHARED = ("out", "seed", "vae", "text")


def _stage(
    name: str,
    index: int,
    written: Mapping[str, Any],
    shared: Mapping[str, Any],
    sources: Mapping[str, Any],
    earlier: Sequence[Stage],
) -> Stage:
    where = f"stages.{name}"
    for key, value in written.items():
        if key in _SHARED:
            raise parser.ConfigError(
                f"{where}.{key}", value, "belongs to the whole recipe: it stands beside `stages`"
            )
        if key not in _SECTIONS and key not in _STAGE_KEYS:
            known = [k for k in (*_SECTIONS, *_STAGE_KEYS) if k not in _SHARED]
            raise parser.ConfigError(
                f"{where}.{key}", value, f"unknown key of a stage; {_nearest(key, known)}"
            )
    carry = parser.parse(CarryConfig, _section(written, "carry", where), f"{where}.carry")
    start = _start(written, carry, where, earlier)
    own = {key: value for key, value in written.items() if key not in _STAGE_KEYS}
    run = _merged(shared, own)
    run["out"] = str(Path(shared["out"]) / "stages" / name)
    run["seed"] = stage_seed(shared["seed"], name)
    if carry.stream:
        run["seed"] = next(stage for stage in earlier if stage.name == start).config.seed
    held_out = _held_out(run, sources, f"{where}." if "unseen" in own else "")
    run["data"] = _section(run, "data", where) | _drawn(written, where, sources, held_out)
    if held_out is not None:
        run["unseen"] = sources[held_out]["path"]
    if "schedule_offset" in _section(run, "optimizer", where):
        error = parser.ConfigError(
            f"{where}.optimizer.schedule_offset",
            run["optimizer"]["schedule_offset"],
            "carry.schedule sets it; leave it out",
        )
        raise _placed(error, name, own)
    try:
        config = resolve(run, where)
    except parser.ConfigError as error:
        raise _placed(error, name, own) from error
    if carry.schedule and config.optimizer.schedule != "constant":
        raise parser.ConfigError(
            f"{where}.carry.schedule",
            True,
            f"allowed: with optimizer.schedule: constant; a {config.optimizer.schedule} ends with its stage",
        )
    return Stage(name=name, index=index, config=config, start=start, carry=carry)


def _check_name(name: str, value: Any) -> None:
    allowed = all(c.isalnum() or c in "-_" for c in name)
    if not (allowed and name.isascii() and name[0].isalnum()):
        raise parser.ConfigError(
            f"stages.{name}", name, "a stage's name is a folder: letters, digits, '-' and '_'"
        )
    if not isinstance(value, Mapping):
        raise parser.ConfigError(f"stages.{name}", value, "must be a section")


def _start(
    written: Mapping[str, Any], carry: CarryConfig, where: str, earlier: Sequence[Stage]
) -> str | None:
    """What the stage starts from: what `from` says, else the stage before it; None for a fresh model."""
    names = [stage.name for stage in earlier]
    start = written.get("from")
    if start is not None and not isinstance(start, str):
        raise parser.ConfigError(f"{where}.from", start, "must be a string or null")
    if start is not None and "/" not in start and start not in names:
        hint = _nearest(start, names) if names else "no stage stands before it"
        raise parser.ConfigError(
            f"{where}.from",
            start,
            f"must be an earlier stage, a folder (written with a '/') or null; {hint}",
        )
    if start is not None and carry.weights == "none":
        raise parser.ConfigError(
            f"{where}.carry.weights",
            "none",
            f"a stage `from` {start} carries weights: model or ema",
        )
    if "from" not in written and names and carry.weights != "none":
        start = names[-1]
    asked = [key for key, value in _section(written, "carry", where).items() if value is True]
    if start is None and (asked or (written.get("carry") and carry.weights != "none")):
        raise parser.ConfigError(
            f"{where}.carry",
            dict(written["carry"]),
            "there is nothing to carry: the stage starts fresh",
        )
    if start is not None and "/" in start and carry.stream:
        raise parser.ConfigError(
            f"{where}.carry.stream",
            True,
            f"allowed: from a stage, whose seed is known; not {start}",
        )
    return start


def _sources(tree: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's sources; empty where it names one dataset by data.path, as a run does."""
    sources = _section(tree, "sources")
    for key in ("sources", "mix"):
        if key in data:
            where = "`sources` stands" if key == "sources" else "a stage's `mix` stands"
            raise parser.ConfigError(
                f"data.{key}", data[key], f"in a recipe {where} outside of `data`"
            )
    if sources and data.get("path") is not None:
        raise parser.ConfigError(
            "data.path", data["path"], "a recipe has either `sources` or data.path"
        )
    return sources


def _held_out(run: Mapping[str, Any], sources: Mapping[str, Any], where: str) -> str | None:
    """The source that `unseen` names; None where it is a path, or nothing."""
    name = run.get("unseen")
    source = sources.get(name) if isinstance(name, str) else None
    if not isinstance(source, Mapping) or "path" not in source:
        return None
    more = [key for key in source if key != "path"]
    if more:
        raise parser.ConfigError(
            f"{where}unseen",
            name,
            f"a source that is held out has a path alone, not {', '.join(more)}",
        )
    return str(name)


def _drawn(
    written: Mapping[str, Any], where: str, sources: Mapping[str, Any], held_out: str | None
) -> dict[str, Any]:
    """data.sources and data.mix of a stage: the sources that its mix names, or without one all that are trained on."""
    if not sources:
        if "mix" in written:
            raise parser.ConfigError(
                f"{where}.mix", written["mix"], "the recipe has no `sources` to draw from"
            )
        return {}
    if "mix" not in written:
        drawn = {name: source for name, source in sources.items() if name != held_out}
        if not drawn:
            raise parser.ConfigError(
                "unseen", held_out, "is the only source: nothing is left to train on"
            )
        return {"sources": drawn}
    mix = _section(written, "mix", where)
    if not mix:
        raise parser.ConfigError(f"{where}.mix", mix, "must name a source at least")
    for name, value in mix.items():
        if name not in sources:
            hint = _nearest(name, list(sources))
            raise parser.ConfigError(f"{where}.mix.{name}", value, f"is no source; {hint}")
        if name == held_out:
            raise parser.ConfigError(
                f"{where}.mix.{name}", value, "`unseen` holds this source out; give one of them up"
            )
    return {"sources": {name: sources[name] for name in mix}, "mix": dict(mix)}


def _covering(out: str, seed: int, stages: Sequence[Stage]) -> RunConfig:
    """A run over the sources of all stages at the largest sizes of any, with the recipe's own folder and seed."""
    largest = max((s.config for s in stages), key=lambda config: config.packing.tokens_per_pack)
    sources = {
        name: source
        for stage in stages
        for name, source in (stage.config.data.sources or {}).items()
    }
    drawn = [stage.config.data for stage in stages]
    sizes: dict[str, Any] = {"max_frames": max(data.max_frames for data in drawn)}
    modalities: tuple[Literal["image", "video"], ...] = ("image", "video")
    for modality in modalities:
        key = f"{modality}_pixels"
        # Of a stage that draws none of a modality, the size says nothing.
        used = [getattr(data, key) for data in drawn if draws(data, modality)]
        sizes[key] = max(used or [getattr(data, key) for data in drawn])
    limits: dict[str, Any] = {"min_image_pixels": 0, "min_video_pixels": 0, "min_frames": 1}
    data = replace(largest.data, sources=sources or None, mix=_joint_mix(stages), **sizes, **limits)
    return replace(largest, out=out, seed=seed, data=data)


def draws(data: DataConfig, modality: Literal["image", "video"]) -> bool:
    """Whether training on `data` takes any item of that modality, as far as its mix says."""
    return data.mix is None or any(getattr(w, modality) > 0 for w in data.mix.values())


def _joint_mix(stages: Sequence[Stage]) -> dict[str, MixConfig] | None:
    """What any stage draws; None where one draws everything."""
    joint: dict[str, MixConfig] = {}
    for stage in stages:
        if stage.config.data.mix is None:
            return None
        for name, weights in stage.config.data.mix.items():
            so_far = joint.get(name, MixConfig())
            joint[name] = MixConfig(
                image=max(so_far.image, weights.image), video=max(so_far.video, weights.video)
            )
    return joint


def _placed(error: parser.ConfigError, name: str, own: Mapping[str, Any]) -> parser.ConfigError:
    """The error with its key where the file has it: beside `stages` for what the stage itself does not set."""
    prefix = f"stages.{name}."
    if not error.path.startswith(prefix):
        return error
    parts = error.path.removeprefix(prefix).split(".")
    if parts[:2] == ["data", "sources"]:
        return parser.ConfigError(".".join(parts[1:]), error.value, error.allowed)
    if parts[:2] == ["data", "mix"]:
        return parser.ConfigError(prefix + ".".join(parts[1:]), error.value, error.allowed)
    place: Any = own
    for part in parts:
        if not isinstance(place, Mapping) or part not in place:
            break
        place = place[part]
    else:
        return error
    note = f"{error.allowed} (in the stage {name})"
    return error if parts[0] in own else parser.ConfigError(".".join(parts), error.value, note)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _section(tree: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = tree.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise parser.ConfigError(f"{where}.{key}".lstrip("."), value, "must be a section")
    return dict(value)


def _typed(tree: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = tree.get(key, default)
    if type(value) is not kind:
        word = {str: "a string", int: "an integer"}[kind]
        raise parser.ConfigError(key, value, f"must be {word}")
    return value


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Known are {', '.join(known)}"
