"""At their published sizes the configs describe the published files: to the byte where the hub has an index of shards.

Through mindone's classes on parameters that are never allocated. A file has 8 bytes, a header and the data.
"""

import math

import pytest
from real_configs import PIPELINES
from real_controlnets import CONTROLNETS, VAES
from real_pipelines import parameter_shapes

# Bytes of a file in float32, and how many of them its header may be.
FILES = {
    ("stable-diffusion-v1-5", "unet"): 3_438_167_540,
    ("stable-diffusion-v1-5", "text_encoder"): 492_265_874,
    ("stable-diffusion-v1-5", "vae"): 334_643_276,
    ("stable-diffusion-2-1", "unet"): 3_463_726_498,
    ("stable-diffusion-2-1", "text_encoder"): 1_361_597_018,
    ("stable-diffusion-xl-base-1.0", "unet"): 10_270_077_736,
    ("stable-diffusion-xl-base-1.0", "text_encoder_2"): 2_778_702_264,
}


def count(config):
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def fits(size, parameters, bytes_each=4):
    """Whether the rest is a header's: at most 300 bytes for each of its some thousand tensors."""
    return 0 < size - parameters * bytes_each < 300_000


@pytest.mark.parametrize("name, part", FILES, ids=["-".join(key) for key in FILES])
def test_a_file_of_one_of_stable_diffusions_models(name, part):
    assert fits(FILES[name, part], count(PIPELINES[name][f"{part}/config.json"]))


def test_a_controlnet_and_a_vae():
    assert fits(1_445_157_124, count(CONTROLNETS["sd-controlnet-canny"]))
    assert fits(334_643_276, count(VAES["sd-vae-ft-mse"]))


def test_ssd_1b():
    """Of its UNet only the shape was known: with it the file has the 5.33 GB that the hub gives (2.66 GB in fp16)."""
    assert 5.325e9 < 4 * count(PIPELINES["SSD-1B"]["unet/config.json"]) < 5.335e9


@pytest.mark.parametrize("name, part, tensors, total", [
    ("FLUX.1-dev", "transformer", 1160, 23_802_816_640), ("FLUX.1-schnell", "transformer", 1156, 23_782_357_120),
    ("FLUX.1-dev", "text_encoder_2", 219, 9_524_621_312),
])  # fmt: skip
def test_the_index_of_flux(name, part, tensors, total):
    """How many tensors and bytes in bf16 the index names."""
    shapes = parameter_shapes(PIPELINES[name][f"{part}/config.json"])
    assert len(shapes) == tensors and 2 * sum(math.prod(shape) for shape in shapes.values()) == total
