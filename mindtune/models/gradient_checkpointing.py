"""Gradient checkpointing: blocks compute their activations again in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from mindspore import nn


def recompute_blocks(count: int, trained: nn.Cell, *others: nn.Cell) -> None:
    """Makes the first `count` of `blocks_with_gradient` recompute their activations instead of keeping them."""
    for block in blocks_with_gradient(trained, *others)[:count]:
        block.recompute()


def blocks_with_gradient(trained: nn.Cell, *others: nn.Cell) -> list[nn.Cell]:
    """The blocks that a gradient passes, in the order of their computation; first those of the model that is trained.

    `others` can be a trained CLIP encoder, or the frozen model that a trained ControlNet controls: there only the
    blocks after the first residual get a gradient. A UNet's blocks are its residual and transformer blocks; mindone's
    own gradient checkpointing leaves out the first residual block of every level and all attention.
    """
    blocks = _all_blocks(trained)
    for model in others:
        if hasattr(model, "transformer_blocks"):
            blocks += _all_blocks(model)[1:]
        elif hasattr(model, "up_blocks"):
            blocks += _unet_blocks(model.up_blocks)
        else:
            blocks += list(model.text_model.encoder.layers)
    return blocks


def _all_blocks(model: nn.Cell) -> list[nn.Cell]:
    if hasattr(model, "transformer_blocks"):
        return [*model.transformer_blocks, *model.single_transformer_blocks]
    return _unet_blocks([*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", ())])


def _unet_blocks(levels: Iterable[nn.Cell]) -> list[nn.Cell]:
    """The blocks of a UNet's levels. The middle one may be None; it has a residual block after its attention."""
    blocks = []
    for level in levels:
        resnets = level.resnets if level is not None else ()
        for resnet, attention in zip_longest(resnets, getattr(level, "attentions", None) or ()):
            blocks += [resnet, *(attention.transformer_blocks if attention is not None else ())]
    return blocks
