"""Sampling from a run: one sample does not know its company, and the EMA weights are what is shown."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from goku import media_files
from goku.cli import main
from goku.flow import time_grid
from goku.metrics import read_log
from goku.model import GokuTransformer, patchify
from goku.parallelize import ParallelContext
from goku.random import Purpose, normal
from goku.sampler import (
    Loaded,
    Request,
    SampleConfig,
    generate,
    generate_share,
    load_for_sampling,
    save_media,
)
from goku.vae import VideoVAE
from goku_kernels import Packing
from goku_runtime import checkpoint

CPU = torch.device("cpu")
SETTINGS = SampleConfig(steps=4)
# Images and clips of several sizes, two of them alike but for the seed.
REQUESTS = [
    Request("picture number 0", 32, 32, seed=1),
    Request("clip number 1", 32, 48, frames=9, seed=2),
    Request("", 48, 32, seed=3),
    Request("picture number 0", 32, 32, seed=4),
    Request("a prompt that no training item has", 16, 64, frames=5, seed=0),
]
# The velocity is fp32, and a product's sums run in another order where the pack has another number
# of rows: bit equality holds for packs of equal shape only. Latents are of the order of 1; over
# the few integration steps here the differences stay below ten roundings.
FP32 = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose weights and their average differ clearly."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    cases = [
        {"caption": "a cat", "height": 32, "width": 32, "num_frames": frames} for frames in (1, 5)
    ]
    (out.parent / "cases.json").write_text(json.dumps({"data": cases}))
    validation = {"file": str(out.parent / "cases.json"), "every": 3, "steps": 2}
    changes: dict[str, Any] = {"out": str(out), "validation": validation}
    changes["optimizer"] = {"lr": 2e-2, "warmup_steps": 2}
    config = out.parent / "run.yaml"
    config.write_text(yaml.safe_dump(settings | changes))
    assert main(["train", str(config)]) == 0
    return out


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load_for_sampling(run, CPU)


@dataclass
class LatentRecorder:
    """A VAE that notes the latents it is asked to decode: uint8 pixels would hide a difference."""

    vae: VideoVAE
    latents: list[Tensor] = field(default_factory=list)

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.vae.strides

    @property
    def channels(self) -> int:
        return self.vae.channels

    def denormalise(self, latent: Tensor) -> Tensor:
        self.latents.append(latent[0].clone())
        return self.vae.denormalise(latent)

    @property
    def causal(self) -> bool:
        return self.vae.causal

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        return self.vae.decode_stream(latent)


def _latents(
    loaded: Loaded, requests: list[Request], config: SampleConfig = SETTINGS
) -> list[Tensor]:
    """The latent of each request, in the order of the requests."""
    recorder: Any = LatentRecorder(loaded.vae)
    videos = generate(loaded.model, recorder, loaded.text.encode, requests, config, CPU)
    # Packs are decoded one after another; a latent is told by the video that it becomes.
    decoded = [
        ((loaded.vae.decode(loaded.vae.denormalise(z[None]))[0].clamp(-1, 1) + 1) * 127.5).round()
        for z in recorder.latents
    ]
    return [
        next(
            z
            for z, other in zip(recorder.latents, decoded, strict=True)
            if torch.equal(other.to(torch.uint8), video)
        )
        for video in videos
    ]


def _tokens(request: Request) -> int:
    return ((request.frames - 1) // 4 + 1) * (request.height // 16) * (request.width // 16)


# --- company --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("method", ["euler", "heun", "ab2"])
def test_together_equals_alone(loaded: Loaded, guidance: float, method: Any) -> None:
    config = replace(SETTINGS, guidance=guidance, method=method)
    together = _latents(loaded, REQUESTS, config)
    for request, latent in zip(REQUESTS, together, strict=True):
        (alone,) = _latents(loaded, [request], config)
        torch.testing.assert_close(latent, alone, **FP32)


def test_company_of_the_same_shape_changes_no_bit(loaded: Loaded) -> None:
    """With equal shapes the arithmetic is the same: what the others are has no influence at all."""
    together = _latents(loaded, REQUESTS)
    others = [replace(r, seed=r.seed + 100) for r in REQUESTS]
    for i, request in enumerate(REQUESTS):
        mixed = _latents(loaded, [*others[:i], request, *others[i + 1 :]])
        assert torch.equal(mixed[i], together[i])
        assert not any(
            torch.equal(a, b)
            for k, (a, b) in enumerate(zip(mixed, together, strict=True))
            if k != i
        )


def test_the_pack_budget_changes_nothing_and_an_oversized_request_gets_a_pack(
    loaded: Loaded,
) -> None:
    together = _latents(loaded, REQUESTS)
    lengths = [_tokens(request) for request in REQUESTS]
    assert sorted(lengths) == [4, 4, 6, 8, 18]
    progress: list[tuple[int, int]] = []
    for budget in (1, 18, 22, 40):
        config = replace(SETTINGS, tokens_per_pack=budget)
        for ours, theirs in zip(_latents(loaded, REQUESTS, config), together, strict=True):
            torch.testing.assert_close(ours, theirs, **FP32)
    # 40 tokens in packs of 22: at least two, and the counter runs over the steps of all.
    config = replace(SETTINGS, tokens_per_pack=22)
    generate(
        loaded.model, loaded.vae, loaded.text.encode, REQUESTS, config, CPU,
        lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    packs = progress[-1][1] // SETTINGS.steps
    assert packs >= 2
    assert progress == [(k, packs * SETTINGS.steps) for k in range(1, packs * SETTINGS.steps + 1)]


def test_shares_of_any_number_of_processes_are_the_same_bits(loaded: Loaded) -> None:
    """What makes the files of several processes equal byte for byte: packs do not depend on them.

    fp32 latents that differ by a rounding already give a pixel of another value now and then.
    """

    def shares(world: int) -> tuple[dict[int, Tensor], set[bytes]]:
        videos: dict[int, Tensor] = {}
        recorder: Any = LatentRecorder(loaded.vae)
        for rank in range(world):
            context = ParallelContext(rank, world, CPU, None)
            mine = dict(generate_share(replace(loaded, vae=recorder), REQUESTS, SETTINGS, context))
            assert not videos.keys() & mine.keys()
            videos |= mine
        assert sorted(videos) == list(range(len(REQUESTS)))
        return videos, {latent.numpy().tobytes() for latent in recorder.latents}

    alone, latents = shares(1)
    assert len(latents) == len(REQUESTS)
    for world in (2, 3, 7):
        several, theirs = shares(world)
        assert theirs == latents
        assert all(torch.equal(several[i], alone[i]) for i in alone)


def _size(request: Request) -> tuple[int, int, int]:
    return request.frames, request.height, request.width


@pytest.mark.long
@pytest.mark.slow
def test_the_command_writes_the_same_files_on_one_and_two_processes(
    run: Path, tmp_path: Path, goku: Any
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("picture number 0\n\n  clip number 1  \nsomething else\n")
    arguments = ["sample", run, "--prompts", prompts, "--prompt", "first", "--count", "2"]
    arguments += ["--height", "48", "--width", "32", "--frames", "5", "--steps", "4"]
    arguments += ["--seed", "7", "--guidance", "1.5", "--device", "cpu"]
    files = []
    for processes in (1, 2):
        out = tmp_path / f"on{processes}"
        result = goku(*arguments, "--out", out, processes=processes)
        assert result.returncode == 0, result.stderr
        files.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()})
        lines = sorted(line for line in result.stdout.splitlines() if line)
        assert [line.split("  ", 1)[1] for line in lines] == [
            *["first"] * 2,
            *["picture number 0"] * 2,
            *["clip number 1"] * 2,
            *["something else"] * 2,
        ]
    prompts_given = ["first", "picture number 0", "clip number 1", "something else"]
    stems = [media_files.file_stem(prompt) for prompt in prompts_given]
    names = [f"{row:04d}_{stems[row]}_seed{seed}.mp4" for row in range(4) for seed in (7, 8)]
    assert sorted(files[0]) == names
    assert files[0] == files[1]
    assert len(set(files[0].values())) == 8


# --- what is sampled ------------------------------------------------------------------------------


def test_the_seed_decides_the_picture(loaded: Loaded) -> None:
    request = REQUESTS[1]

    def video(seed: int) -> Tensor:
        requests = [replace(request, seed=seed)]
        (made,) = generate(loaded.model, loaded.vae, loaded.text.encode, requests, SETTINGS, CPU)
        return made

    first = video(2)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(first, video(2))
    assert not torch.equal(first, video(3))
    assert not torch.equal(_latents(loaded, [request])[0], _latents(loaded, [
        replace(request, prompt="another prompt")
    ])[0])  # fmt: skip


def _euler_by_hand(
    loaded: Loaded, request: Request, steps: int, shift: float, guidance: float
) -> Tensor:
    """The latent of one request, one token sequence, by the formulas of the paper."""
    grid = ((request.frames - 1) // 4 + 1, request.height // 16, request.width // 16)
    width = loaded.model.config.patch_dim
    packing = Packing.from_grids([grid])
    x = normal(request.seed, 0, _tokens(request) * width, Purpose.SAMPLE).view(-1, width)

    def velocity(prompt: str, x: Tensor, t: float) -> Tensor:
        text = loaded.text.encode([prompt])[0]
        return loaded.model(x, torch.tensor([t]), text, packing, Packing.from_lengths([len(text)]))

    # t' = t / (t + s (1 - t)): SD3's shift, with t = 0 as noise.
    times = [(k / steps) / (k / steps + shift * (1 - k / steps)) for k in range(steps + 1)]
    for t, following in itertools.pairwise(times):
        v = velocity(request.prompt, x, t)
        if guidance != 1:
            uncond = velocity("", x, t)
            v = uncond + guidance * (v - uncond)
        x = x + (following - t) * v
    return x


@pytest.mark.parametrize(
    ("guidance", "shift"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (2.0, 3.0), (0.0, 1.0)]
)
@torch.no_grad()
def test_an_independent_euler_loop_agrees(loaded: Loaded, guidance: float, shift: float) -> None:
    request = REQUESTS[1]
    config = replace(SETTINGS, guidance=guidance, shift=shift)
    (latent,) = _latents(loaded, [request], config)
    by_hand = _euler_by_hand(loaded, request, 4, shift, guidance)
    # fp32 over 4 steps; guidance multiplies the roundings by 2.
    torch.testing.assert_close(patchify(latent), by_hand, **FP32)
    # The settings matter more than the tolerance.
    other = _euler_by_hand(loaded, request, 4, shift + 1, guidance + 1)
    assert (other - by_hand).abs().max() > 1e-3
    assert time_grid(4, shift)[0] == 0


def test_guidance_1_is_no_guidance_and_computes_none(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    calls = 0

    def encode(texts: Any) -> list[Tensor]:
        prompts.extend(texts)
        return loaded.text.encode(texts)

    forward = GokuTransformer.forward

    def counted(self: GokuTransformer, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GokuTransformer, "forward", counted)
    request = REQUESTS[0]
    generate(loaded.model, loaded.vae, encode, [request], SETTINGS, CPU)
    assert (prompts, calls) == ([request.prompt], SETTINGS.steps)
    # Guiding with a factor as good as 1 goes the other way and arrives at the same place.
    nearly = replace(SETTINGS, guidance=1 + 1e-6)
    (plain,), (guided,) = _latents(loaded, [request]), _latents(loaded, [request], nearly)
    torch.testing.assert_close(plain, guided, rtol=0, atol=2e-5)


def test_the_average_is_what_is_sampled(run: Path, loaded: Loaded) -> None:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    model = loaded.model
    zeros: dict[str, Any] = {
        name: {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        for name in ("ema", "model")
    }
    checkpoint.load(zeros, path, partial=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, zeros["ema"][key])
    assert any(not torch.equal(zeros["model"][key], zeros["ema"][key]) for key in zeros["ema"])
    assert loaded.step == 8
    assert not model.training
    # The weights themselves would show something else.
    other = GokuTransformer(model.config)
    other.load_state_dict(zeros["model"])
    (ours,) = _latents(loaded, REQUESTS[:1])
    (theirs,) = _latents(replace(loaded, model=other), REQUESTS[:1])
    assert (ours - theirs).abs().max() > 1e-3


def test_training_draws_its_cases(run: Path) -> None:
    """At the start, when they are due and at the end; the average learns, so they change."""
    events = [e for e in read_log(run / "train.jsonl") if e["event"].startswith("validation")]
    assert {e["event"] for e in events} == {"validation"}
    assert [e["step"] for e in events] == [0, 0, 3, 3, 6, 6, 8, 8]
    pictures = []
    for event in events:
        path = run / event["path"]
        assert path.suffix == (".png", ".mp4")[len(pictures) % 2]
        shown = media_files.read_metadata(path)
        assert (shown["model_step"], shown["seed"]) == (event["step"], len(pictures) % 2)
        pictures.append(path.read_bytes())
    assert len(set(pictures)) == 8


def test_what_the_run_recorded_is_known(run: Path, loaded: Loaded) -> None:
    """The largest trained grid, the area, the shift: what the command takes its defaults from."""
    assert loaded.about.limits == (3, 3, 3)  # 9 frames; 48 x 32 and 32 x 48
    assert loaded.about.area == 6
    assert (loaded.about.pixels, loaded.about.image_pixels, loaded.about.shift) == (1536, 1536, 1.0)
    assert (loaded.about.fps, loaded.about.base_tokens, loaded.about.conditioning) == (
        None,
        None,
        None,
    )
    assert loaded.about.path == run / "checkpoints" / "step_0000008"


def test_one_checkpoint_of_a_run_can_be_named(run: Path, loaded: Loaded) -> None:
    earlier = load_for_sampling(run / "checkpoints" / "step_0000004", CPU)
    assert earlier.step == 4
    assert not torch.equal(earlier.model.final.proj.weight, loaded.model.final.proj.weight)


# --- files ----------------------------------------------------------------------------------------


def test_shapes_and_files(loaded: Loaded, tmp_path: Path) -> None:
    videos = generate(loaded.model, loaded.vae, loaded.text.encode, REQUESTS, SETTINGS, CPU)
    for i, (request, video) in enumerate(zip(REQUESTS, videos, strict=True)):
        assert video.shape == (3, *_size(request))
        assert video.dtype == torch.uint8
        assert video.float().std() > 1  # not one flat colour
        path = save_media(video, tmp_path / "deep" / f"v1.{i}", fps=8)
        if request.frames == 1:
            assert path.name == f"v1.{i}.png"
            with Image.open(path) as image:
                # Lossless: the very pixels.
                shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            assert torch.equal(shown, video[:, 0])
        else:
            assert path.name == f"v1.{i}.mp4"
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                assert stream.average_rate == 8
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert np.stack(frames).shape == (*_size(request), 3)
    assert len(list((tmp_path / "deep").iterdir())) == len(REQUESTS)


@pytest.mark.parametrize("frames", [1, 5])
def test_saving_is_atomic(frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever system call fails, the old file stays and nothing else is left."""
    old = torch.zeros(3, frames, 16, 16, dtype=torch.uint8)
    new = torch.full_like(old, 200)
    path = save_media(old, tmp_path / "x")
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    def broken(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    failures: list[tuple[str, Callable[..., Any], int]] = [
        ("write_bytes", full, errno.ENOSPC),
        ("replace", broken, errno.EIO),
    ]
    for name, replacement, number in failures:
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, replacement)
            with pytest.raises(OSError) as caught:
                save_media(new, tmp_path / "x")
        assert caught.value.errno == number
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before
    assert save_media(new, tmp_path / "x") == path
    assert path.read_bytes() != before
