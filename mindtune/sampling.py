"""Pictures from FLUX: the Euler loop over a transformer that is already in memory, decoding, and grids."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from PIL import Image, ImageDraw, ImageFont

from mindtune.flow import latent_image_ids, pack_latents, resolution_shift, shift_sigmas, unpack_latents
from mindtune.models import pynative_no_grad


@contextlib.contextmanager
def eager():
    """PyNative for a while: pictures and held-out losses need no compiled graph of their own, and their memory is given back."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with pynative_no_grad():
            yield
    finally:
        ms.set_context(mode=mode)


def sample_latents(
    transformer: nn.Cell,
    scheduler: dict,
    prompt_embeds: np.ndarray,
    pooled_prompt_embeds: np.ndarray,
    noise: np.ndarray,
    steps: int,
    guidance_scale: float,
    compute: ms.Type,
) -> np.ndarray:
    """Denoises float32 [B, C, H, W] under text [B, L, D] and pooled text [B, P]; gives the VAE's scaled latents, same shape.

    sigma runs linearly from 1 to 1/steps and is shifted for the picture's size as the `scheduler` config says.
    """
    batch, _, height, width = noise.shape
    latents = pack_latents(ms.Tensor(noise, ms.float32))
    shift = resolution_shift(latents.shape[1], scheduler) if scheduler["use_dynamic_shifting"] else scheduler["shift"]
    sigmas = np.append(shift_sigmas(np.linspace(1.0, 1.0 / steps, steps), shift), 0.0)
    text, pooled = ms.Tensor(prompt_embeds).to(compute), ms.Tensor(pooled_prompt_embeds).to(compute)
    img_ids, txt_ids = ms.Tensor(latent_image_ids(height, width)), ms.Tensor(np.zeros((text.shape[1], 3), np.float32))
    guidance = ms.Tensor(np.full(batch, guidance_scale, np.float32)) if transformer.config["guidance_embeds"] else None
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        velocity = transformer(
            hidden_states=latents.to(compute),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=ms.Tensor(np.full(batch, sigma, np.float32)),
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )[0]
        latents = latents + float(following - sigma) * velocity.to(ms.float32)
    return unpack_latents(latents, height, width).asnumpy()


def decode_latents(vae: nn.Cell, latents: np.ndarray, compute: ms.Type) -> list[Image.Image]:
    """Scaled latents [B, C, H, W] to B pictures."""
    z = latents / vae.config["scaling_factor"] + vae.config["shift_factor"]
    pixels = vae.decode(ms.Tensor(z.astype(np.float32)).to(compute), return_dict=False)[0].to(ms.float32).asnumpy()
    pixels = np.nan_to_num((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5 + 0.5).astype(np.uint8)
    return [Image.fromarray(p) for p in pixels.transpose(0, 2, 3, 1)]


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Optional[Sequence[str]] = None) -> Image.Image:
    """Rows of pictures of one size, each row under its label (wrapped); small pictures are enlarged to be seen."""
    width, height = rows[0][0].size
    scale = max(1, -(-192 // width))
    width, height = width * scale, height * scale
    total = width * max(len(row) for row in rows)
    texts = [textwrap.wrap(label, max(8, total // 8)) for label in labels] if labels else [[] for _ in rows]
    band = 16 * max(len(lines) for lines in texts)
    sheet = Image.new("RGB", (total, (height + band) * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for y, (row, lines) in enumerate(zip(rows, texts)):
        top = y * (height + band)
        draw.text((3, top), "\n".join(lines), fill="black", font=font, spacing=2)
        for x, image in enumerate(row):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x * width, top + band))
    return sheet


def save_image(image: Image.Image, path: Path) -> Path:
    """PNG, whatever the folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path
