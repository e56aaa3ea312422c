"""The names of a component's weight files, and the message when they are missing."""

import pytest
from conftest import shard

from mindtune.models.weights import missing_file_problem, weight_files


def test_weight_files_of_one_file_and_of_a_variant(tiny_flux):
    assert weight_files(tiny_flux, "vae") == [tiny_flux / "vae" / "diffusion_pytorch_model.safetensors"]
    # Without files of the variant those without a variant are used; without any, those of the variant are missing.
    assert weight_files(tiny_flux, "text_encoder_2", "fp16") == [tiny_flux / "text_encoder_2" / "model.safetensors"]
    assert weight_files(tiny_flux, "tokenizer", "fp16") == [
        tiny_flux / "tokenizer" / "diffusion_pytorch_model.fp16.safetensors"
    ]


@pytest.mark.parametrize(
    "variant, index, middle",
    [
        (None, "model.safetensors.index.json", ""),
        ("fp16", "model.safetensors.index.fp16.json", ".fp16"),
        ("fp16", "model.fp16.safetensors.index.json", ".fp16"),
    ],
)
def test_weight_files_of_an_index(pipeline, variant, index, middle):
    """Libraries use two names for the index of a variant. A missing shard is listed too."""
    folder = pipeline / "text_encoder_2"
    names = shard(folder, "model", index, middle)
    (folder / names[0]).unlink()
    assert weight_files(pipeline, "text_encoder_2", variant) == [folder / name for name in names]
    if variant:
        assert weight_files(pipeline, "text_encoder_2") == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    "existing, expected",
    [
        ([], ""),
        (["model.fp16.safetensors"], "; there are files of the variant fp16: add --variant fp16"),
        (["model-00001-of-00002.fp16.safetensors"], "; there are files of the variant fp16: add --variant fp16"),
        (["model.bf16-00001-of-00002.safetensors"], "; there are files of the variant bf16: add --variant bf16"),
        (["model.non_ema.safetensors"], ""),
        (["flax_model.msgpack"], "; text_encoder/flax_model.msgpack holds Flax weights, which are not supported"),
        (["pytorch_model.bin", "config.json"], "; text_encoder/pytorch_model.bin is a pickle, which can run code"),
    ],
)
def test_the_message_for_a_missing_file(tmp_path, existing, expected):
    found = missing_file_problem("text_encoder", tmp_path / "text_encoder" / "model.safetensors", existing)
    assert found.startswith("text_encoder/model.safetensors is missing" + expected)
    assert bool(expected) == (";" in found)
