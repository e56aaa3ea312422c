"""Whole runs of the Stable Diffusion ControlNet scripts: what goes in, what a run leaves, that it learns."""

import csv
import json
import os
import re
import shlex
import subprocess
from types import SimpleNamespace

import mindone.diffusers
import numpy as np
import pytest
import yaml
from conftest import ROOT, StageWithoutEncoders, command, load_script, metrics
from fake_hub import TOKEN
from PIL import Image
from safetensors.numpy import load_file

from mindtune.data import columns, pair_data
from mindtune.models import named_parameters
from mindtune.run.checkpoint import checkpoints

from .conftest import FINAL

VAE_CONFIG = {"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}


# ---- batches -------------------------------------------------------------------------------------


def marked(number, height, width):
    """uint8 [height, width, 3]: red is the column, green the row, blue the number of the image."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 40 * number)], axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def oblong(tmp_path_factory):
    """Four pairs, wide (112x80) and tall (80x112) in turn. The condition is the negative: both show the crop."""
    folder, rows = tmp_path_factory.mktemp("oblong"), []
    for number in range(4):
        pixels = marked(number, *((80, 112) if number % 2 == 0 else (112, 80)))
        for name, image in (("image", pixels), ("condition", 255 - pixels)):
            Image.fromarray(image).save(folder / f"{name}-{number}.png")
        row = {
            "image": f"image-{number}.png",
            "conditioning_image": f"condition-{number}.png",
            "text": f"picture {number}",
        }
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def batches(sd_flags, oblong, tmp_path):
    """batches(sd, *flags): `iterate(first, last)`, the batches of a run, and `captions`, noted and not encoded."""

    def make(sd, *more):
        args = sd.train.parse_args(sd_flags(sd, tmp_path / "out", "--train_data_dir", oblong, *more))
        stage = StageWithoutEncoders()
        data = pair_data.load(args.select(columns.Source), args.select(pair_data.Settings), 0)
        made = sd.train.Batches(args, stage, VAE_CONFIG, 1000)
        return SimpleNamespace(
            captions=stage.captions, iterate=lambda first, last: data.iterate(first, last, made.make, threads=1)
        )

    return make


def test_condition_and_target_are_cropped_by_one_box_and_flipped_together(sd, batches):
    """Images in [-1, 1], conditions in [0, 1]: an image and its negative add up everywhere, wherever the crop is."""
    places, mirrored = set(), set()
    for images, conditions, *_ in batches(sd, "--random_flip", "--resolution", 72).iterate(0, 12):
        assert images.shape == conditions.shape == (1, 3, 72, 72) and conditions.min() >= 0 and conditions.max() <= 1
        np.testing.assert_allclose((images + 1) / 2 + conditions, 1.0, atol=2 / 255)
        across = images[0, 0, 0, 1:] - images[0, 0, 0, :-1]
        mirrored.add(bool(across.mean() < 0))
        places.add((images[0, 0, 0, 0], images[0, 1, 0, 0]))
    assert mirrored == {True, False} and len(places) > 4


def test_the_size_conditioning_of_sdxl(sdxl, batches):
    more = ["--aspect_ratio_buckets", "64,96;96,64", "--crops_coords_top_left_h", 3, "--crops_coords_top_left_w", 5]
    sizes = set()
    for batch in batches(sdxl, *more, "--train_batch_size", 2).iterate(0, 4):
        height, width = batch[0].shape[2:]
        np.testing.assert_array_equal(batch[-1], [[height, width, 3, 5, height, width]] * 2)
        assert batch[1].shape == (2, 3, height, width) and batch[2].shape == (2, 4, height // 8, width // 8)
        sizes.add((height, width))
    assert sizes == {(64, 96), (96, 64)}


def test_timesteps_are_uniform_and_every_use_draws_anew(sd, batches):
    made = batches(sd, "--proportion_empty_prompts", 0.5)
    timesteps = np.concatenate([batch[4] for batch in made.iterate(0, 400)])
    counts = np.histogram(timesteps, bins=4, range=(0, 1000))[0]
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and (abs(counts - 100) < 35).all()
    empty = np.array(made.captions) == ""
    assert 0.4 < empty.mean() < 0.6
    kept = {caption for caption, dropped in zip(made.captions, empty) if not dropped}
    assert kept == {f"picture {number}" for number in range(4)}  # no pair always loses its caption


# ---- what a run writes ---------------------------------------------------------------------------


def test_the_final_controlnet_is_in_the_output_directory_and_checkpoints_have_it_alone(sd, run, shapes, tmp_path):
    """In diffusers' layout and with its names, without the frozen UNet. mindone's class loads both. With samples."""
    images = [shapes / "conditioning" / f"00000{number}.png" for number in (0, 1)]
    more = ["--validation_prompt", "a red circle", "--validation_image", *images, "--validation_steps", 2]
    run(sd, tmp_path, *more, "--checkpointing_steps", 2, "--save_weight_dtype", "fp16")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    final, last = load_file(tmp_path / FINAL), load_file(tmp_path / "checkpoint-3" / "controlnet" / FINAL)
    assert {value.dtype.name for value in final.values()} == {"float16"}
    assert {value.dtype.name for value in last.values()} == {"float32"}
    for name, value in last.items():
        np.testing.assert_array_equal(value.astype(np.float16), final[name], err_msg=name)
    expected = ["controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.bias"]
    assert {*expected, "down_blocks.0.resnets.0.norm1.weight"} <= set(last)
    assert not any(name.startswith("up_blocks") for name in last)
    weights = [path for path in tmp_path.rglob("*.safetensors") if "cache" not in path.parts]
    assert {path.parent.name for path in weights} == {tmp_path.name, "controlnet", "checkpoint-2", "checkpoint-3"}
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ControlNetModel"
    loaded = mindone.diffusers.ControlNetModel.from_pretrained(str(tmp_path / "checkpoint-3" / "controlnet"))
    for name, parameter in named_parameters.model_parameters(loaded).items():
        np.testing.assert_array_equal(parameter.asnumpy(), last[name], err_msg=name)

    samples = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    assert sorted(samples) == ["final.png", "step-000002.png"] and len(set(samples.values())) == 2


def test_training_starts_from_an_existing_controlnet(sd15, run, finished, tmp_path):
    first = finished("sd15")
    run(sd15, tmp_path, "--controlnet_model_name_or_path", first, "--learning_rate", 0, "--max_train_steps", 1)
    after = load_file(tmp_path / FINAL)
    for name, value in load_file(first / FINAL).items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_the_moving_average_is_the_result_and_in_checkpoints(sd15, run, tmp_path):
    run(sd15, tmp_path, "--use_ema", "--max_train_steps", 2)
    trained, averaged = load_file(tmp_path / "checkpoint-2" / "controlnet" / FINAL), load_file(tmp_path / FINAL)
    state = load_file(tmp_path / "checkpoint-2" / "training_state.safetensors")
    assert any(not np.array_equal(trained[name], value) for name, value in averaged.items())
    for name, value in averaged.items():
        np.testing.assert_array_equal(state[f"ema.{name}"], value, err_msg=name)


def test_an_overflow_in_the_middle_of_a_run_is_skipped_and_reported(sd15, run, tmp_path, monkeypatch, capfd):
    iterate = pair_data.PairData.iterate

    def with_one_too_large(data, first, last, make_batch, threads):
        for number, batch in enumerate(iterate(data, first, last, make_batch, threads), first):
            yield (*batch[:3], np.full_like(batch[3], 1e30), *batch[4:]) if number == 1 else batch

    monkeypatch.setattr(pair_data.PairData, "iterate", with_one_too_large)
    run(sd15, tmp_path, "--mixed_precision", "fp16", "--cache_latents", "--checkpointing_steps", 1)
    assert "update 2: overflow in fp16, skipped; loss scale 32768" in "".join(capfd.readouterr())
    steps = [load_file(tmp_path / f"checkpoint-{step}" / "controlnet" / FINAL) for step in (1, 2, 3)]
    for name, value in steps[0].items():
        np.testing.assert_array_equal(steps[1][name], value, err_msg=name)
    assert any(not np.array_equal(steps[2][name], value) for name, value in steps[1].items())
    assert json.loads((tmp_path / "run.json").read_text())["skipped_updates"] == 1
    assert [line["loss_scale"] for line in metrics(tmp_path)] == [65536, 32768, 32768]


# ---- flags ---------------------------------------------------------------------------------------


def test_another_tokenizer(sdxl, finished):
    """SDXL's second pads with "!": other ids for every caption, other embeddings, another loss."""
    own, other = finished("sd15"), finished("sd15", "--tokenizer_name", sdxl.root / "tokenizer_2")
    assert metrics(own)[0]["loss"] != metrics(other)[0]["loss"]


def test_another_vae(sd15, sdxl, run, tmp_path, capfd):
    """The pipeline's own in float32 whatever the precision; another one in the run's dtype."""
    more = ["--mixed_precision", "fp16", "--max_train_steps", 1]
    run(sdxl, tmp_path / "own", *more)
    assert "vae                   float32  float16" in capfd.readouterr().out
    run(sdxl, tmp_path / "other", *more, "--pretrained_vae_model_name_or_path", sd15.root / "vae")
    assert "vae                   float16  float16" in capfd.readouterr().out
    assert metrics(tmp_path / "own")[0]["loss"] != metrics(tmp_path / "other")[0]["loss"]


def test_min_snr_lowers_the_loss_of_clear_images_only(finished):
    """Weights are at most 1, and 1 where there is more noise than gamma allows: a huge gamma changes nothing."""
    still = ["--learning_rate", 0, "--max_train_steps", 4]
    plain, huge, five = (
        [line["loss"] for line in metrics(finished("sd15", *still, *more))]
        for more in ([], ["--snr_gamma", 1e6], ["--snr_gamma", 5.0])
    )
    assert huge == plain and all(a <= b for a, b in zip(five, plain)) and five != plain


def test_streaming_first_samples_and_empty_prompts_together(sd, run, tmp_path):
    stream = ["--streaming", "--shuffle_buffer_size", 3, "--proportion_empty_prompts", 0.5, "--train_batch_size", 2]
    run(sd, tmp_path / "stream", *stream)
    run(sd, tmp_path / "few", "--max_train_samples", 2, "--cache_latents", "--random_flip")
    assert json.loads((tmp_path / "few" / "run.json").read_text())["data"]["samples"] == 2
    assert all(np.isfinite(line["loss"]) for name in ("stream", "few") for line in metrics(tmp_path / name))


@pytest.mark.parametrize("more", [["--streaming", "--shuffle_buffer_size", 3], ["--random_flip"]])
def test_windows_change_nothing_but_the_disk(sd15, run, tmp_path, more):
    """A stream, and a set that does not fit its limit: the losses are those of a run that encodes all at once."""
    load_script("examples/tiny/shapes.py").make_folder(tmp_path / "pairs", 20, 80, seed=0, split="train")
    more = [*more, "--train_data_dir", tmp_path / "pairs", "--cache_latents", "--max_train_steps", 10, "--cache_dir"]
    run(sd15, tmp_path / "at once", *more, tmp_path / "a", "--encode_window", 100)
    run(sd15, tmp_path / "in turn", *more, tmp_path / "b", "--encode_window", 1, "--cache_limit_gb", 1e-9)
    assert metrics(tmp_path / "at once") == metrics(tmp_path / "in turn")
    counts = [len(list((tmp_path / name / "mindtune" / "windows").iterdir())) for name in ("a", "b")]
    assert 2 <= counts[1] < counts[0]


def recipes():
    """The flags of docs/controlnet.md's table of memory recipes, row by row."""
    lines = (ROOT / "docs" / "controlnet.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if re.match(r"\| \d+ GB \|", line)]
    assert len(rows) == 4
    return [[flag for cell in row[2].split("`")[1::2] for flag in cell.split()] for row in rows]


@pytest.mark.parametrize("flags", recipes(), ids=lambda flags: " ".join(flags) or "default")
def test_every_memory_recipe_runs(sd15, run, tmp_path, flags):
    run(sd15, tmp_path, *flags, "--max_train_steps", 1)
    assert len(metrics(tmp_path)) == 1


LAUNCH = """--pretrained_model_name_or_path=sd15 --output_dir=out --dataset_name=fusing/fill50k --resolution=512
--learning_rate=1e-5 --validation_image a.png b.png
--validation_prompt "red circle with blue background" "cyan circle with brown floral background"
--train_batch_size=1 --gradient_accumulation_steps=4 --push_to_hub"""


def test_the_guides_launch_command(sd15, shapes, fake_hub, tmp_path):
    """As it is written there, with small images and few denoising steps: a local pipeline, data set and hub."""
    for path, target in (
        ("sd15", sd15.root),
        ("fusing/fill50k", shapes),
        ("a.png", picture := shapes / "conditioning/000000.png"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).symlink_to(target)
    (tmp_path / "b.png").symlink_to(picture)
    quick = "--resolution=64 --num_inference_steps=2 --num_validation_images=1 --mindspore_mode=1 --report_to=none"
    environment = {**os.environ, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        command(sd15.path, shlex.split(f"{LAUNCH} {quick}")),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 samples per epoch, 0 held out; batch size 1 x 4 accumulation steps x 1 devices; 2 updates" in done.stdout
    assert (
        fake_hub.repositories == ["somebody/out"] and fake_hub.files[FINAL] == (tmp_path / "out" / FINAL).read_bytes()
    )
    samples = {f"samples/{name}.png" for name in ("final", "final-1", "final-2")}
    assert set(fake_hub.files) == {"README.md", "config.json", FINAL, "run.json", "report.html", *samples}
    metadata = yaml.safe_load(fake_hub.files["README.md"].decode().split("---\n")[1])
    assert metadata["widget"][1] == {
        "text": "cyan circle with brown floral background",
        "output": {"url": "samples/final-2.png"},
    }
    assert metadata["tags"][2:4] == ["controlnet", "stable-diffusion"]
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_a_token_given_as_a_flag_is_written_nowhere(sd15, run, fake_hub, tmp_path):
    out = tmp_path / "out"
    run(sd15, out, "--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "club/circles", "--max_train_steps", 1)
    assert fake_hub.repositories == ["club/circles"]
    assert not [path for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# ---- learning ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 40, 64, seed=0, split="train")
    return folder


def held_out(out):
    """Mean held-out loss after every measured update."""
    with open(out / "loss_by_timestep.csv") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    return [np.mean([loss for at, loss in rows if at == step]) for step in sorted({at for at, _ in rows})]


def test_held_out_loss_falls_with_training_and_stays_at_learning_rate_0(sd15, run, world, tmp_path):
    """On random weights, 28 updates at a high rate: below 0.8 of what it was."""
    more = ["--train_data_dir", world, "--train_batch_size", 4, "--cache_latents", "--validation_split", 0.05]
    first, last = held_out(run(sd15, tmp_path / "trained", *more, "--max_train_steps", 28, "--learning_rate", 4e-3))
    print("held out", first, last)
    assert last < first * 0.8
    still = held_out(run(sd15, tmp_path / "still", *more, "--max_train_steps", 1, "--learning_rate", 0))
    assert still == [first, first]
