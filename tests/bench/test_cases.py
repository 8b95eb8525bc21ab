"""A peer is judged before it is timed, and every listed problem and pack is what it says."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from bench import cases, packs, peers, running, timing
from bench.cases import Absent, Inputs, Peer, Problem

CPU = torch.device("cpu")
PACK = packs.Pack("three", ((1, 2, 3), (1, 1, 1), (2, 2, 2)))
CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
)


def norm(inputs):
    x, weight = inputs.leaves
    return (F.rms_norm(x, x.shape[-1:], weight),)


def problem(**change):
    def draw(device, seed):
        generator = torch.Generator(device).manual_seed(seed)
        x = cases.draw_normal(generator, PACK.tokens, 16, dtype=torch.bfloat16)
        return Inputs((x, 1 + 0.1 * torch.randn(16, generator=generator).bfloat16()))

    given = {
        "operator": "norm", "case": "16 wide", "pack": PACK, "dtype": torch.bfloat16,
        "shape": {"dim": 16}, "draw": draw, "reference": norm, "unit": "byte",
        "work": lambda direction: 1e3, "sources": ("bench/cases.py",),
    }  # fmt: skip
    return Problem(**(given | change))


def always(function):
    return lambda problem, device: function


def refuses(problem, device):
    raise Absent("not here")


def breaks(inputs):
    raise RuntimeError("no kernel for 16 channels")


def scaled(inputs):
    return (1.05 * norm(inputs)[0],)


def wrong_gradient(inputs):
    x, weight = inputs.leaves
    return (F.rms_norm(x, x.shape[-1:], weight.detach()) + 0 * weight,)


def of_another_sample(inputs):
    (y,) = norm(inputs)
    return (torch.cat([y[:6], y[:1] * 1.2, y[7:]]),)


def halved(inputs):
    return (inputs.leaves[0] / 2,)


def test_only_what_is_right_is_timed():
    given = {"right": norm, "scaled": scaled, "wrong gradient": wrong_gradient, "breaks": breaks,
             "of another sample": of_another_sample}  # fmt: skip
    listed = [Peer(name, always(function)) for name, function in given.items()]
    listed += [Peer("absent", refuses), Peer("half only", always(halved), reference=halved)]
    rows = list(cases.measure(problem(), listed, CPU, CEILINGS, seconds=0))
    found = {(r.peer, r.direction): r for r in rows}
    assert len(found) == len(rows) == 2 * len(listed)
    statuses = {name: found[name, "forward"].status for name, _ in found}
    assert statuses == {
        "right": "measured", "scaled": "wrong", "wrong gradient": "wrong", "breaks": "failed",
        "of another sample": "wrong", "absent": "absent", "half only": "measured",
    }  # fmt: skip
    assert "output 0 of sample" in found["scaled", "forward"].note
    assert "gradient 1" in found["wrong gradient", "backward"].note
    assert "output 0 of sample 1 is off by" in found["of another sample", "forward"].note
    assert found["breaks", "forward"].note == "RuntimeError: no kernel for 16 channels"
    assert found["absent", "backward"].note == "not here"
    assert [found[name, "forward"].part for name in ("right", "half only")] == [False, True]
    assert found["right", "forward"].shape == {"dim": 16, "tokens": 15, "samples": 3}
    assert found["right", "forward"].ceiling is CEILINGS.copy


def test_numbers_that_are_none_are_wrong():
    nan = Peer("nan", always(lambda inputs: (norm(inputs)[0] * float("nan"),)))
    rows = list(cases.measure(problem(), [nan], CPU, CEILINGS, seconds=0))
    assert [r.status for r in rows] == ["wrong", "wrong"]


def test_without_a_gradient_there_is_a_forward_alone():
    rows = list(
        cases.measure(problem(directions=("forward",)), [Peer("a", always(norm))], CPU, CEILINGS,
                      seconds=0)
    )  # fmt: skip
    assert [(r.direction, r.status) for r in rows] == [("forward", "measured")]


def test_a_peer_that_writes_into_its_inputs_gets_its_own():
    seen = []

    def in_place(inputs):
        seen.append(inputs.leaves[0].data_ptr())
        with torch.no_grad():
            inputs.leaves[0].mul_(2)
        return norm(inputs)

    checked = []

    def watching(inputs):
        checked.append(inputs.leaves[0].detach().clone())
        return norm(inputs)

    # RMSNorm does not care about a factor: the result stays right.
    listed = [
        Peer("writes", always(in_place), reference=norm, in_place=True), Peer("w", always(watching))
    ]  # fmt: skip
    list(cases.measure(problem(), listed, CPU, CEILINGS, seconds=0))
    assert all(torch.equal(x, checked[0]) for x in checked)


def test_casting_keeps_strides_and_numbers():
    wide = torch.randn(5, 3, 4).bfloat16()
    inputs = Inputs((wide[:, 1],), {"cu": torch.tensor([0, 5])})
    copy = inputs.cast(torch.float64, True)
    assert copy.leaves[0].stride() == (12, 1)
    assert copy.leaves[0].requires_grad
    assert torch.equal(copy.leaves[0].bfloat16(), wide[:, 1])
    assert inputs.bytes() == 5 * 4 * 2 + 2 * 8


# ---- what is listed ----


def test_packs_have_the_tokens_that_their_names_say():
    for pack in packs.GPU_PACKS:
        thousands, kind = pack.name.split(", ")
        wanted = {"16K": 2**14, "64K": 2**16, "220K": 220_000}[thousands]
        assert abs(pack.tokens / wanted - 1) < 0.02, pack.name
        videos = [t > 1 for t, _, _ in pack.grids]
        if kind == "one clip":
            assert videos == [True]
        elif kind == "mixed":
            assert any(videos)
            assert not all(videos)
        else:
            assert kind == "many images"
            assert not any(videos)
            assert len(videos) >= 40
    assert max(p.tokens for p in packs.CPU_PACKS) < 400
    assert [p.name for p in packs.named(["220K"], "cuda")] == [
        "220K, one clip", "220K, mixed", "220K, many images"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="pack is 'none'"):
        packs.named(["none"], "cpu")


@pytest.mark.parametrize("name", running.OPERATORS)
def test_every_operator_declares_its_problems(name):
    module = importlib.import_module(f"bench.{name}")
    assert name == module.OPERATOR
    names = [peer.name for peer in module.PEERS]
    assert {"eager", "goku triton"} <= set(names)
    assert len(set(names)) == len(names)
    assert all("only" in p.name for p in module.PEERS if p.reference is not None)
    for kind in ("cpu", "cuda"):
        problems = list(module.problems(kind))
        assert {p.pack.name for p in problems} == {p.name for p in packs.packs(kind)}
        keys = [(p.case, p.pack.name, p.dtype) for p in problems]
        assert len(set(keys)) == len(keys)
        for case in problems:
            assert all(case.work(direction) > 0 for direction in case.directions)
            assert f"bench/{name}.py" in case.sources
    assert module.tuning(64, torch.bfloat16, PACK).pack is PACK


@pytest.mark.parametrize("name", running.OPERATORS)
def test_every_peer_is_right_or_absent_on_small_shapes(name):
    module = importlib.import_module(f"bench.{name}")
    small = module.tuning(64, torch.bfloat16, PACK)
    listed = [p for p in module.PEERS if p.name != "torch.compile"]
    rows = list(cases.measure(small, listed, CPU, CEILINGS, seconds=0))
    assert {r.status for r in rows if r.peer == "eager"} == {"measured"}
    assert {r.status for r in rows if r.peer != "eager"} == {"absent"}
    assert all(r.note for r in rows if r.status == "absent")


def test_attention_is_probed_in_every_kind_of_sample():
    module = importlib.import_module("bench.varlen_attention")
    lengths = (5, 900, 1, 40, 33, 2)
    rows = module.probed_rows(lengths)
    starts = (0, 5, 905, 906, 946, 979, 981)
    counts = [int(((rows >= a) & (rows < b)).sum()) for a, b in itertools.pairwise(starts)]
    # first, last, smallest and the three largest
    assert counts == [5, 32, 1, 32, 32, 2]
    assert rows.unique().equal(rows)


def test_rows_of_attention_that_are_not_compared_have_to_be_numbers():
    module = importlib.import_module("bench.varlen_attention")
    pack = packs.Pack("long", ((1, 20, 20),))
    case = module.problem("self", 2, 16, pack, torch.float32)
    unprobed = next(i for i in range(400) if i not in case.probe.tolist())

    def unwritten(inputs):
        (out,) = module.function("torch")(inputs)
        hole = torch.zeros(400, 1, 1)
        hole[unprobed] = float("nan")
        return (out + hole,)

    rows = list(cases.measure(case, [Peer("x", always(unwritten))], CPU, CEILINGS, seconds=0))
    assert [r.status for r in rows] == ["wrong", "wrong"]
    assert "rows that are no numbers" in rows[0].note


def test_partial_peers_have_references_that_run():
    """Their libraries are not here; what they are judged by is."""
    for name in ("qk_norm_rope", "adaln_modulate", "gated_residual_adaln"):
        module = importlib.import_module(f"bench.{name}")
        small = module.tuning(64, torch.bfloat16, PACK)
        for peer in module.PEERS:
            if peer.reference is not None:
                truths = cases.Truths(small, small.draw(CPU, 0))
                assert truths.verdict(peer.reference, peer.reference).right
                for out in peer.reference(small.draw(CPU, 0)):
                    assert out.dtype == torch.bfloat16


# ---- other people's kernels ----


def test_what_cannot_be_imported_is_absent_with_the_reason(monkeypatch, tmp_path):
    with pytest.raises(Absent, match=r"no_such_module.*ModuleNotFoundError"):
        peers.load("no_such_module", "f")
    with pytest.raises(Absent, match=r"math\.no_such_name: AttributeError"):
        peers.load("math", "no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("OSError", "RuntimeError", "ImportError"):
        (tmp_path / f"broken_{kind}.py").write_text(f"raise {kind}('libcuda is missing')")
        with pytest.raises(Absent, match=f"{kind}: libcuda is missing"):
            peers.load(f"broken_{kind}", "f")
    (tmp_path / "bug.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):  # no sign of absence
        peers.load("bug", "f")


def test_the_list_of_peers_says_present_or_why_not():
    found = dict(peers.status())
    assert set(found) == set(peers.LIBRARIES)
    assert all(word == "present" or word.startswith("absent: ") for word in found.values())
    assert found["FlexAttention"] == "present"
