"""What a run's adapter starts from, --lora_model_name_or_path, and which layers a new one adapts. Reads no model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from mindtune import files
from mindtune.cli import UserError
from mindtune.models import lora_files, lora_layouts, lora_settings

FLAG = "--lora_model_name_or_path"
NORMS_ADVICE = "Add --train_norm_layers", "Only examples/flux_control/ trains them"
Layers = dict[str, dict[str, tuple[int, int]]]  # model -> layer -> (inputs, outputs), as `loading.linear_layers`
Adapters = dict[str, dict[str, np.ndarray]]  # model -> its adapter, see `lora_files`


class Settings(NamedTuple):
    """The flags of what an adapter starts from, with their names and meanings."""

    system: str  # a key of lora_settings.DEFAULT_TARGETS
    output_dir: str
    lora_model_name_or_path: Optional[str] = None
    adapter: str = "lora"
    lora_layers: Optional[str] = None
    learning_rate_pattern: Optional[str] = None
    train_text_encoder: bool = False
    train_norm_layers: bool = False


def find_adapters(
    settings: Settings,
    lora: lora_settings.Settings,
    layers: Layers,
    norms: Optional[dict[str, tuple[int, ...]]] = None,
) -> tuple[dict[str, list[str]], Adapters, Optional[str]]:
    """(ends of the names of the layers to adapt by model, adapters to start from by model, hash of the latter's file).

    Without --lora_model_name_or_path there is no adapter and no hash. `norms` are the shapes of the transformer's norms
    that can be trained, if the system trains them. Raises UserError if the run cannot start from this file, if no layer
    has a name that a flag gives, and for a pattern in a flag that has no effect.
    """
    initial, digest = _read(settings, layers, norms)
    return _find_targets(settings, lora, layers, initial), initial, digest


def _read(
    settings: Settings, layers: Layers, norms: Optional[dict[str, tuple[int, ...]]]
) -> tuple[Adapters, Optional[str]]:
    if not settings.lora_model_name_or_path:
        return {}, None
    path = lora_files.find_lora(settings.lora_model_name_or_path, FLAG)
    if Path(settings.output_dir).resolve() in path.resolve().parents:
        raise UserError(f"{FLAG} {path}: is in --output_dir, where this run writes. Name another output directory.")
    adapters = lora_files.read_adapters(path, FLAG)
    lora_files.check_adapters(path, FLAG, adapters, layers)
    lora_files.check_kind(path, FLAG, adapters, settings.adapter)
    if "text_encoder" in adapters and not settings.train_text_encoder:
        raise UserError(f"{FLAG} {path}: has a LoRA of CLIP, which would be lost. Add --train_text_encoder.")
    if any(map(lora_layouts.norms, adapters.values())) and not settings.train_norm_layers:
        raise UserError(f"{FLAG} {path}: has trained norms, which would be lost. {NORMS_ADVICE[norms is None]}.")
    if norm := lora_layouts.foreign_norm(adapters.get("transformer", {}), norms or {}):
        raise UserError(f"{FLAG} {path}: made for another model; this transformer has no {norm}.")
    description = lora_files.describe_adapters(adapters)
    print(f"starting from {path} ({description}): its layers keep their ranks, flags of layers and ranks do not apply")
    return adapters, files.file_digest(path)


def _find_targets(
    settings: Settings, lora: lora_settings.Settings, layers: Layers, initial: Adapters
) -> dict[str, list[str]]:
    targets = {"transformer": lora_settings.target_names(settings.lora_layers, settings.system)}
    if settings.train_text_encoder:
        targets["text_encoder"] = lora_settings.TEXT_ENCODER_TARGETS
    if "transformer" not in initial:  # which has layers of its own
        lora_settings.check_targets(layers["transformer"], targets["transformer"], "--lora_layers")
    names = {name: list(layers[name]) for name in targets}
    adapted = {name: list(lora_files.by_layer(adapter)) for name, adapter in initial.items()}
    lora_settings.check_patterns(lora, names, targets, adapted, settings.learning_rate_pattern)
    return targets
