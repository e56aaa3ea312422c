"""What the scripts cannot train is refused before anything is encoded or written: model, key and value are named.

The same in --dry_run, which must not say "fits" of it.
"""

import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import real_pipelines
from conftest import load_script
from safetensors.numpy import load_file

from .conftest import SCRIPTS, copy, edit
from .verdicts import CONTROL, FILL, FLUX, KONTEXT, LORA, PIPELINES, SD, SDXL

FINAL = "diffusion_pytorch_model.safetensors"
REFUSED = [name for name, verdict in PIPELINES.items() if verdict.script]


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_is_not_trained(name, refused, real):
    """By any script, or by the LoRA script."""
    verdict = PIPELINES[name]
    refused(verdict.script, real(name), (name, *verdict.words))


CHANNELS = [
    ("FLUX.1-Fill-dev", LORA, "FluxPipeline", "384"), ("FLUX.1-Depth-dev", FLUX, "FluxPipeline", "128"),
    ("FLUX.1-Fill-dev", CONTROL, "FluxPipeline", "384"), ("FLUX.1-Depth-dev", KONTEXT, "FluxPipeline", "128"),
    ("stable-diffusion-inpainting", SD, "StableDiffusionPipeline", "9"),
]  # fmt: skip


@pytest.mark.parametrize("name, script, cls, channels", CHANNELS)
def test_a_model_that_takes_more_than_latents(name, script, cls, channels, refused, real, tmp_path):
    """Whatever the pipeline's class: re-saves and mixtures have that of a text-to-image pipeline."""
    root = copy(real(name), tmp_path)
    edit(root / "model_index.json", _class_name=cls)
    refused(script, root, (name, "in_channels", channels))


OTHER_SCRIPTS = [
    ("stable-diffusion-xl-base-1.0", SD, "StableDiffusionXLPipeline"),
    ("stable-diffusion-v1-5", SDXL, "StableDiffusionPipeline"),
    ("FLUX.1-dev", SD, "FluxPipeline"), ("FLUX.1-schnell", SDXL, "FluxPipeline"),
    ("stable-diffusion-2-1", LORA, "StableDiffusionPipeline"),
    ("stable-diffusion-xl-base-1.0", FLUX, "StableDiffusionXLPipeline"),
    ("FLUX.1-Kontext-dev", FILL, "FluxKontextPipeline"), ("FLUX.1-Fill-dev", KONTEXT, "FluxFillPipeline"),
    ("FLUX.1-Canny-dev", FILL, "FluxControlPipeline"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, script, cls", OTHER_SCRIPTS, ids=[f"{name} in {script}" for name, script, _ in OTHER_SCRIPTS]
)
def test_a_pipeline_of_another_script(name, script, cls, refused, real):
    refused(script, real(name), (name, cls))


# ---- quantised files -----------------------------------------------------------------------------


def says_what_to_download(message):
    return re.search(r"(?i)\bdownload\b|\bbf16\b|\bfp16\b|--int8", message)


def test_fp8_tensors(refused, real, tmp_path):
    """The transformer's large matrices in float8, as a re-save of 12 GB has them."""
    root = copy(real("FLUX.1-dev", shards={"transformer": 1}), tmp_path)
    path = root / "transformer" / FINAL
    tensors = load_file(path)
    halved = {
        name: value.astype(ml_dtypes.float8_e4m3fn) if value.ndim == 2 else value for name, value in tensors.items()
    }
    real_pipelines.write_safetensors(path, halved)
    assert says_what_to_download(refused(LORA, root, ("transformer", "F8_E4M3"), dry=False))


def test_bitsandbytes_in_4_bits(refused, real, tmp_path):
    """Its config.json says so, and each matrix has become bytes with tables beside them."""
    root = copy(real("FLUX.1-dev", shards={"transformer": 1}), tmp_path)
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(root / "transformer" / "config.json", quantization_config={**how, "bnb_4bit_compute_dtype": "bfloat16"})
    path = root / "transformer" / FINAL
    tensors = {}
    for name, value in load_file(path).items():
        if value.ndim == 2:
            tensors[name] = np.zeros((value.size // 2, 1), np.uint8)
            tensors[f"{name}.absmax"] = np.zeros(value.size // 64, np.uint8)
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.zeros(88, np.uint8)
        else:
            tensors[name] = value
    real_pipelines.write_safetensors(path, tensors)
    assert says_what_to_download(refused(LORA, root, ("transformer", "quantization_config", "bitsandbytes")))


@pytest.mark.parametrize("file", ["flux1-dev-Q4_K_S.gguf", "flux1-dev.safetensors", "v1-5-pruned-emaonly.ckpt"])
@pytest.mark.parametrize("script", [LORA, SD])
def test_one_file_instead_of_a_folder(script, file, refused, tmp_path):
    """What other programs load: GGUF, or all of a model in a single file."""
    (tmp_path / file).write_bytes(b"GGUF" + bytes(100))
    message = refused(script, tmp_path / file, ("--pretrained_model_name_or_path", file))
    assert "no such directory" not in message and re.search(r"(?i)folder|directory", message)


# ---- which files are there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, script", [("stable-diffusion-v1-5", SD), ("sdxl-turbo", SDXL), ("FLUX.1-schnell", LORA)]
)
def test_only_fp16_files_without_the_flag(name, script, refused, real):
    refused(script, real(name, variants=("fp16",)), ("--variant fp16",), dry=False)


def test_the_flag_where_no_part_has_such_files(refused, real):
    refused(
        SD, real("stable-diffusion-v1-5"), ("stable-diffusion-v1-5", "--variant fp16"), "--variant", "fp16", dry=False
    )


def test_a_controlnet_with_only_fp16_files(refused, real):
    path = real("control_v11p_sd15_canny", variants=("fp16",))
    refused(SD, real("stable-diffusion-v1-5"), (path.name, "fp16"), "--controlnet_model_name_or_path", path, dry=False)


def test_weights_of_flax_alone(refused, real, tmp_path):
    root = copy(real("stable-diffusion-v1-4"), tmp_path)
    for path in root.glob("*/*.safetensors"):
        path.with_name(
            "flax_model.msgpack" if path.name == "model.safetensors" else "diffusion_flax_model.msgpack"
        ).write_bytes(b"flax")
        path.unlink()
    refused(SD, root, ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_flax_model.msgpack"), dry=False)


def test_pickles_alone(refused, real, tmp_path):
    root = copy(real("stable-diffusion-v1-5", extras=True), tmp_path)
    (root / "unet" / FINAL).unlink()
    refused(SD, root, ("unet/diffusion_pytorch_model.bin", "pickle"), dry=False)


@pytest.mark.parametrize("script", [LORA, FLUX])
def test_flux_without_any_file_of_its_second_tokenizer(script, refused, real, tmp_path):
    root = copy(real("FLUX.1-dev"), tmp_path)
    for name in ("spiece.model", "tokenizer.json"):
        (root / "tokenizer_2" / name).unlink()
    refused(script, root, ("tokenizer_2/spiece.model",), dry=False)


def test_one_shard_of_three(refused, real, tmp_path):
    root = copy(real("FLUX.1-dev"), tmp_path)
    shard = "diffusion_pytorch_model-00002-of-00003.safetensors"
    (root / "transformer" / shard).unlink()
    refused(LORA, root, (f"transformer/{shard}",), dry=False)


# ---- --dry_run needs configs only ----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, verdict in PIPELINES.items() if verdict.scripts])
def test_a_dry_run_without_weights_says_what_it_takes(name, real, line, tmp_path, capsys):
    root = tmp_path / name
    shutil.copytree(
        real(name), root, ignore=lambda folder, files: [f for f in files if f.endswith((".safetensors", ".index.json"))]
    )
    for script in PIPELINES[name].scripts:
        assert load_script(SCRIPTS[script]).main(line(script, root, tmp_path / "out", "--dry_run")) == 0
        assert "fits" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()
