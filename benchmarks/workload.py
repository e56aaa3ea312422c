"""Model sizes and inputs of the speed benchmark. NumPy only, because both environments import it."""

import time

import numpy as np

# FLUX transformers by width or depth. tokens: rows and columns of image tokens; text: T5 tokens; controlnet: its double
# and single blocks.
SIZES = {
    "mid": {
        "transformer": {
            "num_attention_heads": 8,
            "attention_head_dim": 64,
            "axes_dims_rope": [16, 24, 24],
            "num_layers": 4,
            "num_single_layers": 8,
            "joint_attention_dim": 512,
        },
        "tokens": [16, 16],
        "text": 128,
        "controlnet": [2, 2],
    },
    "wide": {
        "transformer": {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 4096,
        },
        "tokens": [32, 32],
        "text": 512,
        "controlnet": [1, 0],
    },
    "deep": {
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "axes_dims_rope": [16, 24, 24],
            "num_layers": 19,
            "num_single_layers": 38,
            "joint_attention_dim": 128,
        },
        "tokens": [8, 8],
        "text": 32,
        "controlnet": [2, 4],
    },
    # The first two levels of Stable Diffusion 1.5.
    "sd": {
        "unet": {
            "block_out_channels": [320, 640],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        },
        "latent": [32, 32],
        "text": 77,
    },
    # Stable Diffusion XL's three levels at their widths, with 1 instead of 2 layers per level, and with 1 and 2 instead
    # of 2 and 10 transformer blocks per layer.
    "sdxl": {
        "unet": {
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "norm_num_groups": 32,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,  # pooled text, six numbers of size and crop
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "use_linear_projection": True,
        },
        "latent": [32, 32],
        "text": 77,
    },
}
FLUX_COMMON = {"in_channels": 64, "pooled_projection_dim": 768, "guidance_embeds": True}
POOLED = 1280  # width of SDXL's pooled text
# Sampling one image: denoising steps and the guidance scale, for FLUX and for a UNet with its ControlNet.
SAMPLING = {"mid": {"steps": 28, "guidance": 3.5}, "sd": {"steps": 20, "guidance": 7.5}}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
RANK = 16


def settings(kind, size):
    """Settings of a training step for tests/parity: flux_lora, flux_controlnet, sd15 or sdxl; `size` is of SIZES."""
    common = {
        "kind": kind,
        "eps": 1e-8,
        "guidance_scale": 3.5,
        "length": size["text"],
        "logit_mean": 0.0,
        "logit_std": 1.0,
    }
    common.update(mode_scale=1.29, scheme="none", updates=1)
    if kind == "flux_lora":
        return {
            **common,
            "rank": RANK,
            "alpha": float(RANK),
            "targets": {"transformer": TARGETS},
            "rates": {"transformer": [1e-4, 1e-4]},
        }
    common.update(rates={"controlnet": [5e-6, 1e-2]})
    if kind == "flux_controlnet":
        return {**common, "blocks": size["controlnet"]}
    scale = 0.13025 if kind == "sdxl" else 0.18215
    return {**common, "prediction_type": "epsilon", "snr_gamma": None, "scaling_factor": scale}


def batch(kind, size, count=1):
    """Name -> array of a batch of `count` for one update, with the names of tests/parity."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((count, *shape), dtype=np.float32)

    flux = kind.startswith("flux")
    channels = 16 if flux else 4
    height, width = (2 * n for n in size["tokens"]) if flux else size["latent"]
    made = {"moments": normal(2 * channels, height, width)}
    made.update(posterior=normal(channels, height, width), noise=normal(channels, height, width))
    if flux:
        made.update(text=normal(size["text"], size["transformer"]["joint_attention_dim"]), pooled=normal(768))
        made.update(uniform=rng.random(count), normal=normal())
    else:
        made.update(
            text=normal(size["text"], size["unet"]["cross_attention_dim"]),
            condition=rng.random((count, 3, 8 * height, 8 * width)),
        )
        made.update(
            condition=made["condition"].astype(np.float32), timesteps=rng.integers(0, 1000, count).astype(np.int32)
        )
    if kind == "sdxl":
        numbers = [8 * height, 8 * width, 0, 0, 8 * height, 8 * width]
        made.update(pooled=normal(POOLED), time_ids=np.array([numbers] * count, np.float32))
    if kind == "flux_controlnet":
        made.update(condition=normal(2 * channels, height, width), condition_posterior=normal(channels, height, width))
    return made


def prompt(kind, size):
    """Name -> embeddings of a prompt, as `EncoderStage.text` returns them."""
    made = batch(kind, size)
    names = {"prompt_embeds": "text", "pooled_prompt_embeds": "pooled"}
    return {name: made[key][0] for name, key in names.items() if key in made}


def condition(size):
    """A condition image of a UNet's ControlNet, uint8 [H, W, 3]."""
    return (255 * batch("sd15", size)["condition"][0]).astype(np.uint8).transpose(1, 2, 0)


def time_images(draw):
    """Seconds of the first and of the second call of `draw`, and some values of the latents that it returns."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        latents = np.asarray(draw())
        seconds.append(time.perf_counter() - began)
    return {"first": seconds[0], "image": seconds[1], "latents": latents.ravel()[:: latents.size // 64].tolist()}
