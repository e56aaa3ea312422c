"""The config.json of published VAEs and ControlNets: every key, with its published value.

See tests/real_configs.py for pipelines. _name_or_path is without the home directory that two files have.
"""

from __future__ import annotations

from real_configs import (
    FLUX_TRANSFORMER,
    ROPE,
    SD1_LEVELS,
    SDXL_SIZES,
    UNET_0_10,
    UNET_SHARED,
    VAE_256,
    VAE_PLAYGROUND,
    VAE_SDXL,
    header,
    without,
)

VAES = {
    "sd-vae-ft-mse": {**header("AutoencoderKL", "0.4.2"), **VAE_256},
    "sdxl-vae": {**header("AutoencoderKL", "0.18.0.dev0", "."), **VAE_SDXL},
    "sdxl-vae-fp16-fix": {
        **header("AutoencoderKL", "0.18.0.dev0", "."),
        **VAE_SDXL,
        "sample_size": 512,
        "force_upcast": False,
    },
    "playground-v2.5 VAE": {**header("AutoencoderKL", "0.27.0.dev0"), **VAE_PLAYGROUND},
}

CONTROL_0_14 = {
    **UNET_SHARED, **UNET_0_10, "class_embed_type": None, "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb", "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default", "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
CONTROL_0_20 = {
    **CONTROL_0_14, "addition_embed_type": None, "addition_embed_type_num_heads": 64, "addition_time_embed_dim": None,
    "conditioning_channels": 3, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "global_pool_conditions": False,
    "num_attention_heads": None, "transformer_layers_per_block": 1,
}  # fmt: skip
CONTROL_0_26 = {**CONTROL_0_20, "mid_block_type": "UNetMidBlock2DCrossAttn"}
CONTROL_SD21 = {
    **CONTROL_0_20,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
CONTROL_SDXL = {**CONTROL_0_20, **SDXL_SIZES, "upcast_attention": None}
NULLS = [key for key, value in CONTROL_SDXL.items() if value is None]
CONTROLNETS = {
    # Those for depth, hed, mlsd and scribble are equal, as are those of v1.1 for all other conditions.
    "sd-controlnet-canny": {**header("ControlNetModel", "0.14.0.dev0"), **CONTROL_0_14},
    "control_v11p_sd15_canny": {
        **header("ControlNetModel", "0.16.0.dev0", "control_v11p_sd15_canny"), **CONTROL_0_14,
    },
    "Depth-Anything-controlnet": {**header("ControlNetModel", "0.26.0.dev0"), **CONTROL_0_26},
    "controlnet-canny-sdxl-1.0": {
        **header("ControlNetModel", "0.24.0.dev0", "diffusers/controlnet-canny-sdxl-1.0"), **CONTROL_SDXL,
    },
    "controlnet-depth-sdxl-1.0": {**header("ControlNetModel", "0.20.0.dev0", "valhalla/depth-2"),
    **without(CONTROL_SDXL, *NULLS)},
    "controlnet-union-sdxl-1.0": {**header("ControlNetModel", "0.20.0.dev0"), **CONTROL_SDXL},
    "controlnet-union-sdxl-1.0 promax": {**header("ControlNetModel", "0.20.0.dev0"), **CONTROL_SDXL,
    "num_control_type": 8},
    "sd21-photo-background-9-channels": {
        **header("ControlNetModel", "0.20.0.dev0", "yahoo-inc/photo-background-generation"), **CONTROL_SD21,
        "in_channels": 9,
    },
    # Not of one repository: conditions of six channels (such as an image and its mask) and of one.
    "6-channel ControlNet": {**header("ControlNetModel", "0.20.0.dev0"), **CONTROL_0_20, "conditioning_channels": 6},
    "1-channel ControlNet": {**header("ControlNetModel", "0.20.0.dev0"), **CONTROL_0_20, "conditioning_channels": 1},
    "FlaxControlNet-hands": {
        **header("FlaxControlNetModel", "0.16.0.dev0"), "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 768,
        "down_block_types": SD1_LEVELS["down_block_types"], "dropout": 0.0, "flip_sin_to_cos": True, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "only_cross_attention": False, "sample_size": 32,
        "use_linear_projection": False,
    },
}  # fmt: skip


def flux_control(version: str, layers: int, single: int = 0, path: str | None = None, **more) -> dict:
    sizes = {**FLUX_TRANSFORMER, **ROPE, "num_layers": layers, "num_single_layers": single, "num_mode": None}
    return {**header("FluxControlNetModel", version, path), **sizes, **more}


FLUX_CONTROLNETS = {
    # From a file that was saved from it.
    "FLUX.1-dev-Controlnet-Canny": flux_control(
        "0.36.0.dev0", 5, 0, "InstantX/FLUX.1-dev-Controlnet-Canny", conditioning_embedding_channels=None
    ),
    "Flux.1-dev-Controlnet-Upscaler": flux_control(
        "0.31.0.dev0", 5, 0, "/data/checkpoints/flux_controlnet_hf/controlnet_upscaling//"
    ),
    "FLUX.1-dev-ControlNet-Union-Pro-2.0": flux_control("0.31.0.dev0", 6),
    "FLUX.1-dev-Controlnet-Union": flux_control("0.30.0.dev0", 5, 10, "/mnt/wangqixun/", num_mode=10),
    "xlabs-style-rgb_v1": flux_control("0.31.0.dev0", 2, conditioning_embedding_channels=16, patch_size=2),
}  # fmt: skip
