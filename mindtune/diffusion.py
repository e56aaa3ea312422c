"""The mathematics of training a diffusion model such as Stable Diffusion: noise schedule, targets, loss weights.

Tables have one entry per timestep and are computed on the host. The training step reads them by index
(`flow.get_sigmas`), in graph mode and in PyNative.
"""

from __future__ import annotations

import math
from typing import Optional

import mindspore as ms
import numpy as np

from mindtune import flow
from mindtune.cli import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def alphas_cumprod(scheduler: dict) -> np.ndarray:
    """The cumulative product of 1 - beta at every training timestep, float64 [N], from a scheduler's config.

    Sources: Ho et al. (arXiv 2006.11239) for linear betas, Rombach et al. (arXiv 2112.10752) for scaled_linear, Nichol
    and Dhariwal (arXiv 2102.09672, equation 17) for squaredcos_cap_v2. Raises UserError for another schedule, and for
    rescaled or listed betas.
    """
    count, schedule = scheduler["num_train_timesteps"], scheduler.get("beta_schedule", "linear")
    if scheduler.get("rescale_betas_zero_snr") or scheduler.get("trained_betas") is not None:
        raise UserError(
            "scheduler/scheduler_config.json: rescaled or listed betas are not supported; give a pipeline with a "
            "beta_schedule."
        )
    first, last = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    if schedule == "linear":
        betas = np.linspace(first, last, count)
    elif schedule == "scaled_linear":
        betas = np.square(np.linspace(math.sqrt(first), math.sqrt(last), count))
    elif schedule == "squaredcos_cap_v2":
        power = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - power[1:] / power[:-1], 0.999)
    else:
        raise UserError(
            f"scheduler/scheduler_config.json: beta_schedule {schedule} is not supported; expected linear, "
            "scaled_linear or squaredcos_cap_v2."
        )
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise UserError(
            f"scheduler/scheduler_config.json: beta_start {first} and beta_end {last} give betas outside (0, 1)."
        )
    return np.cumprod(1.0 - betas)


def prediction_type(scheduler: dict) -> str:
    """The prediction type in a scheduler's config. Raises UserError for anything but epsilon and v_prediction."""
    found = scheduler.get("prediction_type", "epsilon")
    if found not in PREDICTION_TYPES:
        raise UserError(
            f"scheduler/scheduler_config.json: prediction_type {found} is not supported; expected epsilon or "
            "v_prediction."
        )
    return found


def min_snr_weights(alphas: np.ndarray, gamma: Optional[float], prediction_type: str) -> np.ndarray:
    """The loss weight of every timestep, [N]; all 1 if `gamma` is None.

    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v_prediction, where SNR = a / (1 - a).
    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556), section 3.4.
    """
    if gamma is None:
        return np.ones_like(alphas)
    snr = alphas / (1.0 - alphas)
    return np.minimum(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1.0)


def huber_deltas(schedule: Optional[str], delta: Optional[float], alphas: np.ndarray) -> np.ndarray:
    """`flow.huber_deltas` at every timestep, [N]: t is the timestep / N, s is sqrt(a) / (sqrt(a) + sqrt(1 - a))."""
    signal, noise = np.sqrt(alphas), np.sqrt(1.0 - alphas)
    return flow.huber_deltas(schedule, delta, np.arange(len(alphas)) / len(alphas), signal / (signal + noise))


def add_noise(latents: ms.Tensor, noise: ms.Tensor, alphas: ms.Tensor) -> ms.Tensor:
    """sqrt(a) x + sqrt(1 - a) noise, float32 [B, C, H, W], with `alphas` [B, 1, 1, 1]. arXiv 2006.11239, equation 4."""
    return alphas.sqrt() * latents + (1.0 - alphas).sqrt() * noise


def target(latents: ms.Tensor, noise: ms.Tensor, alphas: ms.Tensor, prediction_type: str) -> ms.Tensor:
    """The target of the prediction: the noise (epsilon), or sqrt(a) noise - sqrt(1 - a) x (v_prediction).

    Source of the velocity: Salimans and Ho, "Progressive Distillation" (arXiv 2202.00512), appendix D.
    """
    return noise if prediction_type == "epsilon" else alphas.sqrt() * noise - (1.0 - alphas).sqrt() * latents
