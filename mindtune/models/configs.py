"""The configs of a pipeline's components, read with the defaults of their classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindtune.cli import UserError
from mindtune.models.library import config_defaults
from mindtune.models.weights import read_json


@contextlib.contextmanager
def from_files(folder: Path) -> Iterator[None]:
    """Says of whatever goes wrong inside that the files of `folder` are to blame: libraries raise anything for odd values. UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be made from its files ({type(error).__name__}: {error}). Copy or download them again."
        ) from error


def config_file(name: str) -> str:
    return f"{name}/scheduler_config.json" if name == "scheduler" else f"{name}/config.json"


def read_config(root: Path, name: str) -> dict[str, Any]:
    """A component's config.json (scheduler_config.json), with its class's defaults for the keys that it lacks.

    Those keys are listed as `_use_default_values`, as diffusers does: another class made of the config has its own defaults for them.
    Raises ValueError naming the file if it is torn, OSError if it is missing.
    """
    found = read_json(root, root / config_file(name))
    if isinstance(found.get("text_config"), dict) and "architectures" in found:  # of a whole CLIP
        found = {**found, **found["text_config"], "architectures": found["architectures"]}
    defaults = {key: value for key, value in config_defaults(class_of(found)).items() if key not in found}
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    return {**found, **defaults, "_use_default_values": [*defaults]}


def class_of(config: dict[str, Any]) -> str:
    """The class that a config names."""
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
    return str(config.get("_class_name") or named)


def latent_layout(vae_config: dict) -> tuple[int, int]:
    """(channels of the latents, pixels per latent along a side) of a VAE."""
    return vae_config["latent_channels"], 2 ** (len(vae_config["block_out_channels"]) - 1)
