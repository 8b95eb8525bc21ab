"""Checkpoints made to look right: the manifest is written anew after a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from goku_runtime.checkpoint import crc32c


def seal(checkpoint: Path) -> None:
    """Makes the manifest match the files again, as somebody with bad intentions would."""
    write_manifest(
        checkpoint,
        files={
            path.name: {"size": path.stat().st_size, "crc32c": f"{crc32c(path.read_bytes()):08x}"}
            for path in sorted(checkpoint.iterdir())
            if path.name != "manifest.json"
        },
    )


def write_manifest(checkpoint: Path, **change: Any) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_bytes()) | change
    del manifest["crc32c"]
    manifest["crc32c"] = f"{crc32c(json.dumps(manifest).encode()):08x}"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
