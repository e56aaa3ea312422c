"""The blocks of a model that a gradient passes, and their sizes, from configs alone.

What the backward pass keeps of a block is in `cpu_memory` and `ascend_memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Union


class Block(NamedTuple):
    """A block that a gradient passes, and the elements of its output and of its attention weights.

    Attention weights are heads x tokens x tokens. `type` is double or single (FLUX), clip (a layer of CLIP), residual
    or attention (a UNet), or condition: the layers of a UNet's ControlNet that read the condition image. `trained`: its
    weights are trained, not only a LoRA in it. `adapter`: the elements that a DoRA or LoKr in it keeps beyond a LoRA.
    """

    type: str
    output: int
    attention_weights: int = 0
    trained: bool = False
    adapter: int = 0


def flux_blocks(
    config: dict[str, Any], layers: tuple[int, int], batch: int, image_tokens: int, text_tokens: int, trained: bool
) -> list[Block]:
    """The (double, single) `layers` of a FLUX transformer or ControlNet; `config` is the transformer's."""
    double, single = layers
    tokens = image_tokens + text_tokens
    heads = config["num_attention_heads"]
    output = batch * tokens * heads * config["attention_head_dim"]
    weights = batch * heads * tokens * tokens
    return [Block("double", output, weights, trained)] * double + [Block("single", output, weights, trained)] * single


def clip_blocks(config: dict[str, Any], batch: int) -> list[Block]:
    """The layers of a CLIP text encoder."""
    tokens, heads = config["max_position_embeddings"], config["num_attention_heads"]
    block = Block("clip", batch * tokens * config["hidden_size"], batch * heads * tokens * tokens)
    return [block] * config["num_hidden_layers"]


class _UNet:
    """The settings of a UNet, one value per resolution level, and its blocks for one batch of latents."""

    def __init__(self, config: dict[str, Any], batch: int, height: int, width: int, text_tokens: int) -> None:
        self.config = config
        self.channels = config["block_out_channels"]
        self.layers = self._per_level("layers_per_block")
        self.heads = self._per_level(
            "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        )
        self.depth = self._per_level("transformer_layers_per_block", 1)
        self.up_depth = config.get("reverse_transformer_layers_per_block") or self.depth[::-1]
        self.batch, self.height, self.width, self.text_tokens = batch, height, width, text_tokens

    def _per_level(self, key: str, default: Any = None) -> list[Any]:
        value = self.config[key] if default is None else self.config.get(key, default)
        return list(value) if isinstance(value, (list, tuple)) else [value] * len(self.channels)

    def level(self, number: int, count: int, depth: Union[int, list[int]], attention: bool) -> list[Block]:
        """`count` residual blocks of one level, each with `depth` transformer blocks: one number for all, or a list."""
        pixels = (self.height >> number) * (self.width >> number)
        rows = self.batch * pixels
        residual = Block("residual", rows * self.channels[number])
        transformer = Block("attention", residual.output, rows * self.heads[number] * (pixels + self.text_tokens))
        depths = list(depth) * count if isinstance(depth, (list, tuple)) else [depth] * count
        blocks = []
        for transformers in depths[:count]:
            blocks += [residual] + [transformer] * (transformers if attention else 0)
        return blocks

    def middle(self) -> list[Block]:
        last = len(self.channels) - 1
        if not self.config.get("mid_block_type", True):
            return []
        attention = self.config.get("mid_block_type") != "UNetMidBlock2D"
        return self.level(last, 1, self.depth[last], attention) + self.level(last, 1, 0, False)

    def down(self) -> list[Block]:
        blocks = []
        for number, name in enumerate(self.config["down_block_types"]):
            blocks += self.level(number, self.layers[number], self.depth[number], name.startswith("CrossAttn"))
        return blocks

    def up(self) -> list[Block]:
        blocks = []
        last = len(self.channels) - 1
        for number in range(last, -1, -1):
            attention = self.config["up_block_types"][last - number].startswith("CrossAttn")
            blocks += self.level(number, self.layers[number] + 1, self.up_depth[last - number], attention)
        return blocks


def unet_controlnet_blocks(
    config: dict[str, Any], batch: int, latent_size: tuple[int, int], image_size: tuple[int, int], text_tokens: int
) -> list[Block]:
    """The blocks that a gradient of a UNet's ControlNet passes. Sizes are (height, width).

    They are the ControlNet's layers that read the condition image, its down and middle blocks, and the frozen UNet's up
    blocks.
    """
    unet = _UNet(config, batch, *latent_size, text_tokens)
    height, width = image_size
    controlnet = [block._replace(trained=True) for block in (*unet.down(), *unet.middle())]
    # The outputs of the layers that read the image together: 64 elements per pixel.
    condition = Block("condition", 64 * batch * height * width, trained=True)
    return [condition, *controlnet, *unet.up()]


def recomputable(blocks: Iterable[Block]) -> int:
    """How many of the blocks gradient checkpointing can recompute: all but those that read the condition image."""
    return sum(block.type != "condition" for block in blocks)


def with_recomputed(blocks: Iterable[Block], count: int) -> Iterator[tuple[Block, bool]]:
    """Every block, and whether it is recomputed if the first `count` are."""
    for block in blocks:
        recomputed = block.type != "condition" and count > 0
        count -= recomputed
        yield block, recomputed
