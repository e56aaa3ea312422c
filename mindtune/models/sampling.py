"""Pictures: the sampling loops over a transformer or UNet that is already in memory, decoding, and grids."""

from __future__ import annotations

from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from PIL import Image

from mindtune.flow import latent_image_ids, latent_scale, pack_latents, resolution_shift, shift_sigmas, unpack_latents
from mindtune.models.loading import unipc


def sample_latents(
    transformer: nn.Cell,
    scheduler: dict,
    prompt_embeds: np.ndarray,
    pooled_prompt_embeds: np.ndarray,
    noise: np.ndarray,
    steps: int,
    guidance_scale: float,
    compute: ms.Type,
    control: Optional[tuple[nn.Cell, np.ndarray, float]] = None,
) -> np.ndarray:
    """Denoises float32 [B, C, H, W] under text [B, L, D] and pooled text [B, P]; gives the VAE's scaled latents, same shape.

    sigma runs linearly from 1 to 1/steps and is shifted for the picture's size as the `scheduler` config says. `control` is a
    ControlNet, the scaled latents [B, C, H, W] of its condition picture, and the strength of its residuals.
    """
    batch, _, height, width = noise.shape
    latents = pack_latents(ms.Tensor(noise, ms.float32))
    shift = resolution_shift(latents.shape[1], scheduler) if scheduler["use_dynamic_shifting"] else scheduler["shift"]
    sigmas = np.append(shift_sigmas(np.linspace(1.0, 1.0 / steps, steps), shift), 0.0)
    text, pooled = ms.Tensor(prompt_embeds).to(compute), ms.Tensor(pooled_prompt_embeds).to(compute)
    img_ids, txt_ids = ms.Tensor(latent_image_ids(height, width)), ms.Tensor(np.zeros((text.shape[1], 3), np.float32))
    guidance = ms.Tensor(np.full(batch, guidance_scale, np.float32))
    if control:
        controlnet, condition = control[0], pack_latents(ms.Tensor(control[1])).to(compute)

    def predict(model, **more):
        return model(
            hidden_states=latents.to(compute),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=ms.Tensor(np.full(batch, sigma, np.float32)),
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance if model.config["guidance_embeds"] else None,
            return_dict=False,
            **more,
        )

    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        residuals = {}
        if control:
            blocks, single_blocks = predict(controlnet, controlnet_cond=condition, conditioning_scale=control[2])
            residuals = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single_blocks}
        velocity = predict(transformer, **residuals)[0]
        latents = latents + float(following - sigma) * velocity.to(ms.float32)
    return unpack_latents(latents, height, width).asnumpy()


def sample_unet_latents(
    unet: nn.Cell,
    scheduler: dict,
    text: dict[str, np.ndarray],
    empty: dict[str, np.ndarray],
    noise: np.ndarray,
    steps: int,
    guidance_scale: float,
    compute: ms.Type,
    control: tuple[nn.Cell, np.ndarray, float],
) -> np.ndarray:
    """Denoises float32 [1, C, h, w] with UniPC under a caption's `EncoderStage.text`; gives the VAE's scaled latents, same shape.

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) steers away from `empty`, a like dict of the empty prompt; a scale of 1
    does without. `control` is a ControlNet, the pixels of its condition [1, 3, H, W] in [0, 1], and the strength of its residuals.
    """
    controlnet, condition, strength = control
    guided = guidance_scale != 1.0
    texts = [empty, text] if guided else [text]
    states = ms.Tensor(np.stack([each["prompt_embeds"] for each in texts])).to(compute)
    pixels = ms.Tensor(np.repeat(condition, len(texts), axis=0)).to(compute)
    more = {}
    if unet.config["addition_embed_type"] == "text_time":
        height, width = condition.shape[2:]
        time_ids = np.array([[height, width, 0, 0, height, width]] * len(texts), np.float32)
        pooled = np.stack([each["pooled_prompt_embeds"] for each in texts])
        more["added_cond_kwargs"] = {"text_embeds": ms.Tensor(pooled).to(compute), "time_ids": ms.Tensor(time_ids)}
    sampler = unipc(scheduler)
    sampler.set_timesteps(steps)
    latents = ms.Tensor(noise, ms.float32)
    for timestep in sampler.timesteps:
        given = ops.cat([latents] * len(texts)).to(compute)
        down, mid = controlnet(given, timestep, states, pixels, conditioning_scale=strength, return_dict=False, **more)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predicted = unet(given, timestep, states, return_dict=False, **residuals, **more)[0].to(ms.float32)
        if guided:
            predicted = predicted[:1] + guidance_scale * (predicted[1:] - predicted[:1])
        latents = sampler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents.asnumpy()


def latent_shape(vae: nn.Cell, pixels: np.ndarray) -> tuple[int, int, int, int]:
    """The shape [1, C, h, w] of the latents of one picture as large as `pixels` [1, 3, H, W]."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    return 1, vae.config["latent_channels"], pixels.shape[2] // factor, pixels.shape[3] // factor


def encode_image(vae: nn.Cell, image: Image.Image, compute: ms.Type) -> np.ndarray:
    """A picture, its sides divisible by 16, as the VAE's scaled latents [1, C, H, W]: the posterior's mean."""
    pixels = (np.asarray(image, dtype=np.float32) / 127.5 - 1.0).transpose(2, 0, 1)
    mean = vae.encode(ms.Tensor(pixels[None]).to(compute))[0].chunk(2, 1)[0].to(ms.float32).asnumpy()
    shift, scale = (np.asarray(value, np.float32) for value in latent_scale(vae.config))
    return (mean - shift) * scale


def decode_latents(vae: nn.Cell, latents: np.ndarray, compute: ms.Type) -> list[Image.Image]:
    """Scaled latents [B, C, H, W] to B pictures."""
    shift, scale = latent_scale(vae.config)
    z = latents / scale + shift
    pixels = vae.decode(ms.Tensor(z.astype(np.float32)).to(compute), return_dict=False)[0].to(ms.float32).asnumpy()
    pixels = np.nan_to_num((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5 + 0.5).astype(np.uint8)
    return [Image.fromarray(p) for p in pixels.transpose(0, 2, 3, 1)]
