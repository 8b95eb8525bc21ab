"""Sampling against the formulas written out: guidance over text and image, given frames, scaled positions."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from goku.conditioning import condition_latent
from goku.flow import time_grid
from goku.given import encode_given
from goku.model import GokuTransformer, patchify
from goku.random import Purpose, normal
from goku.sampler import (
    Loaded,
    Request,
    SampleConfig,
    decode,
    describe,
    integrate_all,
    load_for_sampling,
)
from goku.sizes import position_scale
from goku_kernels import Packing

CPU = torch.device("cpu")
# fp32 velocities whose sums run in another order; latents of the order of 1, a few steps.
FP32 = {"rtol": 0.0, "atol": 2e-5}


def _picture(seed: int, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def plain(trained_run: Callable[..., Path]) -> Loaded:
    return load_for_sampling(trained_run(), CPU)


@pytest.fixture(scope="module")
def framed(trained_run: Callable[..., Path]) -> Loaded:
    return load_for_sampling(trained_run(condition="frames"), CPU)


CLIP = Request(
    "a cat", 32, 48, frames=9, seed=2, negative="blur", given={0: _picture(0), -1: _picture(1)}
)


def _latents(loaded: Loaded, requests: list[Request], **settings: Any) -> list[Tensor]:
    config = SampleConfig(**({"steps": 3} | settings))
    found = integrate_all(
        loaded.model, loaded.vae, loaded.text.encode, requests, config, CPU
    )  # fmt: skip
    return [found[i] for i in range(len(requests))]


class ByHand:
    """One request on its own: the velocity with and without prompt and frames, Euler's method."""

    def __init__(self, loaded: Loaded, request: Request, scale: Tensor | None = None) -> None:
        self.loaded, self.request, self.scale = loaded, request, scale
        self.grid = t, h, w = request.grid
        shape = (loaded.vae.channels, t, 2 * h, 2 * w)
        given = {}
        for frame, image in request.given.items():
            assert isinstance(image, Tensor)
            video = image[None, :, None].float() / 127.5 - 1
            index = {0: 0, -1: t - 1}[frame]
            given[index] = loaded.vae.normalise(loaded.vae.encode(video).mean)[0]
        self.condition = patchify(condition_latent(given, shape))

    @torch.no_grad()
    def velocity(self, x: Tensor, t: float, *, prompt: bool, image: bool) -> Tensor:
        text = self.loaded.text.encode([self.request.prompt if prompt else self.request.negative])
        condition = None
        if self.loaded.model.config.condition == "frames":
            condition = self.condition if image else torch.zeros_like(self.condition)
        return self.loaded.model(
            x, torch.tensor([t]), text[0], Packing.from_grids([self.grid]),
            Packing.from_lengths([len(text[0])]), None, condition, self.scale,
        )  # fmt: skip

    def euler(self, steps: int, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
        width = self.loaded.model.config.patch_dim
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        x = normal(self.request.seed, 0, tokens * width, Purpose.SAMPLE).view(-1, width)
        for t, following in itertools.pairwise(k / steps for k in range(steps + 1)):
            x = x + (following - t) * velocity(x, t)
        return x

    def guided(self, steps: int, text: float, image: float) -> Tensor:
        def velocity(x: Tensor, t: float) -> Tensor:
            none = self.velocity(x, t, prompt=False, image=False)
            seen = self.velocity(x, t, prompt=False, image=True)
            both = self.velocity(x, t, prompt=True, image=True)
            return none + image * (seen - none) + text * (both - seen)

        return self.euler(steps, velocity)


class Counter:
    """How often the model was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, forward = 0, GokuTransformer.forward

        def counted(model: GokuTransformer, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(GokuTransformer, "forward", counted)


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "image", "forwards"),
    [(1.0, 1.0, 1), (2.5, 2.5, 2), (2.5, 1.0, 2), (3.0, 1.5, 3), (1.0, 2.0, 3), (0.0, 1.0, 2)],
)
def test_guidance_over_text_and_frames(
    framed: Loaded, text: float, image: float, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ByHand(framed, CLIP).guided(3, text, image)
    counter = Counter(monkeypatch)
    (latent,) = _latents(framed, [CLIP], guidance=text, guidance_image=image)
    assert counter.calls == 3 * forwards
    torch.testing.assert_close(patchify(latent), expected, **FP32)
    # What is compared depends on the images and on the prompts.
    for other in (replace(CLIP, given={0: _picture(5)}), replace(CLIP, prompt="b", negative="c")):
        assert (patchify(_latents(framed, [other], guidance=text)[0]) - expected).abs().max() > 1e-3


def test_one_scale_for_both_unless_told(framed: Loaded) -> None:
    one, other = (_latents(framed, [CLIP], guidance=2.0, **more)[0] for more in (
        {}, {"guidance_image": 2.0},
    ))  # fmt: skip
    assert torch.equal(one, other)


def test_a_negative_prompt_is_what_is_guided_away_from(plain: Loaded) -> None:
    request = replace(CLIP, given={})
    hand = ByHand(plain, request)

    def velocity(x: Tensor, t: float) -> Tensor:
        away = hand.velocity(x, t, prompt=False, image=False)
        return away + 2.0 * (hand.velocity(x, t, prompt=True, image=False) - away)

    (latent,) = _latents(plain, [request], guidance=2.0)
    torch.testing.assert_close(patchify(latent), hand.euler(3, velocity), **FP32)
    (other,) = _latents(plain, [replace(request, negative="")], guidance=2.0)
    assert (other - latent).abs().max() > 1e-3
    # Without guidance it has no part.
    unguided = _latents(plain, [request, replace(request, negative="")])
    torch.testing.assert_close(*unguided, rtol=0, atol=0)


def test_guidance_within_an_interval_alone(plain: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(CLIP, given={})
    hand = ByHand(plain, request)

    def velocity(x: Tensor, t: float) -> Tensor:
        both = hand.velocity(x, t, prompt=True, image=False)
        if not 0.25 <= t <= 0.5:
            return both
        away = hand.velocity(x, t, prompt=False, image=False)
        return away + 3.0 * (both - away)

    expected = hand.euler(8, velocity)
    counter = Counter(monkeypatch)
    (latent,) = _latents(
        plain, [request], steps=8, guidance=3.0, guidance_interval=(0.25, 0.5)
    )  # fmt: skip
    assert counter.calls == 8 + 3  # at 2/8, 3/8, 4/8
    torch.testing.assert_close(patchify(latent), expected, **FP32)
    everywhere = {"guidance": 3.0, "guidance_interval": (0.0, 1.0)}
    assert torch.equal(
        _latents(plain, [request], **everywhere)[0], _latents(plain, [request], guidance=3.0)[0]
    )


# --- requests of their own ------------------------------------------------------------------------


def test_steps_of_its_own(plain: Loaded) -> None:
    requests = [
        Request("a", 32, 32, seed=1, steps=2),
        Request("b", 32, 48, seed=2),
        Request("c", 16, 32, seed=3, steps=2),
        Request("d", 32, 32, seed=4, steps=5),
    ]
    told: list[tuple[int, int]] = []
    config = SampleConfig(steps=3)
    together = integrate_all(
        plain.model, plain.vae, plain.text.encode, requests, config, CPU,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(k, 10) for k in range(1, 11)]
    for i, request in enumerate(requests):
        own = replace(request, steps=None)
        (alone,) = _latents(plain, [own], steps=request.steps or 3)
        torch.testing.assert_close(together[i], alone, **FP32)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_all_groups_call_the_model_equally_often(
    framed: Loaded, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked of each: other sizes, steps of their own, frames given to one alone."""
    requests = [
        Request("a", 32, 32, seed=1, steps=2),
        CLIP,
        Request("c", 16, 32, frames=5, seed=3),
        Request("d", 64, 64, frames=5, seed=4, steps=2),
    ]
    calls, found = [], {}
    for group in range(groups):
        with monkeypatch.context() as patch:
            counter = Counter(patch)
            config = SampleConfig(steps=3, guidance=2.0, guidance_image=1.5, tokens_per_pack=20)
            found |= integrate_all(
                framed.model, framed.vae, framed.text.encode, requests, config, CPU,
                share=(group, groups),
            )  # fmt: skip
            calls.append(counter.calls)
    assert len(set(calls)) == 1
    assert sorted(found) == [0, 1, 2, 3]
    for i, request in enumerate(requests):
        (alone,) = _latents(framed, [request], guidance=2.0, guidance_image=1.5)
        torch.testing.assert_close(found[i], alone, **FP32)


def test_a_model_with_frames_samples_without_any(
    framed: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(CLIP, given={})
    expected = ByHand(framed, request).guided(3, 2.0, 7.0)
    counter = Counter(monkeypatch)
    (latent,) = _latents(framed, [request], guidance=2.0, guidance_image=7.0)
    assert counter.calls == 3 * 2  # no image to be guided over
    torch.testing.assert_close(patchify(latent), expected, **FP32)


# --- given frames ---------------------------------------------------------------------------------


def test_what_is_given_is_encoded_as_an_image(framed: Loaded, tmp_path: Path) -> None:
    Image.fromarray(np.moveaxis(_picture(0).numpy(), 0, -1)).save(tmp_path / "a.png")
    latents = encode_given(
        framed.vae, replace(CLIP, given={0: tmp_path / "a.png", 5: _picture(1)}), CPU
    )
    assert sorted(latents) == [0, 2]
    for latent, picture in ((latents[0], _picture(0)), (latents[2], _picture(1))):
        video = picture[None, :, None].float() / 127.5 - 1
        assert torch.equal(latent, framed.vae.normalise(framed.vae.encode(video).mean)[0])
    with pytest.raises(ValueError, match="frames 5 and 8 of 9 are one latent frame"):
        encode_given(framed.vae, replace(CLIP, given={5: _picture(0), 8: _picture(1)}), CPU)
    with pytest.raises(ValueError, match=r"given\[0\] has shape \(3, 16, 16\)"):
        encode_given(framed.vae, replace(CLIP, given={0: _picture(0, 16, 16)}), CPU)


@pytest.mark.parametrize("method", ["euler", "heun", "ab2"])
def test_a_held_first_frame_is_the_given_one(framed: Loaded, method: Any) -> None:
    free = Request("b", 32, 32, frames=5, seed=1)
    for request in (CLIP, replace(CLIP, given={0: _picture(0)})):
        given = encode_given(framed.vae, request, CPU)
        other, held = _latents(framed, [free, request], hold=True, method=method)
        torch.testing.assert_close(held[:, :1], given[0], rtol=0, atol=1e-6)
        # The decoder is causal: the first frame is what the VAE alone makes of the image.
        assert torch.equal(decode(framed.vae, held)[:, 0], decode(framed.vae, given[0])[:, 0])
        same, loose = _latents(framed, [free, request], method=method)
        assert torch.equal(other, same)  # one without given frames is let alone
        assert (loose[:, :1] - given[0]).abs().max() > 0.1
        # The others see it: they are not what they were.
        assert (loose[:, 1] - held[:, 1]).abs().max() > 1e-4


def test_frames_that_cannot_be_used_are_refused(plain: Loaded, framed: Loaded) -> None:
    with pytest.raises(ValueError, match="trained without given frames"):
        _latents(plain, [CLIP])

    class NotCausal:
        causal = False

        def __getattr__(self, name: str) -> Any:
            return getattr(framed.vae, name)

    other: Any = NotCausal()
    with pytest.raises(ValueError, match="hold needs a VAE"):
        _latents(replace(framed, vae=other), [CLIP], hold=True)
    _latents(replace(framed, vae=other), [CLIP])


@pytest.mark.slow
def test_processes_that_share_tokens_agree_with_one(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    run_processes: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    """Given frames, the held one and scaled positions are cut with the tokens."""
    script = Path(__file__).with_name("sampler_processes.py")
    spec = importlib.util.spec_from_file_location("sampler_processes", script)
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    run, first, last = trained_run(condition="frames"), _picture(0), _picture(1)
    loaded = load_for_sampling(run, CPU)
    alone = integrate_all(
        loaded.model, loaded.vae, loaded.text.encode, cases.requests(first, last), cases.CONFIG, CPU
    )
    torch.save([first, last], tmp_path / "images.pt")
    arguments: dict[str, object] = {
        "run": str(run), "images": str(tmp_path / "images.pt"), "port": free_port(),
        "out": str(tmp_path / "latents.pt"),
    }  # fmt: skip
    run_processes(2, script, ("share_tokens", arguments), backend="none")
    together = torch.load(tmp_path / "latents.pt", weights_only=True)
    for i in range(2):
        torch.testing.assert_close(together[i], alone[i], **FP32)


# --- sizes beyond the trained ones ----------------------------------------------------------------


def test_positions_are_scaled_beyond_the_limits_alone(
    plain: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert position_scale((3, 4, 9), (5, 4, 3)) == (1.0, 1.0, 0.25)
    assert position_scale((3, 4, 9), (1, 2, 9)) == (1.0, 1 / 3, 1.0)
    assert position_scale((3, 4, 9), None) == (1.0, 1.0, 1.0)
    large, small = Request("a", 64, 48, frames=9, seed=1), Request("b", 32, 48, seed=2)
    limits = (2, 2, 3)  # large has (3, 4, 3) tokens
    scale = torch.tensor([[1 / 2, 1 / 3, 1.0]])
    expected = ByHand(plain, large, scale)
    by_hand = expected.euler(3, lambda x, t: expected.velocity(x, t, prompt=True, image=False))
    found = _latents(plain, [large, small], limits=limits)
    torch.testing.assert_close(patchify(found[0]), by_hand, **FP32)
    unscaled = _latents(plain, [large, small])
    assert (found[0] - unscaled[0]).abs().max() > 1e-3
    torch.testing.assert_close(found[1], unscaled[1], **FP32)
    # Within the limits nothing is passed at all: the bits of before.
    scales = []
    forward = GokuTransformer.forward

    def noted(model: GokuTransformer, *args: Any) -> Tensor:
        scales.append(args[7])
        return forward(model, *args)

    monkeypatch.setattr(GokuTransformer, "forward", noted)
    within = _latents(plain, [small], limits=limits)
    assert scales == [None] * 3
    assert torch.equal(within[0], _latents(plain, [small])[0])


def test_the_shift_grows_with_the_tokens_where_training_had_it_so(plain: Loaded) -> None:
    """sqrt(tokens / base) for each request, though they are asked for together."""
    requests = [Request("a", 32, 32, seed=1), Request("b", 64, 64, frames=5, seed=2), CLIP]
    requests[2] = replace(CLIP, given={}, steps=2)
    growing = {"shift": 1.5, "base_tokens": 8}
    shifts = [1.5 * (tokens / 8) ** 0.5 for tokens in (4, 32, 18)]
    found = _latents(plain, requests, **growing)
    for request, shift, latent in zip(requests, shifts, found, strict=True):
        config = SampleConfig(**growing)
        assert config.shift_of(request) == pytest.approx(shift, rel=1e-12)
        assert SampleConfig(shift=1.5).shift_of(request) == 1.5
        (alone,) = _latents(plain, [request], shift=shift)
        torch.testing.assert_close(latent, alone, **FP32)
        (constant,) = _latents(plain, [request], shift=1.5)
        assert (constant - latent).abs().max() > 1e-3
        said = describe(request, config, step=0, fps=12)
        assert said["shift"] == config.shift_of(request)
    # Groups of processes call the model equally often, whatever their times.
    again: dict[int, Tensor] = {}
    for group in range(2):
        again |= integrate_all(
            plain.model, plain.vae, plain.text.encode, requests, SampleConfig(steps=3, **growing),
            CPU, share=(group, 2),
        )  # fmt: skip
    assert sorted(again) == [0, 1, 2]
    with pytest.raises(ValueError, match="base_tokens is 0"):
        SampleConfig(base_tokens=0)


def test_a_guided_interval_begins_and_ends_without_a_leap(
    plain: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two-step integration does not go on from a guided velocity to one without, nor back."""
    request = replace(CLIP, given={})
    size = math.prod(request.grid)

    def velocity(_: Any, x: Tensor, *rest: Any) -> Tensor:
        # Every prompt 1, no prompt 0: guided by 5 it is 5.
        return torch.full_like(x, float(len(rest[1]) > 1))

    monkeypatch.setattr(GokuTransformer, "forward", velocity)
    width = plain.model.config.patch_dim
    noise = normal(request.seed, 0, size * width, Purpose.SAMPLE).view(-1, width)

    def moved(**settings: Any) -> Tensor:
        latents = integrate_all(
            plain.model, plain.vae,
            lambda strings: [torch.zeros(1 + (s == request.prompt), 32) for s in strings],
            [request], SampleConfig(steps=10, method="ab2", guidance=5.0, **settings), CPU,
        )  # fmt: skip
        return patchify(latents[0]) - noise

    # Every step takes 1 or 5. They are of unequal lengths, so that two leaps would not make up for each other.
    times = time_grid(10, 3.0).tolist()
    expected = sum((b - a) * (5 if 0.25 <= a <= 0.65 else 1) for a, b in itertools.pairwise(times))
    found = moved(guidance_interval=(0.25, 0.65), shift=3.0)
    torch.testing.assert_close(found, torch.full((size, width), expected), **FP32)
    torch.testing.assert_close(moved(), torch.full((size, width), 5.0), **FP32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval is"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval is"),
        ({"guidance_interval": (0.1, 1.5)}, "guidance_interval is"),
        ({"guidance_image": float("inf")}, "guidance_image is inf"),
        ({"method": "rk4"}, "method is 'rk4'; allowed: 'euler', 'heun', 'ab2'"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        SampleConfig(**settings)
