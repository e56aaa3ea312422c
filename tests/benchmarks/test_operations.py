"""The operations of a training step are counted as PyTorch counts them."""

import pytest
from conftest import load_script

operations = load_script("benchmarks/operations.py")

FLUX = {
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 24,
    },
    "tokens": [2, 3],
    "text": 5,
    "controlnet": [1, 2],
}
# As in Stable Diffusion 1.5: the last level has no attention, the middle has.
SD = {
    "unet": {
        "block_out_channels": [16, 24, 32],
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    },
    "latent": [8, 8],
    "text": 7,
}
# As in Stable Diffusion XL: the first level has no attention, and pooled text and sizes are embedded too.
SDXL = {
    "unet": {
        "block_out_channels": [16, 24, 32],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": 24,
        "projection_class_embeddings_input_dim": 1280 + 6 * 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    },
    "latent": [8, 8],
    "text": 7,
}


# Counted by FlopCounterMode of PyTorch 2.13 at batch 2, by the job `count` of benchmarks/step_torch.py.
@pytest.mark.parametrize(
    "kind, size, counted",
    [
        ("flux_lora", FLUX, 7_987_968),
        ("flux_controlnet", FLUX, 11_868_672),
        ("sd15", SD, 923_821_568),
        ("sdxl", SDXL, 892_852_224),
    ],
)
def test_an_update_has_as_many_operations_as_pytorch_counts(kind, size, counted):
    assert sum(operations.of_step(kind, size, batch=2).values()) == counted


def test_a_frozen_layer_has_no_gradient_of_its_weight_and_a_first_one_none_of_its_input():
    # 3 rows, 5 inputs, 7 outputs: 2 x 3 x 5 x 7 operations for the product and for each gradient.
    first = operations.layer(operations.Value(), 3, 5, 7)
    trained = operations.layer(first, 3, 7, 5, trains=True)
    last = operations.layer(trained, 3, 5, 7)
    assert operations.total(last) == {"forward": 3 * 210, "backward": 2 * 210}
