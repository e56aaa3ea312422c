"""Every kind of picture trains, and trains right: what the step is given equals arrays made without the code under test."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune.data import crops

SIDE = 32


def smooth(height, width):
    """uint8 [height, width, 3]: red rises to the right, green downwards, blue along the diagonal."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([20 + 200 * x // width, 20 + 200 * y // height, 20 + 100 * (x + y) // (width + height)], 2).astype(
        np.uint8
    )


def cropped(rgb):
    """What the step shall see of uint8 or float [h, w, 3] in 0..255: the central square, [3, SIDE, SIDE] in -1..1."""
    top, left = (rgb.shape[0] - SIDE) // 2, (rgb.shape[1] - SIDE) // 2
    return rgb[top : top + SIDE, left : left + SIDE].astype(np.float64).transpose(2, 0, 1) / 127.5 - 1


# Each makes a picture whose shorter side is SIDE and gives the RGB values it stands for.


def rotated_jpeg(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
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


@pytest.fixture
def batches(lora_script, flags, tmp_path):
    """batches(folder, *flags): the script's batches over a folder, with a caption encoder that is not needed here left out."""

    def make(folder, *more, stage=None):
        args = lora_script.parse_args(flags(tmp_path / "out", "--instance_data_dir", folder, *more))
        text = {"prompt_embeds": np.zeros((16, 32), np.float32), "pooled_prompt_embeds": np.zeros(32, np.float32)}
        stage = SimpleNamespace(text=lambda _: text, moments=stage.moments if stage else None)
        samples = lora_script.load_samples(args, [(SIDE, SIDE)])
        none = [], np.array([], int)
        return lora_script.Batches(
            args, 0, stage, [(SIDE, SIDE)], (samples, np.zeros(len(samples), int)), none, none, (16, 8), 1000
        )

    return make


def uses(made, count):
    """{file name: [the arrays the step gets at its first, second ... use]} over `count` batches of one."""
    seen = {sample.name: [] for sample in made.samples}
    for position in range(count):
        ((sample_id, _),) = made.order.at(position)[1]
        seen[made.samples[sample_id].name].append(made.at(position)[0][0])
    return seen


# ---- kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_step_is_given_the_pixels_that_the_picture_stands_for(batches, tmp_path, name):
    (tmp_path / "in").mkdir()
    expected = cropped(KINDS[name](tmp_path / "in" / name))
    given = batches(tmp_path / "in", "--center_crop").at(0)[0][0]
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
    np.testing.assert_allclose(batches(tmp_path / "in", "--center_crop").at(0)[0][0], cropped(upright), atol=1e-6)


def test_one_folder_of_all_kinds_trains_without_the_bad_ones(train, tmp_path):
    folder = tmp_path / "all kinds"
    folder.mkdir()
    for name, make in KINDS.items():
        make(folder / name)
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "torn.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:-200])
    Image.fromarray(smooth(31, 200)).save(folder / "small.png")

    done = train(
        tmp_path / "out",
        "--instance_data_dir",
        folder,
        "--skip_bad_images",
        "--train_batch_size",
        4,
        "--max_train_steps",
        3,
    )
    assert f"--instance_data_dir {folder}: continuing without 3 of 15 files" in done.stdout
    for line in ("page.jpg: not an image", "torn.jpg: damaged (", "small.png: 200x31 is smaller than --resolution 32"):
        assert line in done.stdout
    assert "\n12 pictures, 0 held out" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]  # one pass over the twelve
    assert all(0.1 < line["loss"] < 100 for line in metrics(tmp_path / "out"))
    assert len(list(folder.iterdir())) == 15  # nothing was moved or deleted


# ---- crops and flips -----------------------------------------------------------------------------


def test_crops_and_flips_are_drawn_afresh_for_every_use_and_repeatably(batches, photos):
    first, again = (uses(batches(photos, "--random_flip"), 20) for _ in range(2))
    for name, arrays in first.items():
        assert len(arrays) == 4
        assert len({array.tobytes() for array in arrays}) >= 3, f"{name} is cropped the same for use after use"
        np.testing.assert_array_equal(arrays, again[name])


def test_random_crops_reach_every_place_and_stay_inside_the_picture(batches, tmp_path):
    (tmp_path / "in").mkdir()
    columns = np.tile(np.arange(36, dtype=np.uint8)[None, :, None], (SIDE, 1, 3))
    Image.fromarray(columns).save(tmp_path / "in/a.png")
    (arrays,) = uses(batches(tmp_path / "in"), 60).values()
    lefts = [round((float(array[0, 0, 0]) + 1) * 127.5) for array in arrays]
    assert set(lefts) == {0, 1, 2, 3, 4}
    for left, array in zip(lefts, arrays):
        np.testing.assert_allclose((array[1, 5] + 1) * 127.5, np.arange(left, left + SIDE), atol=1e-3)


def test_about_half_of_the_uses_are_mirrored_with_random_flip_and_none_without(batches, tmp_path):
    (tmp_path / "in").mkdir()
    plain = cropped(rgb_png(tmp_path / "in/a.png")).astype(np.float32)
    (arrays,) = uses(batches(tmp_path / "in", "--center_crop", "--random_flip"), 100).values()
    mirrored = [np.allclose(array, plain[:, :, ::-1], atol=1e-6) for array in arrays]
    assert all(flip or np.allclose(array, plain, atol=1e-6) for flip, array in zip(mirrored, arrays))
    assert 35 <= sum(mirrored) <= 65
    (arrays,) = uses(batches(tmp_path / "in", "--center_crop"), 20).values()
    assert all(np.allclose(array, plain, atol=1e-6) for array in arrays)


def test_a_larger_picture_is_scaled_by_its_shorter_side_with_the_filter_asked_for(tmp_path):
    image = Image.fromarray(smooth(80, 64))
    for name, filter_ in (("lanczos", Image.Resampling.LANCZOS), ("nearest", Image.Resampling.NEAREST)):
        expected = cropped(np.asarray(image.resize((SIDE, 40), filter_)))
        np.testing.assert_allclose(crops.pixel_values(image, SIDE, name), expected, atol=1e-6)


# ---- cached latents ------------------------------------------------------------------------------


def test_cached_latents_are_one_entry_a_flip_of_the_central_crop(
    batches, lora_script, flags, tiny_flux, photos, tmp_path
):
    """Two pictures, encoded in the child process; a use then only chooses between the picture's two entries."""
    (tmp_path / "in").mkdir()
    for name in ("0.png", "3.png"):
        shutil.copy(photos / name, tmp_path / "in")
    more = ["--cache_latents", "--random_flip", "--cache_dir", tmp_path / "cache"]
    args = lora_script.parse_args(flags(tmp_path / "out", "--instance_data_dir", tmp_path / "in", *more))
    stage, samples = lora_script.make_stage(args, tiny_flux, "no"), lora_script.load_samples(args, [(SIDE, SIDE)])
    wanted = [(sample, (SIDE, SIDE), flip) for sample in samples for flip in (False, True)]
    assert stage.prepare([], wanted) == 4 and stage.prepare([], wanted) == 0
    assert len(list((tmp_path / "cache/mindtune").glob("*.safetensors"))) == 4

    plain, mirrored = (
        {sample.name: stage.moments(sample, (SIDE, SIDE), flip) for sample in samples} for flip in (False, True)
    )
    kind = lora_script.precision.resolve_precision("no")
    vae = lora_script.loading.load_model(tiny_flux, "vae", kind)
    for sample in samples:
        image = Image.open(tmp_path / "in" / sample.name).convert("RGB")
        scale = SIDE / min(image.size)
        pixels = cropped(
            np.asarray(image.resize([max(SIDE, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS))
        )
        for moments, array in ((plain, pixels), (mirrored, pixels[:, :, ::-1])):
            expected = vae.encode(lora_script.ms.Tensor(array[None].astype(np.float32)))[0][0].asnumpy()
            np.testing.assert_allclose(moments[sample.name], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(plain[sample.name] - mirrored[sample.name]).max() > 1e-2

    for name, arrays in uses(batches(tmp_path / "in", *more, stage=stage), 16).items():
        flips = [np.array_equal(array, mirrored[name]) for array in arrays]
        assert all(flip or np.array_equal(array, plain[name]) for flip, array in zip(flips, arrays))
        assert {True, False} == set(flips)
