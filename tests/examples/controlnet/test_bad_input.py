"""Bad input: a message that names the flag or file, what was found and what to do; nothing is written or loaded."""

import json
import shutil

import pytest
from PIL import Image

from mindtune.cli import UserError


@pytest.fixture
def refused(sd, sd_flags, tmp_path, monkeypatch):
    """refused(*flags): the message of the UserError. Nothing was loaded or written."""

    def never(*_):
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr("mindtune.models.loading.load_model", never)
    monkeypatch.setattr("mindtune.encode.encoder_stage.run_in_child", never)

    def run(*more):
        with pytest.raises(UserError) as error:
            sd.train.main(sd_flags(sd, tmp_path / "out", *more))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    return run


FLAGS = {
    "a resolution that the VAE cannot halve": (["--resolution", 100], ["--resolution 100", "divisible by 8", "96"]),
    "a resolution too small for the UNet": (["--resolution", 32], ["--resolution 32", "at least 64"]),
    "no gamma": (["--snr_gamma", 0], ["--snr_gamma 0", "above 0"]),
    "8-bit moments of another optimizer": (
        ["--use_8bit_adam", "--optimizer", "adafactor"],
        ["--use_8bit_adam with --optimizer adafactor", "leave one of the two out"],
    ),
    "two sources": (["--dataset_name", "x"], ["--dataset_name", "--train_data_dir", "give one of"]),
    "a stream without end": (["--streaming", "--max_train_steps", 0], ["--max_train_steps 0"]),
    "images without prompts": (
        ["--validation_image", "a.png"],
        ["--validation_prompt has 0", "--validation_image 1"],
    ),
    "two images for three prompts": (
        ["--validation_image", "a", "b", "--validation_prompt", "x", "y", "z"],
        ["--validation_prompt has 3", "--validation_image 2"],
    ),
    "a missing condition": (
        ["--validation_image", "absent.png", "--validation_prompt", "x"],
        ["--validation_image absent.png"],
    ),
    "a missing tokenizer": (
        ["--tokenizer_name", "./absent"],
        ["--tokenizer_name ./absent", "no such directory"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_a_bad_flag_is_named_with_its_value_and_the_way_out(refused, case):
    flags, fragments = FLAGS[case]
    message = refused(*flags)
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_a_line_of_the_validation_file_is_named(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert "rows.jsonl: 1 of its lines cannot be used:\n  line 1: image is missing: name a condition image" in refused(
        "--validation_file", tmp_path / "rows.jsonl"
    )


def test_another_kind_of_pipeline(sd, refused, pipelines, tiny_flux):
    other = pipelines["sdxl" if sd.kind == "sd15" else "sd15"]
    script = "train_controlnet_sdxl.py" if sd.kind == "sd15" else "train_controlnet.py"
    assert refused("--pretrained_model_name_or_path", other).endswith(f"train it with examples/controlnet/{script}.")
    message = refused("--pretrained_model_name_or_path", tiny_flux)
    scripts = "flux_lora/, flux_controlnet/ and examples/flux_*/"
    assert f"_class_name is FluxPipeline, FLUX.1; train it with {scripts}" in message


def changed(sd, tmp_path, file, **changes):
    """A copy of the pipeline with entries of a config changed; its folder."""
    root = shutil.copytree(sd.root, tmp_path / "changed")
    (root / file).write_text(json.dumps({**json.loads((root / file).read_text()), **changes}))
    return root


@pytest.mark.parametrize(
    "change, said",
    [({"prediction_type": "sample"}, "prediction_type sample"), ({"beta_schedule": "exp"}, "beta_schedule exp")],
)
def test_a_schedule_that_it_was_not_written_for(sd, refused, tmp_path, change, said):
    root = changed(sd, tmp_path, "scheduler/scheduler_config.json", **change)
    assert f"scheduler/scheduler_config.json: {said} is not supported" in refused(
        "--pretrained_model_name_or_path", root
    )


def test_a_controlnet_or_vae_that_does_not_fit(sd, refused, pipelines, tmp_path):
    other = "sdxl" if sd.kind == "sd15" else "sd15"
    unet = shutil.copytree(pipelines[other] / "unet", tmp_path / "unet")
    assert "the class is UNet2DConditionModel, expected ControlNetModel" in refused(
        "--controlnet_model_name_or_path", unet
    )
    config = {**json.loads((unet / "config.json").read_text()), "_class_name": "ControlNetModel"}
    (unet / "config.json").write_text(json.dumps(config))
    assert "its down_block_types is" in refused("--controlnet_model_name_or_path", unet)
    if sd.kind == "sdxl":
        assert "expected AutoencoderKL" in refused("--pretrained_vae_model_name_or_path", unet)


def test_pairs_that_do_not_belong_together_are_listed_at_once(refused, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "pairs")
    Image.new("RGB", (80, 90)).save(folder / "conditioning" / "000001.png")
    (folder / "images" / "000003.png").write_bytes(b"no picture")
    message = refused("--train_data_dir", folder)
    assert "000001.png: 80x80, its condition 80x90" in message and "000003.png" in message
