"""Configs of the published sizes of FLUX.1-dev, Stable Diffusion 1.5 and XL, without weights, for memory plans."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny"))

import make_tiny_pipeline as maker
from full_size import FLUX_DEV, VAE

UNETS = {
    "sd15": {
        **maker.SD15_UNET,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
    "sdxl": {
        **maker.SDXL_UNET,
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# The arguments that a UNet's ControlNet shares with it.
CONTROLNET_LACKS = ("center_input_sample", "out_channels", "sample_size", "up_block_types")


def write_pipeline(folder, name):
    """Writes the configs of a pipeline and of a ControlNet for it to `folder`.

    `name` is sd15, sdxl, or for FLUX the numbers of double and single blocks of the transformer and of the ControlNet:
    "19 38 4 0".
    """
    if name in UNETS:
        unet = UNETS[name]
        controlnet = {key: value for key, value in unet.items() if key not in CONTROLNET_LACKS}
        models = {"unet": ("UNet2DConditionModel", unet), "controlnet": ("ControlNetModel", controlnet)}
        vae, scheduler = maker.SD15_VAE, maker.SDXL_SCHEDULER
    else:
        double, single, own_double, own_single = map(int, name.split())
        size = {**maker.FLUX_TRANSFORMER, **FLUX_DEV}
        base = {**size, "num_layers": double, "num_single_layers": single}
        controlnet = {**size, "num_layers": own_double, "num_single_layers": own_single}
        models = {"transformer": ("FluxTransformer2DModel", base), "controlnet": ("FluxControlNetModel", controlnet)}
        vae, scheduler = maker.FLUX_VAE, maker.FLUX_SCHEDULER
    models["vae"] = ("AutoencoderKL", {**vae, **VAE})
    for component, (cls, config) in models.items():
        write(folder / component / "config.json", {"_class_name": cls, **config})
    write(folder / "scheduler" / "scheduler_config.json", scheduler)


def write(path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
