"""The mathematics of training a rectified flow model such as FLUX.1, and small helpers for graph mode.

Shapes: B batch, C latent channels, H and W latent height and width. Functions for the host work with NumPy arrays, the
others with MindSpore tensors, in graph mode and in PyNative.
"""

from __future__ import annotations

import math
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import ops

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
LOSSES = ("mse", "huber", "smooth_l1")
HUBER_SCHEDULES = ("exponential", "snr", "constant")


@ms.jit_class
class AttrJitWrapper:
    """Attributes that a graph can read.

    Pass only those that `forward` reads: they are the flags that change the loss.
    """

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


# ---- on the host ---------------------------------------------------------------------------------


def sample_density(
    rng: np.random.Generator, scheme: str, logit_mean: float, logit_std: float, mode_scale: float
) -> float:
    """Draws u in [0, 1]: where in the table of sigmas to train, from its first entry (noise) to its last (image).

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
    """floor(N u), clamped to the table: `mode` and a saturated sigmoid can give u = 1."""
    return min(max(int(u * num_train_timesteps), 0), num_train_timesteps - 1)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """s sigma / (1 + (s - 1) sigma): moves timesteps towards the noise, for large images.

    arXiv 2403.03206, equation 23.
    """
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def resolution_shift(image_tokens: int, config: dict) -> float:
    """FLUX's shift of the sigmas, exp(mu), from a scheduler's config; mu is linear in the number of image tokens."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return math.exp(config["base_shift"] + slope * (image_tokens - low))


def training_sigmas(sigmas: np.ndarray, timestep_shift: str, image_tokens: list[int], config: dict) -> np.ndarray:
    """A table of sigmas to train on per size of images, [S, N], from the scheduler's sigmas [N].

    They are shifted by --timestep_shift: a number, or auto for the `resolution_shift` of each size. `image_tokens` [S]
    are the numbers of tokens of the sizes.
    """
    if timestep_shift == "auto":
        return np.stack([shift_sigmas(sigmas, resolution_shift(tokens, config)) for tokens in image_tokens])
    return np.stack([shift_sigmas(sigmas, float(timestep_shift))] * len(image_tokens))


def shift_kind(timestep_shift: str, sizes: list) -> Optional[str]:
    """What a checkpoint says of `training_sigmas`: until version 0.2, auto shifted all sizes as the largest one."""
    return "by size" if timestep_shift == "auto" and len(sizes) > 1 else None


def huber_deltas(
    schedule: Optional[str], delta: Optional[float], times: np.ndarray, signal_shares: np.ndarray
) -> np.ndarray:
    """delta of the Huber losses at every timestep, in the shape of `times`, by --huber_schedule and --huber_delta.

    constant: `delta` itself. exponential: delta^t, with the time t from 0 (image) to 1 (noise). snr: (1 - delta) s^2 +
    delta, with the share s = signal / (signal + noise). The scheduled ones are 1 at the image and `delta` at the noise.
    For rectified flow t is sigma and s is 1 - sigma.
    Source: Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
    (arXiv 2403.16728), section 4.
    """
    delta = 0.1 if delta is None else delta
    if schedule == "constant":
        return np.full_like(times, delta)
    if schedule == "snr":
        return (1.0 - delta) * np.square(signal_shares) + delta
    return delta**times


def timestep_tables(sigmas: np.ndarray, schedule: str, delta: Optional[float]) -> tuple[ms.Tensor, ms.Tensor]:
    """(sigmas, deltas of the Huber losses) as `get_sigmas` reads them, of every timestep for each size, from [S, N]."""
    deltas = huber_deltas(schedule, delta, sigmas, 1.0 - sigmas)
    return ms.Tensor(sigmas.ravel(), ms.float32), ms.Tensor(deltas.ravel(), ms.float32)


def latent_scale(vae: dict) -> tuple:
    """(shift, scale) from a VAE's config: the model's latents are (z - shift) * scale.

    Floats, or float32 arrays [1, C, 1, 1] if the config has latents_mean and latents_std per channel: then they are
    the mean and scaling_factor / std.
    """
    if vae.get("latents_mean") is None:
        return vae.get("shift_factor") or 0.0, vae["scaling_factor"]
    mean, std = (np.array(vae[key], np.float32).reshape(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, np.float32(vae["scaling_factor"]) / std


# ---- in the step ---------------------------------------------------------------------------------


def get_sigmas(table: ms.Tensor, indices: ms.Tensor, n_dim: int = 4) -> ms.Tensor:
    """Looks up `indices` [B] in a table [N].

    Returns [B, 1, ...] with `n_dim` axes. A graph cannot search for a timestep.
    """
    return table[indices].reshape((-1,) + (1,) * (n_dim - 1))


def sample_posterior(moments: ms.Tensor, noise: ms.Tensor) -> ms.Tensor:
    """Samples latents, float32 [B, C, H, W], from the mean and log-variance [B, 2C, H, W] and standard normal noise.

    The log-variance is clamped to [-30, 20] as in the latent-diffusion VAE (arXiv 2112.10752).
    """
    mean, logvar = ops.chunk(moments.to(ms.float32), 2, axis=1)
    return mean + ops.exp(0.5 * ops.clamp(logvar, -30.0, 20.0)) * noise


def posterior_mean(moments: ms.Tensor) -> ms.Tensor:
    """The mean of the latents, float32 [B, C, H, W], from the mean and log-variance [B, 2C, H, W]."""
    return ops.chunk(moments.to(ms.float32), 2, axis=1)[0]


def scale_constants(vae: dict) -> tuple:
    """`latent_scale` as values that a graph can read as constants."""
    return tuple(ms.Tensor(value) if isinstance(value, np.ndarray) else value for value in latent_scale(vae))


def pack_latents(latents: ms.Tensor) -> ms.Tensor:
    """Turns latents [B, C, H, W] into tokens [B, H/2 * W/2, 4C]: one token per 2x2 patch, channels outermost."""
    b, c, h, w = latents.shape
    return (
        latents.reshape((b, c, h // 2, 2, w // 2, 2))
        .transpose((0, 2, 4, 1, 3, 5))
        .reshape((b, h // 2 * (w // 2), 4 * c))
    )


def unpack_latents(tokens: ms.Tensor, height: int, width: int) -> ms.Tensor:
    """The inverse of `pack_latents`: tokens [B, H/2 * W/2, 4C] to latents [B, C, height, width]."""
    b, _, c = tokens.shape
    grid = tokens.reshape((b, height // 2, width // 2, c // 4, 2, 2))
    return grid.transpose((0, 3, 1, 4, 2, 5)).reshape((b, c // 4, height, width))


def latent_image_ids(height: int, width: int) -> np.ndarray:
    """(0, row, column) of every token of latents of `height` x `width`, float32 [H/2 * W/2, 3]."""
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)


def source_image_ids(height: int, width: int) -> np.ndarray:
    """`latent_image_ids` with 1 in place of 0: the ids of an image that FLUX.1-Kontext edits, float32 [H/2 * W/2, 3].

    Source: "FLUX.1 Kontext" (arXiv 2506.15742), section 3.
    """
    return latent_image_ids(height, width) + np.array([1, 0, 0], np.float32)


def mask_channels(mask: np.ndarray, factor: int) -> np.ndarray:
    """The pixels of a mask [1, H, W] as channels of its latents, [factor^2, H / factor, W / factor], row by row.

    As FluxFillPipeline of diffusers gives them to the model.
    """
    _, height, width = mask.shape
    grid = mask.reshape(height // factor, factor, width // factor, factor)
    return grid.transpose(1, 3, 0, 2).reshape(factor * factor, height // factor, width // factor)


def loss_weighting(scheme: str, sigmas: ms.Tensor) -> ms.Tensor:
    """The loss weight of every sample, in the shape of `sigmas`. Source: arXiv 2403.03206, section 3.1 (`cosmap`)."""
    if scheme == "sigma_sqrt":
        return 1.0 / ops.square(sigmas)
    if scheme == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * sigmas + 2.0 * ops.square(sigmas)))
    return ops.ones_like(sigmas)


def sample_losses(
    prediction: ms.Tensor,
    target: ms.Tensor,
    weighting: ms.Tensor,
    loss: str = "mse",
    deltas: Optional[ms.Tensor] = None,
) -> ms.Tensor:
    """The loss of each sample, float32 [B]: w f(prediction - target), averaged over the sample.

    `weighting` is [B, 1, 1, 1], or [B, 1, H, W] to weight the latents of a sample. f is one of LOSSES: the square
    (mse), 2 delta (sqrt(e^2 + delta^2) - delta) (huber, the pseudo-Huber loss), or that divided by delta (smooth_l1).
    `deltas` are [B, 1, 1, 1]. Source of the last two: arXiv 2403.16728, section 4.
    """
    error = ops.square(prediction.to(ms.float32) - target.to(ms.float32))
    if loss != "mse":
        # (sqrt(e^2 + d^2) - d) (sqrt(e^2 + d^2) + d) = e^2: as a quotient, small errors do not cancel. The term with a
        # gradient has its derivative by e^2, 1 / sqrt(e^2 + d^2): that of ops.sqrt is an old operator on Ascend.
        root = ops.stop_gradient(ops.sqrt(error + ops.square(deltas)))
        linear = error / root
        error = linear + ops.stop_gradient(2.0 * error / (root + deltas) - linear)
    if loss == "huber":
        error = deltas * error
    error = error * weighting.to(ms.float32)
    return error.reshape((error.shape[0], -1)).mean(axis=1)


def prior_preservation_loss(losses: ms.Tensor, prior_weight: float) -> ms.Tensor:
    """The loss of a batch from those of its samples [B], whose first half are instance, whose second half class images.

    It is the mean of the first half plus `prior_weight` times that of the second half.
    Source: Ruiz et al., "DreamBooth" (arXiv 2208.12242), section 3.3.
    """
    instance_losses, class_losses = ops.chunk(losses, 2, axis=0)
    return instance_losses.mean() + prior_weight * class_losses.mean()
