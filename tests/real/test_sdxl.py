"""ControlNets for published Stable Diffusion XL pipelines and VAEs: one update and an image; one is resumed."""

import pytest

from .verdicts import PIPELINES, SDXL, VAES

NAMES = [name for name, verdict in PIPELINES.items() if SDXL in verdict.scripts]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained(name, trains, real):
    trains(SDXL, real(name), resume=name == NAMES[0])


@pytest.mark.parametrize("name", [name for name, verdict in VAES.items() if SDXL in verdict.scripts])
def test_a_vae_of_its_own(name, trains, real):
    trains(SDXL, real("stable-diffusion-xl-base-1.0"), "--pretrained_vae_model_name_or_path", real(name))


def test_its_fp16_files(trains, real):
    trains(SDXL, real("sdxl-turbo", variants=("fp16",)), "--variant", "fp16")
