"""Tables and picture of whole steps, from made-up rows."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bench import harness, longest, report, step, step_profile, step_report, timing
from bench.block_expected import RATE_NOT_MEASURED
from bench.packs import Pack

CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 8e14, "FLOP/s"), timing.Ceiling("copy", 4e12, "byte/s")
)
WHERE = {"attention": 600.0, "matrix products": 300.0, "AdamW": 80.0, "nothing": 20.0}
EXTRA = {
    "tokens_per_s": 16000.0, "estimated_memory_bytes": 50 * 2**30, "peak_memory_bytes": 49 * 2**30,
    "expected_ms": 900.0, "attention_rate": "attention as measured", "mfu": 0.42, "where_ms": WHERE,
}  # fmt: skip
PACK = Pack("16K, made up", ((4, 16, 32), (1, 16, 16)))


def record(folder: Path, row: harness.Row, *, stale: bool = False) -> dict[str, Any]:
    (found,) = harness.write([row], torch.device("cpu"), folder)
    found["device_type"] = "cuda"
    found["hardware"] = {"device": "NVIDIA H200", "clocks": "1980 MHz, 3201 MHz, 580.1"}
    if stale:
        found["sources_sha256"] = "0" * 64
    return found


def measured(
    folder: Path, policy: str, ms: float, *, stale: bool = False, **extra: Any
) -> dict[str, Any]:
    setting = step.Setting("goku-2b", PACK, policy)
    timed = timing.Timing(ms, ms, ms, 3)
    return record(
        folder, step.row(setting, CEILINGS, timing=timed, extra=EXTRA | extra), stale=stale
    )


def page_of(*records: dict[str, Any]) -> tuple[str, report.Shown]:
    shown = report.Shown.of(records, harness.ROOT)
    page = report.render(shown)
    return page.split("## step\n")[1].split("\n## ")[0], shown


def cells(page: str, *words: str) -> list[list[str]]:
    lines = [
        line for line in page.splitlines() if line.startswith("|") and all(w in line for w in words)
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_step_is_shown_beside_what_was_expected(tmp_path: Path) -> None:
    absent = step.row(
        step.Setting("goku-2b", PACK, "none"), CEILINGS, status="absent", note="90 GiB"
    )
    page, _ = page_of(
        measured(tmp_path, "full", 1000.0), measured(tmp_path, "operators: attention", 900.0, stale=True),
        record(tmp_path, absent),
    )  # fmt: skip
    full, where = cells(page, "| full |")
    assert full == ["NVIDIA H200", "goku-2b", PACK.name, "full", "1000.0", "16,000", "42.0%",
                    "900.0 (attention as measured)", "0.90", "49.00 GiB", "50.00 GiB", "0.98"]  # fmt: skip
    assert where[4:] == ["60.0", "30.0", "8.0", "2.0"]
    (names,) = cells(page, "| kept |")
    assert names[4:] == list(WHERE)
    assert cells(page, "operators: attention")[0][4] == f"900.0{report.STALE}"
    assert cells(page, "| none |")[0][4] == "absent: 90 GiB"
    assert "### The longest sequence" in page


def test_without_the_attentions_rate_nothing_is_judged_by_what_is_expected(tmp_path: Path) -> None:
    """At the matrix product's rate it would be too short."""
    page, _ = page_of(measured(tmp_path, "full", 1000.0, attention_rate=RATE_NOT_MEASURED))
    full = cells(page, "| full |")[0]
    assert full[7] == f"900.0 ({RATE_NOT_MEASURED})"
    assert "attention was not measured" in full[7]
    assert full[8] == "not measured"


def test_the_longest_sequence_has_a_table_of_its_own(tmp_path: Path) -> None:
    extra = {
        "longest_tokens": 180_224,
        "estimated_tokens": 175_104,
        "peak_memory_bytes": 77 * 2**30,
    }
    setting = step.Setting("goku-2b", longest.one_clip(180_224), "full")
    timed = timing.Timing(80e3, 80e3, 80e3, 1)
    ran = step.row(
        setting,
        CEILINGS,
        timing=timed,
        extra=extra | {"tokens_per_s": 2252.8, "clip_tokens": 180_224},
    )
    page, _ = page_of(record(tmp_path, ran))
    (line,) = cells(page, "180,224")
    assert line[2:] == ["full", "180,224", "175,104", "77.00 GiB", "80.0 s", "2,253"]
    less = extra | {"tokens_per_s": 1024.0, "clip_tokens": 81_920}
    shorter = step.Setting("goku-2b", longest.one_clip(81_920), "full")
    page, _ = page_of(record(tmp_path, step.row(shorter, CEILINGS, timing=timed, extra=less)))
    (line,) = cells(page, "180,224")
    assert line[6:] == ["80.0 s for 81,920", "1,024"]
    skipped = step.row(setting, CEILINGS, status="absent", note="about 400 s", extra=extra)
    page, _ = page_of(record(tmp_path, skipped))
    (line,) = cells(page, "180,224")
    assert line[5:] == ["77.00 GiB", "about 400 s", "not measured"]


def test_the_picture_is_divided_as_the_time_is(tmp_path: Path) -> None:
    _, shown = page_of(
        measured(tmp_path, "full", 1000.0), measured(tmp_path, "none", 800.0, stale=True)
    )
    drawn = step_report.picture(shown)
    root = ElementTree.fromstring(drawn)
    name = "{http://www.w3.org/2000/svg}"
    rects = [r for r in root.iter(f"{name}rect") if r.find(f"{name}title") is not None]
    widths = [float(r.get("width")) for r in rects]
    assert [round(w / sum(widths[:4]), 2) for w in widths[:4]] == [0.6, 0.3, 0.08, 0.02]
    assert [r.get("class") for r in rects] == [None] * 4 + ["s"] * 4
    titles = [r.find(f"{name}title").text for r in rects]
    assert titles[0] == "attention: 60.0%"
    assert "(stale)" in drawn
    # Every kind has a look of its own, and all of them have one.
    everything = dict.fromkeys(step_profile.CATEGORIES, 1.0)
    _, shown = page_of(measured(tmp_path, "full", 1000.0, where_ms=everything))
    patterns = list(ElementTree.fromstring(step_report.picture(shown)).iter(f"{name}pattern"))
    assert len({ElementTree.tostring(p[0]) + bytes(len(p)) for p in patterns}) == len(everything)


def test_nothing_measured_is_said_in_the_picture() -> None:
    assert "not measured" in step_report.picture(report.Shown.of([], harness.ROOT))
