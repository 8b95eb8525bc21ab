"""Bad input: exit code 2, one message that names the thing, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from goku.cli import main
from goku.metrics import read_log
from goku.vae import GokuVAE, VAEConfig
from goku_runtime import checkpoint

WriteConfig = Callable[..., Path]


def _hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a hash of its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(words, *arguments): the command says these words on stderr and exits with 2."""

    def check(words: list[str], *arguments: object) -> str:
        capfd.readouterr()
        # An exception that is no bad input would come out of main and fail the test.
        assert main([str(argument) for argument in arguments]) == 2
        printed, error = capfd.readouterr()
        assert error.strip().startswith(f"goku {arguments[0]}: ")
        _assert_clear(error, words)
        assert printed == ""
        return error

    return check


def _assert_clear(error: str, words: list[str]) -> None:
    assert "Traceback" not in error
    missing = [word for word in words if word not in error]
    assert not missing, error


def _spoil_video(folder: Path) -> str:
    """The clip's last half is noise behind an intact header: it opens, and does not decode."""
    path = folder / "clip1.mp4"
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    for i in range(start, len(data) if data.index(b"moov") < start else data.index(b"moov") - 4):
        data[i] = (i * 2654435761 >> 7) & 0xFF
    path.write_bytes(bytes(data))
    return path.name


def _empty_image(folder: Path) -> str:
    (folder / "image1.png").write_bytes(b"")
    return "image1.png"


def _missing_caption(folder: Path) -> str:
    (folder / "image2.txt").unlink()
    return "image2.png"


BAD_MEDIA: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "corrupt video": (_spoil_video, ["1 of 5 items"]),
    "zero-byte image": (_empty_image, ["1 of 5 items", "empty"]),
    "missing caption": (_missing_caption, ["missing caption: no image2.txt"]),
}


@pytest.fixture
def copied_media(media: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(media, tmp_path / "copied"))


@pytest.mark.parametrize("case", BAD_MEDIA)
def test_bad_media_are_named(
    case: str, copied_media: Path, write_config: WriteConfig, refused: Any, tmp_path: Path
) -> None:
    spoil, words = BAD_MEDIA[case]
    name = spoil(copied_media)
    config = write_config(tmp_path / "out", data={"path": str(copied_media)})
    refused([name, *words], "train", config)
    assert not (tmp_path / "out").exists()


def test_the_process_itself_refuses_and_prints_no_traceback(
    copied_media: Path, write_config: WriteConfig, tmp_path: Path, goku: Any
) -> None:
    """All three at once, in one message, from a process of its own."""
    names = [spoil(copied_media) for spoil, _ in BAD_MEDIA.values()]
    config = write_config(tmp_path / "out", data={"path": str(copied_media)})
    result = goku("train", config)
    assert result.returncode == 2
    assert result.stdout == ""
    _assert_clear(result.stderr, ["goku train: ", "3 of 5 items cannot be used", *names])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=1e-3", ["optimiser", "unknown key", "did you mean optimizer?"]),
        ("model.deph=3", ["model.deph", "found 3", "did you mean model.depth?"]),
        ("grad_clip=3", ["grad_clip", "did you mean", "optimizer.grad_clip"]),
        ("train.steps=many", ["train.steps", "'many'", "an integer"]),
        ("train.steps=0", ["train.steps", "0", "allowed: >= 1"]),
        ("train.precision=fp8", ["train.precision", "fp8", "float32, bfloat16"]),
        ("train.steps", ["train.steps", "section.key=value"]),
        ("parallel.sp=0", ["parallel", "sp is 0", ">= 1"]),
        ("parallel.sp=3", ["sp=3", "1 process"]),
        ("parallel.sp=25", ["parallel.sp is 25", "tokens_per_pack = 24"]),
        ("sharding.prefetch=-1", ["sharding", "prefetch is -1", ">= 0"]),
        (
            "activation_checkpointing.mode=some",
            ["activation_checkpointing.mode", "some", "every_nth"],
        ),
    ],
)
def test_bad_config_keys_and_values(
    override: str, words: list[str], write_config: WriteConfig, refused: Any, tmp_path: Path
) -> None:
    refused(words, "train", write_config(tmp_path / "out"), override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--dry-run"], ["cache", "latents"], ["cache", "text"]]
)
def test_a_folder_of_other_things_is_refused_before_any_work(
    command: list[str], write_config: WriteConfig, tmp_path: Path, capfd: Any
) -> None:
    """Of a run and of a recipe; nothing is put into it."""
    home = tmp_path / "home"
    (home / "Videos").mkdir(parents=True)
    run = write_config(home, data={"cache": None})
    tree = yaml.safe_load(run.read_text())
    tree["sources"] = {"all": {"path": tree["data"].pop("path")}}
    del tree["data"]["cache"]  # then in `out`
    tree["stages"] = {"first": {"mix": {"all": {"image": 1}}}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    for config in (run, recipe):
        assert main([*command, str(config)]) == 2
        words = f"out is {home}, which holds other things (Videos) and nothing of goku; allowed: "
        _assert_clear(capfd.readouterr().err, [f"goku {command[0]}: {words}"])
        assert [path.name for path in home.rglob("*")] == ["Videos"]


_NO_DATASET = "no such file or folder; allowed: a folder, or a .jsonl"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=DIR/absent"], f"data.path: DIR/absent: {_NO_DATASET}"),
        (["data.path=DIR/file"], "data.path: DIR/file: is no dataset; allowed: a folder, or a "),
        (["unseen=DIR/absent"], f"unseen: DIR/absent: {_NO_DATASET}"),
        (
            ["data.path=null", "data.sources={a: {path: DIR/absent}}"],
            f"sources.a.path: DIR/absent: {_NO_DATASET}",
        ),
        # Before a VAE is trained.
        (["data.path=DIR/absent", "vae={path: DIR/new, train: {}}"], "data.path: DIR/absent: no "),
        (["unseen=DIR/absent", "vae={path: DIR/new, train: {}}"], "unseen: DIR/absent: no such "),
        (["text.path=DIR/absent"], "text.path is DIR/absent, which is not a folder; allowed: the "),
        (["text.path=DIR/broken"], "text.path: DIR/broken/config.json cannot be read: "),
        (["vae.path=DIR/absent"], "vae.path is DIR/absent, which holds no VAE; allowed: a VAE's "),
        (["vae.path=DIR/broken"], "vae.path: DIR/broken/config.json is damaged or truncated: "),
        (
            ["vae={path: DIR/file, train: {}}"],
            "vae.path is DIR/file: DIR/file is no folder; allowed: a folder, there or not",
        ),
        (["data.cache=DIR/file"], "data.cache is DIR/file: DIR/file is no folder; allowed: a "),
        (["data.cache=DIR/file/in"], "data.cache is DIR/file/in: DIR/file is no folder; allowed: "),
        (["out=DIR/file"], "out is DIR/file: DIR/file is no folder; allowed: a folder, there or "),
        (
            ["validation.file=DIR/absent", "validation.every=1"],
            "validation.file is DIR/absent, which cannot be read (No such file or directory); allowed: ",
        ),
    ],
)
def test_a_wrong_path_is_named_with_its_field(
    overrides: list[str], said: str, write_config: WriteConfig, tmp_path: Path, capfd: Any
) -> None:
    """By a dry run as well, but for the data, at which it does not look, and what a text encoder's folder holds."""
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    config = write_config(tmp_path / "out")
    words = [word.replace("DIR", str(tmp_path)) for word in [said, *overrides]]
    looked_at = not said.startswith(("data.path", "unseen", "sources", "text.path: "))
    for dry in [[], ["--dry-run"]][: 1 + looked_at]:
        assert main(["train", str(config), *words[1:], *dry]) == 2
        error = capfd.readouterr().err
        if dry and said.startswith("text.path"):
            words[0] = f"text.path is {tmp_path}/absent, which holds no text encoder; allowed: "
        _assert_clear(error, [f"goku train: {words[0]}"])
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "new").exists()


def test_operators_that_do_not_exist_are_named_before_any_work(
    write_config: WriteConfig, refused: Any, tmp_path: Path
) -> None:
    wanted = {"mode": "operators", "save": ["aten::nothing"]}
    config = write_config(tmp_path / "out", activation_checkpointing=wanted)
    refused(["activation_checkpointing: ", "aten::nothing"], "train", config)
    assert not (tmp_path / "out").exists()


def test_missing_config_file_and_one_that_is_no_yaml(refused: Any, tmp_path: Path) -> None:
    for verb in ("train", "doctor", "cache"):
        what = ["text"] if verb == "cache" else []
        absent = tmp_path / "absent.yaml"
        words = [f"goku {verb}: {absent}: no such file or directory; allowed: a YAML file\n"]
        refused(words, verb, *what, absent)
    refused([f"{tmp_path}: is a directory; allowed: a YAML file"], "train", tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {steps: 3\n")
    refused(["bad.yaml", "must be YAML", "line 2"], "train", bad)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_budget_smaller_than_one_sample_names_the_sample(
    write_config: WriteConfig, refused: Any, tmp_path: Path
) -> None:
    # clip1.mp4 has 9 frames of 32 x 48: a grid of 3 x 2 x 3.
    config = write_config(tmp_path / "out")
    words = ["clip1.mp4", "3 x 2 x 3 = 18 tokens", "tokens_per_pack=17", '"cut"']
    refused(words, "train", config, "packing.tokens_per_pack=17")
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_geometry(
    settings: dict[str, Any], write_config: WriteConfig, refused: Any, tmp_path: Path
) -> None:
    # The config against itself, and the config against the VAE's folder.
    config = write_config(tmp_path / "out")
    refused(
        ["model.latent_channels is 16", "vae.model.channels is 8"],
        "train", config, "vae.model.channels=8",
    )  # fmt: skip
    refused(
        [settings["vae"]["path"], "16 latent channels", "vae.model.channels is 8"],
        "train", config, "vae.model.channels=8", "model.latent_channels=8",
    )  # fmt: skip
    strides = Path(shutil.copytree(settings["vae"]["path"], tmp_path / "strides"))
    written = json.loads((strides / "config.json").read_text()) | {"strides": [8, 16, 16]}
    (strides / "config.json").write_text(json.dumps(written))
    refused(["strides", "[8, 16, 16]", "[4, 8, 8]"], "train", config, f"vae.path={strides}")
    refused(["vae.path", "nowhere", "vae.train"], "train", config, f"vae.path={tmp_path}/nowhere")
    assert not (tmp_path / "out").exists()


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with its only checkpoint at the end."""
    out = tmp_path_factory.mktemp("finished") / "run"
    merged = settings | {"out": str(out), "train": settings["train"] | {"steps": 4}}
    config = out.parent / "run.yaml"
    config.write_text(yaml.safe_dump(merged))
    assert main(["train", str(config)]) == 0
    return out


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


CHECKPOINT_FILES = ["__0_0.distcp", "__0_0.crc", "index.json", "state.json", "manifest.json"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    """In a data file where sampling reads, too: in the averaged weights."""
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    if path.suffix == ".distcp":
        tensors = json.loads(path.with_name("index.json").read_bytes())["tensors"]
        place = next(t["places"][0][2] for name, t in tensors.items() if name.startswith("ema."))
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_neither_resumed_nor_sampled_nor_overwritten(
    damage: Callable[[Path], None],
    name: str,
    run_copy: Path,
    write_config: WriteConfig,
    refused: Any,
    tmp_path: Path,
) -> None:
    path = run_copy / "checkpoints" / "step_0000004"
    others = {".metadata", "__values.distcp"}  # stock DCP's; only their sizes are looked at
    assert {file.name for file in path.iterdir()} == {*CHECKPOINT_FILES, *others}
    damage(path / name)
    before = _hashes(run_copy)
    refused(["step_0000004", name], "train", write_config(run_copy), "train.steps=8")
    assert _hashes(run_copy) == before
    samples = tmp_path / "samples"
    sample = ["sample", run_copy, "--prompt", "x", "--height", 32, "--width", 32, "--out", samples]
    refused(["step_0000004", name], *sample)
    assert _hashes(run_copy) == before
    assert not samples.exists()


@pytest.fixture(params=["full disk", "file size limit"])
def disk(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None], Callable[[], None] | None]]:
    """(folder, fill it, free it, preexec): a real full file system where one may be mounted.

    Filled, it has room for the log's lines and not for a checkpoint. Where nothing can be mounted
    (and in the second case) files may not grow past such a size, which the kernel reports in the
    same place.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    # The checkpoint of this model has about 1 MB, the log some kB.
    room = 256 * 1024
    mounted = request.param == "full disk" and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    filler = folder / "filler"

    def fill() -> None:
        space = shutil.disk_usage(folder)
        with filler.open("wb") as file:
            file.write(b"x" * (space.free - room))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    def nothing() -> None:
        return None

    try:
        if mounted:
            yield folder, fill, filler.unlink, None
        else:
            yield folder, nothing, nothing, limit
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_full_while_saving_leaves_the_previous_checkpoint(
    disk: Any, write_config: WriteConfig, goku: Any
) -> None:
    folder, fill, free, preexec = disk
    out = folder / "run"
    config = write_config(out)
    assert main(["train", str(config), "train.steps=4"]) == 0
    checkpoints = out / "checkpoints"
    first = checkpoints / "step_0000004"
    assert checkpoint.verify(first).total_bytes > 2 * 256 * 1024
    before = _hashes(first)

    fill()
    result = goku("train", config, preexec=preexec)
    assert result.returncode == 1, result.stderr
    reason = "No space left on device" if preexec is None else "File too large"
    # Below the line that says where the run resumed stands the error, and nothing else.
    _assert_clear(result.stderr.splitlines()[-1], ["goku train: ", reason])
    _assert_clear(result.stderr, ["resumed at step 4"])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_0000004"]
    assert _hashes(first) == before
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert checkpoint.latest(checkpoints) == first

    free()
    assert main(["train", str(config)]) == 0
    events = read_log(out / "train.jsonl")
    assert [e["step"] for e in events if e["event"] == "resume"] == [4, 4]
    assert checkpoint.latest(checkpoints) == checkpoints / "step_0000008"
    # Steps 5 to 8 were done twice, from the same state to the same losses.
    losses = [(e["step"], e["loss"]) for e in events if e["event"] == "step"]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
    assert losses[4:8] == losses[8:]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.depth=3", ["model.depth: 2 -> 3"]),
        ("seed=6", ["seed: 5 -> 6"]),
        ("optimizer.lr=1e-3", ["optimizer.lr: 0.003 -> 0.001"]),
        ("train.precision=bfloat16", ["train.precision: float32 -> bfloat16"]),
        ("data.max_frames=5", ["data.max_frames: 9 -> 5"]),
    ],
)
def test_an_incompatible_config_is_refused_with_the_difference(
    override: str, words: list[str], run_copy: Path, write_config: WriteConfig, refused: Any
) -> None:
    before = _hashes(run_copy)
    error = refused(
        ["step_0000004", "incompatible", *words],
        "train", write_config(run_copy), "train.steps=8", override,
    )  # fmt: skip
    # train.steps is free, and what did not change is not shown.
    assert "train.steps" not in error
    assert error.count(" -> ") == 1
    assert _hashes(run_copy) == before


def test_another_run_is_refused_before_any_work(
    run_copy: Path, write_config: WriteConfig, refused: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before a VAE is looked for, which may have to be trained; a dry run says it below its report."""
    other = ["train", str(write_config(run_copy)), "model.depth=3", "vae.path=/nowhere"]
    words = ["step_0000004", "incompatible", "model.depth: 2 -> 3"]
    assert "holds no VAE" not in refused(words, *other)
    assert main([*other, "--dry-run"]) == 2
    printed, error = capfd.readouterr()
    _assert_clear(error, [*words, "holds no VAE"])
    assert "tokens per step" in printed


def test_out_is_a_folder(write_config: WriteConfig, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file.png").touch()
    config = write_config(tmp_path / "any")
    place = tmp_path / "file.png"
    for out in (place, place / "run"):
        words = [f"out is {out}: {place} is no folder; allowed"]
        refused(words, "train", config, f"out={out}", "vae.path=/nowhere")


def test_kernels_that_cannot_run_here_are_refused(
    write_config: WriteConfig, tmp_path: Path, refused: Any
) -> None:
    config = write_config(tmp_path / "fused")
    words = ["kernels.backend is 'triton', but", "not available", "always is"]
    refused(words, "train", config, "kernels.backend=triton")
    assert not (tmp_path / "fused").exists()


def test_other_media_under_the_same_config_are_refused(
    run_copy: Path, copied_media: Path, write_config: WriteConfig, refused: Any
) -> None:
    (copied_media / "image0.txt").write_text("another caption")
    before = _hashes(run_copy)
    config = write_config(run_copy, data={"path": str(copied_media)}, train={"steps": 8})
    refused(["step_0000004", "incompatible", "items", "captions"], "train", config)
    assert _hashes(run_copy) == before


# --- sampling and the doctor ----------------------------------------------------------------------


def test_sampling_from_nothing(refused: Any, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty", tmp_path / "samples"
    empty.mkdir()
    for folder, words in ((empty, "no checkpoint"), (tmp_path / "absent", "no such folder")):
        refused([str(folder), words], "sample", folder, "--prompt", "x", "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--height", "33"], ["height is 33", "multiples of 16"]),
        (["--width", "0"], ["width is 0", "multiples of 16"]),
        (["--frames", "4"], ["frames is 4", "4k + 1"]),
        (["--seed", "-1"], ["seed is -1", "0 to 2**64 - 1"]),
        (["--count", "0"], ["--count is 0", ">= 1"]),
        (["--steps", "0"], ["steps is 0", ">= 1"]),
        (["--shift", "0"], ["shift is 0", "> 0"]),
        (["--fps", "0"], ["--fps is 0", "1 to 2**31 - 1"]),
        (["--guidance", "nan"], ["guidance is nan"]),
        (["--sp", "9"], ["--sp is 9", "1 to 8"]),
        (["--sp", "2"], ["sp=2", "1 process"]),
    ],
)
def test_sampling_values_out_of_range(
    arguments: list[str], words: list[str], finished: Path, refused: Any, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    size = ["--height", 32, "--width", 32, "--frames", 5]
    refused(words, "sample", finished, "--prompt", "x", *size, "--out", out, *arguments)
    assert not out.exists()


def test_sampling_without_a_prompt(finished: Path, refused: Any, tmp_path: Path) -> None:
    refused(["no prompt", "--prompts"], "sample", finished, "--out", tmp_path / "samples")
    refused(["absent.txt"], "sample", finished, "--prompts", tmp_path / "absent.txt")
    blank = tmp_path / "blank.txt"
    blank.write_text("\n  \n")
    refused(["no prompt"], "sample", finished, "--prompts", blank, "--out", tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_sampling_with_another_vae_than_the_model_was_trained_with(
    settings: dict[str, Any], refused: Any, tmp_path: Path
) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(settings["vae"]["path"], vae)
    section = settings["vae"] | {"path": str(vae)}
    run = settings | {"out": str(tmp_path / "run"), "vae": section}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run | {"train": settings["train"] | {"steps": 1}}))
    assert main(["train", str(config)]) == 0
    shutil.rmtree(vae)
    sample = ["sample", tmp_path / "run", "--prompt", "x", "--out", tmp_path / "samples"]
    refused([str(vae)], *sample)
    GokuVAE(VAEConfig(**settings["vae"]["model"], channels=8), seed=3).save(vae)
    refused(["8 channels", "16"], *sample)
    assert not (tmp_path / "samples").exists()


def test_the_doctor_tells_good_from_bad(
    media: Path, copied_media: Path, capfd: pytest.CaptureFixture[str], goku: Any
) -> None:
    for spoil, _ in BAD_MEDIA.values():
        spoil(copied_media)
    before = _hashes(copied_media)
    options = ["--image-pixels", "1536", "--video-pixels", "1536", "--workers", "0"]
    assert main(["doctor", str(copied_media), *options]) == 2
    printed, error = capfd.readouterr()
    assert error == ""
    _assert_clear(printed, ["5 listed", "3 unusable", "Not ready for training: "])
    _assert_clear(printed, ["clip1.mp4: ", "image1.png: ", "image2.png: missing caption"])

    result = goku("doctor", copied_media, "--json", *options)
    assert result.returncode == 2
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["usable"] == {"image": 1, "video": 1}
    reasons = {row["name"]: row["reason"] for row in report["unusable"]}
    assert sorted(reasons) == ["clip1.mp4", "image1.png", "image2.png"]
    assert all(reasons.values())
    assert _hashes(copied_media) == before

    assert main(["doctor", str(media), "--json", *options]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] is True
    assert report["usable"] == {"image": 3, "video": 2}
    assert main(["doctor", str(media), *options]) == 0
    assert "Ready for training." in capfd.readouterr().out.splitlines()[-1]


def test_the_doctor_on_what_is_no_dataset(
    refused: Any, tmp_path: Path, write_config: WriteConfig, media: Path
) -> None:
    refused(
        ["absent: no such file or folder; allowed: a folder, or"], "doctor", tmp_path / "absent"
    )
    (tmp_path / "empty").mkdir()
    refused(["empty", "no media found"], "doctor", tmp_path / "empty")
    refused(["max_frames: 4", "4k+1"], "doctor", media, "--max-frames", 4)
    refused(["tokens_per_pack", "0"], "doctor", media, "--tokens-per-pack", 0)


def test_the_doctor_uses_the_budgets_of_a_config(
    media: Path,
    write_config: WriteConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "out")
    assert main(["doctor", str(media), "--config", str(config), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["packing"]["tokens_per_step"] == 48
    assert report["packing"]["tokens_per_pack"] == 24
    # One clip of 18 tokens does not fit a pack of 17: the doctor says what training would say.
    options = ["--config", str(config), "--tokens-per-pack", "17"]
    assert main(["doctor", str(media), *options]) == 2
    assert "clip1.mp4: 3 x 2 x 3 = 18 tokens" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()
