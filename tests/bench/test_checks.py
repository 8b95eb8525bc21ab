"""The checks of tests/gpu, run on a CPU with the reference: they work, and they can fail.

Every file of tests/gpu is loaded, and what it checks of its operator is done at small sizes.
"""

import importlib.util

import pytest
import torch

from bench import checks, harness
from bench.cases import Inputs
from bench.packs import Pack
from goku.model import ModelConfig

CPU = torch.device("cpu")
MIXED = Pack("mixed", ((2, 3, 4), (1, 1, 1), (0, 1, 1), (1, 5, 3)))
HUGE, SMALL = Pack("huge", ((3, 4, 5), (1, 2, 3))), Pack("small", ((1, 2, 3),))
GRAPH = (Pack("two", ((1, 3, 4), (1, 2, 3))), Pack("one and nothing", ((2, 3, 3), (0, 1, 1))))
CONFIG = ModelConfig(dim=32, depth=1, heads=2, text_dim=16)


def gpu_file(stem):
    path = harness.ROOT / "tests" / "gpu" / f"{stem}.py"
    spec = importlib.util.spec_from_file_location(stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problems_of(stem, file, pack, dtype):
    """What the file checks, on `pack` and small widths."""
    if stem in ("adaln_modulate", "gated_residual_adaln"):
        return [*file.variants(pack, dtype, 48), *file.forms(pack, dtype, 48)]
    if stem == "qk_norm_rope":
        return [*file.variants(pack, dtype, CONFIG), *file.forms(pack, dtype, CONFIG)]
    if stem == "varlen_attention":
        both = (file.variants(pack, dtype, 2, 16, probed) for probed in (True, False))
        return [case for cases in both for case in cases]
    whole = [file.problem("latents", width, pack, dtype) for width in (16, 7)]
    return [*whole, checks.shard(whole[0])]


STEMS = (
    "adaln_modulate", "gated_residual_adaln", "qk_norm_rope", "varlen_attention",
    "rectified_flow_noise", "velocity_loss",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_every_check_of_every_operator_runs(stem, dtype):
    file = gpu_file(f"test_{stem}")
    checks.all_of(problems_of(stem, file, MIXED, dtype), file.function, CPU, "torch", runs=2)
    whole = [problems_of(stem, file, pack, dtype)[0] for pack in (HUGE, SMALL)]
    checks.far_rows(*whole, file.function("torch"), CPU, past=16 * 64)
    pair = [problems_of(stem, file, pack, dtype)[0] for pack in GRAPH]
    checks.replays(*pair, file.function("torch"), CPU)


def test_attention_of_heads_that_lie_apart_or_in_one_place():
    attention = gpu_file("test_varlen_attention")
    seen = []

    def watched(backend):
        def run(inputs):
            seen.append({x.stride()[1:] for x in inputs.leaves})
            return attention.function(backend)(inputs)

        return run

    for case, change in attention.layouts(MIXED, torch.bfloat16, 2, 16):
        checks.all_fit(
            case, [change(watched)("torch"), change(attention.deterministic)("torch")], CPU
        )
    assert {frozenset(strides) for strides in seen} >= {
        frozenset({(24, 1)}), frozenset({(17, 1)}), frozenset({(16, 1), (0, 1)})
    }  # fmt: skip


def test_attention_with_lse_and_in_tf32():
    attention = gpu_file("test_varlen_attention")
    case = attention.with_lse(MIXED, torch.float32, 2, 16)
    checks.fits(case, attention.both("torch"), CPU)
    before = torch.get_float32_matmul_precision()
    attention.fits_in_tf32(MIXED, 2, 16, CPU, "torch")
    assert torch.get_float32_matmul_precision() == before


def test_the_loss_of_every_sample():
    loss = gpu_file("test_velocity_loss")
    checks.all_of(list(loss.forms(MIXED, torch.bfloat16, 7)), loss.both, CPU, "torch", runs=2)

    def wrong(inputs):  # the smallest sample's, a tenth of the largest
        total, own = loss.both("torch")(inputs)
        return total, own * (1 + 1e-3 * (own == own[1]))

    with pytest.raises(AssertionError, match="output 1 of sample 1"):
        checks.fits(loss.per_sample(loss.problem("latents", 7, MIXED, torch.float32)), wrong, CPU)


def test_noise_bits_are_the_references_here_and_on_the_cpu(monkeypatch):
    noise = gpu_file("test_rectified_flow_noise")
    case = noise.problem("latents", 7, MIXED, torch.bfloat16)
    noise.equals_the_reference(case, CPU, "torch")
    noise.equals_the_reference(checks.shard(case), CPU, "torch")
    right, runs = noise.function("torch"), []

    def drifting(backend):  # the reference of the same device agrees, that of the CPU does not
        def run(inputs):
            runs.append(backend)
            return tuple(x + (len(runs) == 3) for x in right(inputs))

        return run

    monkeypatch.setattr(noise, "function", drifting)
    with pytest.raises(AssertionError, match="the reference on cpu"):
        noise.equals_the_reference(case, CPU, "triton")


def test_what_is_checked_of_the_block():
    block = gpu_file("test_block")
    config = ModelConfig(dim=32, depth=2, heads=2, text_dim=16, latent_channels=4)
    for autocast in (True, False):
        block.bf16_is_near_fp32(config, "cpu", "torch", autocast)
    block.fp32_is_near_fp64(config, "cpu", "torch")
    block.one_sample_changes_no_other(config, "cpu", "torch")
    # The reference reads offsets on the host, so it is no one graph; "eager" compiles nothing.
    assert block.compiled_serves_packs(
        config, "cpu", "torch", 3, fullgraph=False, compiler="eager"
    )  # fmt: skip


def test_all_files_of_tests_gpu_can_be_loaded():
    for path in (harness.ROOT / "tests" / "gpu").glob("test_*.py"):
        assert any(name.startswith("test_") for name in dir(gpu_file(path.stem)))


# ---- they can fail ----


@pytest.fixture(params=STEMS)
def operator(request):
    file = gpu_file(f"test_{request.param}")
    return [problems_of(request.param, file, p, torch.float32)[0] for p in (HUGE, SMALL)], file


def test_a_replay_may_differ_by_what_it_is_given_and_no_more(operator):
    _, file = operator
    pair = [problems_of(file.__name__.removeprefix("test_"), file, p, torch.float32)[0]
            for p in GRAPH]  # fmt: skip
    right = file.function("torch")

    def drifting(by):
        runs = []

        def run(inputs):
            runs.append(by)
            return tuple(x * (1 + (len(runs) == 1) * by) for x in right(inputs))

        return run

    checks.replays(*pair, drifting(2**-9), CPU, within=2**-7)
    for by, within in ((2**-9, 0.0), (2**-6, 2**-7)):
        with pytest.raises(AssertionError, match="differs in the replay, by"):
            checks.replays(*pair, drifting(by), CPU, within=within)


def test_a_slightly_wrong_row_is_found(operator):
    (case, _), file = operator
    right = file.function("torch")

    def wrong(inputs):
        first, *others = right(inputs)
        last = torch.ones_like(first)
        last[-1:] = 1.001
        return first * last, *others

    if case.operator == "velocity_loss":  # one number: its only row
        right_loss = file.function("torch")
        wrong = lambda inputs: tuple(1.001 * x for x in right_loss(inputs))  # noqa: E731
    with pytest.raises(AssertionError, match=r"off by"):
        checks.fits(case, wrong, CPU)


def test_a_long_sample_half_as_large_again_is_found():
    """The giant's numbers are means of many values: half of one is below a small sample's largest."""
    file = gpu_file("test_varlen_attention")
    pack = Pack("long", ((1, 1, 1), (4, 16, 16), (1, 2, 3)))
    case = file.problem("self", 2, 16, pack, torch.bfloat16)

    def wrong(inputs):
        (out,) = file.function("torch")(inputs)
        factor = torch.ones(len(out), 1, 1, dtype=out.dtype)
        factor[1:-6] = 1.5
        return (out + (out * (factor - 1)).detach(),)  # the gradients stay right

    with pytest.raises(AssertionError, match="output 0 of sample 1 is off by"):
        checks.fits(case, wrong, CPU)


def test_a_shard_begins_inside_a_sample_and_ends_in_padding():
    file = gpu_file("test_adaln_modulate")
    case = checks.shard(file.problem("layer", 8, MIXED, torch.float32), padding=3)
    inputs = case.draw(CPU, 0)
    assert inputs.rest["options"] == {"token_offset": 20}
    assert case.partitions == ((4, 1, 0, 15, 3),)
    assert inputs.leaves[0].isnan().all(1).tolist() == [False] * 20 + [True] * 3

    def without_offset(inputs):
        return file.function("torch")(Inputs(inputs.leaves, {**inputs.rest, "options": {}}))

    with pytest.raises(AssertionError, match="off by"):
        checks.fits(case, without_offset, CPU)


def test_runs_that_differ_are_found(operator):
    (case, _), file = operator
    calls = []

    def wrong(inputs):
        calls.append(0)
        return tuple(x * (1 + 1e-6 * len(calls)) for x in file.function("torch")(inputs))

    with pytest.raises(AssertionError, match="run 1 differs"):
        checks.deterministic(case, wrong, CPU, runs=2)


def test_a_last_sample_taken_for_another_is_found(operator):
    (case, small), file = operator

    def wrong(inputs):
        cut = inputs.leaves[0].shape[0] == HUGE.tokens  # only in the huge pack
        leaves = tuple(
            x.roll(1, 0) if cut and x.shape[0] == HUGE.tokens else x for x in inputs.leaves
        )
        return file.function("torch")(Inputs(leaves, inputs.rest))

    with pytest.raises(AssertionError, match="off by"):
        checks.far_rows(case, small, wrong, CPU, past=16 * 64)


@pytest.mark.parametrize("stem", STEMS[:3])
@pytest.mark.parametrize("kind", ["sample", "weight"])
def test_a_wrong_sum_over_tokens_far_away_is_found(stem, kind):
    """Gradients of modulation rows and of gains, whose tokens' outputs and gradients are right."""
    file = gpu_file(f"test_{stem}")
    if stem == "qk_norm_rope" and kind == "sample":
        pytest.skip("it has no rows of samples")
    given = {"weight": True, "norm": "rms"} if stem == "adaln_modulate" else {}
    width = CONFIG if stem == "qk_norm_rope" else 48
    pair = [file.problem("case", width, pack, torch.float32, **given) for pack in (HUGE, SMALL)]

    def wrong(inputs):
        huge = len(inputs.leaves[0]) == HUGE.tokens
        dims = 2 if kind == "sample" else 1
        leaves = [
            2 * x - x.detach() if huge and x.dim() == dims and len(x) != HUGE.tokens else x
            for x in inputs.leaves
        ]
        return file.function("torch")(Inputs(tuple(leaves), inputs.rest))

    checks.far_rows(*pair, file.function("torch"), CPU, past=16 * 64)
    with pytest.raises(AssertionError, match=r"gradient [1-5]: off by"):
        checks.far_rows(*pair, wrong, CPU, past=16 * 64)


def test_offsets_that_are_not_far_are_refused(operator):
    (case, small), file = operator
    with pytest.raises(AssertionError, match="last row lies at"):
        checks.far_rows(case, small, file.function("torch"), CPU)
