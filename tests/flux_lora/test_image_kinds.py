"""Every kind of image reaches the training step as the pixels it stands for, made here without the code under test."""

import shutil

import mindspore as ms
import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune.data import crops
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.models import loading, precision

SIDE = 32


def smooth(height, width):
    """uint8 [height, width, 3]: red rises to the right, green downwards, blue along the diagonal."""
    y, x = np.mgrid[0:height, 0:width]
    blue = 20 + 100 * (x + y) // (width + height)
    return np.stack([20 + 200 * x // width, 20 + 200 * y // height, blue], 2).astype(np.uint8)


def cropped(rgb):
    """The center of uint8 or float [h, w, 3] in 0..255 as the step takes it: [3, SIDE, SIDE] in [-1, 1]."""
    top, left = (rgb.shape[0] - SIDE) // 2, (rgb.shape[1] - SIDE) // 2
    return rgb[top : top + SIDE, left : left + SIDE].astype(np.float64).transpose(2, 0, 1) / 127.5 - 1


# Each writes an image whose shorter side is SIDE, and returns the RGB values that it stands for.


def rotated_jpeg(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    Image.fromarray(smooth(SIDE, 40)).save(path, quality=95, exif=exif)
    return np.rot90(np.asarray(Image.open(path)), k=-1)


def cmyk_jpeg(path):
    ink = 255 - smooth(40, SIDE)
    Image.fromarray(np.dstack([ink // 2, ink // 3, ink // 4, ink[..., 0] // 2]), "CMYK").save(path, quality=95)
    c, m, y, k = np.moveaxis(np.asarray(Image.open(path), dtype=np.float64), 2, 0)
    return np.stack([(255 - part) * (255 - k) / 255 for part in (c, m, y)], 2)


def gray_jpeg(path):
    Image.fromarray(smooth(SIDE, 40)[..., 0]).save(path, quality=95)
    return np.repeat(np.asarray(Image.open(path))[..., None], 3, axis=2)


def rgb_jpeg(path):
    Image.fromarray(smooth(SIDE, SIDE)).save(path, "JPEG", quality=95)
    return np.asarray(Image.open(path))


def palette_png(path):
    indices = np.add.outer(np.arange(SIDE), np.arange(40)).astype(np.uint8) % 8
    colours = np.random.default_rng(0).integers(0, 256, (8, 3), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    image.save(path)
    return colours[indices]


def transparent_palette_png(path):
    rgb = palette_png(path)
    Image.open(path).save(path, transparency=3)
    indices = np.asarray(Image.open(path))
    return np.where(indices[..., None] == 3, 255, rgb)


def rgba_png(path):
    rgb, alpha = smooth(SIDE, 40), np.tile(np.linspace(0, 255, 40).astype(np.uint8), (SIDE, 1))
    Image.fromarray(np.dstack([rgb, alpha])).save(path)
    share = alpha[..., None] / 255.0
    return share * rgb + (1 - share) * 255


def gray_alpha_png(path):
    gray = smooth(SIDE, SIDE)[..., 0]
    Image.fromarray(np.dstack([gray, np.full_like(gray, 51)]), "LA").save(path)
    return np.repeat(0.2 * gray[..., None] + 0.8 * 255, 3, axis=2)


def gray16_png(path):
    gray = np.linspace(0, 65535, SIDE * 40).astype(np.uint16).reshape(SIDE, 40)
    Image.fromarray(gray).save(path)
    return np.repeat(gray[..., None] / 257.0, 3, axis=2)


def one_bit_png(path):
    bits = smooth(SIDE, SIDE)[..., 0] > 100
    Image.fromarray(bits).save(path)
    return np.repeat(255.0 * bits[..., None], 3, axis=2)


def rgb_png(path):
    Image.fromarray(smooth(40, SIDE)).save(path)
    return smooth(40, SIDE)


KINDS = {
    "turned.jpg": rotated_jpeg,
    "cmyk.jpg": cmyk_jpeg,
    "gray.jpeg": gray_jpeg,
    "UPPER.JPG": rgb_jpeg,
    "palette.png": palette_png,
    "hole.png": transparent_palette_png,
    "rgba.png": rgba_png,
    "gray alpha.png": gray_alpha_png,
    "gray16.png": gray16_png,
    "bit.png": one_bit_png,
    "盒子里的 猫 (1).png": rgb_png,
    "no suffix": rgb_jpeg,
}


def uses(made, count):
    """{file name: the arrays that the step gets at its first, second ... use} over `count` batches of size 1."""
    seen = {sample.name: [] for sample in made.data.train}
    for number in range(count):
        (use,) = made.data.uses(number)
        seen[use.sample.name].append(made.at(number)[0][0])
    return seen


# ---- kinds of images -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_step_gets_the_pixels_that_the_image_stands_for(batches, tmp_path, name):
    (tmp_path / "in").mkdir()
    expected = cropped(KINDS[name](tmp_path / "in" / name))
    given = batches([(SIDE, SIDE)], "--instance_data_dir", tmp_path / "in", "--center_crop").at(0)[0][0]
    assert given.dtype == np.float32 and given.shape == (3, SIDE, SIDE)
    np.testing.assert_allclose(given, expected, atol=1.01 / 127.5)  # within one of 256 levels: roundings differ
    assert np.ptp(given) > 0.3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_exif_orientations_come_out_upright(batches, tmp_path, orientation):
    upright = smooth(40, SIDE)
    undo = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.transpose(1, 0, 2), np.rot90,
            lambda a: np.rot90(a, 2).transpose(1, 0, 2), lambda a: np.rot90(a, -1)]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "in").mkdir()
    Image.fromarray(np.ascontiguousarray(undo[orientation - 1](upright))).save(tmp_path / "in/a.png", exif=exif)
    made = batches([(SIDE, SIDE)], "--instance_data_dir", tmp_path / "in", "--center_crop")
    np.testing.assert_allclose(made.at(0)[0][0], cropped(upright), atol=1e-6)


def test_one_folder_of_all_kinds_is_trained_on_without_the_bad_images(lora, tmp_path, capfd):
    folder = tmp_path / "all kinds"
    folder.mkdir()
    for name, make in KINDS.items():
        make(folder / name)
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "torn.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:-200])
    Image.fromarray(smooth(31, 200)).save(folder / "small.png")

    more = ["--instance_data_dir", folder, "--skip_bad_images", "--train_batch_size", 4, "--max_train_steps", 3]
    out = lora(tmp_path / "out", *more)
    printed = capfd.readouterr().out
    assert f"--instance_data_dir {folder}: continuing without 3 of 15 files" in printed
    for line in ("page.jpg: not an image", "torn.jpg: damaged (", "small.png: 200x31 is smaller than --resolution 32"):
        assert line in printed
    assert "\n12 samples per epoch, 0 held out" in printed
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]  # one epoch of the twelve
    assert all(0.1 < line["loss"] < 100 for line in metrics(out))
    assert len(list(folder.iterdir())) == 15  # nothing was moved or deleted


# ---- crops and flips -----------------------------------------------------------------------------


def test_crops_and_flips_are_drawn_anew_for_every_use_and_repeatably(batches):
    first, again = (uses(batches([(SIDE, SIDE)], "--random_flip"), 20) for _ in range(2))
    for name, arrays in first.items():
        assert len(arrays) == 4
        assert len({array.tobytes() for array in arrays}) >= 3, f"{name} is cropped the same for use after use"
        np.testing.assert_array_equal(arrays, again[name])


def test_random_crops_reach_every_place_and_stay_inside_the_image(batches, tmp_path):
    (tmp_path / "in").mkdir()
    columns = np.tile(np.arange(36, dtype=np.uint8)[None, :, None], (SIDE, 1, 3))
    Image.fromarray(columns).save(tmp_path / "in/a.png")
    (arrays,) = uses(batches([(SIDE, SIDE)], "--instance_data_dir", tmp_path / "in"), 60).values()
    lefts = [round((float(array[0, 0, 0]) + 1) * 127.5) for array in arrays]
    assert set(lefts) == {0, 1, 2, 3, 4}
    for left, array in zip(lefts, arrays):
        np.testing.assert_allclose((array[1, 5] + 1) * 127.5, np.arange(left, left + SIDE), atol=1e-3)


def test_about_half_of_the_uses_are_mirrored_with_random_flip_and_none_without(batches, tmp_path):
    (tmp_path / "in").mkdir()
    plain = cropped(rgb_png(tmp_path / "in/a.png")).astype(np.float32)
    more = ["--instance_data_dir", tmp_path / "in", "--center_crop"]
    (arrays,) = uses(batches([(SIDE, SIDE)], *more, "--random_flip"), 100).values()
    mirrored = [np.allclose(array, plain[:, :, ::-1], atol=1e-6) for array in arrays]
    assert all(flip or np.allclose(array, plain, atol=1e-6) for flip, array in zip(mirrored, arrays))
    assert 35 <= sum(mirrored) <= 65
    (arrays,) = uses(batches([(SIDE, SIDE)], *more), 20).values()
    assert all(np.allclose(array, plain, atol=1e-6) for array in arrays)


def test_a_larger_image_is_resized_by_its_shorter_side_with_the_given_filter(tmp_path):
    image = Image.fromarray(smooth(80, 64))
    for name, filter_ in (("lanczos", Image.Resampling.LANCZOS), ("nearest", Image.Resampling.NEAREST)):
        expected = cropped(np.asarray(image.resize((SIDE, 40), filter_)))
        np.testing.assert_allclose(crops.pixel_values(image, SIDE, name), expected, atol=1e-6)


# ---- cached latents ------------------------------------------------------------------------------


def test_cached_latents_are_one_entry_per_flip_of_the_central_crop(batches, tiny_flux, photos, tmp_path):
    """Two images, encoded in the child process. A use then only chooses one of its image's two entries."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("0.png", "3.png"):
        shutil.copy(photos / name, folder)
    stage = EncoderStage(tiny_flux, None, "no", tmp_path / "cache", 16)
    more = ["--instance_data_dir", folder, "--cache_latents", "--random_flip"]
    made = batches([(SIDE, SIDE)], *more, moments=stage.moments)
    images = made.data.images(random_flip=True)
    assert stage.prepare([], images) == 4 and stage.prepare([], images) == 0
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4

    entries = {
        flip: {sample.name: stage.moments(sample, (SIDE, SIDE), flip) for sample in made.data.train}
        for flip in (False, True)
    }
    vae = loading.load_model(tiny_flux, "vae", precision.resolve_precision("no"))
    for name in entries[False]:
        image = Image.open(folder / name).convert("RGB")
        scale = SIDE / min(image.size)
        size = [max(SIDE, round(side * scale)) for side in image.size]
        pixels = cropped(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
        for flip, array in ((False, pixels), (True, pixels[:, :, ::-1])):
            expected = vae.encode(ms.Tensor(array[None].astype(np.float32)))[0][0].asnumpy()
            np.testing.assert_allclose(entries[flip][name], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(entries[False][name] - entries[True][name]).max() > 1e-2

    for name, arrays in uses(made, 16).items():
        flips = [np.array_equal(array, entries[True][name]) for array in arrays]
        assert all(flip or np.array_equal(array, entries[False][name]) for flip, array in zip(flips, arrays))
        assert {True, False} == set(flips)
