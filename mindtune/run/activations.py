"""How much memory a model's blocks need for activations: what the backward pass keeps from the forward pass.

The factors in KEPT were measured on the CPU. On an NPU we measured none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Union

# Per block type: how many tensors of the size of its output the backward pass keeps, in graph mode and in PyNative,
# and how many tensors of attention weights (heads x tokens x tokens). "condition" stands for the layers of a UNet's
# ControlNet that read the condition image.
KEPT = {
    "double":    (25.0, 35.0, 1.0),
    "single":    (25.0, 35.0, 1.0),
    "residual":  (16.0, 16.0, 0.0),
    "attention": (16.0, 16.0, 2.5),
    "condition": (23.0, 23.0, 0.0),
}  # fmt: skip


class Block(NamedTuple):
    """A block that a gradient passes: its key in KEPT, the elements of its output and of its attention weights."""

    type: str
    output: int
    attention_weights: int = 0


def flux_blocks(
    config: dict[str, Any], layers: tuple[int, int], batch: int, image_tokens: int, text_tokens: int
) -> list[Block]:
    """The (double, single) `layers` of a FLUX transformer or ControlNet; `config` is the transformer's."""
    double, single = layers
    tokens = image_tokens + text_tokens
    heads = config["num_attention_heads"]
    output = batch * tokens * heads * config["attention_head_dim"]
    weights = batch * heads * tokens * tokens
    return [Block("double", output, weights)] * double + [Block("single", output, weights)] * single


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
        for number in range(len(self.channels)):
            attention = self.config["up_block_types"][last - number].startswith("CrossAttn")
            blocks += self.level(number, self.layers[number] + 1, self.up_depth[last - number], attention)
        return blocks


def unet_controlnet_blocks(
    config: dict[str, Any], batch: int, latent_size: tuple[int, int], image_size: tuple[int, int], text_tokens: int
) -> list[Block]:
    """The blocks that a gradient of a UNet's ControlNet passes. Sizes are (height, width).

    They are the ControlNet itself (the UNet's middle and down blocks, and the layers that read the condition image),
    then the frozen UNet's middle and up blocks.
    """
    unet = _UNet(config, batch, *latent_size, text_tokens)
    height, width = image_size
    condition = Block("condition", 64 * batch * height * width)  # its layers' outputs together: 64 elements per pixel
    return [*unet.middle(), *unet.down(), condition, *unet.middle(), *unet.up()]


def kept_bytes(blocks: Iterable[Block], itemsize: int, graph_mode: bool, fused: bool) -> tuple[int, int]:
    """Bytes kept for the backward pass, (without gradient checkpointing, with it).

    With gradient checkpointing only the blocks' inputs are kept. `fused` attention keeps no attention weights.
    """
    kept = inputs = 0.0
    for block in blocks:
        in_graph, in_pynative, weights = KEPT[block.type]
        elements = block.output * (in_graph if graph_mode else in_pynative)
        size = itemsize * (elements + (0 if fused else weights * block.attention_weights))
        kept += size
        inputs += size if block.type == "condition" else itemsize * block.output
    return int(kept), int(inputs)


def largest_block_bytes(blocks: Iterable[Block], itemsize: int, fused: bool) -> int:
    """Bytes that the largest block keeps while gradient checkpointing computes it again, in graph mode."""
    return max(kept_bytes([block], itemsize, True, fused)[0] for block in blocks)
