"""The VAE: one adapter interface, our small causal one that trains on a CPU in minutes, public ones."""

from goku.vae.causal_vae import GokuVAE, VAEConfig
from goku.vae.diffusers_vaes import DiffusersVAE, VAEDtype
from goku.vae.interface import STRIDES, Posterior, VideoVAE, latent_shape
from goku.vae.loading import has_vae, is_causal, load_vae, vae_folder
from goku.vae.tiling import decode_pieces
from goku.vae.training import VAETrainConfig, train_vae

__all__ = [
    "STRIDES",
    "DiffusersVAE",
    "GokuVAE",
    "Posterior",
    "VAEConfig",
    "VAEDtype",
    "VAETrainConfig",
    "VideoVAE",
    "decode_pieces",
    "has_vae",
    "is_causal",
    "latent_shape",
    "load_vae",
    "train_vae",
    "vae_folder",
]
