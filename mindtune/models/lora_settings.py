"""What a LoRA, DoRA or LoKr adapts: the settings of its flags, and the layers and ranks that they name.

Needs no model, only the names of its layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple, Optional

from mindtune.cli import UserError
from mindtune.models import layer_patterns

TRANSFORMER_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ALL_LINEAR = "all-linear"
# System -> the ends of the names of the transformer's layers that are adapted unless --lora_layers names others. Those
# of Kontext are the ones of diffusers' training example.
DEFAULT_TARGETS = {
    "flux_lora": TRANSFORMER_TARGETS,
    "flux_kontext": [
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    ],
    "flux_control": [ALL_LINEAR],
}  # fmt: skip


class Settings(NamedTuple):
    """The adapter of a run. The fields have the names and meanings of the flags."""

    adapter: str = "lora"
    lora_rank: int = 4
    lora_alpha: Optional[float] = None
    lora_dropout: float = 0.0
    lokr_factor: int = -1
    lora_blocks: Optional[str] = None
    lora_rank_pattern: Optional[str] = None

    @property
    def blocks(self) -> list[str]:
        """The patterns of --lora_blocks."""
        return layer_patterns.parse_patterns(self.lora_blocks)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The ranks of --lora_rank_pattern by their patterns."""
        return layer_patterns.parse_values(self.lora_rank_pattern, "--lora_rank_pattern", int)

    def ranks(self, names: Iterable[str], targets: Iterable[str], in_blocks: bool) -> dict[str, int]:
        """The rank of every layer that gets an adapter: of those of `names` that end in a target, or ALL_LINEAR.

        `in_blocks`: only those in --lora_blocks, which are blocks of the transformer.
        """
        blocks, patterns = self.blocks if in_blocks else [], self.rank_pattern
        targets = list(targets)
        endings = tuple(f".{target}" for target in targets)
        found = [name for name in names if ALL_LINEAR in targets or f".{name}".endswith(endings)]
        found = [name for name in found if not blocks or any(layer_patterns.matches(block, name) for block in blocks)]
        return {name: layer_patterns.value_of(name, patterns, self.lora_rank) for name in found}


def check_settings(settings: Settings) -> None:
    """Raises UserError for settings that do not go together, and for ranks that are no numbers."""
    layer_patterns.parse_values(settings.lora_rank_pattern, "--lora_rank_pattern", int)
    if settings.adapter != "lora" and settings.lora_dropout > 0:
        raise UserError(f"--lora_dropout {settings.lora_dropout}: not with --adapter {settings.adapter}. Leave it out.")
    if settings.lokr_factor != -1 and settings.adapter != "lokr":
        raise UserError(f"--lokr_factor {settings.lokr_factor}: only for --adapter lokr. Leave it out.")
    if settings.lokr_factor != -1 and settings.lokr_factor < 1:
        raise UserError(
            f"--lokr_factor {settings.lokr_factor}: must be at least 1, or -1 for factors near the square root."
        )


def target_names(lora_layers: Optional[str], system: str) -> list[str]:
    """The ends of layer names in --lora_layers, or the default ones of the `system`, a key of DEFAULT_TARGETS.

    A Control-LoRA always adapts the input layer, which reads the condition.
    """
    if not lora_layers:
        return DEFAULT_TARGETS[system]
    names = [name.strip() for name in lora_layers.split(",")]
    return names if system != "flux_control" or "x_embedder" in names else [*names, "x_embedder"]


def check_targets(names: Iterable[str], targets: Iterable[str], flag: str) -> None:
    """Raises UserError, with similar names, unless every target is ALL_LINEAR or the end of one of these names."""
    names = list(names)
    suffixes = sorted({".".join(name.split(".")[-n:]) for name in names for n in (1, 2)} - {"0", "2"})
    for target in targets:
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in names):
            similar = difflib.get_close_matches(target, suffixes, n=4, cutoff=0.5) or suffixes
            raise UserError(f"{flag} {target}: no linear layer has that name. Similar names: {', '.join(similar)}.")


def check_patterns(
    settings: Settings,
    names: dict[str, list[str]],
    targets: dict[str, list[str]],
    initial: dict[str, list[str]],
    learning_rate_pattern: Optional[str],
) -> None:
    """Raises UserError for a pattern in a flag that has no effect on the layers that get an adapter.

    `names` are those of the linear layers of each model, `targets` the ends of those that are adapted, and `initial`
    the layers of models that have an adapter already, whose layers and ranks are given.
    """
    layers = dict(initial)
    for model in names.keys() - initial.keys():
        if model == "transformer":
            everywhere = settings._replace(lora_blocks=None)
            layer_patterns.check(settings.blocks, everywhere.ranks(names[model], targets[model], True), "--lora_blocks")
        layers[model] = list(settings.ranks(names[model], targets[model], in_blocks=model == "transformer"))
    chosen = [name for model in layers.keys() - initial.keys() for name in layers[model]]
    if chosen:
        layer_patterns.check_first(settings.rank_pattern, chosen, "--lora_rank_pattern")
    rates = layer_patterns.parse_values(learning_rate_pattern, "--learning_rate_pattern", float)
    layer_patterns.check_first(rates, [name for found in layers.values() for name in found], "--learning_rate_pattern")
