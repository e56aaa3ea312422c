"""Finding the models of a run, in directories or on the hub, and checking them before anything large is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from mindtune.models import hubs, loading, pipelines


def pipeline(
    name: str,
    revision: Optional[str],
    variant: Optional[str],
    cache_dir: Optional[str],
    components: Iterable[str],
    weights: bool = True,
    hub: str = hubs.DEFAULT,
    task: str = "text-to-image",
) -> Path:
    """The directory of --pretrained_model_name_or_path, checked. An id is downloaded from `hub`, here and below.

    Without `weights`, for a memory plan, weight files may be missing. `task` is a key of `supported.TASKS`. Raises
    UserError.
    """
    root = pipelines.resolve_pipeline(
        name, revision, variant, cache_dir, components, weights=weights, hub=hub, task=task
    )
    loading.check_files(root, components if weights else loading.with_weights(root, components, variant), variant)
    return root


def controlnet(
    name: Optional[str],
    cache_dir: Optional[str],
    base_config: dict,
    weights: bool = True,
    flag: str = "--controlnet_model_name_or_path",
    hub: str = hubs.DEFAULT,
) -> Optional[Path]:
    """The directory of the ControlNet that `flag` names, which must fit the base model, or None."""
    if not name:
        return None
    folder = pipelines.resolve_controlnet(name, flag, cache_dir, base_config, weights=weights, hub=hub)
    if weights:
        loading.check_files(folder.parent, [folder.name])
    return folder


def vae(
    name: Optional[str], cache_dir: Optional[str], root: Path, weights: bool = True, hub: str = hubs.DEFAULT
) -> Optional[Path]:
    """The directory of --pretrained_vae_model_name_or_path, which must fit the UNet, or None."""
    if not name:
        return None
    folder = pipelines.resolve_vae(
        name, "--pretrained_vae_model_name_or_path", cache_dir, root, "unet", weights=weights, hub=hub
    )
    if weights:
        loading.check_files(folder.parent, [folder.name])
    return folder


def tokenizer(name: Optional[str], cache_dir: Optional[str], hub: str = hubs.DEFAULT) -> Optional[Path]:
    """The directory of --tokenizer_name, or None without one."""
    return pipelines.resolve_tokenizer(name, "--tokenizer_name", cache_dir, hub) if name else None
