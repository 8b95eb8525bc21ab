"""What docs/performance.md says of correctness: what went well, of which sources, and the losses."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from bench import gpu_steps, harness, plots, report, training
from bench.correctness_report import STALE, Checked
from bench.gpu_steps import Ended, Status

CPU = torch.device("cpu")
SVG = "{http://www.w3.org/2000/svg}"
LOSSES = [2.0 - 0.01 * i for i in range(50)]


def kept(folder, values, device="NVIDIA H200", kind="cuda", sources="", preset="goku-2b"):
    """A line of losses as a GPU would leave it."""
    training.keep(folder, CPU, preset, values, 8000)
    file = folder / training.LOSSES
    *before, line = file.read_text().splitlines()
    record = json.loads(line) | {"device_type": kind, "hardware": {"device": device}}
    record |= {"commit": "0123456789abcdef", "dirty": False}
    record["sources_sha256"] = sources or record["sources_sha256"]
    file.write_text("".join(f"{x}\n" for x in [*before, json.dumps(record)]))


def noted(folder, name, code=0, device="NVIDIA H200", change=False):
    sources = gpu_steps.check_sources()[name]
    if change:
        sources = dataclasses.replace(sources, configs=())
    step = gpu_steps.Step(name, lambda seconds: [], 9.0, sources)
    Status(folder, device, lambda: ("0123456789abcdef", True)).note(
        step, Ended(code, 9.0, "12 passed, 1 skipped in 9.00s")
    )


def lines(folder, title):
    page = Checked.read(folder, harness.ROOT).section(report.table)
    parts = dict(zip(("checks", "training"), page.split("### Fifty training steps\n"), strict=True))
    table = [line for line in parts[title].splitlines() if line.startswith("| NVIDIA")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_nothing_is_said_to_be_so(tmp_path):
    assert Checked.read(tmp_path, harness.ROOT) == Checked()
    page = Checked().section(report.table)
    assert page.count("Not measured on any GPU.") == 2
    assert "not measured" in Checked().picture()


def test_checks_of_every_gpu_with_commit_and_how_they_ended(tmp_path):
    names = ["tests/gpu/test_block.py", "training"]
    noted(tmp_path, names[1])
    noted(tmp_path, names[0], code=1)
    noted(tmp_path, names[0], device="NVIDIA H100", change=True)
    known = gpu_steps.Step("tune/memory", lambda seconds: [], 9.0, gpu_steps.Sources(("bench",)))
    Status(tmp_path, "NVIDIA H100").note(known, Ended(0, 1.0))  # no check
    found = lines(tmp_path, "checks")
    assert [cells[:4] for cells in found] == [
        [
            "NVIDIA H100",
            names[0],
            "well: 12 passed, 1 skipped in 9.00s" + STALE,
            "0123456789ab with changes",
        ],
        [
            "NVIDIA H200",
            names[0],
            "exit code 1: 12 passed, 1 skipped in 9.00s",
            "0123456789ab with changes",
        ],
        ["NVIDIA H200", names[1], "well", "0123456789ab with changes"],
    ]


def test_the_newest_losses_of_a_gpu_and_none_of_a_cpu(tmp_path):
    kept(tmp_path, [2.0] * 50)
    kept(tmp_path, LOSSES)
    kept(tmp_path, LOSSES, device="x86_64", kind="cpu")
    kept(tmp_path, [2.0, float("nan")], device="NVIDIA H100", sources="0" * 64)
    assert lines(tmp_path, "training") == [
        ["NVIDIA H100", "goku-2b", "2", "8,000", "2.000", "no number", "DID NOT FALL" + STALE,
         "0123456789ab"],
        ["NVIDIA H200", "goku-2b", "50", "8,000", "2.000", "1.510", "fell", "0123456789ab"],
    ]  # fmt: skip
    root = ElementTree.fromstring(Checked.read(tmp_path, harness.ROOT).picture())
    curves = list(root.iter(SVG + "polyline"))
    assert [len(curve.get("points").split()) for curve in curves] == [1, 50]
    assert [curve.get("class") for curve in curves] == ["s", None]
    words = {text.text for text in root.iter(SVG + "text")}
    assert {"NVIDIA H100: goku-2b (stale)", "NVIDIA H200: goku-2b", "2.00", "50"} <= words


def test_a_curve_is_as_high_as_its_numbers():
    root = ElementTree.fromstring(plots.curves("x", [plots.Curve("a & b", [4.0, None, 1.0, 2.0])]))
    (curve,) = root.iter(SVG + "polyline")
    points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
    (x0, y4), (x2, y1), (x3, y2) = points
    assert (x2 - x0) == pytest.approx(2 * (x3 - x2), abs=0.2)
    assert (y1 - y4) == pytest.approx(3 * (y1 - y2), abs=0.4)


@pytest.mark.parametrize("line", ["{", "[]", '{"losses": []}'])
def test_losses_that_cannot_be_read_are_refused_by_place(line, tmp_path):
    kept(tmp_path, LOSSES)
    with (tmp_path / training.LOSSES).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"training-losses\.jsonl:2"):
        Checked.read(tmp_path, harness.ROOT)


def test_rows_are_read_beside_the_losses(tmp_path):
    kept(tmp_path, LOSSES)
    assert harness.read(tmp_path) == []
