"""Bad input of the Kontext script: a message that names the flag or file, what was found and what to do."""

import json
import shutil

import numpy as np
import pytest
from conftest import edit, metrics
from flux_pairs import message_of, write_adapter, write_pairs

from mindtune.cli import UserError

TO_Q = "transformer_blocks.0.attn.to_q"
NORM = "transformer_blocks.0.attn.norm_q.weight"


@pytest.fixture
def refused(kontext_script, kontext_flags, edits, tmp_path):
    """refused(*flags): the message of the UserError. No model was loaded and no file was written."""
    return lambda *more: message_of(kontext_script, kontext_flags(tmp_path / "out", *more), tmp_path, edits)


def says(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, message


@pytest.mark.parametrize(
    "bad, parts",
    [
        (["--resolution", 100], ["--resolution 100", "divisible by 16"]),
        (["--aspect_ratio_buckets", "32,40"], ["--aspect_ratio_buckets", "multiples of 16"]),
        (["--lora_layers", "to_qq"], ["--lora_layers to_qq", "Similar names: to_q"]),
        (["--lora_blocks", "transformer_blocks.7"], ["--lora_blocks transformer_blocks.7", "matches no layer"]),
        (["--adapter", "dora", "--lora_dropout", 0.1], ["--lora_dropout 0.1: not with --adapter dora"]),
        (["--image_column", "photo"], ["--image_column photo", "has the columns"]),
        (["--conditioning_image_column", "edges"], ["--conditioning_image_column edges", "has the columns"]),
        (["--cond_image_column", "edges"], ["--conditioning_image_column edges", "has the columns"]),
        (["--caption_column", "words"], ["--caption_column words", "has the columns"]),
        (["--dataset_name", "some/pairs"], ["--dataset_name", "--train_data_dir", "give one of"]),
        (["--streaming", "--validation_split", 0.2], ["--validation_split with --streaming"]),
        (["--lora_model_name_or_path", "none"], ["--lora_model_name_or_path none: no such file"]),
        (["--validation_image", "none.png"], ["--validation_prompt has 0 and --validation_image 1", "the same number"]),
        (["--validation_prompt", "x", "--validation_image", "none.png"], ["--validation_image none.png", "missing"]),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_bad_flag_is_named_with_its_value_and_the_way_out(refused, bad, parts):
    says(refused(*bad), *parts)


def test_prompts_and_sources_of_validation_that_do_not_match(refused, edits):
    images = [edits / "conditioning" / f"{number}.png" for number in (0, 1)]
    message = refused("--validation_prompt", "a", "b", "c", "--validation_image", *images)
    says(message, "--validation_prompt has 3 and --validation_image 2", "one prompt")


# ---- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, parts",
    [
        (
            {"_class_name": "FluxFillPipeline"},
            ["FluxFillPipeline: it fills", "examples/flux_control/ and --fill"],
        ),
        (
            {"_class_name": "FluxControlPipeline"},
            ["FluxControlPipeline: it reads", "examples/flux_control/"],
        ),
        ({"_class_name": "StableDiffusionPipeline"}, ["Stable Diffusion 1 or 2; train it with examples/controlnet/"]),
    ],
)
def test_a_pipeline_of_another_task(refused, small_flux, tmp_path, changes, parts):
    root = shutil.copytree(small_flux, tmp_path / "flux")
    edit(root / "model_index.json", **changes)
    says(refused("--pretrained_model_name_or_path", root), "--pretrained_model_name_or_path", *parts)


def test_a_transformer_that_reads_a_condition(refused, small_flux, tmp_path):
    root = shutil.copytree(small_flux, tmp_path / "flux")
    edit(root / "model_index.json", _class_name="FluxKontextPipeline")
    edit(root / "transformer" / "config.json", in_channels=128)
    message = refused("--pretrained_model_name_or_path", root, "--dry_run")
    says(message, "in_channels is 128, expected 64: a model that reads a condition", "Give the text-to-image model")


# ---- adapters to start from ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, norms, parts",
    [
        (
            {"x_embedder": (128, 32)},
            {},
            ["(2, 128) and (32, 2)", "has 64 inputs", "Only examples/flux_control/ trains Control-LoRAs"],
        ),
        ({TO_Q: (32, 32)}, {NORM: 16}, ["has trained norms", "Only examples/flux_control/ trains them"]),
        ({TO_Q: (3072, 3072)}, {}, ["made for another model", "(2, 3072)", "32 inputs and 32 outputs"]),
    ],
    ids=["Control-LoRA", "norms", "another width"],
)
def test_an_adapter_that_does_not_fit(refused, tmp_path, layers, norms, parts):
    path = write_adapter(tmp_path / "in.safetensors", layers, norms)
    says(refused("--lora_model_name_or_path", path), f"--lora_model_name_or_path {path}", *parts)


def test_an_adapter_of_another_kind(refused, tmp_path):
    path = write_adapter(tmp_path / "in.safetensors", {TO_Q: (32, 32)})
    says(refused("--lora_model_name_or_path", path, "--adapter", "dora"), "is a LoRA", "Give --adapter lora")


# ---- pairs ---------------------------------------------------------------------------------------


def gray(width, height):
    return np.full((height, width, 3), 128, np.uint8)


def test_all_bad_pairs_are_listed_at_once(refused, tmp_path):
    """A source may have any size, and may be missing, but not damaged."""
    pairs = [(gray(48, 40), gray(8, 90), "a"), (gray(48, 40), None, "b"), (gray(20, 90), None, "c")]
    pairs += [(gray(48, 40), gray(48, 40), "d"), (gray(48, 40), gray(48, 40), "e")]
    folder = write_pairs(tmp_path / "pairs", pairs)
    (folder / "conditioning/3.png").write_text("<html>404</html>")
    (folder / "images/4.png").write_bytes(b"")
    more = ["--train_data_dir", folder, "--aspect_ratio_buckets", "32,32"]
    message = refused(*more)
    says(
        message,
        "3 of 5 pairs cannot be used",
        "images/2.png: 20x90 is smaller",
        "images/3.png: its condition: not an image",
    )
    says(message, "images/4.png", "--skip_bad_images")
    assert "images/0.png" not in message and "images/1.png" not in message


def test_a_missing_file_of_a_source_is_named(refused, tmp_path):
    folder = write_pairs(tmp_path / "pairs", [(gray(48, 40), gray(48, 40), "a"), (gray(48, 40), None, "b")])
    (folder / "conditioning/0.png").unlink()
    says(refused("--train_data_dir", folder), "conditioning/0.png (line 1)")


@pytest.mark.parametrize("last, part", [(None, "has no condition"), ("none", "no column of conditions")])
def test_a_stream_needs_a_source_for_every_pair(kontext, tmp_path, last, part):
    """Batches take the pairs as they come, and their sequences must have the same length."""
    sources = [None, None] if last else [gray(40, 40), None]
    folder = write_pairs(tmp_path / "pairs", [(gray(40, 40), source, "x") for source in sources])
    more = ["--train_data_dir", folder, "--streaming", "--cache_latents", "--aspect_ratio_buckets", ""]
    with pytest.raises(UserError, match=part):
        kontext(tmp_path / "out", *more, "--train_batch_size", 2)
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


# ---- while training ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_update(kontext, tmp_path):
    more = ["--cache_latents", "--learning_rate", 1e30, "--max_train_steps", 9]
    with pytest.raises(UserError, match=r"update 2: the loss is (nan|inf)"):
        kontext(tmp_path / "out", *more)
    assert len(metrics(tmp_path / "out")) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is False
