"""The small copies of published pipelines have the published keys, values, file names and tensor names."""

import json

import pytest
import real_pipelines
from real_configs import PIPELINES
from real_pipelines import SMALL, frozen
from safetensors import safe_open

SIZES = {*SMALL, "vocab_size", "added_tokens_decoder"}
ATTENTION = "mid_block.attentions.0."


def tensor_names(path):
    with safe_open(path, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@pytest.mark.parametrize("name", PIPELINES)
def test_keys_and_values_are_those_of_the_hub(name, real):
    for path, published in PIPELINES[name].items():
        written = json.loads((real(name) / path).read_text())
        assert written.keys() == published.keys(), path
        assert {key for key in published if written[key] != published[key]} <= SIZES, path


@pytest.mark.parametrize("name", PIPELINES)
def test_it_is_small_and_its_widths_fit_together(name, real):
    root = real(name)
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 4.1e6
    configs = {path.parent.name: json.loads(path.read_text()) for path in root.glob("*/config.json")}
    first = configs["text_encoder"]["hidden_size"]
    if "transformer" in configs:
        assert configs["transformer"]["pooled_projection_dim"] == first
        assert configs["transformer"]["joint_attention_dim"] == configs["text_encoder_2"]["d_model"]
        return
    second = configs.get("text_encoder_2", {"hidden_size": 0})["hidden_size"]
    assert configs["unet"]["cross_attention_dim"] == first + second
    if second:
        added = 6 * configs["unet"]["addition_time_embed_dim"]
        assert (
            configs["unet"]["projection_class_embeddings_input_dim"]
            == configs["text_encoder_2"]["projection_dim"] + added
        )


def test_a_seed_gives_the_same_bytes(real, tmp_path):
    again = real_pipelines.make("stable-diffusion-v1-5", tmp_path / "again")
    for path in real("stable-diffusion-v1-5").rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(real("stable-diffusion-v1-5"))).read_bytes(), path


def test_flux_is_in_shards_with_t5s_embedding_under_one_name(real):
    root = real("FLUX.1-dev")
    shards = [path.name for path in sorted((root / "transformer").glob("*.safetensors"))]
    assert shards == [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for part, stem, count in (("transformer", "diffusion_pytorch_model", 3), ("text_encoder_2", "model", 2)):
        index = json.loads((root / part / f"{stem}.safetensors.index.json").read_text())
        files = [tensor_names(path) for path in sorted((root / part).glob("*.safetensors"))]
        assert len(files) == count and set(index["weight_map"]) == {name for names in files for name in names}
        assert index["metadata"]["total_size"] == sum(
            2 * size(shape) for names in files for shape in names.values()
        )  # bf16
    assert "shared.weight" in index["weight_map"] and "encoder.embed_tokens.weight" not in index["weight_map"]


def size(shape):
    count = 1
    for side in shape:
        count *= side
    return count


def test_guidance_is_in_dev_and_not_in_schnell(real):
    def names(name):
        return json.loads((real(name) / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())[
            "weight_map"
        ]

    only = {name for name in names("FLUX.1-dev") if name not in names("FLUX.1-schnell")}
    assert only == {
        f"time_text_embed.guidance_embedder.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name, old", [
    ("stable-diffusion-v1-4", True), ("stable-diffusion-2-1", True), ("Realistic_Vision_V5.1_noVAE", True),
    ("sdxl-turbo", False),
    ("stable-diffusion-xl-base-1.0", False),
])  # fmt: skip
def test_old_names_of_the_vaes_attention(name, old, real):
    """In the plain files of diffusers before 0.17; never in the fp16 files, which were made later."""
    folder = real(name, variants=("", "fp16")) / "vae"
    plain, half = (tensor_names(folder / f"diffusion_pytorch_model{middle}.safetensors") for middle in ("", ".fp16"))
    width = plain["encoder.conv_norm_out.weight"][0]
    assert plain[f"encoder.{ATTENTION}{'query' if old else 'to_q'}.weight"] == (width, width)
    assert f"decoder.{ATTENTION}to_out.0.weight" in half and (f"decoder.{ATTENTION}proj_attn.weight" in plain) == old


def test_the_config_says_controlnet_and_the_file_has_a_unions_tensors(real):
    folder = real("controlnet-union-sdxl-1.0")
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "ControlNetModel"
    assert {"task_embedding", "spatial_ch_projs.weight"} <= tensor_names(
        folder / "diffusion_pytorch_model.safetensors"
    ).keys()


def test_every_size_is_made_small():
    """A published size that the table of small ones lacks would be written at full size."""
    for name, files in PIPELINES.items():
        for path, config in files.items():
            for key, value in config.items() if path.endswith("/config.json") and "safety_checker" not in path else ():
                if key in (
                    "block_out_channels",
                    "hidden_size",
                    "intermediate_size",
                    "cross_attention_dim",
                    "d_model",
                    "num_layers",
                ):
                    assert frozen(value) in SMALL[key], (name, path, key, value)
