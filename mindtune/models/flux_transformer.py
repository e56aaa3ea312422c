"""The forward pass of a FLUX transformer, for mindone 0.3. `shared_blocks.use_shared_blocks` puts it in.

mindone's own adds a ControlNet's residuals to a slice of the single blocks' tokens. On Ascend, a graph makes that a
scatter with an int64 index for every element. Here the residuals are filled up with zeros for the text's tokens.
"""

from __future__ import annotations

from mindone.diffusers.models.modeling_outputs import Transformer2DModelOutput
from mindspore import ops


def construct_transformer(
    self,
    hidden_states,
    encoder_hidden_states,
    pooled_projections,
    timestep,
    img_ids,
    txt_ids,
    guidance=None,
    joint_attention_kwargs=None,
    controlnet_block_samples=None,
    controlnet_single_block_samples=None,
    return_dict=False,
    controlnet_blocks_repeat=False,
):
    """Takes and returns what mindone's FluxTransformer2DModel does. Shared blocks ignore `joint_attention_kwargs`."""
    hidden, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
    timestep = timestep.astype(hidden.dtype) * 1000
    if guidance is None:
        temb = self.time_text_embed(timestep, pooled_projections)
    else:
        temb = self.time_text_embed(timestep, guidance.astype(hidden.dtype) * 1000, pooled_projections)
    rotary = self.pos_embed(ops.cat((txt_ids, img_ids), 0))

    for index, block in enumerate(self.transformer_blocks):
        text, hidden = block(hidden, text, temb, rotary)
        if controlnet_block_samples is not None:
            number = residual_of(
                index, len(self.transformer_blocks), len(controlnet_block_samples), controlnet_blocks_repeat
            )
            hidden = hidden + controlnet_block_samples[number]
    tokens = ops.cat((text, hidden), 1)
    residuals = None
    if controlnet_single_block_samples is not None:
        residuals = [with_text(sample.astype(tokens.dtype), text) for sample in controlnet_single_block_samples]
    for index, block in enumerate(self.single_transformer_blocks):
        tokens = block(tokens, temb, rotary)
        if residuals is not None:
            tokens = tokens + residuals[residual_of(index, len(self.single_transformer_blocks), len(residuals))]

    out = self.proj_out(self.norm_out(tokens[:, text.shape[1] :], temb))
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def residual_of(block, blocks, residuals, repeat=False):
    """The number of the residual that `block` gets: consecutive blocks share one, or (XLabs) residuals take turns."""
    return block % residuals if repeat else block // -(-blocks // residuals)


def with_text(residual, text):
    """A residual of the image's tokens [B, T, d] with zeros for those of `text` [B, L, d]: [B, L + T, d]."""
    return ops.cat((ops.zeros(text.shape, text.dtype), residual), 1)
