"""The mathematics of rectified-flow training as FLUX.1 uses it, and small helpers for graph mode.

Shapes: B batch, C latent channels, H and W latent height and width. Host-side functions take and give NumPy, the others MindSpore
tensors, in graph mode and PyNative alike.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import ops

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


@ms.jit_class
class AttrJitWrapper:
    """Attributes that a graph may read. Give it only what `forward` reads: that is the list of flags that change the math."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


# ---- on the host ---------------------------------------------------------------------------------


def sample_density(
    rng: np.random.Generator, scheme: str, logit_mean: float, logit_std: float, mode_scale: float
) -> float:
    """One u in [0, 1]: where on the path from image (0) to noise (1, index 0) to train.

    Source: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 3.1.
    """
    if scheme == "logit_normal":
        # tanh saturates where exp overflows.
        return 0.5 * (1.0 + math.tanh(0.5 * (logit_mean + logit_std * rng.standard_normal())))
    u = rng.random()
    if scheme == "mode":
        u = 1.0 - u - mode_scale * (math.cos(math.pi * u / 2.0) ** 2 - 1.0 + u)
    return u


def density_to_index(u: float, num_train_timesteps: int) -> int:
    """floor(N u), kept inside the table: the closed ends of `mode` and a saturated sigmoid reach u = 1."""
    return min(max(int(u * num_train_timesteps), 0), num_train_timesteps - 1)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """sigma to s sigma / (1 + (s - 1) sigma): more of the path near the noise, for large pictures. arXiv 2403.03206, equation 23."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def resolution_shift(image_tokens: int, config: dict) -> float:
    """exp(mu), mu linear in the number of image tokens between the scheduler's two anchors, as FLUX samples with."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return math.exp(config["base_shift"] + slope * (image_tokens - low))


def latent_scale(vae: dict) -> tuple:
    """(shift, scale) of a VAE's config: a model's latents are (z - shift) scale. Floats, or float32 arrays [1, C, 1, 1].

    With latents_mean and latents_std, a mean and a spread of every channel, they are mean and scaling_factor / std.
    """
    if vae.get("latents_mean") is None:
        return vae.get("shift_factor") or 0.0, vae["scaling_factor"]
    mean, std = (np.array(vae[key], np.float32).reshape(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, np.float32(vae["scaling_factor"]) / std


# ---- in the step ---------------------------------------------------------------------------------


def get_sigmas(table: ms.Tensor, indices: ms.Tensor, n_dim: int = 4) -> ms.Tensor:
    """Entries [B] of a table [N] as [B, 1, ...] with n_dim axes. By index: a graph cannot search for a timestep."""
    return table[indices].reshape((-1,) + (1,) * (n_dim - 1))


def sample_posterior(moments: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
    """Mean and log-variance [B, 2C, H, W] with standard normal noise [B, C, H, W] to a latent [B, C, H, W], in float32.

    The log-variance is clamped to [-30, 20] as in the latent-diffusion VAE (arXiv 2112.10752).
    """
    mean, logvar = ops.chunk(moments.to(ms.float32), 2, axis=1)
    return mean + ops.exp(0.5 * ops.clamp(logvar, -30.0, 20.0)) * noise


def scale_constants(vae: dict) -> tuple:
    """`latent_scale` as constants of a graph."""
    return tuple(ms.Tensor(value) if isinstance(value, np.ndarray) else value for value in latent_scale(vae))


def pack_latents(latents: ms.Tensor) -> ms.Tensor:
    """[B, C, H, W] to tokens [B, H/2 * W/2, 4C]: every 2x2 patch becomes one token, channels outermost."""
    b, c, h, w = latents.shape
    return (
        latents.reshape((b, c, h // 2, 2, w // 2, 2))
        .transpose((0, 2, 4, 1, 3, 5))
        .reshape((b, h // 2 * (w // 2), 4 * c))
    )


def unpack_latents(tokens: ms.Tensor, height: int, width: int) -> ms.Tensor:
    """The inverse of `pack_latents`: [B, H/2 * W/2, 4C] to [B, C, height, width], latent sizes."""
    b, _, c = tokens.shape
    grid = tokens.reshape((b, height // 2, width // 2, c // 4, 2, 2))
    return grid.transpose((0, 3, 1, 4, 2, 5)).reshape((b, c // 4, height, width))


def latent_image_ids(height: int, width: int) -> np.ndarray:
    """float32 [H/2 * W/2, 3], (0, row, column) of every token, for a latent of `height` x `width`."""
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)


def loss_weighting(scheme: str, sigmas: ms.Tensor) -> ms.Tensor:
    """Weight of every sample's error, the shape of `sigmas`. Source: arXiv 2403.03206, section 3.1 (`cosmap`)."""
    if scheme == "sigma_sqrt":
        return 1.0 / ops.square(sigmas)
    if scheme == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * sigmas + 2.0 * ops.square(sigmas)))
    return ops.ones_like(sigmas)


def weighted_mse(prediction: ms.Tensor, target: ms.Tensor, weighting: ms.Tensor) -> ms.Tensor:
    """Scalar float32: w (prediction - target)^2, averaged over each sample and then over the batch; `weighting` is [B, 1, 1, 1]."""
    error = ops.square(prediction.to(ms.float32) - target.to(ms.float32)) * weighting.to(ms.float32)
    return error.reshape((error.shape[0], -1)).mean(axis=1).mean()


def prior_preservation_mse(
    prediction: ms.Tensor, target: ms.Tensor, weighting: ms.Tensor, prior_weight: float
) -> ms.Tensor:
    """Loss of a batch [instances; class images]: instance error + prior_weight * class error, each with its own sigmas' weights.

    Source: Ruiz et al., "DreamBooth" (arXiv 2208.12242), section 3.3.
    """
    prediction, prior_prediction = ops.chunk(prediction, 2, axis=0)
    target, prior_target = ops.chunk(target, 2, axis=0)
    weighting, prior_weighting = ops.chunk(weighting, 2, axis=0)
    prior = weighted_mse(prior_prediction, prior_target, prior_weighting)
    return weighted_mse(prediction, target, weighting) + prior_weight * prior
