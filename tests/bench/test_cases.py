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
    a_part = Peer(
        "half only", always(halved), reference=halved, work=lambda problem, direction: 250
    )
    listed += [Peer("absent", refuses), a_part]
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
    # A part has its own work, not the operator's.
    assert [found[name, "forward"].work for name in ("right", "half only")] == [1e3, 250]
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
        Peer("writes", always(in_place), reference=norm, work=lambda *_: 1e3, in_place=True),
        Peer("w", always(watching)),
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
        more = packs.LONG_PACKS if (name, kind) == ("varlen_attention", "cuda") else ()
        assert {p.pack for p in problems} == {*packs.packs(kind), *more}
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
    listed = [p for p in module.PEERS if "torch.compile" not in p.name]
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


def test_the_last_row_of_every_sample_of_attention_is_compared():
    module = importlib.import_module("bench.varlen_attention")
    lengths = (300, 0, 7, *range(40, 60), 901, 1, 0)
    rows = module.probed_rows(lengths).tolist()
    ends = [end - 1 for end, n in zip(itertools.accumulate(lengths), lengths, strict=True) if n]
    assert set(ends) <= set(rows)
    assert rows == sorted(set(rows))
    assert module._counts(torch.tensor(rows), lengths)[:3] == (32, 0, 1)
    assert module._counts(torch.tensor(rows), lengths)[-3:] == (32, 1, 0)


LONG = packs.Pack("long and short", ((1, 20, 20), (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 8, 5)))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("result", ["output 0", "gradient 0", "gradient 1", "gradient 2"])
def test_a_giant_of_attention_does_not_hide_its_neighbour(cross, result, monkeypatch):
    """Each sample's rows of the probed output, of dq and of dk and dv of as many keys as it has."""
    module = importlib.import_module("bench.varlen_attention")
    monkeypatch.setattr(module, "TEXT_TOKENS", 24)
    case = module.problem("case", 2, 16, LONG, torch.float32, cross=cross)
    inputs = case.draw(CPU, 0).cast(None, True)
    same = cases.results(case, case.reference, inputs, probed=False)
    exact = {name: x.double() for name, x in same.items()}
    (partition,) = {p for p in case.partitions if sum(p) == exact[result].shape[0]}
    assert len(partition) == len(LONG.grids)
    a, b, *_ = partition
    # A small sample half as large again: far below the largest number of the giant.
    got, large = ({name: x.clone() for name, x in found.items()} for found in (same, exact))
    for found in (got, large):
        found[result][:a] *= 1e3
    got[result][a : a + b] *= 1.5
    verdict = cases.judge(got, {**same, result: large[result].float()}, large, case.partitions)
    assert not verdict.right
    assert verdict.worst == f"{result} of sample 1"


def test_two_partitions_of_one_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="have equal sums"):
        problem(partitions=((1, 2), (2, 1)))
    assert problem(partitions=((1, 2), (1, 2), (3, 1))).partitions


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["zeros", "another sample's"])
def test_one_key_too_many_is_found_in_a_long_sample(scale):
    """The last block of keys is partly filled: behind it are zeros or the next sample."""
    module = importlib.import_module("bench.varlen_attention")
    case = module.problem("self", 4, 64, packs.Pack("odd", ((1, 33, 31),)), torch.bfloat16)
    other = module.problem("self", 4, 64, packs.Pack("next", ((1, 1, 1),)), torch.bfloat16)
    more = [scale * x for x in other.draw(CPU, 7).leaves]

    def wrong(inputs):
        q, k, v = inputs.leaves
        k, v = torch.cat((k, more[1])), torch.cat((v, more[2]))
        rest = {**inputs.rest, "lengths_k": (1024,)}
        return (module.plain(Inputs((q, k, v), rest), torch.arange(1023)),)

    truths = cases.Truths(case, case.draw(CPU, 0))
    assert truths.verdict(module.function("torch"), case.reference).right
    assert not truths.verdict(wrong, case.reference).right


def test_the_gradient_of_one_token_may_be_the_rounding_of_two_sums():
    """dS = P * (dP - delta) is zero but for rounding; autograd's softmax has it exactly zero."""
    module = importlib.import_module("bench.varlen_attention")
    pack = packs.Pack("ones", ((1, 1, 1), (1, 1, 1)))
    case = module.problem("self", 2, 128, pack, torch.bfloat16)

    def kernel(error):
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                ctx.save_for_backward(q, k, v)
                return v.clone()

            @staticmethod
            def backward(ctx, dout):
                q, k, v = (x.float() for x in ctx.saved_tensors)
                products = dout.float().norm(dim=-1).max() * v.norm(dim=-1).max()
                ds = error * 2.0**-23 * products * 128**-0.5
                return (ds * k).to(dout.dtype), (ds * q).to(dout.dtype), dout

        return lambda inputs: (Attention.apply(*inputs.leaves),)

    truths = cases.Truths(case, case.draw(CPU, 0))
    assert truths.verdict(kernel(3.0), case.reference).right
    assert not truths.verdict(kernel(30.0), case.reference).right


def test_coarse_arithmetic_is_judged_by_its_own_rounding():
    exact = {"output 0": torch.ones(4, 2, dtype=torch.float64)}
    same = {"output 0": torch.ones(4, 2)}
    got = {"output 0": torch.full((4, 2), 1 + 2.0**-10)}
    assert not cases.judge(got, same, exact).right
    assert cases.judge(got, same, exact, precision=2.0**-10).right


def test_eager_attention_runs_its_forward_once(monkeypatch):
    module = importlib.import_module("bench.varlen_attention")
    calls = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **y: calls.append(0) or attend(*x, **y)
    )
    (peer,) = (p for p in module.PEERS if p.name == "eager")
    small = module.tuning(64, torch.bfloat16, PACK)
    inputs = small.draw(CPU, 0).cast(None, True)
    (out,) = peer.make(small, CPU)(inputs)
    assert len(calls) == len(PACK.grids)
    torch.autograd.grad(out.sum(), inputs.leaves)
    assert len(calls) == len(PACK.grids)


def test_a_part_has_its_own_traffic():
    """Multiples of one (T, d) tensor of bf16: 15 tokens of 64."""
    one = 15 * 64 * 2
    for name, width, expected in (
        ("adaln_modulate", 1, {"Liger RMSNorm only": (2, 3)}),
        ("gated_residual_adaln", 1,
         {"Liger RMSNorm only": (2, 3), "QuACK sum and RMSNorm only": (4, 4)}),
        ("qk_norm_rope", 24, {"QuACK RMSNorm only": (4, 6), "Liger rope only (in place)": (4, 4)}),
    ):  # fmt: skip
        module = importlib.import_module(f"bench.{name}")
        small = module.tuning(64, torch.bfloat16, PACK)
        found = {p.name: p for p in module.PEERS}
        for peer, passes in expected.items():
            work = found[peer].work
            got = tuple(work(small, d) / (one * width) for d in ("forward", "backward"))
            assert got == passes, (name, peer)


def test_a_part_without_its_work_is_refused():
    with pytest.raises(ValueError, match="needs both its reference and its work"):
        Peer("half only", always(halved), reference=halved)


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
