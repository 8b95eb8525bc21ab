"""Whether operators bound by memory are said to reach what is wanted of them only where all packs do."""

import json

import pytest

from bench import bandwidth_report, report

GPU, CASES = "NVIDIA H200", ("goku-2b", "goku-8b", "goku-2b, views of QKV")


class Shown:
    def mark(self, record):
        return "!" if record.get("stale") else ""


def cells(percent, *, devices=(GPU,), name="qk_norm_rope", case="goku-2b", direction="forward"):
    """The verdicts of 64K and 220K packs. percent: case, pack, direction -> per cent, None or a record."""

    def ours(operator, device, group):
        found = percent(group[0], group[1], group[3])
        return {"percent_of_ceiling": found} if isinstance(found, float) else found

    page = bandwidth_report.section(
        Shown(), devices, report.expected_groups, ours, lambda head, lines: json.dumps(lines)
    )
    lines = json.loads(page.rpartition("\n")[2])
    (line,) = [x for x in lines if x[:4] == [GPU, name, case, direction]]
    return line[4:]


def test_what_is_wanted_of_which_operators():
    assert bandwidth_report.WANTED == {"forward": 90.0, "backward": 85.0}
    assert cells(lambda *group: 87.0, direction="backward") == ["85%", "met: 87.0%", "met: 87.0%"]
    forward = cells(lambda *group: 87.0)
    assert forward[0] == "90%"
    assert forward[1].startswith("missed: 87.0% (64K, ")
    both = cells(lambda *group: 90.0, name="rectified_flow_noise", case="latents")
    assert both == ["90%", "met: 90.0%", "met: 90.0%"]
    with pytest.raises(ValueError, match="not enough values"):  # it has no backward
        cells(lambda *g: 90.0, name="rectified_flow_noise", case="latents", direction="backward")


def test_the_lowest_pack_and_view_decides():
    def percent(case, pack, direction):
        return 89.9 if (case, pack) == (CASES[2], "64K, mixed") else 95.0

    assert cells(percent) == ["90%", "missed: 89.9% (64K, mixed)", "met: 95.0%"]
    assert cells(percent, case="goku-8b") == ["90%", "met: 95.0%", "met: 95.0%"]


def test_what_is_not_measured_is_not_met():
    def percent(case, pack, direction):
        return None if "220K" in pack or pack == "64K, one clip" else 95.0

    assert cells(percent, name="adaln_modulate") == [
        "90%", "not measured on 1 of 3; 95.0%", "not measured"
    ]  # fmt: skip


def test_stale_rows_are_marked():
    assert cells(lambda *group: {"percent_of_ceiling": 95.0, "stale": True})[1] == "met: 95.0%!"


def test_without_a_gpu_it_says_so():
    page = bandwidth_report.section(Shown(), [], report.expected_groups, None, report.table)
    assert page.endswith("Not measured on any GPU.\n")
