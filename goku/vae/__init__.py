"""The VAE: one adapter interface, and our small causal one that trains on a CPU in minutes."""

from goku.vae.causal_vae import GokuVAE, VAEConfig
from goku.vae.interface import STRIDES, Posterior, VideoVAE, latent_shape
from goku.vae.loading import load_vae
from goku.vae.training import VAETrainConfig, train_vae

__all__ = [
    "STRIDES",
    "GokuVAE",
    "Posterior",
    "VAEConfig",
    "VAETrainConfig",
    "VideoVAE",
    "latent_shape",
    "load_vae",
    "train_vae",
]
