"""make_tiny_pipeline.py: the layouts of the real pipelines, equal bytes for equal seeds, and images by mindone."""

import hashlib
import json

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest
from conftest import load_script

from mindtune.models import configs, pipelines, tokenization

maker = load_script("examples/tiny/make_tiny_pipeline.py")
COMPONENTS = {"flux": pipelines.FLUX_COMPONENTS, "sd15": pipelines.SD_COMPONENTS, "sdxl": pipelines.SDXL_COMPONENTS}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made[kind]: the pipeline of seed 0."""
    folders = {kind: tmp_path_factory.mktemp("tiny") / kind for kind in COMPONENTS}
    for kind, folder in folders.items():
        maker.KINDS[kind](folder, seed=0)
    return folders


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", COMPONENTS)
def test_equal_seeds_give_equal_bytes_and_other_seeds_other_weights(made, tmp_path, kind):
    maker.KINDS[kind](tmp_path / "again", seed=0)
    maker.KINDS[kind](tmp_path / "other", seed=1)
    assert digest(tmp_path / "again") == digest(made[kind])
    changed = {name for name, value in digest(tmp_path / "other").items() if value != digest(made[kind])[name]}
    assert changed == {name for name in digest(made[kind]) if name.endswith(".safetensors")}


@pytest.mark.parametrize("kind", COMPONENTS)
def test_it_is_complete(made, kind):
    pipelines.check_pipeline(made[kind], COMPONENTS[kind])


@pytest.mark.parametrize("kind, cls", [("sd15", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")])
def test_mindones_pipeline_loads_it_and_generates_an_image(made, kind, cls):
    """The image is not flat, so the weights are loaded, and nearly all VAE outputs lie within [-1, 1]."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert json.loads((made[kind] / "model_index.json").read_text())["_class_name"] == cls
    pipeline = getattr(mindone.diffusers, cls).from_pretrained(str(made[kind]))
    pipeline.set_progress_bar_config(disable=True)
    image = np.asarray(pipeline("a red circle", height=64, width=64, num_inference_steps=2)[0][0], float)
    assert image.shape == (64, 64, 3) and image.std() > 5 and ((image > 0) & (image < 255)).mean() > 0.8


def test_the_two_text_encoders_and_tokenizers_of_sdxl(made):
    """The text encoders have different widths and are concatenated for the UNet; the second tokenizer pads with "!"."""
    first, second = (tokenization.load_tokenizer(made["sdxl"] / name) for name in ("tokenizer", "tokenizer_2"))
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert first("a dog").input_ids == second("a dog").input_ids
    widths = [configs.read_config(made["sdxl"], name)["hidden_size"] for name in ("text_encoder", "text_encoder_2")]
    unet = configs.read_config(made["sdxl"], "unet")
    assert widths[0] != widths[1] and unet["cross_attention_dim"] == sum(widths)
    assert unet["projection_class_embeddings_input_dim"] == widths[1] + 6 * unet["addition_time_embed_dim"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "existing").write_text("existing")
    with pytest.raises(SystemExit) as error:
        maker.main(["sd15", str(tmp_path)])
    assert error.value.code == 2 and "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]
