"""Going on from published ControlNets."""

import pytest
from safetensors.numpy import load_file

from .verdicts import BASES, CONTROLNETS

FLAG, FINAL = "--controlnet_model_name_or_path", "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", [name for name, verdict in CONTROLNETS.items() if verdict.scripts])
def test_it_goes_on(name, run, real, tmp_path):
    """One update: the names and shapes of its file are those of the one that is left."""
    (script,) = CONTROLNETS[name].scripts
    run(script, real(BASES[script]), tmp_path / "out", FLAG, real(name))
    before, after = (
        {key: value.shape for key, value in load_file(folder / FINAL).items()}
        for folder in (real(name), tmp_path / "out")
    )
    assert before == after


def test_its_fp16_files(run, real, tmp_path):
    run("sd", real(BASES["sd"]), tmp_path / "out", FLAG, real("control_v11p_sd15_canny", variants=("", "fp16")))


@pytest.mark.parametrize("name", [name for name, verdict in CONTROLNETS.items() if not verdict.scripts])
def test_it_is_refused(name, refused, real):
    verdict = CONTROLNETS[name]
    root = real(BASES.get(name, BASES[verdict.script]))
    refused(
        verdict.script,
        root,
        (FLAG, real(name).name, *verdict.words),
        FLAG,
        real(name),
        dry="task_embedding" not in verdict.words,
    )


def test_one_of_another_base(refused, real):
    """Both values are said: what it was made for and what the pipeline has."""
    root = real("stable-diffusion-2-1-base")
    refused("sd", root, (FLAG, "cross_attention_dim", "32", "40"), FLAG, real("sd-controlnet-canny"))


def test_one_for_stable_diffusion_1_on_xl(refused, real):
    root = real("stable-diffusion-xl-base-1.0")
    refused("sdxl", root, (FLAG, "sd-controlnet-canny"), FLAG, real("sd-controlnet-canny"))


def test_a_flux_one_on_stable_diffusion(refused, real):
    name = "FLUX.1-dev-Controlnet-Canny"
    refused("sd", real("stable-diffusion-v1-5"), (FLAG, name, "FluxControlNetModel"), FLAG, real(name))
