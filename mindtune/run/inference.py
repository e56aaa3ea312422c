"""What the inference scripts share: checks, prompt encoding, sampling, saving images."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from mindspore import nn
from PIL import Image

from mindtune import rng
from mindtune.cli import UserError, matched
from mindtune.data import conditions, grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.files import require_writable
from mindtune.models import configs, execution, loading, lora, resolve, sampling
from mindtune.models.precision import Precision, resolve_precision

Text = dict[str, np.ndarray]  # the embeddings of a prompt, as `EncoderStage.text` returns them
T5_LENGTH = 512  # tokens that FLUX.1 was trained with


# ---- checks --------------------------------------------------------------------------------------


def require_positive(**values: int) -> None:
    """Raises UserError for a value below 1; each keyword is the name of a flag."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1.")


def require_side(flag: str, side: int, multiple: int, least: int) -> None:
    """Raises UserError unless the side of an image, in pixels, is a multiple of `multiple` and at least `least`."""
    if side % multiple or side < least:
        raise UserError(f"{flag} {side}: must be divisible by {multiple} and at least {least}.")


def require_t5_length(tokens: int) -> None:
    """Raises UserError unless --max_sequence_length is between 1 and `T5_LENGTH`."""
    require_positive(max_sequence_length=tokens)
    if tokens > T5_LENGTH:
        raise UserError(
            f"--max_sequence_length {tokens}: FLUX.1 was trained on at most {T5_LENGTH} T5 tokens; "
            f"use {T5_LENGTH} or less."
        )


def find_pipeline(
    name: str,
    revision: Optional[str],
    variant: Optional[str],
    cache_dir: Optional[str],
    components: dict,
    hub: str,
    task: str = "text-to-image",
) -> Path:
    """The directory of a pipeline, local or from `hub`; its `components` are checked, no weights are read.

    `task` is a key of `supported.TASKS`.

    Raises UserError if the pipeline is incomplete or not supported, and if nothing can be written to `cache_dir`.
    """
    require_writable("--cache_dir", cache_dir)
    return resolve.pipeline(name, revision, variant, cache_dir, components, hub=hub, task=task)


def find_controlnet(name: str, cache_dir: Optional[str], root: Path, base: str, hub: str) -> Path:
    """The directory of a ControlNet, local or from `hub`, that fits the component `base` of the pipeline in `root`.

    Raises UserError if it is incomplete, not supported, or made for another model.
    """
    return resolve.controlnet(name, cache_dir, configs.read_config(root, base), flag="--controlnet", hub=hub)


def pair_conditions(
    prompts: list[str], paths: list[str], resolution: int, multiple: int, flag: str = "--control_image"
) -> list[tuple[str, Image.Image]]:
    """(prompt, condition image) for every row of the grid. The shorter side of an image is `resolution`.

    `flag` gave the paths. Raises UserError if the numbers of prompts and images do not match or an image cannot be
    read.
    """
    pairs = matched(prompts, paths, "--prompt", flag)
    return [(prompt, conditions.condition_image(path, flag, resolution, multiple)) for prompt, path in pairs]


def pair_masks(pairs: list[tuple[str, Image.Image]], paths: list[str]) -> list[tuple[str, Image.Image, Image.Image]]:
    """(prompt, image, mask in gray) for every row of the grid, from the pairs of `pair_conditions`.

    A mask gets the size of its image. Raises UserError unless --mask_image has one path for each row, or one for all,
    and for a mask that cannot be read.
    """
    if len(paths) not in (1, len(pairs)):
        raise UserError(
            f"--mask_image has {len(paths)} for {len(pairs)} rows of prompt and image. Give one each, or one for all."
        )
    masks = list(paths) * (len(pairs) // len(paths))
    return [
        (prompt, image, conditions.mask_image(mask, "--mask_image", (image.height, image.width)))
        for (prompt, image), mask in zip(pairs, masks)
    ]


# ---- prompts -------------------------------------------------------------------------------------


@contextlib.contextmanager
def prompt_cache(cache_dir: Optional[str]) -> Iterator[Path]:
    """The folder for encoded prompts: below `cache_dir`, or a temporary one that is deleted at the end."""
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(cache_dir or temporary, "mindtune")


def encode_for_flux(stage: EncoderStage, prompts: Sequence[str]) -> dict[str, Text]:
    """Prompt -> its text embeddings."""
    stage.prepare(prompts, [])
    return {prompt: stage.text(prompt) for prompt in prompts}


def encode_for_unet(stage: EncoderStage, prompts: Sequence[str]) -> tuple[dict[str, Text], Text]:
    """Prompt -> its text embeddings, and those of the unconditional prediction of classifier-free guidance."""
    stage.prepare([*prompts, ""], [])
    return {prompt: stage.text(prompt) for prompt in prompts}, stage.unconditional()


# ---- sampling ------------------------------------------------------------------------------------


class FluxSampler:
    """Samples with a `transformer` of FLUX.1 and the VAE of the pipeline in the directory `root`."""

    def __init__(
        self,
        root: Path,
        transformer: nn.Cell,
        precision: Precision,
        variant: Optional[str],
        *,
        seed: int,
        steps: int,
        guidance_scale: float,
    ) -> None:
        self.transformer = transformer
        self.vae = loading.load_model(root, "vae", precision, variant)
        self.scheduler = configs.read_config(root, "scheduler")
        self.compute = precision.compute
        self.seed = seed
        self.steps = steps
        self.guidance_scale = guidance_scale

    def encode(self, image: Image.Image) -> np.ndarray:
        """The scaled latents of an image: see `sampling.encode_image`."""
        return sampling.encode_image(self.vae, image, self.compute)

    def sample(self, text: Text, size: tuple[int, int], number: int, **inputs: Any) -> Image.Image:
        """Image `number` for a prompt, of `size` (height, width). Its noise depends only on seed and number.

        `inputs` are those of `sampling.sample_latents` that come from images: control, source or condition.
        """
        inputs.update(size=size, seed=self.seed, number=number, steps=self.steps, guidance=self.guidance_scale)
        return sampling.flux_image(self.transformer, self.vae, self.scheduler, text, self.compute, **inputs)


class Settings(NamedTuple):
    """How images are sampled with a UNet and a ControlNet; `count` images per prompt and condition."""

    seed: int
    count: int
    steps: int
    guidance_scale: float
    conditioning_scale: float


class UNetSampler:
    """Samples with the UNet of `stage`'s pipeline and the ControlNet in the directory `controlnet`.

    `unconditional` are the text embeddings of the unconditional prediction (`EncoderStage.unconditional`).
    """

    def __init__(self, stage: EncoderStage, controlnet: Path, unconditional: Text, settings: Settings) -> None:
        precision = resolve_precision(stage.precision)
        self.unet = loading.load_model(stage.root, "unet", precision, stage.variant)
        self.controlnet = loading.load_model(controlnet.parent, controlnet.name, precision)
        self.vae = stage.load_vae()
        self.scheduler = configs.read_config(stage.root, "scheduler")
        self.dtype = precision.compute
        self.vae_dtype = resolve_precision(stage.vae_precision).compute
        self.unconditional = unconditional
        self.settings = settings

    def sample(self, text: Text, condition: Image.Image) -> list[Image.Image]:
        """The images for one prompt (`EncoderStage.text`) and condition image. Their noise depends only on the seed."""
        settings = self.settings
        pixels = conditions.condition_pixels(condition)
        shape = sampling.latent_shape(self.vae, pixels.shape[2:])
        images = []
        with execution.pynative():
            for number in range(settings.count):
                latents = sampling.sample_unet_latents(
                    self.unet,
                    self.scheduler,
                    text=text,
                    empty=self.unconditional,
                    noise=rng.normal(settings.seed, "validation", number, shape=shape),
                    steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    compute=self.dtype,
                    control=(self.controlnet, pixels, settings.conditioning_scale),
                )
                images += sampling.decode_latents(self.vae, latents, self.vae_dtype)
        return images


# ---- results -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the grid: its label, its images, and the condition image that it starts with, if any."""

    label: str
    images: list[Image.Image]
    condition: Optional[Image.Image] = None


def adapter_labels(prompt: str, models: Sequence[nn.Cell], compare: bool) -> Iterator[str]:
    """The labels of a prompt's rows: that with the adapter of `models`, and with `compare` before it that without.

    The adapter is enabled or disabled for the row whose label was given last.
    """
    for adapted in (False, True) if compare else (True,):
        for model in models:
            lora.enable_lora(model, adapted)
        yield f"{prompt} ({'adapter' if adapted else 'base'})" if compare else prompt


def save_rows(rows: Sequence[Row], output: Path, singles: Sequence[Path]) -> None:
    """Saves the images to `singles`, row by row, and a labelled grid of them to `output`; prints every path.

    Without `singles` there is one image, and `output` is that image.
    """
    images = [image for row in rows for image in row.images]
    for path, image in zip(singles, images):
        print(grids.save_image(image, path))
    if not singles:
        print(grids.save_image(images[0], output))
        return
    cells = [[row.condition, *row.images] if row.condition else row.images for row in rows]
    print(grids.save_image(grids.image_grid(cells, [row.label for row in rows]), output))
