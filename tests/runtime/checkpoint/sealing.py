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
    path = checkpoint / "manifest.json"
    path.write_text(manifest_text(json.loads(path.read_bytes()) | change))


def manifest_text(content: dict[str, Any]) -> str:
    """manifest.json with this content and its sum, whatever sum there is."""
    content = {name: value for name, value in content.items() if name != "crc32c"}
    content["crc32c"] = f"{crc32c(json.dumps(content).encode()):08x}"
    return json.dumps(content, indent=1) + "\n"
