"""--aspect_ratio_buckets of the LoRA script: the shape of every batch, its pixels, and whole runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune import flow
from mindtune.data.buckets import bucket_ids
from mindtune.models import lora_files

BUCKETS = [(32, 48), (48, 32), (32, 32)]  # height, width: the photographs are three of the first and two of the second


@pytest.fixture
def batches(lora_script, flags, tmp_path):
    """batches(*flags, classes): the script's batches over the photographs, without encoders."""

    def make(*more, classes=()):
        args = lora_script.parse_args(flags(tmp_path / "out", "--aspect_ratio_buckets", text(BUCKETS), *more))
        samples = lora_script.load_samples(args, BUCKETS)
        numbers = bucket_ids(samples, BUCKETS)
        encoded = {"prompt_embeds": np.zeros((16, 32), np.float32), "pooled_prompt_embeds": np.zeros(32, np.float32)}
        stage, none = SimpleNamespace(text=lambda _: encoded), ([], np.array([], int))
        class_pictures = (samples, numbers) if classes else none
        return lora_script.Batches(args, 0, stage, BUCKETS, (samples, numbers), class_pictures, none, (16, 8), 1000)

    return make


@pytest.fixture
def run(lora_script, flags, tmp_path, monkeypatch):
    """run(*flags, name): a run in this process; gives its output directory."""

    def go(*more, name="run"):
        monkeypatch.setattr(lora_script, "StopRequest", lambda: type("Never", (), {"exit_code": None})())
        assert lora_script.main(flags(tmp_path / name, *more)) == 0
        return tmp_path / name

    return go


def text(buckets):
    return ";".join(f"{height},{width}" for height, width in buckets)


def cropped(image, size):
    """The centre of a picture that just covers `size`, by Pillow and NumPy alone: [3, height, width] in -1..1."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    pixels = np.asarray(resized)[top : top + height, left : left + width]
    return pixels.astype(np.float64).transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("classes", [False, True], ids=["alone", "with class pictures"])
def test_a_batch_is_of_one_bucket_and_holds_the_crops_of_its_pictures(batches, photos, size, classes):
    made, seen = batches("--center_crop", "--train_batch_size", size, classes=classes), {}
    for number in range(12):
        images, posterior, noise, _, embeds, _, image_ids = made.at(number)
        bucket, uses = made.order.at(number)
        height, width = BUCKETS[bucket]
        assert images.shape == (size * (1 + classes), 3, height, width) and len(embeds) == len(images)
        assert posterior.shape == noise.shape == (len(images), 16, height // 8, width // 8)
        np.testing.assert_array_equal(image_ids, flow.latent_image_ids(height // 8, width // 8))
        for image, (sample_id, _) in zip(images, uses):
            name = made.samples[sample_id].name
            expected = cropped(Image.open(photos / name).convert("RGB"), BUCKETS[bucket])
            np.testing.assert_allclose(image, expected, atol=1.01 / 127.5)
            seen[name] = bucket
    shapes = {name: Image.open(photos / name).size for name in seen}
    assert len(seen) == 5
    assert all(
        BUCKETS[bucket][0] > BUCKETS[bucket][1]
        for name, bucket in seen.items()
        if shapes[name][1] > 1.2 * shapes[name][0]
    )
    assert all(
        BUCKETS[bucket][0] < BUCKETS[bucket][1]
        for name, bucket in seen.items()
        if shapes[name][0] > 1.2 * shapes[name][1]
    )


def test_every_picture_is_used_as_often_as_the_others(batches):
    """12 passes of 5 pictures with 2 repeats: within a batch of 24 uses each, of instance and of class pictures."""
    made = batches("--train_batch_size", 2, "--repeats", 2, classes=True)
    counts, real = {"instance": np.zeros(5, int), "class": np.zeros(5, int)}, made._row

    def counted(kind, sample, sample_id, use, size):
        counts[kind][sample_id] += 1
        return real(kind, sample, sample_id, use, size)

    made._row = counted
    for number in range(60):
        made.at(number)
    assert abs(counts["instance"] - 24).max() <= 2
    assert counts["class"].sum() == 120 and abs(counts["class"] - 24).max() <= 2


@pytest.mark.parametrize(
    "more", [["--cache_latents"], ["--random_flip", "--train_batch_size", 2]], ids=["cached", "fresh crops"]
)
def test_one_bucket_is_the_resolution_bit_for_bit(run, more):
    square = run(*more, name="square")
    bucket = run(*more, "--aspect_ratio_buckets", "32,32", "--resolution", 512, name="bucket")
    assert (square / lora_files.LORA_FILE).read_bytes() == (bucket / lora_files.LORA_FILE).read_bytes()


def test_graph_and_pynative_agree_in_every_bucket(run):
    more = ["--aspect_ratio_buckets", text(BUCKETS), "--cache_latents", "--train_batch_size", 2, "--max_train_steps", 6]
    more += ["--validation_split", 0.2, "--timestep_shift", "auto"]
    found = [metrics(run(*more, "--mindspore_mode", mode, name=f"mode {mode}")) for mode in (0, 1)]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in found]
    held_out = [[line["held_out__loss"] for line in lines if "held_out__loss" in line] for lines in found]
    assert len(losses[0]) == 6 and len(held_out[0]) == 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(held_out[0], held_out[1], rtol=1e-5)


def test_class_pictures_are_made_in_the_buckets_of_the_instances(run, photos, tmp_path):
    """Ten of them for three lying and two standing pictures."""
    sizes = [Image.open(path).size for path in sorted(photos.glob("*.png"))]
    standing = sum(height > width for width, height in sizes)
    prior = [
        "--with_prior_preservation",
        "--class_data_dir",
        tmp_path / "class",
        "--class_prompt",
        "a cat",
        "--num_class_images",
        10,
    ]
    prior += ["--aspect_ratio_buckets", text(BUCKETS[:2]), "--max_train_steps", 2]
    run(*prior)
    made = [Image.open(path).size for path in (tmp_path / "class").iterdir()]
    assert sorted(made) == sorted([(32, 48)] * 2 * standing + [(48, 32)] * 2 * (5 - standing))
    run(*prior, name="again")
    assert len(list((tmp_path / "class").iterdir())) == 10


def test_validation_pictures_have_the_first_bucket_s_shape(run):
    out = run(
        "--aspect_ratio_buckets",
        "32,48;48,32",
        "--validation_prompt",
        "a cat",
        "--num_validation_images",
        1,
        "--cache_latents",
    )
    wide = Image.open(out / "samples" / "final.png").size
    square = Image.open(
        run("--validation_prompt", "a cat", "--num_validation_images", 1, name="square") / "samples" / "final.png"
    ).size
    assert wide[0] / wide[1] > square[0] / square[1]
    assert json.loads((out / "run.json").read_text())["flags"]["aspect_ratio_buckets"] == "32,48;48,32"
