"""Image files of every kind, decoded to the right pixels, and transparent drawings on a background."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from mindtune.data.image_sample import Sample
from mindtune.data.images import Visibility, choose_background, decode, measure_visibility, to_rgb
from mindtune.data.inspection import inspect

from .image_files import encode, noise, same, smooth

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


# ---- every mode to RGB ---------------------------------------------------------------------------


def reopened(image, path, **options):
    """The image saved to a file and opened again."""
    image.save(path, **options)
    return Image.open(path)


def close_to(image, place, colour, tolerance=4):
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel(place), colour, atol=tolerance)


@pytest.mark.parametrize(
    "orientation, size, red",
    [
        (1, (32, 16), (4, 8)),
        (3, (32, 16), (28, 8)),
        (6, (16, 32), (8, 4)),
        (8, (16, 32), (8, 28)),
        (2, (32, 16), (28, 8)),
    ],
)
def test_a_jpeg_is_rotated_by_its_exif(tmp_path, orientation, size, red):
    """The camera wrote red on the left; orientation 6 says: turn clockwise, so red comes to the top."""
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = to_rgb(reopened(image, tmp_path / "a.jpg", exif=exif, quality=95))
    assert upright.size == size
    close_to(upright, red, RED)
    close_to(upright, (size[0] - 1 - red[0], size[1] - 1 - red[1]), BLUE)


def test_a_cmyk_jpeg(tmp_path):
    """Cyan 0, magenta 1/2, yellow 1, black 1/5: (1 - ink)(1 - black)."""
    image = reopened(Image.new("CMYK", (16, 16), (0, 128, 255, 51)), tmp_path / "a.jpg", quality=100)
    assert image.mode == "CMYK"
    close_to(to_rgb(image), (8, 8), (204, 102, 0))


def test_a_palette_png_with_a_transparent_colour_is_put_on_white(tmp_path):
    image = Image.new("P", (4, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 1])
    found = reopened(image, tmp_path / "a.png", transparency=1)
    assert found.mode == "P"
    assert list(to_rgb(found).getdata()) == [RED, WHITE, BLUE, WHITE]


def test_a_palette_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([1, 0])
    assert list(to_rgb(reopened(image, tmp_path / "a.png")).getdata()) == [GREEN, RED]


def test_rgba_is_put_on_white(tmp_path):
    """a c + (1 - a) 255; what a transparent pixel hides does not show."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(100, 0, 200, 255), (100, 0, 200, 0), (100, 0, 200, 51)])
    shown = to_rgb(reopened(image, tmp_path / "a.png"))
    for x, colour in enumerate([(100, 0, 200), WHITE, (224, 204, 244)]):
        close_to(shown, (x, 0), colour, tolerance=1)


def test_gray_with_alpha_is_put_on_white(tmp_path):
    image = Image.new("LA", (3, 1))
    image.putdata([(50, 255), (50, 0), (50, 102)])
    found = reopened(image, tmp_path / "a.png")
    assert found.mode == "LA"
    for x, gray in enumerate([50, 255, 173]):
        close_to(to_rgb(found), (x, 0), (gray,) * 3, tolerance=1)


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert list(to_rgb(reopened(image, tmp_path / "a.png", transparency=RED)).getdata()) == [WHITE, BLUE]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    """round(v / 257): 65535 is 255, and 32896 is 128 (a plain conversion clips everything above 255 to white)."""
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    shown = to_rgb(reopened(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert np.asarray(shown)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]


def test_8_bit_gray(tmp_path):
    shown = to_rgb(reopened(Image.fromarray(np.array([[0, 7, 255]], np.uint8)), tmp_path / "a.png"))
    assert list(shown.getdata()) == [(0, 0, 0), (7, 7, 7), WHITE]


def test_black_and_white(tmp_path):
    shown = to_rgb(reopened(Image.fromarray(np.array([[True, False]])), tmp_path / "a.png"))
    assert list(shown.getdata()) == [WHITE, (0, 0, 0)]


@pytest.mark.parametrize("values", [np.float32([[0.5, 1.0]]), np.int32([[0, 65536]]), np.int32([[-1, 5]])])
def test_pixels_of_an_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match="not an 8- or 16-bit image"):
        to_rgb(Image.fromarray(values))


# ---- intact images with unusual metadata ---------------------------------------------------------


def with_exif(jpeg, orientation, kind, count, value):
    """A JPEG with an unusual EXIF block: the tag of the exposure bias has this type, count and value."""
    ifd = struct.pack("<H", 2) + struct.pack("<HHI", 0x0112, 3, 1) + struct.pack("<HH", orientation, 0)
    ifd += struct.pack("<HHII", 0x8769, 4, 1, 8 + 2 + 24 + 4) + bytes(4)
    bias = (
        struct.pack("<H", 1) + struct.pack("<HHII", 0x9204, kind, count, 8 + 2 + 24 + 4 + 2 + 12 + 4) + bytes(4) + value
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd + bias
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize(
    "kind, count, value",
    [
        (10, 1, struct.pack("<ii", -1, 0)),
        (5, 1, struct.pack("<II", 0, 0)),
        (10, 1, b""),
        (2, 5000, b"short"),
        (99, 1, bytes(8)),
    ],
    ids=["-1/0", "0/0", "truncated", "longer than the file", "of an unknown type"],
)
def test_a_jpeg_with_unusual_exif_is_read_upright(kind, count, value):
    plain = encode(smooth(), "JPEG", quality=95)
    turned = decode(plain).transpose(Image.Transpose.ROTATE_270)
    same(decode(with_exif(plain, 6, kind, count, value)), turned)


def test_an_invalid_exif_block_is_ignored():
    plain = encode(smooth(), "JPEG")
    for block in (b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0" + bytes(range(200))):
        same(decode(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]), decode(plain))


def texts(*chunks):
    info = PngImagePlugin.PngInfo()
    for method, *arguments in chunks:
        getattr(info, method)(*arguments)
    return info


LARGE = "x" * 3_000_000


ODD_PNG = {
    "a compressed text of 3 MB": {"pnginfo": texts(("add_text", "workflow", LARGE, True))},
    "the same in Unicode": {"pnginfo": texts(("add_itxt", "workflow", LARGE, "", "", True))},
    "a plain text of 3 MB": {"pnginfo": texts(("add_text", "workflow", LARGE))},
    "70 MB of texts": {"pnginfo": texts(*[("add_text", f"{n}", LARGE) for n in range(23)])},
    "a colour profile of 3 MB": {"icc_profile": bytes(3_000_000)},
}


@pytest.mark.parametrize("options", ODD_PNG.values(), ids=ODD_PNG)
def test_a_png_with_large_metadata_is_read(options):
    same(decode(encode(noise(20, 16), "PNG", **options)), noise(20, 16))


def test_a_png_with_large_texts_is_upright():
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info = texts(("add_text", "workflow", LARGE, True), ("add_itxt", "XML:com.adobe.xmp", xmp))
    same(decode(encode(noise(20, 16), "PNG", pnginfo=info)), noise(20, 16).transpose(Image.Transpose.ROTATE_270))


def test_a_png_whose_text_has_a_wrong_checksum_is_read():
    """Image viewers show such a file. A wrong checksum of the pixels is an error."""
    content = bytearray(encode(noise(20, 16), "PNG", pnginfo=texts(("add_text", "a", "b" * 50))))
    content[content.index(b"tEXt") + 20] ^= 1
    same(decode(bytes(content)), noise(20, 16))
    content[content.index(b"IDAT") + 100] ^= 1
    assert inspect(Sample("a", bytes(content))).problem.startswith("damaged (")


def test_a_png_whose_exif_has_a_wrong_checksum_is_read_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(encode(noise(20, 16), "PNG", exif=exif.tobytes()))
    # EXIF in a PNG lacks the six bytes "Exif\0\0" of `tobytes`; the checksum follows it.
    checksum = content.index(b"eXIf") + 4 + len(exif.tobytes()) - 6
    content[checksum] ^= 1
    same(decode(bytes(content)), noise(20, 16).transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_jpeg_whose_exif_points_beyond_its_end_is_upright(order):
    """Exif 2.32: a directory of Make, whose text lies far beyond the end, and of orientation 6."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    make = struct.pack(order + "HHII", 0x010F, 2, 20, 0x7FFFFFFF)
    exif = head + struct.pack(order + "IH", 8, 2) + make + struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0) + bytes(4)
    content = encode(smooth(), "JPEG", quality=95, exif=b"Exif\0\0" + exif)
    same(decode(content), smooth().transpose(Image.Transpose.ROTATE_270), 12)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_read(progressive):
    content = encode(smooth(), "JPEG", quality=95, progressive=progressive)
    assert content[-2:] == b"\xff\xd9"
    for part in (content[:-2], content[:-1]):
        same(decode(part), decode(content))
    for lost in (6, 12, 30, len(content) // 2):
        assert inspect(Sample("a", content[:-lost])).problem.startswith("damaged (")


# ---- photos of phones and animations -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_heic_and_avif_are_read(kind):
    found = decode(encode(smooth(), kind, quality=95))
    same(found, smooth(), 12)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "JPEG", "PNG", "WEBP", "TIFF"])
def test_every_format_is_rotated_once(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(smooth(), kind, exif=exif.tobytes(), **({} if kind in ("PNG", "TIFF") else {"quality": 95}))
    same(decode(content), smooth().transpose(Image.Transpose.ROTATE_270), 12)


def test_the_preview_in_a_phone_photo_is_not_a_frame():
    content = encode(smooth(), "MPO", save_all=True, append_images=[noise(64, 48)], quality=95)
    same(decode(content), smooth(), 12)
    assert not inspect(Sample("a", content)).animated


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    first, second = smooth().quantize(64).convert("RGB"), noise(64, 48)
    content = encode(first, kind, save_all=True, append_images=[second], **options)
    same(decode(content), first)
    assert inspect(Sample("a", content)).animated and not inspect(Sample("a", encode(first, kind, **options))).animated


# ---- transparency --------------------------------------------------------------------------------


def line(background, colour, mode="RGBA"):
    image = Image.new(mode, (80, 80), background)
    ImageDraw.Draw(image).line((5, 10, 75, 40), fill=colour, width=4)
    return image


def beside(image, colour):
    """The image with another thin line."""
    ImageDraw.Draw(image).line((5, 70, 75, 50), fill=colour)
    return image


def test_visibility_of_a_drawing():
    """A quarter of the pixels is orange, visible on both; a quarter is white at alpha 1/5; an eighth is black."""
    image = Image.new("RGBA", (20, 20))
    image.paste((200, 100, 50, 255), (0, 0, 10, 10))
    image.paste((255, 255, 255, 51), (10, 0, 20, 10))
    image.paste((0, 0, 0, 255), (0, 10, 10, 15))
    found = Visibility(drawn=0.25 + 0.05 + 0.125, on_white=0.25 + 0.125, on_black=0.25 + 0.05)
    assert measure_visibility(image) == pytest.approx(found)
    assert found.hidden_share("white") == pytest.approx(0.05 / 0.425)
    assert found.hidden_share("black") == pytest.approx(0.125 / 0.425)
    assert measure_visibility(image.resize((2000, 2000), Image.Resampling.NEAREST)) == pytest.approx(found, abs=0.01)
    assert Visibility().hidden_share("white") == 0


@pytest.mark.parametrize("image", [smooth(), smooth().convert("RGBA"), smooth().convert("L")])
def test_an_opaque_image_has_no_visibility(image):
    assert measure_visibility(image) is None


@pytest.mark.parametrize(
    "image, expected",
    [
        (line((0, 0, 0, 0), (255, 255, 255, 255)), "black"),
        (line((255, 255, 255, 0), (240, 250, 255, 255)), "black"),
        (line((0, 0), (255, 255), "LA"), "black"),
        (line((255, 255, 255, 0), (0, 0, 0, 255)), "white"),
        (line((0, 0, 0, 0), (255, 0, 0, 255)), "white"),
        (line((0, 0, 0, 0), (128, 128, 128, 255)), "white"),
        (Image.new("RGBA", (8, 8)), "white"),
        (line((0, 0, 0, 0), (255, 255, 224, 255)), "black"),
        (beside(line((0, 0, 0, 0), (255, 255, 255, 255)), (255, 0, 0, 255)), "black"),
        (beside(line((0, 0, 0, 0), (255, 255, 255, 255)), (0, 0, 0, 255)), "white"),
        (beside(line((0, 0, 0, 0), (0, 0, 0, 255)), (255, 0, 0, 255)), "white"),
        (line((0, 0, 0, 0), (230, 120, 60, 255)), "white"),
    ],
    ids=[
        "white",
        "nearly white",
        "gray and alpha",
        "black",
        "red",
        "gray",
        "nothing",
        "pale yellow",
        "white and thin red",
        "white and thin black",
        "black and thin red",
        "orange",
    ],
)
def test_black_is_chosen_only_if_white_would_hide_the_drawing(image, expected):
    assert choose_background(measure_visibility(image)) == expected
    if measure_visibility(image).on_black or measure_visibility(image).on_white:
        assert len(to_rgb(image, expected).getcolors()) > 1


def test_condition_images_of_a_single_colour_are_found_on_both_backgrounds():
    white, black, opaque = (
        inspect(Sample("a", encode(image, "PNG")), condition=True)
        for image in (line((0, 0, 0, 0), (255,) * 4), line((0, 0, 0, 0), (0, 0, 0, 255)), Image.new("RGB", (8, 8), RED))
    )
    assert white.single_colour_on == ("white",) and black.single_colour_on == ("black",)
    assert opaque.single_colour_on == ("white", "black")
    assert inspect(Sample("a", encode(smooth(), "PNG")), condition=True).single_colour_on == ()
