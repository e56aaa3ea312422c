"""Runs on several folders that a TOML file names, each with settings of its own."""

import json
import shutil

import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune.cli import UserError


@pytest.fixture
def config(tmp_path, photos):
    """config(text): a file next to the folders a and b, with two and three of the photos."""
    paths = sorted(photos.glob("*.png"))
    for name, chosen in (("a", paths[:2]), ("b", paths[2:5])):
        (tmp_path / name).mkdir()
        for path in chosen:
            shutil.copy(path, tmp_path / name)

    def write(text):
        (tmp_path / "data.toml").write_text(text)
        return ["--instance_data_dir", "", "--dataset_config", tmp_path / "data.toml"]

    return write


def concept(folder, **values):
    lines = ["[[concept]]", f'instance_data_dir = "{folder}"']
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in values.items())]) + "\n"


def losses(out):
    return [line["loss"] for line in metrics(out) if "loss" in line]


def test_one_concept_is_the_run_of_its_flags(lora, config, tmp_path):
    flags = ["--max_train_steps", 3, "--random_flip", "--cache_latents"]
    folder = ["--instance_data_dir", tmp_path / "b", "--instance_prompt", "a b"]
    same = lora(tmp_path / "file", *flags, *config(concept("b", instance_prompt="a b")))
    assert losses(same) == losses(lora(tmp_path / "flags", *flags, *folder))


def test_a_weight_multiplies_the_loss_of_its_images(lora, config, tmp_path):
    """With a learning rate of 0, so that both runs see the same model at every update; batches of one."""
    flags = ["--max_train_steps", 10, "--learning_rate", 0, "--train_batch_size", 1]
    plain = lora(tmp_path / "plain", *flags, *config(concept("a") + concept("b")))
    more = lora(tmp_path / "more", *flags, *config(concept("a", weight=3) + concept("b", weight=0.5)))
    ratios = np.round(np.divide(losses(more), losses(plain)), 5)
    assert sorted(ratios) == [0.5] * 6 + [3.0] * 4  # two passes of three and of two images


@pytest.mark.slow
def test_weights_in_graph_mode_and_batches(lora, config, tmp_path):
    """The loss of a batch is the mean of its images' weighted losses."""
    flags = ["--max_train_steps", 2, "--learning_rate", 0, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    text = concept("a", weight=3, repeats=2) + concept("b", weight=0.5, center_crop=True)
    graph = lora(tmp_path / "graph", *flags, "--mindspore_mode", 0, *config(text))
    pynative = lora(tmp_path / "pynative", *flags, "--mindspore_mode", 1, *config(text))
    np.testing.assert_allclose(losses(graph), losses(pynative), rtol=1e-5)


def test_class_images_of_each_concept(lora, config, tmp_path, capsys):
    """Generated for each with its own prompt and number; both are trained on."""
    text = concept("a", class_data_dir="of a", class_prompt="a cat", num_class_images=2)
    text += concept("b", class_data_dir="of b", class_prompt="a dog", num_class_images=1, random_flip=True)
    flags = ["--with_prior_preservation", "--max_train_steps", 2, "--cache_latents", "--validation_split", 0.2]
    out = lora(tmp_path / "out", *flags, "--num_inference_steps", 1, *config(text))
    assert len(list((tmp_path / "of a").glob("*.png"))) == 2 and len(list((tmp_path / "of b").glob("*.png"))) == 1
    assert len(losses(out)) == 2 and all(np.isfinite(losses(out)))
    record = json.loads((out / "run.json").read_text())
    assert record["data"]["samples"] == 4 and len(record["data"]["held_out"]) == 1


def test_repeats_of_the_flag_are_the_default_of_the_key(lora, config, tmp_path):
    text = concept("a") + concept("b", repeats=2)
    out = lora(tmp_path / "out", "--max_train_steps", 1, "--repeats", 3, *config(text))
    assert json.loads((out / "run.json").read_text())["data"]["samples"] == 2 * 3 + 3 * 2


def test_a_bucket_without_class_images_is_refused(lora, config, tmp_path):
    (tmp_path / "b").joinpath("0.png").unlink(missing_ok=True)
    flags = config(concept("a", class_data_dir="c", class_prompt="x") + concept("b"))
    for path in (tmp_path / "b").glob("*.png"):
        Image.open(path).crop((0, 0, 40, 80)).save(path)
    more = ["--with_prior_preservation", "--aspect_ratio_buckets", "32,32;64,32"]
    with pytest.raises(UserError, match="no concept with a class_data_dir has images in the bucket 64,32"):
        lora(tmp_path / "out", *flags, *more)


def test_class_images_need_their_flag(lora, config, tmp_path, capsys):
    lora(tmp_path / "out", "--max_train_steps", 1, *config(concept("a", class_data_dir="c", class_prompt="x")))
    assert "class_data_dir and class_prompt have no effect" in capsys.readouterr().out
    assert not (tmp_path / "c").exists()


def test_another_file_is_no_exact_continuation(lora, config, tmp_path, capsys):
    lora(tmp_path / "out", "--max_train_steps", 1, *config(concept("a")))
    (tmp_path / "data.toml").write_text(concept("a", weight=2))
    more = ["--instance_data_dir", "", "--dataset_config", tmp_path / "data.toml"]
    lora(tmp_path / "out", "--max_train_steps", 2, "--resume_from_checkpoint", "latest", *more)
    assert "resuming with other values of dataset_config than the checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--instance_data_dir", "photos"], "give one of --instance_data_dir .*, --dataset_name and --dataset_config"),
        (["--class_data_dir", "c", "--class_prompt", "x"], "--class_data_dir with --dataset_config: write"),
        (
            ["--max_train_samples", 2],
            "--max_train_samples with --dataset_config: write max_train_samples into",
        ),
        (["--with_prior_preservation"], "--with_prior_preservation: no concept has a class_data_dir"),
    ],
)
def test_flags_that_do_not_go_with_the_file(lora, config, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        lora(tmp_path / "out", *config(concept("a")), *more)
