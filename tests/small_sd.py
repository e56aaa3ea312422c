"""Stable Diffusion pipelines that are smaller than the tiny ones."""

from conftest import load_script

# Two levels, one with attention and one without, instead of four or three: half to compute and compile.
UNETS = {
    "sd15": {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4], "transformer_layers_per_block": [1, 1],
    },
}  # fmt: skip


def make_pipeline(kind, folder, scheduler=None):
    """The small pipeline of a kind in a new folder."""
    maker = load_script("examples/tiny/make_tiny_pipeline.py").KINDS[kind]
    maker(folder, unet={**UNETS[kind], "block_out_channels": [16, 32]}, scheduler=scheduler)
    return folder
