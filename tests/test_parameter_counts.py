"""Parameter counts of FLUX.1-dev and its adapters, without allocating them: the transformer would need 48 GB."""

import resource

import mindone.diffusers
import mindone.transformers
import mindspore as ms
import pytest
import transformers
from mindspore.nn.utils import no_init_parameters

from mindtune.models.lora import add_lora, lora_parameters, target_ranks
from mindtune.models.lora_settings import DEFAULT_TARGETS, TEXT_ENCODER_TARGETS, TRANSFORMER_TARGETS
from mindtune.models.precision import freeze_params

# black-forest-labs/FLUX.1-dev, transformer/config.json and text_encoder/config.json.
TRANSFORMER = {
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}


def make_transformer():
    return mindone.diffusers.FluxTransformer2DModel(**TRANSFORMER)


def make_control_transformer():
    """One that reads the latents of a condition too, such as FLUX.1-Depth-dev."""
    return mindone.diffusers.FluxTransformer2DModel(**{**TRANSFORMER, "in_channels": 128, "out_channels": 64})


def make_clip():
    return mindone.transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))


def gigabytes():
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def count(parameters):
    return sum(parameter.size for parameter in parameters)


@pytest.mark.parametrize(
    "make, targets, parameters, modules, adapter",
    [
        (make_transformer, TRANSFORMER_TARGETS, 11_901_408_320, 19 * 4 + 38 * 3, 4_669_440),
        (make_transformer, DEFAULT_TARGETS["flux_kontext"], 11_901_408_320, 19 * 12 + 38 * 4, 13_541_376),
        (make_control_transformer, DEFAULT_TARGETS["flux_control"], 11_901_604_928, 504, 21_686_016),
        (make_clip, TEXT_ENCODER_TARGETS, 123_060_480, 12 * 4, 294_912),
    ],
    ids=["transformer", "kontext", "control", "clip"],
)
def test_parameters_of_flux_dev_and_of_its_rank_4_adapter(make, targets, parameters, modules, adapter):
    before = gigabytes()
    with no_init_parameters():
        model = make()
    assert count(model.get_parameters()) == parameters
    freeze_params(model)
    add_lora(model, target_ranks(model, targets, 4), 1.0, 0.0, ms.float32)
    assert len(lora_parameters(model)) == 2 * modules
    assert count(model.trainable_params()) == count(lora_parameters(model).values()) == adapter
    assert count(model.get_parameters()) == parameters + adapter
    assert gigabytes() < max(2.0, before + 0.5)
