"""Masks: which file belongs to which image, and the weights of the loss per latent."""

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.checks import preflight
from mindtune.data.concepts import Concept, load
from mindtune.data.crops import pixel_values
from mindtune.data.folders import samples_in_folder
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import TRANSPARENCY, Sample
from mindtune.data.masks import loss_weights, match_mask_files, shape_problem


@pytest.fixture
def folder(tmp_path):
    """Three images of 48 x 32, one with a mask whose left third is white, one with a transparent right half."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    for name in ("a.jpg", "c.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    alpha = np.full((32, 48, 1), 255, np.uint8)
    alpha[:, 24:] = 0
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "b.png")
    return tmp_path


def samples(folder, **settings):
    concept = Concept(instance_data_dir=str(folder), instance_prompt="x", **settings)
    return load([concept], 32, ImageFacts(), False, 1)


@pytest.mark.parametrize(
    "image, files, expected",
    [
        ("a.jpg", ["a.mask.png"], "a.mask.png"),
        ("A.jpg", ["a.mask.png"], "a.mask.png"),
        ("a.jpg", ["a.MASK.webp"], "a.MASK.webp"),
        ("a.jpg", ["a.jpg.mask.png"], "a.jpg.mask.png"),
        ("a.jpg", ["a.mask.png", "a.mask.jpg"], "a.mask.jpg"),  # the first by name
        ("a.jpg", ["ab.mask.png", "b.mask.png"], None),
        ("a.jpg", ["sub/a.mask.png"], None),
    ],
)
def test_mask_files_belong_to_the_image_of_their_name(tmp_path, image, files, expected):
    found = match_mask_files([tmp_path / image], [tmp_path / file for file in files])
    assert found == ({tmp_path / image: tmp_path / expected} if expected else {})


def test_what_is_named_like_a_mask_is_no_image(folder, capsys):
    """A second mask, and a mask without an image, are named."""
    for name in ("a.mask.bmp", "z.mask.png"):
        Image.new("L", (48, 32)).save(folder / name)
    found = samples(folder, masked_loss=True)
    assert [sample.name for sample in found] == ["a.jpg", "b.png", "c.png"] and found[0].mask.name == "a.mask.bmp"
    assert "2 masks without an image of their own are not used: a.mask.png, z.mask.png" in capsys.readouterr().out


def test_masks_without_a_bright_pixel_are_named(folder, capsys):
    """Such as labels of 0 and 1. The second time nothing is decoded, and the note is the same."""
    Image.fromarray(np.eye(32, 48, dtype=np.uint8)).save(folder / "a.mask.png")
    concept = Concept(instance_data_dir=str(folder), instance_prompt="x", masked_loss=True)
    for _ in range(2):
        load([concept], 32, ImageFacts(folder / "cache"), False, 1)
        assert "1 masks have no bright pixel" in capsys.readouterr().out


def test_masks_of_a_folder(folder, capsys):
    a, b, c = samples(folder, masked_loss=True)
    assert (a.mask.name, b.mask, c.mask) == ("a.mask.png", TRANSPARENCY, TRANSPARENCY)
    assert "2 of 3 images have no mask file: their transparency is the mask" in capsys.readouterr().out
    np.testing.assert_array_equal(loss_weights(a, (32, 48), 8, 0.0)[0], [[1, 1, 0, 0, 0, 0]] * 4)
    np.testing.assert_array_equal(loss_weights(b, (32, 48), 8, 0.25)[0], [[1, 1, 1, 0.25, 0.25, 0.25]] * 4)
    np.testing.assert_array_equal(loss_weights(c, (32, 48), 8, 0.0), np.ones((1, 4, 6)))


def test_masks_are_no_images_and_not_used_in_silence(folder, capsys):
    assert [sample.name for sample in samples(folder)] == ["a.jpg", "b.png", "c.png"]
    assert "1 masks are not used without --masked_loss" in capsys.readouterr().out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("position", [None, (0.0, 0.0), (0.99, 0.4)])
@pytest.mark.parametrize("resolution", [(16, 16), (32, 32), (24, 40)])
def test_a_mask_is_cropped_and_flipped_like_its_image(tmp_path, resolution, position, flip):
    """With the image itself as its mask, the weights are the means of the crop's pixels."""
    y, x = np.mgrid[:64, :96]
    Image.fromarray((x * 2 + y).astype(np.uint8)).save(tmp_path / "a.png")
    sample = Sample("a", tmp_path / "a.png", size=(96, 64), mask=Sample("m", tmp_path / "a.png"))
    found = loss_weights(sample, resolution, 8, 0.0, position, flip)
    pixels = (pixel_values(sample.open(), resolution, "bilinear", position, flip)[:1] + 1.0) / 2.0
    h, w = resolution
    np.testing.assert_allclose(found, pixels.reshape(1, h // 8, 8, w // 8, 8).mean(axis=(2, 4)), atol=1e-6)
    assert found.dtype == np.float32


def test_a_mask_of_another_scale_but_the_same_shape_fits(folder):
    Image.open(folder / "a.mask.png").resize((24, 16)).save(folder / "a.mask.png")
    a = samples(folder, masked_loss=True)[0]
    weights = loss_weights(a, (32, 48), 8, 0.0)[0]
    assert weights[0, 0] == 1 and weights[0, 5] == 0


@pytest.mark.parametrize(
    "image, mask, fits",
    [
        ((3000, 2000), (300, 200), True),
        ((1001, 667), (100, 67), True),
        ((3000, 2000), (200, 300), False),
        ((512, 512), (512, 500), False),
    ],
)
def test_the_shape_of_a_mask(image, mask, fits):
    assert (shape_problem(image, mask) is None) == fits


def test_a_mask_that_cannot_be_used_is_refused(folder):
    Image.new("L", (32, 48)).save(folder / "a.mask.png")
    with pytest.raises(UserError, match=r"a.jpg: its mask a.mask.png: is 32x48, and the image 48x32"):
        samples(folder, masked_loss=True)
    (folder / "a.mask.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="a.jpg: its mask a.mask.png: "):
        samples(folder, masked_loss=True)


def test_masks_next_to_images_that_metadata_name(folder, tmp_path):
    """Also in a subfolder."""
    (folder / "sub").mkdir()
    for name in ("a.jpg", "a.mask.png"):
        (folder / name).rename(folder / "sub" / name)
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/a.jpg", "text": "x"}\n')
    notes = []
    found = {
        sample.name: sample.mask for sample in samples_in_folder(str(folder), "--instance_data_dir", say=notes.append)
    }
    assert found["sub/a.jpg"].name == "sub/a.mask.png"
    assert not any("mask.png" in note for note in notes), notes


def test_the_column_of_masks_is_not_the_column_of_images():
    from mindtune.data.columns import Columns, find_columns

    features = {name: {"bytes": None} for name in ("mask", "photo", "text")}
    found = find_columns(features, Columns(condition="mask"), "--dataset_name x", single=True)
    assert (found.image, found.condition) == ("photo", "mask")


def test_other_files_of_that_name_in_subfolders_are_no_masks(folder):
    (folder / "sub").mkdir()
    for name in ("a.jpg", "a.mask.png"):
        (folder / name).rename(folder / "sub" / name)
    (folder / "sub" / "a.mask.bak").write_text("x")
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/a.jpg", "text": "x"}\n')
    found = {sample.name: sample.mask for sample in samples_in_folder(str(folder), "--instance_data_dir")}
    assert found["sub/a.jpg"].name == "sub/a.mask.png"


def test_masks_in_a_column_of_a_data_set(folder):
    lines = [f'{{"file_name": "{name}", "alpha": "a.mask.png", "text": "x"}}' for name in ("a.jpg", "c.png")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    concept = Concept(dataset_name=str(folder), instance_prompt="x", mask_column="alpha", masked_loss=True)
    found = load([concept], 32, ImageFacts(), False, 1)
    assert len(found) == 2
    for sample in found:
        np.testing.assert_array_equal(loss_weights(sample, (32, 48), 8, 0.0)[0], [[1, 1, 0, 0, 0, 0]] * 4)
    with pytest.raises(UserError, match="--mask_column beta"):
        load([concept._replace(mask_column="beta")], 32, ImageFacts(), False, 1)


def test_the_digest_of_a_mask_is_known_after_the_check(folder, monkeypatch):
    """So the fingerprint of the data, which has it, opens no file."""
    checked = preflight(samples(folder, masked_loss=True), 32, "--instance_data_dir", False)
    monkeypatch.setattr(Sample, "read", lambda self: pytest.fail("read"))
    assert len(checked[0].mask.digest) == 64
