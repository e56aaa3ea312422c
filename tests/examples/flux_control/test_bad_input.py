"""Bad input of the Control-LoRA script: a message that names the flag or file, what was found and what to do."""

import shutil

import numpy as np
import pytest
from conftest import edit
from flux_pairs import message_of, write_adapter, write_pairs
from safetensors.numpy import load_file, save_file

TO_Q = "transformer_blocks.0.attn.to_q"
NORM = "transformer_blocks.0.attn.norm_q.weight"
LORA = "--lora_model_name_or_path"


@pytest.fixture
def refused(control_lora_script, control_lora_flags, outlines, tmp_path):
    """refused(*flags): the message of the UserError. No model was loaded and no file was written."""
    return lambda *more: message_of(
        control_lora_script, control_lora_flags(tmp_path / "out", *more), tmp_path, outlines
    )


def says(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, message


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, parts",
    [
        (["--validation_mask", "mask.png"], ["--validation_mask: needs --fill. Add it, or leave this out"]),
        (["--fill", "--validation_mask", "mask.png"], ["needs --validation_image or --validation_file"]),
        (
            ["--train_norm_layers", "--adapter", "lokr"],
            ["--train_norm_layers", "--adapter lokr", "Leave one of the two"],
        ),
        (["--lora_layers", "to_qq"], ["--lora_layers to_qq", "Similar names: to_q"]),
        (
            ["--lora_blocks", "transformer_blocks.0"],
            [
                "--lora_blocks transformer_blocks.0: leaves out x_embedder",
                "--lora_blocks x_embedder,transformer_blocks.0",
            ],
        ),
        (["--conditioning_image_column", "edges"], ["--conditioning_image_column edges", "has the columns"]),
        (["--resolution", 100], ["--resolution 100", "divisible by 16"]),
        (["--validation_prompt", "x"], ["--validation_prompt has 1 and --validation_image 0"]),
        (["--validation_image", "x.png"], ["--validation_prompt has 0 and --validation_image 1"]),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_bad_flag_is_named_with_its_value_and_the_way_out(refused, bad, parts):
    says(refused(*bad), *parts)


def test_blocks_with_the_input_layer_are_trained(control_lora, tmp_path):
    """As the message advises."""
    more = ["--cache_latents", "--lora_blocks", "x_embedder,transformer_blocks.0", "--max_train_steps", 1]
    names = load_file(control_lora(tmp_path, *more) / "pytorch_lora_weights.safetensors")
    parts = {name.split(".")[1] for name in names}
    assert parts == {"x_embedder", "transformer_blocks"}


@pytest.mark.parametrize(
    "count, message",
    [
        (0, "--validation_mask: 0 for 2 of --validation_image. Give one each, or one for all"),
        (3, "--validation_mask: 3 for 2"),
    ],
)
def test_masks_of_validation_that_do_not_match(refused, outlines, count, message):
    images = [outlines / "conditioning" / f"{number}.png" for number in range(3)]
    more = ["--fill", "--validation_prompt", "x", "--validation_image", *images[:2]]
    says(refused(*more, *(["--validation_mask", *images[:count]] if count else [])), message)


def test_a_mask_of_validation_that_is_no_image(refused, outlines, tmp_path):
    (tmp_path / "mask.png").write_text("<html>404</html>")
    image = outlines / "images" / "0.png"
    more = [
        "--fill",
        "--validation_prompt",
        "x",
        "--validation_image",
        image,
        "--validation_mask",
        tmp_path / "mask.png",
    ]
    says(refused(*more), f"--validation_mask {tmp_path / 'mask.png'}: cannot be read as an image")


def test_a_row_without_a_mask(refused, outlines, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "image": "%s"}' % (outlines / "images" / "0.png"))
    message = refused("--fill", "--validation_file", tmp_path / "rows.jsonl")
    says(message, "line 1: mask is missing", "--validation_mask")


# ---- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, fill, parts",
    [
        ("FluxKontextPipeline", [], ["it edits a reference image", "examples/flux_kontext/"]),
        ("FluxFillPipeline", [], ["it fills a masked image", "examples/flux_control/ and --fill"]),
        ("FluxControlPipeline", ["--fill"], ["it reads a condition with the latents", "examples/flux_control/"]),
        ("StableDiffusionXLPipeline", [], ["Stable Diffusion XL; train it with examples/controlnet/"]),
    ],
)
def test_a_pipeline_of_another_task(refused, small_flux, tmp_path, cls, fill, parts):
    root = shutil.copytree(small_flux, tmp_path / "flux")
    edit(root / "model_index.json", _class_name=cls)
    says(refused("--pretrained_model_name_or_path", root, *fill), f"_class_name is {cls}", *parts)


@pytest.mark.parametrize("inputs, fill", [(384, []), (128, ["--fill"]), (96, [])])
def test_a_transformer_with_other_inputs(refused, small_flux, tmp_path, inputs, fill):
    root = shutil.copytree(small_flux, tmp_path / "flux")
    edit(root / "transformer" / "config.json", in_channels=inputs, out_channels=64)
    message = refused("--pretrained_model_name_or_path", root, "--dry_run", *fill)
    says(message, f"in_channels is {inputs}, expected 64", "Give the text-to-image model")


# ---- adapters to start from ----------------------------------------------------------------------

WIDE = {"x_embedder": (128, 32), TO_Q: (32, 32)}


@pytest.mark.parametrize(
    "layers, norms, more, parts",
    [
        ({"x_embedder": (64, 32)}, {}, [], ["(2, 64) and (32, 2)", "has 128 inputs", "--fill"]),
        (WIDE, {}, ["--fill"], ["(2, 128) and (32, 2)", "has 384 inputs", "--fill"]),
        ({"x_embedder": (384, 32)}, {}, [], ["(2, 384) and (32, 2)", "has 128 inputs", "--fill"]),
        ({TO_Q: (32, 32)}, {}, [], ["adapts no x_embedder, which reads the condition. Give a Control-LoRA"]),
        (WIDE, {NORM: 16}, [], ["has trained norms, which would be lost. Add --train_norm_layers"]),
        (WIDE, {NORM: 128}, ["--train_norm_layers"], ["made for another model", f"no {NORM} (128,)"]),
        (WIDE, {NORM.replace("0", "9"): 16}, ["--train_norm_layers"], ["made for another model", "blocks.9"]),
        (WIDE, {}, ["--adapter", "dora"], ["is a LoRA", "Give --adapter lora"]),
    ],
    ids=["plain", "of a condition", "of a fill model", "no input layer", "norms", "wide norms", "other norms", "kind"],
)
def test_an_adapter_that_does_not_fit(refused, tmp_path, layers, norms, more, parts):
    path = write_adapter(tmp_path / "in.safetensors", layers, norms)
    message = refused(LORA, path, *more)
    says(message, LORA, *parts)


def test_a_lora_without_the_input_layer_goes_on_for_a_model_that_has_it(control_lora, small_flux, tmp_path):
    """LoRAs for FLUX.1-Depth-dev, say: the base model reads the condition without an adapter."""
    root = shutil.copytree(small_flux, tmp_path / "flux")
    edit(root / "model_index.json", _class_name="FluxControlPipeline")
    edit(root / "transformer" / "config.json", in_channels=128, out_channels=64)
    weights = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["x_embedder.weight"] = np.tile(tensors["x_embedder.weight"], (1, 2))
    save_file(tensors, weights, metadata={"format": "pt"})
    path = write_adapter(tmp_path / "in.safetensors", {TO_Q: (32, 32)})
    more = ["--pretrained_model_name_or_path", root, LORA, path, "--cache_latents", "--max_train_steps", 1]
    out = control_lora(tmp_path / "out", *more)
    names = load_file(out / "pytorch_lora_weights.safetensors")
    assert sorted(names) == [f"transformer.{TO_Q}.lora_{half}.weight" for half in "AB"]


# ---- pairs ---------------------------------------------------------------------------------------


def gray(width, height):
    return np.full((height, width, 3), 128, np.uint8)


def test_pairs_without_a_condition_or_with_one_of_another_size(refused, tmp_path):
    """Kontext alone takes them."""
    folder = write_pairs(
        tmp_path / "other size", [(gray(48, 40), gray(40, 40), "a"), (gray(48, 40), gray(48, 40), "b")]
    )
    says(refused("--train_data_dir", folder), "1 of 2 pairs cannot be used", "images/0.png: 48x40, its condition 40x40")
    folder = write_pairs(tmp_path / "none", [(gray(48, 40), gray(48, 40), "a"), (gray(48, 40), None, "b")])
    says(refused("--train_data_dir", folder), "metadata.jsonl", "line 2", "conditioning_image")


def test_a_mask_of_another_size_is_listed(refused, tmp_path):
    """With --fill a pair may lack its mask, which is then random."""
    pairs = [(gray(48, 40), gray(40, 40), "a"), (gray(48, 40), None, "b"), (gray(48, 40), gray(48, 40), "c")]
    message = refused("--fill", "--train_data_dir", write_pairs(tmp_path / "pairs", pairs))
    says(message, "1 of 3 pairs cannot be used", "images/0.png: 48x40, its condition 40x40")


def test_a_data_set_without_conditions(refused, tmp_path):
    folder = write_pairs(tmp_path / "pairs", [(gray(48, 40), None, "a")])
    says(refused("--train_data_dir", folder), "--conditioning_image_column", "has the columns image, text")
