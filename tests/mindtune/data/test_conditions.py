"""Condition images for validation and inference."""

import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.conditions import condition_image


def drawing(path, colour):
    """A bar on a transparent background, in an image that is wider than high."""
    image = Image.new("RGBA", (80, 64))
    image.paste(colour, (8, 16, 72, 48))
    image.save(path)
    return str(path)


@pytest.mark.parametrize(
    "colour, background, ground",
    [((255,) * 4, None, 0), ((0, 0, 0, 255), None, 255), ((255,) * 4, "white", 255), ((255,) * 4, "black", 0)],
)
def test_a_condition_is_put_on_the_given_background_or_on_the_one_that_shows_it(
    tmp_path, capsys, colour, background, ground
):
    path = drawing(tmp_path / "a.png", colour)
    image = condition_image(path, "--control_image", 32, 8, background)
    assert image.size == (40, 32) and image.getpixel((0, 0)) == (ground,) * 3 and image.getpixel((20, 16)) == colour[:3]
    printed = capsys.readouterr().out
    assert (f"--control_image {path}: transparent, put on black" in printed) == (background is None and ground == 0)
    assert ("blank" in printed) == (background == "white")


def test_heic_conditions_and_unreadable_conditions(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.heic", format="HEIF")
    assert condition_image(str(tmp_path / "a.heic"), "--control_image", 32).size == (32, 32)
    assert f"{tmp_path}/a.heic: blank, all pixels have the same colour" in capsys.readouterr().out
    (tmp_path / "b.png").write_bytes(b"%PDF-1.7")
    with pytest.raises(
        UserError, match=r"--control_image .*b.png: cannot be read as an image .*a PDF: export its pages"
    ):
        condition_image(str(tmp_path / "b.png"), "--control_image", 32)
    with pytest.raises(UserError, match=r"--control_image nowhere.png: cannot be read as an image .missing"):
        condition_image("nowhere.png", "--control_image", 32)
