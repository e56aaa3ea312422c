"""Samples images with a transformer or UNet that is already in memory, and encodes and decodes with the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from PIL import Image
from tqdm import tqdm

from mindtune import rng
from mindtune.flow import (
    latent_image_ids,
    latent_scale,
    mask_channels,
    pack_latents,
    resolution_shift,
    shift_sigmas,
    source_image_ids,
    unpack_latents,
)
from mindtune.models.configs import latent_layout
from mindtune.models.loading import create_unipc

BAR = {"desc": "denoising", "unit": "step", "leave": False, "dynamic_ncols": True, "disable": None}  # None: no terminal


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
    source: Optional[np.ndarray] = None,
    condition: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Denoises `noise`, float32 [B, C, H, W], with FLUX and returns scaled latents of the same shape.

    `prompt_embeds` is [B, L, D] and `pooled_prompt_embeds` [B, P]. sigma goes linearly from 1 to 1/steps and is shifted
    for the image size as the `scheduler` config specifies. `control` is (ControlNet, scaled latents [B, C, H, W] of its
    condition image, scale of its residuals).

    `source` are scaled latents [B, C, h, w] of an image to edit, for FLUX.1-Kontext: further tokens, whose prediction
    is not used. `condition` are arrays [B, c, H, W] that the input layer reads beside the latents, for a Control-LoRA.
    """
    batch, _, height, width = noise.shape
    latents = pack_latents(ms.Tensor(noise, ms.float32))
    shift = resolution_shift(latents.shape[1], scheduler) if scheduler["use_dynamic_shifting"] else scheduler["shift"]
    sigmas = np.append(shift_sigmas(np.linspace(1.0, 1.0 / steps, steps), shift), 0.0)
    text, pooled = ms.Tensor(prompt_embeds).to(compute), ms.Tensor(pooled_prompt_embeds).to(compute)
    tokens, img_ids = latents.shape[1], latent_image_ids(height, width)
    if source is not None:
        further = pack_latents(ms.Tensor(source)).to(compute)
        img_ids = np.concatenate([img_ids, source_image_ids(*source.shape[2:])])
    img_ids, txt_ids = ms.Tensor(img_ids), ms.Tensor(np.zeros((text.shape[1], 3), np.float32))
    beside = [pack_latents(ms.Tensor(each)).to(compute) for each in condition]
    guidance = ms.Tensor(np.full(batch, guidance_scale, np.float32))
    if control:
        controlnet, controlnet_cond = control[0], pack_latents(ms.Tensor(control[1])).to(compute)

    def predict(model, **inputs):
        hidden = ops.cat([latents.to(compute), *beside], 2) if beside else latents.to(compute)
        return model(
            hidden_states=hidden if source is None else ops.cat([hidden, further], 1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=ms.Tensor(np.full(batch, sigma, np.float32)),
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance if model.config["guidance_embeds"] else None,
            return_dict=False,
            **inputs,
        )

    for sigma, next_sigma in tqdm(list(zip(sigmas[:-1], sigmas[1:])), **BAR):
        residuals = {}
        if control:
            blocks, single_blocks = predict(controlnet, controlnet_cond=controlnet_cond, conditioning_scale=control[2])
            residuals = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single_blocks}
        velocity = predict(transformer, **residuals)[0]
        velocity = velocity if source is None else velocity[:, :tokens]
        latents = latents + float(next_sigma - sigma) * velocity.to(ms.float32)
    return unpack_latents(latents, height, width).asnumpy()


def flux_image(
    transformer: nn.Cell,
    vae: nn.Cell,
    scheduler: dict,
    text: dict[str, np.ndarray],
    compute: ms.Type,
    *,
    size: tuple[int, int],
    seed: int,
    number: int,
    steps: int,
    guidance: float,
    **inputs: Any,
) -> Image.Image:
    """Image `number` of a prompt, of `size` (height, width) in pixels, from noise that `seed` and `number` determine.

    `text` holds the prompt's embeddings, and `inputs` are those of `sample_latents` that come from other images.
    """
    noise = rng.normal(seed, "validation", number, shape=latent_shape(vae, size))
    embeds, pooled = text["prompt_embeds"][None], text["pooled_prompt_embeds"][None]
    latents = sample_latents(transformer, scheduler, embeds, pooled, noise, steps, guidance, compute, **inputs)
    return decode_latents(vae, latents, compute)[0]


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
    """Denoises `noise`, float32 [1, C, h, w], with UniPC and returns scaled latents of the same shape.

    `text` holds the embeddings of the prompt and `empty` those of the empty prompt, which classifier-free guidance (Ho
    and Salimans, arXiv 2207.12598) moves away from; a `guidance_scale` of 1 turns guidance off. `control` is
    (ControlNet, pixels [1, 3, H, W] of its condition in [0, 1], scale of its residuals).
    """
    controlnet, condition, conditioning_scale = control
    guided = guidance_scale != 1.0
    texts = [empty, text] if guided else [text]
    prompt_embeds = ms.Tensor(np.stack([embeds["prompt_embeds"] for embeds in texts])).to(compute)
    pixels = ms.Tensor(np.repeat(condition, len(texts), axis=0)).to(compute)
    added = {}
    if unet.config["addition_embed_type"] == "text_time":
        height, width = condition.shape[2:]
        time_ids = np.array([[height, width, 0, 0, height, width]] * len(texts), np.float32)
        pooled = np.stack([embeds["pooled_prompt_embeds"] for embeds in texts])
        added["added_cond_kwargs"] = {"text_embeds": ms.Tensor(pooled).to(compute), "time_ids": ms.Tensor(time_ids)}
    sampler = create_unipc(scheduler)
    sampler.set_timesteps(steps)
    sampler.set_begin_index(0)  # otherwise it looks the first timestep up on the device and waits for the answer
    latents = ms.Tensor(noise, ms.float32)
    for timestep in tqdm(sampler.timesteps, total=steps, **BAR):
        model_input = ops.cat([latents] * len(texts)).to(compute)
        down, mid = controlnet(
            model_input,
            timestep,
            prompt_embeds,
            pixels,
            conditioning_scale=conditioning_scale,
            return_dict=False,
            **added,
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predicted = unet(model_input, timestep, prompt_embeds, return_dict=False, **residuals, **added)[0].to(
            ms.float32
        )
        if guided:
            predicted = predicted[:1] + guidance_scale * (predicted[1:] - predicted[:1])
        latents = sampler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents.asnumpy()


def latent_shape(vae: nn.Cell, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The shape [1, C, h, w] of the latents of one image of `size`, (height, width) in pixels."""
    channels, factor = latent_layout(vae.config)
    return 1, channels, size[0] // factor, size[1] // factor


def encode_image(vae: nn.Cell, image: Image.Image, compute: ms.Type) -> np.ndarray:
    """The scaled latents of an image, float32 [1, C, H, W]: the mean of the posterior.

    Its sides are divisible by 16.
    """
    return _encode_pixels(vae, (np.asarray(image, dtype=np.float32) / 127.5 - 1.0).transpose(2, 0, 1), compute)


def encode_condition(
    vae: nn.Cell, image: Image.Image, mask: Optional[Image.Image], compute: ms.Type
) -> tuple[np.ndarray, ...]:
    """The `condition` of `sample_latents`: the latents of a condition image, or of a masked image, and the mask.

    The mask is gray, of the image's size; the white half of its values is filled. Pixels there are 0, the middle of
    [-1, 1], as in diffusers' FluxFillPipeline.
    """
    if mask is None:
        return (encode_image(vae, image, compute),)
    filled = (np.asarray(mask)[None] >= 128).astype(np.float32)
    pixels = (np.asarray(image, dtype=np.float32) / 127.5 - 1.0).transpose(2, 0, 1)
    channels = mask_channels(filled, latent_layout(vae.config)[1])
    return _encode_pixels(vae, pixels * (1.0 - filled), compute), channels[None]


def _encode_pixels(vae: nn.Cell, pixels: np.ndarray, compute: ms.Type) -> np.ndarray:
    """The scaled latents [1, C, h, w] of pixels [3, H, W] in [-1, 1]."""
    mean = vae.encode(ms.Tensor(pixels[None]).to(compute))[0].chunk(2, 1)[0].to(ms.float32).asnumpy()
    shift, scale = (np.asarray(value, np.float32) for value in latent_scale(vae.config))
    return (mean - shift) * scale


def decode_latents(vae: nn.Cell, latents: np.ndarray, compute: ms.Type) -> list[Image.Image]:
    """Decodes scaled latents [B, C, H, W] into B images."""
    shift, scale = latent_scale(vae.config)
    z = latents / scale + shift
    pixels = vae.decode(ms.Tensor(z.astype(np.float32)).to(compute), return_dict=False)[0].to(ms.float32).asnumpy()
    pixels = np.nan_to_num((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5 + 0.5).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]
