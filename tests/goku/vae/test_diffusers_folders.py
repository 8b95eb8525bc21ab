"""Folders of public VAEs: layouts, dtypes, fingerprints, and every refusal."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from goku.vae import GokuVAE, VAEConfig, decode_pieces, diffusers_vaes, load_vae
from goku.vae.refusals import _REASONS

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
Build = Callable[..., Any]
Make = Callable[..., torch.Tensor]
NAMES = ["AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan"]


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_pipelines_folder(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    (tmp_path / "vae").symlink_to(folders[name])
    (tmp_path / "model_index.json").write_text("{}")
    assert load_vae(tmp_path).fingerprint() == load_vae(folders[name]).fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_shards(tmp_path: Path, folders: dict[str, Path], name: str, build: Build) -> None:
    build(name).save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_vae(tmp_path).fingerprint() == load_vae(folders[name]).fingerprint()


def test_dtype(
    tmp_path: Path, folders: dict[str, Path], build: Build, clip: Make, latent: Make
) -> None:
    wan = folders["AutoencoderKLWan"]
    full, half = load_vae(wan), load_vae(wan, dtype="bfloat16")
    assert load_vae(wan, dtype="float32").fingerprint() == full.fingerprint()
    assert half.fingerprint() != full.fingerprint()
    found = half.encode(clip(5))
    assert found.mean.dtype == found.logvar.dtype == torch.float32
    assert 0 < (found.mean - full.encode(clip(5)).mean).abs().max() < 0.05
    assert half.decode(latent(2)).dtype == torch.float32
    build("AutoencoderKLWan").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert load_vae(tmp_path / "bf16").fingerprint() == half.fingerprint()
    # fp16 widens to fp32: every value is kept, and nothing is computed in fp16.
    halves = build("AutoencoderKLWan").to(torch.float16)
    halves.save_pretrained(tmp_path / "fp16")
    widened = load_vae(tmp_path / "fp16")
    assert widened.dtype == torch.float32
    state = halves.state_dict()
    assert all(torch.equal(v, state[k].float()) for k, v in widened.inner.state_dict().items())
    with pytest.raises(ValueError, match=r"vae\.dtype is 'float16'; allowed: auto, float32"):
        load_vae(wan, dtype="float16")  # type: ignore[arg-type]
    ours = GokuVAE(VAEConfig(channels=3, stem_width=8, width=8))
    ours.save(tmp_path / "ours")
    assert load_vae(tmp_path / "ours", dtype="bfloat16").latent_std.dtype == torch.bfloat16


def test_autocast_changes_no_latent(folders: dict[str, Path], clip: Make, latent: Make) -> None:
    vae = load_vae(folders["AutoencoderKLWan"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, pixels = vae.encode(clip(5)).mean, vae.decode(latent(2))
    assert torch.equal(inside, vae.encode(clip(5)).mean)
    assert torch.equal(pixels, vae.decode(latent(2)))


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_follows_what_decides_a_latent(
    tmp_path: Path, folders: dict[str, Path], name: str, build: Build
) -> None:
    first = load_vae(folders[name]).fingerprint()
    build(name, seed=1).save_pretrained(tmp_path / "weights")
    changed = {"AutoencoderKLWan": {"latents_mean": [0.5] * 16}}.get(name, {"scaling_factor": 2.0})
    build(name, **changed).save_pretrained(tmp_path / "config")
    found = {first, *(load_vae(tmp_path / each).fingerprint() for each in ("weights", "config"))}
    assert len(found) == 3
    # One bit of one weight; and where a clip is cut.
    vae = load_vae(folders[name])
    weight = next(vae.parameters())
    weight.data.view(torch.int32).view(-1)[3] ^= 1
    assert vae.fingerprint() != first
    for attribute in type(vae)._cutting:
        vae = load_vae(folders[name])
        usual = getattr(vae.inner, attribute)
        setattr(vae.inner, attribute, usual + 1)
        assert vae.fingerprint() != first
        setattr(vae.inner, attribute, usual)
        assert vae.fingerprint() == first
    # The version that wrote the folder decides nothing.
    config = json.loads((folders[name] / "config.json").read_text())
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / WEIGHTS).symlink_to(folders[name] / WEIGHTS)
    config["_diffusers_version"] = "0.1.0"
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    assert load_vae(tmp_path / "older").fingerprint() == first


def edited(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


WAN, HUNYUAN, COG = "AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (WAN, edited(patch_size=2, is_residual=True), r"patch_size = 2.*Wan 2\.2.*4x16x16"),
        (WAN, edited(is_residual=True), r"is_residual = True.*Wan 2\.2"),
        (WAN, edited(scale_factor_spatial=16), "scale_factor_spatial = 16, allowed is 8"),
        (WAN, edited(scale_factor_temporal=8), "scale_factor_temporal = 8, allowed is 4"),
        (WAN, edited(temperal_downsample=[True] * 3), "temperal_downsample = .*two True"),
        (WAN, edited(dim_mult=[1, 2, 2]), r"dim_mult = \[1, 2, 2\], allowed are 4 values"),
        (WAN, edited(in_channels=4), "in_channels = 4, allowed is 3"),
        (WAN, edited(latents_mean=[0.0] * 4), "latents_mean = .*z_dim = 16"),
        (WAN, edited(latents_mean=[float("nan")] * 16), "latents_mean = .*finite"),
        (WAN, edited(latents_std=[0.0] * 16), "latents_std = .*positive"),
        (HUNYUAN, edited(spatial_compression_ratio=16), "spatial_compression_ratio = 16.*is 8"),
        (HUNYUAN, edited(temporal_compression_ratio=8), "temporal_compression_ratio = 8.*is 4"),
        (HUNYUAN, edited(scaling_factor=0), "scaling_factor = 0, allowed are positive"),
        (COG, edited(scaling_factor=None), "scaling_factor = None, allowed are positive"),
        (COG, edited(temporal_compression_ratio=8), "temporal_compression_ratio = 8.*is 4"),
        (COG, edited(block_out_channels=[8, 16, 16]), "block_out_channels = .*4 values"),
        (COG, edited(shift_factor=0.1), r"shift_factor = 0\.1, allowed is None"),
        (COG, edited(latents_mean=[0.0]), r"latents_mean = \[0\.0\], allowed is None"),
        (COG, edited(latents_std=[1.0]), r"latents_std = \[1\.0\], allowed is None"),
        (COG, edited(use_quant_conv=True), "use_quant_conv = True, allowed is False"),
        (COG, edited(use_post_quant_conv=True), "use_post_quant_conv = True, allowed is False"),
        (WAN, edited(base_dim=16), "AutoencoderKLWan"),
        (WAN, weights(lambda s: s.pop("quant_conv.bias")), r"lacks weights, 1 .*quant_conv\.bias"),
        (COG, weights(lambda s: s.update(extra=torch.ones(1))), "holds unknown weights, 1 .*extra"),
        (
            HUNYUAN,
            weights(lambda s: s["quant_conv.bias"].fill_(float("nan"))),
            r"quant_conv\.bias holds values that are not finite",
        ),
        (
            WAN,
            weights(lambda s: s.update({"quant_conv.bias": s["quant_conv.bias"].bfloat16()})),
            r"stored as BF16, F32.*set vae\.dtype",
        ),
        (WAN, truncated, "AutoencoderKLWan"),
        (WAN, pickled, r"holds no \*\.safetensors file"),
        (WAN, lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
        (WAN, lambda folder: (folder / "config.json").write_text("{"), "damaged or truncated"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path,
    folders: dict[str, Path],
    name: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    for file in folders[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load_vae(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_several_dtypes_are_read_when_one_is_asked_for(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    for file in folders[WAN].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights(lambda s: s.update({"quant_conv.bias": s["quant_conv.bias"].bfloat16()}))(tmp_path)
    assert load_vae(tmp_path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("AutoencoderKLHunyuanVideo15", "4x16x16, with 32 latent channels"),
        ("AutoencoderKLCosmos", "8x8x8"),
        ("AutoencoderKLMochi", "6x8x8, with 12 latent channels"),
        ("AutoencoderKLLTXVideo", "8x32x32, with 128 latent channels"),
        ("AutoencoderKLAllegro", "4 latent channels"),
        ("AutoencoderKL", "images alone"),
        ("AutoencoderTiny", "images alone"),
        ("AsymmetricAutoencoderKL", "images alone"),
        ("AutoencoderDC", "images alone"),
        ("AutoencoderKLTomorrow", "not known"),
        (7, "not known"),
    ],
)
def test_others_are_refused_by_name_and_reason(tmp_path: Path, name: object, why: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=why) as caught:
        load_vae(tmp_path)
    message = str(caught.value)
    assert repr(name) in message
    assert all(allowed in message for allowed in ["GokuVAE", *NAMES])


def test_the_refused_exist_in_diffusers() -> None:
    """A misspelt name would never be refused with its reason."""
    assert [name for name in _REASONS if not hasattr(diffusers, name)] == []


def test_stated_strides_are_those_of_diffusers() -> None:
    """The reasons give numbers; the classes' defaults are the same."""

    def default(name: str, field: str) -> object:
        return inspect.signature(getattr(diffusers, name).__init__).parameters[field].default

    assert default("AutoencoderKLAllegro", "latent_channels") == 4
    assert default("AutoencoderKLMochi", "latent_channels") == 12
    assert default("AutoencoderKLLTXVideo", "latent_channels") == 128
    assert default("AutoencoderKLHunyuanVideo15", "latent_channels") == 32
    assert default("AutoencoderKLHunyuanVideo15", "spatial_compression_ratio") == 16
    assert default("AutoencoderKLCosmos", "spatial_compression_ratio") == 8
    assert default("AutoencoderKLCosmos", "temporal_compression_ratio") == 8


def test_without_diffusers_the_extra_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"AutoencoderKLWan.*pip install 'goku\[vae\]'"):
        load_vae(folders[WAN])


@pytest.mark.parametrize("name", NAMES)
def test_bad_tensors_are_named(
    folders: dict[str, Path], name: str, clip: Make, latent: Make
) -> None:
    vae = load_vae(folders[name])
    with pytest.raises(ValueError, match="frames = 4"):
        vae.encode(clip(4))
    with pytest.raises(ValueError, match="height = 12"):
        vae.encode(clip(1, height=12))
    with pytest.raises(ValueError, match=r"needs \(B, 16, T, H, W\)"):
        vae.decode(latent(1)[:, :4])
    with pytest.raises(ValueError, match=r"needs \(C, T, H, W\)"):
        list(decode_pieces(vae, latent(1)))


def test_a_fingerprint_is_computed_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gigabytes of weights, asked for by the cache, the trainer and the stages."""
    vae = load_vae(folders["AutoencoderKLWan"])
    made: list[str] = []
    honest = diffusers_vaes.hashlib.sha256

    def counted(data: bytes) -> Any:
        made.append("")
        return honest(data)

    monkeypatch.setattr(diffusers_vaes.hashlib, "sha256", counted)
    first = vae.fingerprint()
    assert [vae.fingerprint() for _ in range(3)] == [first] * 3
    assert len(made) == 1
    # Weights of another dtype are other weights.
    assert vae.to(torch.bfloat16).fingerprint() != first
    assert len(made) == 2
