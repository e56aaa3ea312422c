"""Reads the configs of a pipeline's components, with the defaults of their classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindtune.cli import UserError
from mindtune.models.library import config_defaults
from mindtune.models.weights import read_json


@contextlib.contextmanager
def convert_errors(folder: Path) -> Iterator[None]:
    """Turns any exception in the block into a UserError that names `folder`.

    Libraries raise exceptions of every type for unexpected values in files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: its files cannot be loaded ({type(error).__name__}: {error}). Copy or download them again."
        ) from error


def config_file(name: str) -> str:
    """The path of a component's config relative to the pipeline's directory."""
    return f"{name}/scheduler_config.json" if name == "scheduler" else f"{name}/config.json"


def read_config(root: Path, name: str) -> dict[str, Any]:
    """A component's config.json (or scheduler_config.json), with the defaults of its class for missing keys.

    `_use_default_values` lists those keys, as in diffusers: another class built from the config has other defaults for
    them. Raises ValueError with the file's name if it is damaged, and OSError if it is missing.
    """
    config = read_json(root, root / config_file(name))
    if isinstance(config.get("text_config"), dict) and "architectures" in config:  # the config of a whole CLIP model
        config = {**config, **config["text_config"], "architectures": config["architectures"]}
    defaults = {key: value for key, value in config_defaults(class_of(config)).items() if key not in config}
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    return {**config, **defaults, "_use_default_values": [*defaults]}


def class_of(config: dict[str, Any]) -> str:
    """The name of the class in a config: `_class_name` for diffusers, `architectures[0]` for transformers."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
    return str(config.get("_class_name") or name)


def latent_layout(vae_config: dict[str, Any]) -> tuple[int, int]:
    """The number of channels of a VAE's latents, and the pixels per latent along a side."""
    return vae_config["latent_channels"], 2 ** (len(vae_config["block_out_channels"]) - 1)


def control_inputs(vae_config: dict[str, Any], fill: bool) -> int:
    """The number of inputs of x_embedder in a FLUX model that reads a condition beside the noisy latents.

    Both have four values per latent channel and token. A fill model also reads the mask's values of the token's pixels.
    Sources: FluxControlPipeline and FluxFillPipeline of diffusers; 128 and 384 for FLUX.1.
    """
    channels, factor = latent_layout(vae_config)
    return 8 * channels + (4 * factor**2 if fill else 0)


def image_tokens(size: tuple[int, int], vae_config: dict[str, Any]) -> int:
    """The number of FLUX's tokens of an image of `size` (height, width) in pixels: one per patch of 2x2 latents."""
    patch = 2 * latent_layout(vae_config)[1]
    return size[0] // patch * (size[1] // patch)
