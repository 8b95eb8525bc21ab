"""A trained model as a folder that stands alone: diffusers' layout, safetensors, nothing of the training.

    OUT/model_index.json     which library and class each part is of
    OUT/transformer/         config.json, diffusion_pytorch_model*.safetensors
    OUT/scheduler/           scheduler_config.json of diffusers' FlowMatchEulerDiscreteScheduler. Its times are
                             ours (invert_sigmas: from noise at 0 to data at 1) where it is given sigmas of
                             1, (n - 1)/n, ..., 1/n; n of its own end elsewhere
                             (with flow.resolution_shift its shift is that of flow.base_tokens tokens)
    OUT/vae/                 the VAE's own folder
    OUT/text_encoder/        reference.json; with a copied encoder its own files, too, and those of its
    OUT/tokenizer/           tokenizer

`load_exported` makes of it what `goku.trained.load_checkpoint` makes of the checkpoint, bit for bit in fp32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from goku import config as parser
from goku.conditioning import ConditioningConfig
from goku.model import ModelConfig
from goku.text import LazyTextEncoder, TextConfig
from goku.trained import (
    Companions,
    Loaded,
    Trained,
    Weights,
    assemble,
    check_fingerprint,
    empty_model,
    load_companions,
    read_checkpoint,
)
from goku.vae import load_vae, vae_folder
from goku.vae.folder import sync
from goku_runtime.checkpoint.tools import export
from goku_runtime.checkpoint.tools.export import MAX_SHARD_SIZE

__all__ = ["export_run", "exported_companions", "is_exported", "load_exported", "read_exported"]

_INDEX = "model_index.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
_RECORD = ("step", "checkpoint_id", "shift", "pixels", "limits", "motion_caption", "fingerprints")
# What is recorded since: absent from older folders, where it is as read_exported says.
_LATER = (
    "base_tokens",
    "image_pixels",
    "fps",
    "area",
    "conditioning",
    "weights",
    "dtype",
)


def export_run(
    run: Path,
    target: Path,
    *,
    weights: Weights = "ema",
    dtype: torch.dtype | None = None,
    text_encoder: Literal["reference", "copy"] = "reference",
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Writes the folder `target` from a run's latest checkpoint (or one checkpoint); all of it or nothing.

    Args:
        run: as `goku.trained.read_checkpoint` takes it.
        target: a folder that is made.
        weights: the average, or the weights that were trained.
        dtype: of the transformer's stored weights, float32 (by default) or bfloat16. They are computed with in fp32.
        text_encoder: "reference" records where the encoder lies, "copy" takes its files along. The embedded encoder is
            its settings alone, either way.
        max_shard_size: bytes in one file of the transformer.
        progress: called with the bytes of the transformer written and all of them.

    Returns:
        What was exported.

    Raises:
        ValueError: no checkpoint, another dtype, a VAE or text encoder that is not where the run had it, or another
            than the run's.
        FileExistsError: something is at `target`.
        CheckpointError, OSError: a damaged checkpoint; what the system says. Nothing stays of the folder.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; allowed: torch.float32, torch.bfloat16")
    about = replace(
        read_checkpoint(run),
        weights=weights,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
    )
    vae = vae_folder(about.vae)
    if not (vae / "config.json").is_file():
        raise ValueError(f"vae.path of {about.path} is {about.vae}, which holds no VAE any more")
    encoder = about.text.path
    if encoder is not None and not Path(encoder).is_dir():
        raise ValueError(f"text.path of {about.path} is {encoder}, which is no folder any more")
    target = target.absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists; allowed: a name for a new folder")
    # The folder would be refused when it is loaded, the run perhaps gone by then.
    check_fingerprint(about, "vae", load_vae(about.vae, dtype=about.vae_dtype).fingerprint())
    check_fingerprint(about, "text", LazyTextEncoder(about.text).fingerprint())
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        error.filename = str(target)  # a name that somebody gave
        raise
    try:
        described = partial / "config.json"
        _write(described, _transformer_config(about))
        export(
            about.path, partial / "transformer", format="diffusers", prefix=f"{weights}.",
            dtype=dtype, max_shard_size=max_shard_size, config=described, progress=progress,
        )  # fmt: skip
        described.unlink()
        _write(
            partial / "scheduler" / "scheduler_config.json",
            {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "shift": about.shift,
                # Its step is then x + (t' - t) v, and our v is data - noise.
                "invert_sigmas": True,
            },
        )
        _copy(vae, partial / "vae", _is_model_file)
        copied = text_encoder == "copy" and encoder is not None
        if copied:
            _copy(Path(str(encoder)), partial / "text_encoder", _is_model_file)
            _copy(Path(str(encoder)), partial / "tokenizer", lambda name: name in _TOKENIZER)
        reference = asdict(about.text)
        if encoder is not None:
            reference["path"] = None if copied else str(Path(encoder).absolute())
        _write(
            partial / "text_encoder" / "reference.json",
            {
                "kind": "embedded" if encoder is None else "copy" if copied else "reference",
                "fingerprint": about.fingerprints["text"],
                "vae_dtype": about.vae_dtype,
                **reference,
            },
        )
        _write(partial / _INDEX, _index(about, vae, copied))
        for folder, _, files in os.walk(partial, topdown=False):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        partial.rename(target)
        sync(target.parent)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)
    return about


def is_exported(folder: Path) -> bool:
    """Whether `export_run` wrote the folder: it has a model_index.json."""
    return (folder / _INDEX).is_file()


def read_exported(folder: Path) -> Trained:
    """What an exported folder says without its weights. ValueError naming the file that is missing or damaged."""
    index = _read(folder / _INDEX)
    if index.get("_class_name") != "GokuPipeline":
        raise ValueError(
            f"{folder / _INDEX}: _class_name is {index.get('_class_name')!r}; allowed: GokuPipeline, "
            "a folder of `goku export`"
        )
    path = folder / "transformer" / "config.json"
    config = _read(path)
    record = config.pop("_goku", None)
    if not isinstance(record, Mapping) or not (set(_RECORD) <= set(record) <= {*_RECORD, *_LATER}):
        raise ValueError(f"{path}: _goku must hold {', '.join([*_RECORD, *_LATER])}")
    for key in ("_class_name", "time"):
        config.pop(key, None)
    reference = _read(folder / "text_encoder" / "reference.json")
    kind, vae_dtype = reference.pop("kind", None), reference.pop("vae_dtype", "auto")
    reference.pop("fingerprint", None)
    if kind == "copy":
        reference["path"] = str(folder / "text_encoder")
    limits, conditioning = record["limits"], record.get("conditioning")
    if conditioning is not None:
        where = f"{path}: _goku.conditioning"
        conditioning = parser.parse(ConditioningConfig, conditioning, where=where)
    older = dict.fromkeys(_LATER) | {
        "image_pixels": record["pixels"],
        "weights": "ema",
        "dtype": "float32",
    }
    return Trained(
        path=folder,
        model=parser.parse(ModelConfig, config, where=str(path)),
        vae=folder / "vae",
        vae_dtype=vae_dtype,
        text=parser.parse(TextConfig, reference, where="text_encoder/reference.json"),
        **{
            **older,
            **record,
            "conditioning": conditioning,
            "limits": None if limits is None else (limits[0], limits[1], limits[2]),
        },
    )


def load_exported(
    folder: Path, device: torch.device, *, companions: Companions | None = None
) -> Loaded:
    """The model, VAE and text encoder of an exported folder, on `device`.

    Raises ValueError naming what is missing, damaged, moved, or another than what the model was trained with;
    companions: those of `exported_companions`, if they were loaded before.
    """
    about = read_exported(folder)
    if companions is None:
        companions = exported_companions(about, device)
    model = empty_model(about.model)
    state = _read_weights(folder / "transformer")
    wanted = model.state_dict()
    wrong = sorted(state.keys() ^ wanted.keys())
    wrong += [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if wrong:
        raise ValueError(
            f"{folder / 'transformer'}: missing, unknown or of another shape: {', '.join(wrong)}"
        )
    model.load_state_dict(state)
    return assemble(about, model, device, companions)


def exported_companions(about: Trained, device: torch.device) -> Companions:
    """The VAE and the text encoder of what `read_exported` read, on `device`. ValueError as `load_exported`."""
    if about.text.path is not None and not Path(about.text.path).is_dir():
        raise ValueError(
            f"the text encoder is not in {about.text.path}, which "
            f"{about.path / 'text_encoder' / 'reference.json'} names: put it back there, write its new "
            "place into that file, or export with the encoder's files (--text-encoder copy)"
        )
    return load_companions(about, device)


def _transformer_config(about: Trained) -> dict[str, Any]:
    record = {name: getattr(about, name) for name in (*_RECORD, *_LATER)}
    if about.conditioning is not None:
        record["conditioning"] = asdict(about.conditioning)
    return {
        "_class_name": "GokuTransformer",
        "time": "0 is noise, 1 is data",
        **parser.to_dict(about.model),
        "_goku": record,
    }


def _index(about: Trained, vae: Path, copied: bool) -> dict[str, Any]:
    from goku import __version__

    kind = _read(vae / "config.json").get("_class_name")
    pretrained = about.text.path is not None
    return {
        "_class_name": "GokuPipeline",
        "_goku_version": __version__,
        "transformer": ["goku.model", "GokuTransformer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["goku.vae", "GokuVAE"] if kind is None else ["diffusers", kind],
        "text_encoder": (
            ["transformers", "T5EncoderModel"] if pretrained else ["goku.text", "T5TextEncoder"]
        ),
        "tokenizer": ["transformers", "AutoTokenizer"] if copied else [None, None],
    }


def _is_model_file(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or name in (
        "config.json",
        *_TOKENIZER,
    )


def _copy(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            shutil.copyfile(path, target / path.name)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(_read(index)["weight_map"].values()))
    else:
        names = [_WEIGHTS]
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        try:
            state |= load_file(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist; the folder is not whole") from error
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from error
    return state


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; the folder is not whole") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
