"""--aspect_ratio_buckets of the LoRA script: the shape of every batch, its pixels, and whole runs."""

import json

import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune import flow
from mindtune.cli import UserError
from mindtune.models.lora_files import LORA_FILE

BUCKETS = [(32, 48), (48, 32), (32, 32)]  # height, width: three photographs are of the first, two of the second


def text(buckets):
    return ";".join(f"{height},{width}" for height, width in buckets)


def cropped(image, size):
    """The center of an image resized to just cover `size`, by Pillow and NumPy: [3, height, width] in [-1, 1]."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    resized = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    pixels = np.asarray(resized)[top : top + height, left : left + width]
    return pixels.astype(np.float64).transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("class_images", [False, True], ids=["alone", "with class images"])
def test_a_batch_is_of_one_bucket_and_has_the_crops_of_its_images(batches, photos, size, class_images):
    made = batches(BUCKETS, "--center_crop", "--train_batch_size", size, class_images=class_images)
    seen = {}
    for number in range(12):
        images, posterior, noise, _, embeds, _, image_ids = made.at(number)
        uses = made.data.uses(number)
        ((height, width),) = {use.size for use in uses}
        assert images.shape == (size * (1 + class_images), 3, height, width) and len(embeds) == len(images)
        assert posterior.shape == noise.shape == (len(images), 16, height // 8, width // 8)
        np.testing.assert_array_equal(image_ids, flow.latent_image_ids(height // 8, width // 8))
        for image, use in zip(images, uses):
            expected = cropped(Image.open(photos / use.sample.name).convert("RGB"), use.size)
            np.testing.assert_allclose(image, expected, atol=1.01 / 127.5)
            seen[use.sample.name] = use.size
    assert len(seen) == 5
    for name, (height, width) in seen.items():
        image = Image.open(photos / name)
        if image.height > 1.2 * image.width:
            assert height > width
        if image.width > 1.2 * image.height:
            assert width > height


def test_every_image_is_used_as_often_as_the_others(batches):
    """12 epochs of 5 images with 2 repeats: within a batch of 24 uses each, of instance and of class images."""
    data = batches(BUCKETS, "--train_batch_size", 2, "--repeats", 2, class_images=True).data
    counts = {"instance": {}, "class": {}}
    for number in range(60):
        for use in data.uses(number):
            group = counts[use.draws.group]
            group[use.sample.name] = group.get(use.sample.name, 0) + 1
    instance, classes = (np.array(list(group.values())) for group in counts.values())
    assert len(instance) == len(classes) == 5
    assert abs(instance - 24).max() <= 2
    assert classes.sum() == 120 and abs(classes - 24).max() <= 2


@pytest.mark.parametrize(
    "more", [["--cache_latents"], ["--random_flip", "--train_batch_size", 2]], ids=["cached", "random crops"]
)
def test_one_bucket_is_the_resolution_bit_for_bit(finished_lora, lora, tmp_path, more):
    square = finished_lora(*more)
    bucket = lora(tmp_path, *more, "--aspect_ratio_buckets", "32,32", "--resolution", 512)
    assert (square / LORA_FILE).read_bytes() == (bucket / LORA_FILE).read_bytes()


def test_graph_and_pynative_agree_in_every_bucket(lora, tmp_path):
    more = ["--aspect_ratio_buckets", text(BUCKETS[:2])]
    more += ["--cache_latents", "--train_batch_size", 2, "--max_train_steps", 4]
    more += ["--validation_split", 0.2, "--timestep_shift", "auto"]
    found = [metrics(lora(tmp_path / f"mode {mode}", *more, "--mindspore_mode", mode)) for mode in (0, 1)]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in found]
    held_out = [[line["held_out__loss"] for line in lines if "held_out__loss" in line] for lines in found]
    assert len(losses[0]) == 4 and len(held_out[0]) == 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(held_out[0], held_out[1], rtol=1e-5)


# ---- automatic sizes -----------------------------------------------------------------------------

AUTO = ["--resolution", "32,64", "--auto_buckets", "--bucket_step", 16]


def test_every_image_is_trained_at_each_resolution(lora, photos, tmp_path, capsys):
    """Five images in two resolutions: ten samples per epoch, and a table of sizes. A held-out image is so in both."""
    out = lora(tmp_path / "out", *AUTO, "--cache_latents", "--num_train_epochs", 1, "--max_train_steps", 2)
    printed = capsys.readouterr().out
    table = printed[printed.index("height,width") :].splitlines()[1:]
    counts = {}
    for line in table[: next(i for i, line in enumerate(table) if "%" not in line)]:
        size, count, *_ = line.split()
        height, width = size.split(",")
        assert int(width) * int(height) <= 64 * 64 and int(width) % 16 == int(height) % 16 == 0
        counts[int(height), int(width)] = int(count)
    assert sum(counts.values()) == 10 and "10 samples per epoch" in printed
    assert len([line for line in metrics(out) if "loss" in line]) == 2
    lora(tmp_path / "held", *AUTO, "--cache_latents", "--validation_split", 0.2, "--max_train_steps", 1)
    assert "8 samples per epoch, 2 held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--resolution", "32,64"], "--resolution 32,64: several need --auto_buckets"),
        (["--bucket_step", 32], "--bucket_step 32: needs --auto_buckets"),
        ([*AUTO, "--aspect_ratio_buckets", "32,32"], "--auto_buckets with --aspect_ratio_buckets"),
        ([*AUTO, "--bucket_step", 24], "--bucket_step 24: must be a multiple of 16"),
        ([*AUTO, "--bucket_step", 64], "--bucket_step 64: is larger than --resolution 32"),
        (
            [*AUTO, "--bucket_step", 32, "--bucket_max_side", 16],
            "--bucket_max_side 16: is smaller than --bucket_step 32",
        ),
        ([*AUTO, "--resolution", "32,40"], "--resolution 40: must be divisible by 16"),
        (
            [*AUTO, "--with_prior_preservation", "--class_data_dir", "c", "--class_prompt", "x"],
            "--with_prior_preservation with several values of --resolution",
        ),
    ],
)
def test_sizes_that_are_refused(lora, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        lora(tmp_path / "out", *more)


def test_the_plan_of_several_resolutions(lora_script, flags, tmp_path, capsys):
    """It does not fit, so it suggests smaller images."""
    more = ["--resolution", "16384,32768", "--auto_buckets", "--device_memory_gb", 1, "--dry_run"]
    assert lora_script.main([*map(str, flags(tmp_path, *more))]) == 0
    assert "--resolution 256" in capsys.readouterr().out


def test_the_shift_is_that_of_each_size(batches):
    """The index of a timestep points into the table of the sample's own size; the position in it is drawn as before."""
    sizes = [(32, 32), (48, 32), (64, 48)]
    config = {"base_image_seq_len": 4, "max_image_seq_len": 16, "base_shift": 0.5, "max_shift": 1.15}
    sigmas = np.linspace(1.0, 0.001, 1000)
    tables = flow.training_sigmas(sigmas, "auto", [4, 6, 12], config)
    made = batches(sizes, "--timestep_shift", "auto")
    for number in range(10):
        use = made.data.uses(number)[0]
        index = int(made.at(number)[3][0])
        place, table = index % 1000, index // 1000
        assert sizes[table] == use.size
        assert place == use.draws.timestep(lambda generator: int(1000 * generator.random()))
        mu = 0.5 + 0.65 * ([4, 6, 12][table] - 4) / 12
        expected = np.exp(mu) * sigmas[place] / (1 + (np.exp(mu) - 1) * sigmas[place])
        assert tables.ravel()[index] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(flow.training_sigmas(sigmas, "1", [4, 6], config), [sigmas, sigmas])


def test_class_images_are_generated_in_the_buckets_of_the_instance_images(lora, photos, tmp_path):
    """Ten for three wide and two tall images."""
    sizes = [Image.open(path).size for path in sorted(photos.glob("*.png"))]
    tall = sum(height > width for width, height in sizes)
    folder = tmp_path / "class"
    more = [
        "--with_prior_preservation",
        "--class_data_dir",
        folder,
        "--class_prompt",
        "a cat",
        "--num_class_images",
        10,
    ]
    more += ["--aspect_ratio_buckets", text(BUCKETS[:2]), "--max_train_steps", 2]
    lora(tmp_path / "first", *more)
    generated = [Image.open(path).size for path in folder.iterdir()]
    assert sorted(generated) == sorted([(32, 48)] * 2 * tall + [(48, 32)] * 2 * (5 - tall))
    lora(tmp_path / "second", *more)
    assert len(list(folder.iterdir())) == 10


def test_validation_images_have_the_shape_of_the_first_bucket(lora, tmp_path):
    validation = ["--validation_prompt", "a cat", "--num_validation_images", 1, "--cache_latents"]
    validation += ["--max_train_steps", 1]
    out = lora(tmp_path / "wide", "--aspect_ratio_buckets", "32,48;48,32", *validation)
    wide = Image.open(out / "samples" / "final.png").size
    square = Image.open(lora(tmp_path / "square", *validation) / "samples" / "final.png").size
    assert wide[0] / wide[1] > square[0] / square[1]
    assert json.loads((out / "run.json").read_text())["flags"]["aspect_ratio_buckets"] == "32,48;48,32"
