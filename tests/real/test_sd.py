"""ControlNets for published Stable Diffusion 1 and 2 pipelines: one update and an image; one is resumed."""

import shutil

import numpy as np
import pytest
import real_pipelines
from safetensors.numpy import load_file

from mindtune.models import configs, loading

from .conftest import copy
from .verdicts import PIPELINES, SD

FINAL = "diffusion_pytorch_model.safetensors"

NAMES = [name for name, verdict in PIPELINES.items() if SD in verdict.scripts]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained(name, trains, real):
    trains(SD, real(name), resume=name == NAMES[0])


def test_with_latents_encoded_once(trains, real):
    trains(SD, real("stable-diffusion-v1-5"), "--cache_latents")


def test_its_fp16_files(trains, real):
    """Beside the plain ones, as the hub has them: the VAE's old names are in the plain file only."""
    trains(SD, real("stable-diffusion-v1-5", variants=("", "fp16")), "--variant", "fp16", "--cache_latents")


@pytest.mark.parametrize("part, file", [("vae", FINAL), ("text_encoder", "model.safetensors")])
def test_the_variant_where_one_part_has_only_the_plain_file(part, file, run, real, tmp_path, capfd):
    """Repositories on the hub have fp16 files of some parts only: the plain file is taken, and the run says so."""
    root = copy(real("stable-diffusion-v1-5", variants=("", "fp16")), tmp_path)
    (root / part / file.replace(".safetensors", ".fp16.safetensors")).unlink()
    run(SD, root, tmp_path / "out", "--variant", "fp16")
    said = [line for line in capfd.readouterr().out.splitlines() if "--variant fp16" in line]
    assert len(said) == 1 and part in said[0] and "without a variant" in said[0]


def test_shards(run, real, tmp_path):
    """The same weights in two or three files: the same losses."""
    parts = {"unet": 3, "text_encoder": 2, "vae": 2}
    losses = [
        run(SD, real("stable-diffusion-2-1-base", **options), tmp_path / name)
        for name, options in (("one", {}), ("more", {"shards": parts}))
    ]
    assert losses[0] == losses[1]


def test_what_else_lies_on_the_hub_is_left_alone(run, real, tmp_path):
    """Pickles, second copies, other frameworks' files and single files, all of them torn."""
    run(SD, real("stable-diffusion-v1-4", extras=True), tmp_path / "out")


def test_tensors_that_the_model_does_not_have_are_named(run, real, tmp_path, capfd):
    """Except those that are known to be unused, such as the position ids of old CLIPs."""
    root = copy(real("stable-diffusion-v1-5"), tmp_path)
    added = {
        "unet": "down_blocks.0.attentions.0.extra.weight",
        "text_encoder": "text_model.extra.weight",
        "vae": "encoder.extra.weight",
    }
    for part, name in added.items():
        path = next((root / part).glob("*.safetensors"))
        real_pipelines.write_safetensors(path, {**load_file(path), name: np.zeros((4, 4), np.float32)})
    assert "text_model.embeddings.position_ids" in load_file(root / "text_encoder" / "model.safetensors")
    run(SD, root, tmp_path / "out")
    said = capfd.readouterr().out
    assert not [name for name in added.values() if name not in said] and "position_ids" not in said


def test_attention_of_the_vae_as_convolutions(run, plain_losses, real, tmp_path):
    """[C, C, 1, 1], as converters from single files leave it: the same weights, the same loss."""
    plain = real("openjourney")
    root = shutil.copytree(plain, tmp_path / "converted")
    config = real_pipelines.PIPELINES["openjourney"]["vae/config.json"]
    tensors = real_pipelines.draw(real_pipelines.small(config), 0)
    path = root / "vae" / "diffusion_pytorch_model.safetensors"
    real_pipelines.write_safetensors(path, real_pipelines.old_names(tensors, "convolution"))
    assert path.read_bytes() != (plain / "vae" / path.name).read_bytes()
    assert run(SD, root, tmp_path / "out") == plain_losses(SD, plain)


def test_the_vae_put_in_place_of_the_pipelines(trains, real, tmp_path):
    root = shutil.copytree(real("stable-diffusion-v1-5"), tmp_path / "pipeline")
    shutil.rmtree(root / "vae")
    shutil.copytree(real("sd-vae-ft-mse"), root / "vae")
    trains(SD, root)


def test_a_tokenizer_that_does_not_say_its_length(plain_losses, real):
    """transformers would take any: captions are still cut at CLIP's 77."""
    without = real("stable-diffusion-v1-5", model_max_length=False)
    assert plain_losses(SD, without) == plain_losses(SD, real("stable-diffusion-v1-5"))


LINSPACE, LEADING, TRAILING = (
    [999, 874, 749, 624, 500, 375, 250, 125],
    [889, 778, 667, 556, 445, 334, 223, 112],
    [999, 874, 749, 624, 499, 374, 249, 124],
)  # fmt: skip


@pytest.mark.parametrize("name, timesteps", [
    ("stable-diffusion-v1-5", LINSPACE), ("stable-diffusion-2-1", LINSPACE), ("Realistic_Vision_V5.1_noVAE", LINSPACE),
    ("stable-diffusion-xl-base-1.0", LEADING), ("RealVisXL_V5.0", LEADING), ("sdxl-turbo", TRAILING),
])  # fmt: skip
def test_images_are_drawn_at_the_timesteps_of_diffusers(name, timesteps, real):
    """Those of UniPCMultistepScheduler.from_config(pipeline.scheduler.config) in diffusers 0.35, eight steps.

    Where a file has no timestep_spacing, the default of UniPC counts, not that of the scheduler of the file ("leading"
    for PNDM and DDIM).
    """
    sampler = loading.create_unipc(configs.read_config(real(name), "scheduler"))
    sampler.set_timesteps(8)
    assert sampler.timesteps.asnumpy().tolist() == timesteps
