"""The Euler loop against NumPy with a fake transformer, decoding, and grids of images."""

import math

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.conditions import condition_image
from mindtune.data.grids import image_grid, save_image
from mindtune.models.sampling import decode_latents, sample_latents

DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
}
FIXED = {"use_dynamic_shifting": False, "shift": 3.0}


class FakeTransformer:
    """A velocity that depends on every input: tokens, their ids, time, guidance, text and pooled text."""

    def __init__(self, guidance_embeds=True):
        self.config, self.calls = {"guidance_embeds": guidance_embeds}, []

    def __call__(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        img_ids,
        txt_ids,
        guidance,
        return_dict,
    ):
        assert (
            return_dict is False
            and txt_ids.shape == (encoder_hidden_states.shape[1], 3)
            and not txt_ids.asnumpy().any()
        )
        assert (guidance is None) != self.config["guidance_embeds"]
        self.calls.append(
            (hidden_states.dtype, encoder_hidden_states.dtype, pooled_projections.dtype, timestep.asnumpy().copy())
        )
        time = timestep if guidance is None else timestep + 0.01 * guidance
        text = encoder_hidden_states.to(ms.float32).mean(axis=(1, 2)) - 0.5 * pooled_projections.to(ms.float32).mean(
            axis=1
        )
        place = img_ids[:, 1] + 0.1 * img_ids[:, 2]
        channel = ms.Tensor(np.arange(hidden_states.shape[2]) // 4, ms.float32)
        velocity = (
            0.5 * hidden_states.to(ms.float32)
            + (time + text).reshape((-1, 1, 1))
            + place.reshape((1, -1, 1)) * 0.01 * channel
        )
        return (velocity.to(hidden_states.dtype),)


def reference(scheduler, embeds, pooled, noise, steps, guidance, guided=True):
    """The Euler loop on [B, C, H, W] in NumPy: latents are not packed, and sigmas come from a closed form."""
    b, c, h, w = noise.shape
    mu = 0.5 + (1.15 - 0.5) * (h * w / 4 - 256) / (4096 - 256)
    shift = math.exp(mu) if scheduler["use_dynamic_shifting"] else 3.0
    x = noise.astype(np.float64)
    text = embeds.mean(axis=(1, 2)) - 0.5 * pooled.mean(axis=1)
    rows, columns = np.mgrid[0:h, 0:w] // 2
    place = 0.01 * (rows + 0.1 * columns)[None, None] * np.arange(c).reshape(1, c, 1, 1)
    sigmas = [1 - k / steps for k in range(steps)]  # 1 to 1/steps
    sigmas = [1 / (1 + (1 / s - 1) / shift) for s in sigmas] + [0.0]
    for k in range(steps):
        time = sigmas[k] + (0.01 * guidance if guided else 0.0)
        x = x + (sigmas[k + 1] - sigmas[k]) * (0.5 * x + (time + text).reshape(b, 1, 1, 1) + place)
    return x, sigmas


def inputs(shape=(3, 4, 6, 10)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in ((shape[0], 5, 8), (shape[0], 7), shape)]


@pytest.mark.parametrize("scheduler", [DYNAMIC, FIXED], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("shape, steps", [((3, 4, 6, 10), 4), ((1, 16, 8, 2), 1), ((2, 2, 4, 4), 7)])
def test_the_euler_loop(scheduler, shape, steps):
    embeds, pooled, noise = inputs(shape)
    transformer = FakeTransformer()
    found = sample_latents(transformer, scheduler, embeds, pooled, noise, steps, 3.5, ms.float32)
    expected, sigmas = reference(scheduler, embeds, pooled, noise, steps, 3.5)
    assert found.shape == shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for call, sigma in zip(transformer.calls, sigmas):
        np.testing.assert_allclose(call[3], [sigma] * shape[0], rtol=1e-6)
    assert len(transformer.calls) == steps


def test_a_transformer_without_guidance():
    embeds, pooled, noise = inputs()
    found = sample_latents(FakeTransformer(False), DYNAMIC, embeds, pooled, noise, 3, 3.5, ms.float32)
    np.testing.assert_allclose(
        found, reference(DYNAMIC, embeds, pooled, noise, 3, 3.5, guided=False)[0], rtol=1e-5, atol=1e-5
    )


def test_images_of_a_batch_are_independent():
    embeds, pooled, noise = inputs()
    together = sample_latents(FakeTransformer(), DYNAMIC, embeds, pooled, noise, 3, 3.5, ms.float32)
    for n in range(3):
        alone = sample_latents(
            FakeTransformer(), DYNAMIC, embeds[n : n + 1], pooled[n : n + 1], noise[n : n + 1], 3, 3.5, ms.float32
        )
        np.testing.assert_allclose(together[n], alone[0], rtol=1e-6)


@pytest.mark.parametrize("compute, tolerance", [(ms.float16, 5e-3), (ms.bfloat16, 5e-2)])
def test_only_the_transformer_uses_half_precision(compute, tolerance):
    """Its inputs are in half precision; latents are accumulated in float32."""
    embeds, pooled, noise = inputs()
    transformer = FakeTransformer()
    found = sample_latents(transformer, DYNAMIC, embeds, pooled, noise, 4, 3.5, compute)
    assert all(call[:3] == (compute,) * 3 for call in transformer.calls) and found.dtype == np.float32
    np.testing.assert_allclose(found, reference(DYNAMIC, embeds, pooled, noise, 4, 3.5)[0], atol=tolerance)
    assert (found != found.astype(np.float16)).any()


# ---- decoding ------------------------------------------------------------------------------------


class FakeVae:
    """Its first three latent channels are the image."""

    def __init__(self):
        self.config = {"scaling_factor": 0.5, "shift_factor": 0.25}

    def decode(self, z, return_dict):
        assert return_dict is False
        return (z[:, :3],)


@pytest.mark.parametrize("compute", [ms.float32, ms.float16])
def test_latents_are_unscaled_decoded_and_clipped(compute):
    """z / scaling + shift; -1 is black, 0 is 128, 1 is white, other values are clipped, and NaN is black."""
    pixels = np.array([-1.0, 0.0, 1.0, 2.0, -3.0, np.nan, 0.5, 1 / 255])
    latents = np.zeros((2, 4, 2, 4), np.float32)
    latents[:, :3] = (pixels.reshape(2, 4) - 0.25) * 0.5
    images = decode_latents(FakeVae(), latents, compute)
    assert [image.size for image in images] == [(4, 2)] * 2
    assert np.asarray(images[1])[:, :, 0].tolist() == [[0, 128, 255, 255], [0, 0, 191, 128]]


# ---- grids ---------------------------------------------------------------------------------------


def picture(width=200, height=150, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image, left, top, width, height):
    return np.asarray(image)[top : top + height, left : left + width]


def test_a_grid_places_rows_and_columns():
    """Two rows, the second shorter: what is left of it stays white."""
    rows = [[picture(seed=0), picture(seed=1), picture(seed=2)], [picture(seed=3)]]
    sheet = image_grid(rows)
    assert sheet.size == (600, 300)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            np.testing.assert_array_equal(pixels(sheet, 200 * x, 150 * y, 200, 150), np.asarray(image))
    assert (pixels(sheet, 200, 150, 400, 150) == 255).all()


@pytest.mark.parametrize(
    "labels",
    [
        ["one", "two"],
        ["a long prompt " * 20, "short"],
        ["", "数 ☃ \n"],
        ["红色围巾的猫" * 20, "Ấ\u0301\u0301\u0301\u0301"],
    ],
)
def test_every_row_stands_under_its_label(labels):
    """Labels never reach into pictures."""
    rows = [[picture(seed=0)], [picture(seed=1)]]
    sheet = image_grid(rows, labels)
    band = sheet.height // 2 - 150
    assert sheet.width == 200 and band > 0
    for y, row in enumerate(rows):
        np.testing.assert_array_equal(pixels(sheet, 0, y * (150 + band) + band, 200, 150), np.asarray(row[0]))
        assert (pixels(sheet, 0, y * (150 + band), 200, band) < 128).any() == bool(labels[y])


@pytest.mark.parametrize(
    "one, other", [("猫", "狗"), ("ネコ", "イヌ"), ("고양이", "강아지"), ("кот", "пёс"), ("🐱", "🐶")]
)
def test_labels_in_other_scripts_can_be_told_apart(one, other):
    """Characters that a font does not have would all be the same box."""
    sheets = [np.asarray(image_grid([[picture()]], [label])) for label in (one, other)]
    assert sheets[0].shape == sheets[1].shape and not np.array_equal(*sheets)


def test_small_pictures_are_enlarged_pixel_by_pixel():
    image = picture(16, 24)
    sheet = image_grid([[image, image]])
    scale = sheet.width // 32
    assert scale > 1 and sheet.size == (32 * scale, 24 * scale)
    np.testing.assert_array_equal(np.asarray(sheet)[::scale, ::scale], np.tile(np.asarray(image), (1, 2, 1)))
    np.testing.assert_array_equal(
        np.asarray(sheet)[scale - 1 :: scale, scale - 1 :: scale], np.tile(np.asarray(image), (1, 2, 1))
    )


def test_save_image_makes_the_folder_and_a_png(tmp_path):
    image = picture(8, 8)
    path = save_image(image, tmp_path / "new" / "folder" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert Image.open(path).format == "PNG"


# ---- conditions ----------------------------------------------------------------------------------


def drawing(path, colour):
    """A bar on a transparent ground, wider than high."""
    image = Image.new("RGBA", (80, 64))
    image.paste(colour, (8, 16, 72, 48))
    image.save(path)
    return str(path)


@pytest.mark.parametrize(
    "colour, background, ground",
    [((255,) * 4, None, 0), ((0, 0, 0, 255), None, 255), ((255,) * 4, "white", 255), ((255,) * 4, "black", 0)],
)
def test_a_condition_is_laid_on_what_shows_it_or_on_what_the_training_data_are(
    tmp_path, capsys, colour, background, ground
):
    path = drawing(tmp_path / "a.png", colour)
    image = condition_image(path, "--control_image", 32, 8, background)
    assert image.size == (40, 32) and image.getpixel((0, 0)) == (ground,) * 3 and image.getpixel((20, 16)) == colour[:3]
    printed = capsys.readouterr().out
    assert (f"--control_image {path}: laid on black" in printed) == (background is None and ground == 0)
    assert ("blank" in printed) == (background == "white")


def test_conditions_of_phones_and_what_cannot_be_read(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.heic", format="HEIF")
    assert condition_image(str(tmp_path / "a.heic"), "--control_image", 32).size == (32, 32)
    assert f"{tmp_path}/a.heic: blank, of one colour throughout" in capsys.readouterr().out
    (tmp_path / "b.png").write_bytes(b"%PDF-1.7")
    with pytest.raises(
        UserError, match=r"--control_image .*b.png: cannot be read as an image .*a PDF: export its pages"
    ):
        condition_image(str(tmp_path / "b.png"), "--control_image", 32)
    with pytest.raises(UserError, match=r"--control_image nowhere.png: cannot be read as an image .missing"):
        condition_image("nowhere.png", "--control_image", 32)
