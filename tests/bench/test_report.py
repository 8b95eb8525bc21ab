"""The report: GPU and CPU apart, ratios to the best whole peer, stale rows marked, gaps named."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import harness, plots, report, running, timing
from bench.block_expected import RATE_NOT_MEASURED

CPU = torch.device("cpu")
SVG = "{http://www.w3.org/2000/svg}"


def record(tmp_path, peer, ms, *, device="NVIDIA H200", kind="cuda", stale=False, **change):
    given = {
        "name": "adaln_modulate", "case": "goku-2b", "pack": "64K, mixed", "direction": "backward",
        "peer": peer, "shape": {"dim": 1792}, "dtype": "bfloat16", "work": 2e9,
        "ceiling": timing.Ceiling("copy of 1073741824 bytes", 4e12, "byte/s"),
        "sources": ("bench/packs.py",),
        "timing": None if ms is None else timing.Timing(ms, 0.9 * ms, 1.1 * ms, 50),
    }  # fmt: skip
    found = harness.Row(**(given | change)).to_json(harness.origin(("bench/packs.py",), CPU))
    found["device_type"] = kind
    found["hardware"] = {"device": device, "clocks": "1980 MHz, 3201 MHz, 580.1"}
    if stale:
        found["sources_sha256"] = "0" * 64
    return found


def rendered(*records):
    shown = report.Shown.of(records, harness.ROOT)
    return report.render(shown), shown


def line_of(page, *words):
    (found,) = [
        line for line in page.splitlines() if line.startswith("|") and all(w in line for w in words)
    ]
    return [cell.strip() for cell in found.strip("|").split("|")]


CELLS = ("| goku-2b | 64K, mixed | bfloat16 | backward |",)


def test_nothing_measured_is_said_everywhere(tmp_path):
    page, _ = rendered()
    assert "No GPU has been measured yet." in page
    for name in running.BENCHMARKS:
        section = page.split(f"## {name}\n")[1].split("\n## ")[0]
        if name == "step":  # of rows that differ by their policy: tests/bench/test_step_report.py
            assert section.rstrip().endswith("Not measured on any GPU.")
            continue
        lines = [line for line in section.splitlines() if line.startswith("| -")]
        assert lines, name
        lines = [line for line in lines if not line.startswith("| ---")]
        assert all(line.count("not measured") >= 6 for line in lines), name
        assert len(lines) == len(report.expected_groups(name))
        assert section.index("Not measured on any GPU.") < section.index("<details>")
    assert page.rstrip().endswith("Not measured.")


def test_ratio_is_to_the_fastest_whole_peer_of_that_gpu(tmp_path):
    rows = [
        record(tmp_path, "goku triton", 0.5, backend="triton"),
        record(tmp_path, "eager", 4.0, backend="torch"),
        record(tmp_path, "torch.compile", 0.8, backend="torch"),
        record(tmp_path, "Liger RMSNorm only", 0.1, part=True),
        record(tmp_path, "broken", None, status="wrong", note="output 0 is off by 1|2"),
        record(tmp_path, "torch.compile", 0.2, device="NVIDIA B200"),
        record(tmp_path, "torch.compile", 0.3, kind="cpu", device="x86_64"),
    ]
    page, _ = rendered(*rows)
    main_and_after = page.split("## adaln_modulate")[1]
    main = main_and_after.split("<details>")[0]
    cells = line_of(main, "H200", *CELLS)
    # 2 GB in 0.5 ms are 4 TB/s, all of the ceiling; 0.8 / 0.5
    assert cells[5:] == ["0.500", "4 Tbyte/s", "100.0", "torch.compile", "0.800", "1.60"]
    cells = line_of(main, "B200", *CELLS)
    assert cells[5:] == ["not measured"] * 3 + ["torch.compile", "0.200", "not measured"]
    details = main_and_after.split("<details>")[1].split("</details>")[0]
    assert "Liger RMSNorm only | 0.100" in details
    assert "wrong: output 0 is off by 1\\|2" in details
    assert "x86_64" not in details
    cpu = page.split("## On a CPU")[1]
    assert "x86_64" in cpu
    assert "H200" not in cpu


def test_stale_rows_are_marked(tmp_path):
    fresh = record(tmp_path, "goku triton", 0.5)
    old = record(tmp_path, "eager", 4.0, stale=True)
    page, shown = rendered(fresh, old)
    cells = line_of(page.split("## adaln_modulate")[1].split("<details>")[0], "H200", *CELLS)
    assert cells[5] == "0.500"
    assert cells[9] == "4.000" + report.STALE
    assert [shown.mark(r) for r in shown.records] == ["", report.STALE]
    gone = record(tmp_path, "goku triton", 0.5) | {"sources": ["no/such/file.py"]}
    assert report.Shown.of([gone], harness.ROOT).stale


def test_absent_peers_are_listed_with_the_reason(tmp_path):
    absent = record(tmp_path, "flash-attn 3", None, status="absent", note="no module\nof that name")
    page, _ = rendered(absent)
    cells = line_of(page.split("## Peers that were absent")[1], "flash-attn 3")
    assert cells == ["NVIDIA H200", "adaln_modulate", "flash-attn 3", "no module of that name"]


def test_a_peer_that_was_left_out_of_one_problem_alone_is_not_absent(tmp_path):
    left_out = record(tmp_path, "eager", None, status="absent", note="left out")
    measured = record(tmp_path, "eager", 4.0, pack="64K, one clip")
    page, _ = rendered(left_out, measured)
    assert page.split("## Peers that were absent")[1].strip().startswith("No rows say so yet.")


def test_attention_on_short_images_stands_apart(tmp_path):
    shape = {"heads": 28, "head_dim": 64, "keys": 65916, "tokens": 65916}
    given = {"name": "varlen_attention", "shape": shape, "direction": "forward"}
    packs = ("64K, one clip", "64K, many images", "64K, clips of 4 lengths")
    rows = [record(tmp_path, "goku triton", 2.0, pack=pack, **given) for pack in packs]
    page, _ = rendered(*rows)
    section = page.split("## varlen_attention\n")[1].split("\n## ")[0]
    tables = section.split("<details>")[0]  # all peers follow
    clips, images = (tables.split(f"### {x}\n")[1] for x in ("Clips", "Short images"))
    clips, fixed = clips.split("### Packs beside fixed-length batches\n")
    assert line_of(clips, "| 64K, one clip |", "H200", "forward", "| goku-2b |")[5] == "2.000"
    assert line_of(images, "| 64K, many images |", "H200", "forward", "| goku-2b |")[5] == "2.000"
    assert "many images" not in clips
    assert "one clip" not in images
    # The one pack that has something to stand beside, and nothing measured of that.
    fixed = fixed.split("### Short images")[0]
    cells = line_of(fixed, "H200", "| forward |")
    assert cells[2] == "64K, clips of 4 lengths"
    assert cells[5] == "no batch of samples of 4608, 8100, 16200, 32400 was measured"


def test_the_block_shows_what_was_to_be_expected(tmp_path):
    extra = {
        "expected_ms": 8.0, "attention_rate": "attention as measured", "tokens_per_s": 6.4e6,
        "mfu": 0.42, "peak_memory_bytes": 3 * 2**30,
    }  # fmt: skip
    given = {
        "name": "block", "direction": "forward+backward", "dtype": "bfloat16 autocast over float32",
        "work": 4e12, "ceiling": timing.Ceiling("bfloat16 matmul 8192x8192x8192", 8e14, "FLOP/s"),
    }  # fmt: skip
    rows = [
        record(tmp_path, "goku fused", 12.0, extra=extra, **given),
        record(tmp_path, "goku fused, torch.compile", 10.0, extra=extra, **given),
        record(tmp_path, "torch.compile", 15.0, extra=extra, **given),
    ]
    page, _ = rendered(*rows)
    section = page.split("## block")[1].split("<details>")[0]
    cells = line_of(section, "64K, mixed", "autocast", "H200", "goku-2b")
    assert cells[5:] == [
        "10.000", "400 TFLOP/s", "50.0", "torch.compile", "15.000", "1.50",
        "torch.compile", "8.00 (attention as measured)", "0.80", "6,400,000", "42.0%", "3.00 GiB",
    ]  # fmt: skip

    # Beside the matmul ceiling alone every attention would look slow.
    extra["attention_rate"] = RATE_NOT_MEASURED
    page, _ = rendered(record(tmp_path, "goku fused", 12.0, extra=extra, **given))
    section = page.split("## block")[1].split("<details>")[0]
    cells = line_of(section, "64K, mixed", "autocast", "H200", "goku-2b")
    assert cells[12:14] == [f"8.00 ({RATE_NOT_MEASURED})", "not measured"]


def test_files_are_written_and_plots_stand_alone(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    files = report.write(results, docs)
    assert {f.relative_to(docs).as_posix() for f in files} == {
        "performance.md", "performance/training.svg",
        *(f"performance/{name}.svg" for name in running.BENCHMARKS),
    }  # fmt: skip
    page = files[0].read_text()
    for link in re.findall(r"\((performance/[^)]+)\)", page):
        assert (docs / link).is_file()
    for file in files[1:]:
        root = ElementTree.fromstring(file.read_text())
        assert "not measured" in [text.text for text in root.iter(SVG + "text")]
        assert not any("href" in name for node in root.iter() for name in node.attrib)


def test_bars_are_as_long_as_their_numbers():
    groups = [
        plots.Group("one", (plots.Bar("a", 80.0), plots.Bar("b & c", 40.0))),
        plots.Group("two", (plots.Bar("a", 20.0, stale=True),)),
    ]
    root = ElementTree.fromstring(plots.bars("op", groups))
    bars = list(root.iter(SVG + "rect"))
    lengths = [float(bar.get("width")) for bar in bars]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.1)
    assert lengths[0] == pytest.approx(4 * lengths[2], abs=0.2)
    assert [bar.get("class") for bar in bars] == [None, None, "s"]
    assert bars[0].get("fill") == bars[2].get("fill") != bars[1].get("fill")
    words = [text.text for text in root.iter(SVG + "text")]
    assert {"b & c", "80.0", "20.0 (stale)"} <= set(words)


def test_plots_show_whole_peers_of_gpus_alone(tmp_path):
    rows = [
        record(tmp_path, "goku triton", 1.0),
        record(tmp_path, "Liger RMSNorm only", 0.1, part=True),
        record(tmp_path, "eager", 3.0, kind="cpu", device="x86_64"),
        record(tmp_path, "broken", None, status="wrong"),
    ]
    (group,) = report.plot_groups(report.Shown.of(rows, harness.ROOT), "adaln_modulate")
    assert group.title == "NVIDIA H200: goku-2b, 64K, mixed, bfloat16, backward"
    assert [bar.label for bar in group.bars] == ["goku triton"]


def test_the_committed_page_is_rendered_by_this_code():
    """Its frame is; numbers and marks follow the rows and the sources."""
    page = (harness.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.startswith(report.HEAD.format(stale=report.STALE))
    for name in running.BENCHMARKS:
        assert f"## {name}\n" in page
        assert (harness.ROOT / "docs" / "performance" / f"{name}.svg").is_file()
    for words in ("## Correctness\n", "### Fifty training steps\n", "## Beside a copy\n"):
        assert words in page


def test_pages_of_other_results_lie_beside_them(tmp_path, capsys):
    """They are not the repository's, whose own pages stay as they are."""
    pages = sorted((harness.ROOT / "docs").glob("*performance.md"))
    before = [page.read_bytes() for page in pages]
    assert command.main(["report", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sorted(tmp_path / page.name for page in pages) == sorted(tmp_path.glob("*.md"))
    assert all(Path(line).is_relative_to(tmp_path) for line in said)
    assert [page.read_bytes() for page in pages] == before
