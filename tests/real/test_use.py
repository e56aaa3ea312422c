"""Published pipelines in other types and with CLIP trained, and the inference scripts on them."""

import numpy as np
import pytest
from conftest import load_script
from PIL import Image
from safetensors.numpy import load_file

from .verdicts import FLUX, LORA, SD, SDXL


@pytest.fixture
def draw(encode_here, encoder_cache, pairs, tmp_path):
    """draw(script, root, *flags): an inference script in this process; the image's pixels."""

    def go(script, root, *more):
        out = tmp_path / "drawn.png"
        words = [
            "--pretrained_model_name_or_path",
            root,
            "--cache_dir",
            encoder_cache,
            "--prompt",
            "a red circle",
            "--output",
            out,
        ]
        words += ["--num_inference_steps", 1, *more]
        load_script(script).main([str(word) for word in words])
        return np.asarray(Image.open(out))

    return go


def test_clip_trained_with_the_transformer(run, real, tmp_path):
    """FLUX.1's CLIP says eos_token_id 2: it pools at the largest id, which is the end's."""
    run(LORA, real("FLUX.1-dev"), tmp_path / "out", "--train_text_encoder", "--max_train_steps", 2)
    moved = [
        name for name, value in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors").items() if value.any()
    ]
    assert {name.split(".")[0] for name in moved if "lora_B" in name} == {"transformer", "text_encoder"}


@pytest.mark.parametrize("script, name, kind", [
    (LORA, "FLUX.1-schnell", "bf16"), (FLUX, "FLUX.1-dev", "bf16"),
    (SD, "stable-diffusion-2-1", "fp16"), (SDXL, "sdxl-turbo", "fp16"),
])  # fmt: skip
def test_in_half_precision(script, name, kind, run, plain_losses, real, tmp_path):
    """The loss is near that of float32, also with upcast_attention (SD 2.1) and force_upcast (SDXL's VAE)."""
    half = run(script, real(name), tmp_path, "--mixed_precision", kind)
    assert half == pytest.approx(plain_losses(script, real(name)), rel=0.03)


def test_a_lora_is_drawn_with(run, draw, real, tmp_path):
    root = real("FLUX.1-schnell")
    run(LORA, root, tmp_path / "out")
    size = ["--height", 32, "--width", 32, "--max_sequence_length", 16]
    assert draw("flux_lora/infer_flux_lora.py", root, "--lora", tmp_path / "out", *size).shape == (32, 32, 3)


@pytest.mark.parametrize("script, name, controlnet, options", [
    (
        "examples/controlnet/infer_controlnet.py", "stable-diffusion-v1-5", "control_v11p_sd15_canny",
        {"variants": ("fp16",)},
    ),
    ("examples/controlnet/infer_controlnet_sdxl.py", "RealVisXL_V5.0", "controlnet-canny-sdxl-1.0", {}),
    ("flux_controlnet/infer_flux_controlnet.py", "FLUX.1-dev", "FLUX.1-dev-Controlnet-Canny", {}),
])  # fmt: skip
def test_a_published_controlnet_is_drawn_with(script, name, controlnet, options, draw, real, pairs):
    more = [
        "--controlnet",
        real(controlnet),
        "--control_image",
        pairs / "conditioning" / "000000.png",
        "--resolution",
        64,
    ]
    more += ["--variant", "fp16"] if options else []
    more += ["--max_sequence_length", 16] if "flux" in script else []
    pixels = draw(script, real(name, **options), *more)
    assert pixels.shape == (64, 64, 3) and pixels.std() > 5
