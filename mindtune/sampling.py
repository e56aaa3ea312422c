"""Pictures: the sampling loops over a transformer or UNet that is already in memory, decoding, and grids."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mindtune.cli import UserError, shown
from mindtune.flow import latent_image_ids, latent_scale, pack_latents, resolution_shift, shift_sigmas, unpack_latents
from mindtune.images import UnusableImage, flatten, ground, ink, is_flat, opened
from mindtune.library import pynative_no_grad
from mindtune.models import unipc


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


@contextlib.contextmanager
def resting(*trained: nn.Cell):
    """The trained models without dropout, in PyNative, recording nothing for a backward pass."""
    marks = [model.requires_grad for model in trained]
    with eager():
        for model in trained:
            # mindone's TrainStep marks its model: every call would begin a graph for a backward pass, which stays for good.
            model.set_train(False).set_grad(False)
        yield
        for model, mark in zip(trained, marks):
            model.set_train(True).set_grad(mark)


def give_back() -> None:
    """What nothing refers to any more goes back to the system: Python collects it, and glibc, where there is one, keeps none of it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
    """Denoises float32 [1, C, h, w] with UniPC under a caption's `Stage.text`; gives the VAE's scaled latents, same shape.

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


def require_condition(path: str, flag: str) -> Image.Image:
    """The decoded image, in its own mode. Raises UserError naming `flag` if it cannot be read."""
    try:
        return opened(path)
    except ValueError as error:
        raise UserError(f"{flag} {shown(path)}: cannot be read as an image ({error}).") from None


def condition_picture(path: str, flag: str, resolution: int, multiple: int = 16, background: Optional[str] = None) -> Image.Image:
    """An image as a condition to draw with: its shorter side `resolution`, the longer one the nearest multiple of `multiple`.

    Transparent pixels are laid on `background` as in training; without one on what shows this drawing, by the rule for data sets. Raises
    UserError naming `flag` if it cannot be read.
    """
    image = require_condition(path, flag)
    shades = ink(image)
    if background is None and shades and ground(shades) == "black":
        print(f"{flag} {shown(path)}: laid on black; on white its drawing would not be seen")
    try:
        image = flatten(image, background or (ground(shades) if shades else "white"))
    except UnusableImage as error:
        raise UserError(f"{flag} {shown(path)}: cannot be read as an image ({error}).") from None
    if is_flat(image):
        print(f"{flag} {shown(path)}: blank, of one colour throughout")
    width, height = (max(resolution, round(side * resolution / min(image.size) / multiple) * multiple) for side in image.size)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def condition_pixels(image: Image.Image) -> np.ndarray:
    """A picture as what a UNet's ControlNet reads: float32 [1, 3, H, W] in [0, 1]."""
    return (np.asarray(image, dtype=np.float32) / 255.0).transpose(2, 0, 1)[None]


def latent_shape(vae: nn.Cell, pixels: np.ndarray) -> tuple[int, int, int, int]:
    """The shape [1, C, h, w] of the latents of one picture as large as `pixels` [1, 3, H, W]."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    return 1, vae.config["latent_channels"], pixels.shape[2] // factor, pixels.shape[3] // factor


def encode_picture(vae: nn.Cell, image: Image.Image, compute: ms.Type) -> np.ndarray:
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


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Optional[Sequence[str]] = None) -> Image.Image:
    """Rows of pictures, each row under its label (wrapped); cells are as large as the largest, small pictures are enlarged."""
    width, height = (max(getattr(image, side) for row in rows for image in row) for side in ("width", "height"))
    scale = max(1, -(-192 // width))
    total = width * scale * max(len(row) for row in rows)
    texts = [textwrap.wrap(label, max(8, total // 8)) for label in labels] if labels else [[] for _ in rows]
    band = 16 * max(len(lines) for lines in texts)
    sheet = Image.new("RGB", (total, (height * scale + band) * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for y, (row, lines) in enumerate(zip(rows, texts)):
        top = y * (height * scale + band)
        draw.text((3, top), "\n".join(lines), fill="black", font=font, spacing=2)
        for x, image in enumerate(row):
            enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x * width * scale, top + band))
    return sheet


def save_image(image: Image.Image, path: Path) -> Path:
    """PNG, whatever the folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path


def output_files(name: str, count: int, overwrite: bool) -> tuple[Path, list[Path]]:
    """What --output names, and beside it <name>-1.png ... for the single pictures if there are several.

    Raises UserError for another format than PNG, and for files that are there if `overwrite` is false.
    """
    output = Path(name)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: pictures are written as PNG; give a name that ends in .png.")
    singles = [output.with_name(f"{output.stem}-{n + 1}.png") for n in range(count)] if count > 1 else []
    for path in (output, *singles):
        if path.exists() and not overwrite:
            raise UserError(f"--output {path}: is already there. Name another file or add --overwrite.")
    return output, singles
