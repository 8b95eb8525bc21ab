"""Saving and loading: the same VAE comes back, and whatever does not fit is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from goku.vae import GokuVAE, VAEConfig, load_vae
from goku.vae.folder import CONFIG, WEIGHTS, write_folder

SMALL = VAEConfig(channels=3, stem_width=8, width=12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vae = GokuVAE(SMALL, seed=3)
    with torch.no_grad():
        vae.latent_std.fill_(1.5)
    vae.save(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    vae = GokuVAE(SMALL, seed=3).to(dtype)
    vae.save(tmp_path / "a" / "b")
    loaded = load_vae(tmp_path / "a" / "b")
    assert loaded.fingerprint() == vae.fingerprint()
    assert loaded.config == vae.config
    assert not loaded.training
    video = torch.zeros(1, 3, 5, 8, 16, dtype=dtype)
    assert torch.equal(loaded.encode(video).mean, vae.encode(video).mean)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [CONFIG, WEIGHTS]


def test_statistics_are_kept(folder: Path) -> None:
    assert torch.equal(load_vae(folder).latent_std, torch.full((3,), 1.5))


def test_saving_over_another(folder: Path) -> None:
    other = GokuVAE(VAEConfig(channels=4, stem_width=8, width=8))
    other.save(folder)
    assert load_vae(folder).fingerprint() == other.fingerprint()


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            if value is None:
                del config[name]
            else:
                config[name] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return apply


def flip_two_bits(folder: Path) -> None:
    """In the lowest byte of two numbers: finite, and far too small to see."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-4] ^= 1
    content[-400] ^= 1
    (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(CONFIG), r"config\.json does not exist"),
        (remove(WEIGHTS), r"model\.safetensors does not exist"),
        (truncate(WEIGHTS, 0.9), r"model\.safetensors is damaged or truncated"),
        (truncate(WEIGHTS, 0.001), r"model\.safetensors is damaged or truncated"),
        (truncate(WEIGHTS, 0.0), r"model\.safetensors is damaged or truncated"),
        (truncate(CONFIG, 0.5), r"config\.json is damaged or truncated"),
        (lambda f: (f / CONFIG).write_text("[]"), r"config\.json holds list"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), r"config\.json is damaged"),
        (edit(strides=[4, 16, 16]), r"strides \(t, h, w\) = \[4, 16, 16\].*\[4, 8, 8\]"),
        (edit(_class="AutoencoderKLWan"), r"_class = 'AutoencoderKLWan'"),
        (edit(width=None), r"missing or unknown: width"),
        (edit(colour=1), r"missing or unknown: colour"),
        (edit(width="12"), r"width = '12'"),
        (edit(width=True), r"width = True"),
        (edit(width=0), r"config\.json: width = 0"),
        (edit(width=16), r"does not fit config\.json: .* has shape"),
        (edit(channels=4), r"does not fit config\.json: .* has shape"),
        (edit(decoder_depth=5), r"missing or unknown decoder\.body\.4"),
        (weights(lambda s: s.pop("latent_std")), r"missing or unknown latent_std"),
        (weights(lambda s: s.update(extra=torch.ones(1))), r"missing or unknown extra"),
        (weights(lambda s: s["latent_mean"].fill_(float("nan"))), r"latent_mean .* not finite"),
        (weights(lambda s: s["latent_std"][0].fill_(0)), r"model\.safetensors: latent_std .* <= 0"),
        (weights(lambda s: s["latent_std"][1].fill_(-1)), r"latent_std holds values <= 0"),
        (weights(lambda s: s["latent_mean"].add_(1)), r"model\.safetensors was altered since"),
        (flip_two_bits, r"model\.safetensors was altered since it was saved"),
        (edit(fingerprint=None), r"config\.json: fingerprint = None.*GokuVAE\.save.*required"),
        (edit(fingerprint=7), r"config\.json: fingerprint = 7"),
        (edit(fingerprint="0" * 64), r"model\.safetensors was altered .* config\.json says 0{64}"),
        (
            weights(lambda s: s.update(latent_mean=s["latent_mean"].double())),
            r"mixes dtypes torch\.float32, torch\.float64",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_vae(folder)


def test_a_failed_write_leaves_the_old_vae(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_vae(folder).fingerprint()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goku.vae.folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        GokuVAE(SMALL, seed=9).save(folder)
    assert load_vae(folder).fingerprint() == before
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_write_folder_names_what_safetensors_refuses(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(OSError, match="taken"):
        write_folder(tmp_path / "taken", {}, {"a": torch.ones(1)})


def test_a_kill_between_the_two_renames_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        GokuVAE(SMALL, seed=9).save(folder)
    # Both are whole and fit each other; only the fingerprint tells.
    with pytest.raises(ValueError, match=r"is not of the config\.json beside it"):
        load_vae(folder)


def test_files_are_on_the_disk_before_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def renamed(source: Path, target: Path) -> None:
        done.append(f"rename {target.name}")
        replace(source, target)

    def synced(descriptor: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr("os.replace", renamed)
    monkeypatch.setattr("os.fsync", synced)
    GokuVAE(SMALL).save(tmp_path / "vae")
    assert done == [
        f"sync .{WEIGHTS}.partial",
        f"sync .{CONFIG}.partial",
        f"rename {WEIGHTS}",
        "sync vae",
        f"rename {CONFIG}",
        "sync vae",
    ]
