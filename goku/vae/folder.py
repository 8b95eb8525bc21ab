"""A VAE's folder on disk: config.json and model.safetensors, without knowing what they configure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def write_folder(
    directory: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Writes both files, each under a passing name first; the configuration comes last.

    So a new folder with a config.json holds whole weights, also after a power cut. A kill between
    the two renames over an older VAE leaves new weights beside the old configuration; whoever
    reads them has to notice (`load_vae` compares the fingerprint). OSError where the disk says no,
    with nothing half-written left behind.
    """
    folder = Path(directory)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    passing = {name: folder / f".{name}.partial" for name in (WEIGHTS, CONFIG)}
    try:
        try:
            save_file(tensors, passing[WEIGHTS])
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"cannot write {passing[WEIGHTS]}: {error}") from error
        passing[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in passing.values():
            sync(path)
        for name, path in passing.items():
            os.replace(path, folder / name)
            sync(folder)
    finally:
        for path in passing.values():
            path.unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def sync(path: Path) -> None:
    """To the disk itself: a file's content, or which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration alone. ValueError names the file that is missing or damaged."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {directory} is not the folder of a VAE")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}: a JSON object is allowed")
    return config


def read_folder(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors on the CPU). ValueError names the file that is missing or damaged."""
    config, weights_path = read_config(directory), Path(directory) / WEIGHTS
    if not weights_path.is_file():
        raise ValueError(f"{weights_path} does not exist: {directory} is not the folder of a VAE")
    try:
        return config, load_file(weights_path)
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged or truncated: {error}") from error
