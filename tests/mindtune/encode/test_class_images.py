"""Class images: how many per bucket, which of a folder's are used, and which numbers new ones get."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.image_facts import ImageFacts
from mindtune.encode import class_images
from mindtune.encode.class_images import Settings, class_quota

SIZES = [(32, 32), (32, 48)]


class Stage:
    """Stands in for the encoder stage: writes plain images and notes the requests."""

    def __init__(self):
        self.requests = []

    def generate(self, request):
        self.requests.append(request)
        for index in range(request.start, request.stop):
            image = Image.new("RGB", request.size[::-1], (index, 0, 0))
            image.save(request.folder / f"{index:05d}-{'0' * 12}.png")


def settings(folder, **more):
    return Settings(str(folder), "a cat", dataloader_num_workers=0, **more)


def save(path, size=(40, 40)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def test_the_quota_divides_the_class_images_as_the_instance_images():
    assert class_quota(100, np.array([0, 0, 0, 0, 0])) == {0: 100}
    assert class_quota(10, np.array([0, 1, 0, 1, 0])) == {0: 6, 1: 4}
    assert class_quota(2, np.array([0] * 9 + [3])) == {0: 2, 3: 1}  # at least one


def test_a_folder_without_images_is_filled_and_one_with_images_is_used(tmp_path, capsys):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    assert class_images.load(settings(folder), SIZES, {0: 5}, ImageFacts()).samples == []
    save(folder / "a.png")
    (folder / "clip.mp4").write_bytes(b"x")
    found = class_images.load(settings(folder), SIZES, {0: 5}, ImageFacts())
    assert [sample.caption for sample in found.samples] == ["a cat"] and found.bucket_ids.tolist() == [0]
    assert "clip.mp4 (videos" in capsys.readouterr().out
    (folder / "a.txt").write_text("a gray cat")
    assert class_images.load(settings(folder), SIZES, {0: 5}, ImageFacts()).samples[0].caption == "a gray cat"


def test_at_most_the_quota_of_every_bucket_is_used(tmp_path):
    for number in range(4):
        save(tmp_path / "class" / f"square {number}.png")
        save(tmp_path / "class" / f"wide {number}.png", (72, 48))
    found = class_images.load(settings(tmp_path / "class"), SIZES, {0: 1, 1: 3}, ImageFacts())
    assert [sample.name for sample in found.samples] == ["square 0.png", "wide 0.png", "wide 1.png", "wide 2.png"]
    assert found.bucket_ids.tolist() == [0, 1, 1, 1]


def test_missing_images_get_new_numbers_and_their_bucket_s_size(tmp_path):
    """A number determines the noise: that of a deleted image is used again only if it was the last."""
    folder = tmp_path / "class"
    save(folder / f"00004-{'0' * 12}.png")
    save(folder / "mine.png")
    stage = Stage()
    options = settings(folder, sample_batch_size=2, num_inference_steps=3, guidance_scale=2.0)
    class_images.generate(options, stage, 7, SIZES, {0: 4, 1: 2}, np.array([0, 0]))
    first, second = stage.requests
    assert (first.start, first.stop, first.size) == (5, 7, (32, 32))
    assert (second.start, second.stop, second.size) == (7, 9, (32, 48))
    assert (first.prompt, first.batch_size, first.seed, first.steps) == ("a cat", 2, 7, 3)
    assert first.guidance_scale == 2.0
    stage = Stage()
    class_images.generate(options, stage, 7, SIZES, {0: 4, 1: 2}, np.array([0, 0, 0, 0, 1, 1]))
    assert stage.requests == []


def test_load_or_generate_uses_the_precision_for_generation(tmp_path, monkeypatch):
    used = []

    def replaced(stage, **changes):
        used.append(changes)
        return stage

    monkeypatch.setattr(class_images, "replace", replaced)
    stage = Stage()
    stage.precision = "bf16"
    ids = np.array([0, 0, 1])
    options = settings(tmp_path / "class", num_class_images=3, prior_generation_precision="fp16")
    found = class_images.load_or_generate(options, stage, 0, SIZES, ids, ImageFacts())
    assert used == [{"precision": "fp16", "vae": None, "vae_precision": None, "verify": False}]
    assert found.bucket_ids.tolist() == [0, 0, 1] and len(stage.requests) == 2
    again = class_images.load_or_generate(options, SimpleNamespace(), 0, SIZES, ids, ImageFacts())
    assert [sample.name for sample in again.samples] == [sample.name for sample in found.samples]
    class_images.load_or_generate(
        options._replace(num_class_images=6, prior_generation_precision=None), stage, 0, SIZES, ids, ImageFacts()
    )
    assert used[1]["precision"] == "bf16"


def test_damaged_class_images_are_refused(tmp_path):
    save(tmp_path / "class" / "good.png")
    (tmp_path / "class" / "torn.png").write_bytes((tmp_path / "class" / "good.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"--class_data_dir .*: 1 of 2 files"):
        class_images.load(settings(tmp_path / "class"), SIZES, {0: 5}, ImageFacts())
    kept = class_images.load(settings(tmp_path / "class", skip_bad_images=True), SIZES, {0: 5}, ImageFacts())
    assert [sample.name for sample in kept.samples] == ["good.png"]
