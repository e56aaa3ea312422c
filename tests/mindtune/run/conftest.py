"""A pipeline of FLUX.1-dev's size, without weights."""

import json

import pytest

# The configs of black-forest-labs/FLUX.1-dev.
FLUX_DEV = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38,
        "pooled_projection_dim": 768,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "latent_channels": 16, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
    },
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "d_ff": 10240, "d_kv": 64, "d_model": 4096,
        "num_heads": 64, "feed_forward_proj": "gated-gelu", "num_layers": 24, "vocab_size": 32128,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def flux_dev(tmp_path_factory):
    root = tmp_path_factory.mktemp("configs") / "flux-dev"
    for name, config in FLUX_DEV.items():
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config))
    return root
