"""The tuner with a made-up clock: where it ends, what it leaves alone, and that it can be overruled."""

import json
import math

import pytest
import torch

from bench import adaln_modulate, cases, tune
from bench.packs import Pack
from goku_kernels.triton import configs

DTYPES = ["bfloat16"]


def row(kernel, chip, size=1024, **config):
    return {"kernel": kernel, "size": size, "dtypes": DTYPES, "chip": chip, "config": config}


def quiet(words):
    pass


def test_every_neighbour_differs_by_one_step_or_in_flags():
    start = {"num_warps": 8, "num_stages": 1, "rows": 1, "programs": 3, "odd": 3}
    found = list(tune.neighbours(start))
    assert {**start, "num_warps": 4} in found
    assert {**start, "num_warps": 16} in found
    assert {**start, "num_stages": 2} in found
    assert {**start, "rows": 2} in found
    assert {**start, "programs": 2} in found
    assert {**start, "programs": 4} in found
    assert len(found) == 6  # no 0 stages, no half a row, and 3 is no power of two
    flags = {"num_warps": 8, "tma": 0, "specialise": 0}
    turned = [c for c in tune.neighbours(flags) if c["num_warps"] in (4, 8)]
    assert {"num_warps": 4, "tma": 1, "specialise": 1} in turned
    assert {"num_warps": 8, "tma": 1, "specialise": 0} in turned


def test_the_best_configuration_is_found_and_other_chips_stay():
    rows = [row("forward", 80, num_warps=2, rows=1), row("forward", 90, num_warps=1, rows=16),
            row("backward", 90, num_warps=1, rows=1)]  # fmt: skip
    before = json.dumps(rows[0])

    def measure(row, config):
        if config["num_warps"] > 8:
            return None  # does not fit
        # fastest at 8 warps and 4 rows
        return 1 + abs(math.log2(config["num_warps"] / 8)) + abs(math.log2(config["rows"] / 4))

    tune.tune(rows, 90, ["forward"], measure, quiet)
    assert [r["config"] for r in rows] == [
        {"num_warps": 2, "rows": 1}, {"num_warps": 8, "rows": 4}, {"num_warps": 1, "rows": 1}
    ]  # fmt: skip
    assert json.dumps(rows[0]) == before
    tune.tune(rows, 90, [], measure, quiet)
    assert rows[2]["config"] == {"num_warps": 8, "rows": 4}


def test_noise_changes_nothing():
    start = row("forward", 90, num_warps=4, rows=4)
    tuned = tune.improve(start, lambda row, c: 1.0 if c == start["config"] else 0.995, quiet)
    assert tuned == start


def test_no_row_is_measured_for_ever():
    calls = []

    def measure(row, config):
        calls.append(config)
        return 1 / (1 + len(calls))

    wide = row("forward", 90, **{f"block_{i}": 32 for i in range(30)})
    tune.improve(wide, measure, quiet)
    assert len(calls) <= tune.MAX_CANDIDATES


def test_what_cannot_be_tuned_is_refused():
    rows = [row("forward", 80, rows=1)]
    with pytest.raises(ValueError, match="no row of chip 90"):
        tune.tune(rows, 90, [], lambda row, config: 1.0, quiet)
    with pytest.raises(ValueError, match="cannot be used"):
        tune.tune(rows, 80, [], lambda row, config: None, quiet)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="tune needs a CUDA device"):
            tune.main("adaln_modulate", 0.1, [], write=False)


def test_operators_take_the_overridden_rows_and_then_their_own():
    rows = [row("forward", 90, 4096, num_warps=2)]
    args = ("forward", 1024, torch.bfloat16, 90)
    before = configs.config("adaln_modulate", *args)
    with tune.overridden("adaln_modulate", rows):
        assert configs.config("adaln_modulate", *args) == {"num_warps": 2}
        assert configs.config("gated_residual_adaln", *args) != {"num_warps": 2}
    assert configs.config("adaln_modulate", *args) == before
    with pytest.raises(KeyError), tune.overridden("adaln_modulate", rows):
        raise KeyError
    assert configs.config("adaln_modulate", *args) == before


def test_candidates_are_judged_and_timed_with_their_own_configuration(monkeypatch):
    """On a CPU with the reference for a kernel that reads its configuration when it is called."""
    from triton.runtime.errors import OutOfResources

    rows = [row("forward", 90, 64, rows=4), row("backward", 90, 64, rows=2)]
    seen = []

    def function(inputs):
        config = configs.config("adaln_modulate", "forward", 64, torch.bfloat16, 90)
        other = configs.config("adaln_modulate", "backward", 64, torch.bfloat16, 90)
        seen.append((config["rows"], other["rows"]))
        if config["rows"] == 16:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return tuple(x * (2 if config["rows"] == 8 else 1) for x in adaln_modulate.eager(inputs))

    peer = cases.Peer("goku triton", lambda problem, device: function, backend="triton")
    monkeypatch.setattr(adaln_modulate, "PEERS", [peer])
    monkeypatch.setattr(tune, "GPU_PACKS", [Pack(name, ((1, 2, 3),)) for name in tune._JUDGED_ON])
    said = []
    measure = tune.measurer("adaln_modulate", rows, torch.device("cpu"), 0, said.append)
    assert measure(rows[0], {"rows": 4}) > 0
    assert set(seen) == {(4, 2)}
    assert measure(rows[1], {"rows": 1}) > 0
    assert seen[-1] == (4, 1)
    assert measure(rows[0], {"rows": 8}) is None  # wrong
    assert measure(rows[0], {"rows": 16}) is None  # does not fit
    assert ["wrong" in said[0], "out of resource: shared memory" in said[1]] == [True, True]


def test_a_forward_is_tuned_without_the_specialised_one_that_would_run_in_its_place(monkeypatch):
    rows = [row("forward", 90, 64, rows=4), row("forward_specialised", 90, 64, rows=2)]
    seen = []

    def function(inputs):
        seen.append({r["kernel"]: r["config"]["rows"] for r in configs.table("adaln_modulate")})
        return adaln_modulate.eager(inputs)

    peer = cases.Peer("goku triton", lambda problem, device: function, backend="triton")
    monkeypatch.setattr(adaln_modulate, "PEERS", [peer])
    monkeypatch.setattr(tune, "GPU_PACKS", [Pack(name, ((1, 2, 3),)) for name in tune._JUDGED_ON])
    measure = tune.measurer("adaln_modulate", rows, torch.device("cpu"), 0, quiet)
    assert measure(rows[0], {"rows": 8}) > 0
    assert all(kernels == {"forward": 8} for kernels in seen)
    seen.clear()
    assert measure(rows[1], {"rows": 1}) > 0
    assert all(kernels == {"forward": 4, "forward_specialised": 1} for kernels in seen)


def test_attention_on_sm_90_takes_the_overridden_rows_of_either_forward():
    from goku_kernels.triton import varlen_attention as kernels
    from goku_kernels.triton.launch import Recorder

    def launched(rows):
        x = torch.empty((512, 8, 128), dtype=torch.bfloat16, device="meta")
        cu = torch.empty(4, dtype=torch.int32, device="meta")
        recorder = Recorder(90)
        with tune.overridden("varlen_attention", rows):
            kernels.forward(x, x, x, cu, cu, 0.1, run=recorder)
        last = recorder.launches[-1]
        values = [last.arguments[k] for k in ("QUERIES", "KEYS", "STAGES")]
        return last.kernel.fn.__name__, *values, last.options["num_warps"]

    plain = {"queries": 64, "keys": 32, "num_stages": 4, "num_warps": 2, "programs": 1, "tma": 1}
    special = {**plain, "queries": 256, "num_warps": 8}
    rows = [row("forward", 90, 128, **plain), row("forward_specialised", 90, 128, **special)]
    assert launched(rows) == ("specialised_forward_kernel", 256, 32, 4, 8)
    assert launched(rows[:1]) == ("forward_kernel", 64, 32, 4, 2)


def test_files_are_written_as_they_are_kept():
    for file in sorted(tune.FOLDER.glob("*.json")):
        rows = json.loads(file.read_text())["rows"]
        assert json.loads(tune.text(rows)) == {"rows": rows}
        assert tune.text(rows).count("\n") == len(rows) + 2
