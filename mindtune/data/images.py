"""Image files: decoding them upright, telling what a file is that is no image, and laying transparency on a colour."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
    HEIF = True
except ImportError:  # only HEIC photos need it
    HEIF = False

# A scan of 100 million pixels is decoded; Pillow's error above 178 million stays.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of metadata that are cut off, by a line of Pillow's source; the pixels are whole.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the EXIF orientation


class UnusableImage(ValueError):
    """An image that is whole but cannot be used; the text says what to do."""


# ---- decoding ------------------------------------------------------------------------------------


def decode(content: bytes) -> Image.Image:
    """The first frame of an encoded image, wholly decoded and upright, in its own mode; info["animated"] says if there are more.

    Metadata never stand in the way: a PNG that is refused for its text, colour profile or their checksums is read without them.
    A JPEG may lack its end mark. Raises what Pillow raises, or UnusableImage.
    """
    try:
        return _upright(content)
    except (ValueError, SyntaxError, OSError, struct.error):
        if content[:3] == b"\xff\xd8\xff" and (ended := _ended_jpeg(content)):
            return _upright(ended)
        if content[:8] != b"\x89PNG\r\n\x1a\n":
            raise
    try:
        return _upright(
            b"".join(_plain_png(content, (b"XML:com.adobe.xmp", b"Raw profile type exif")))
        )  # which may hold the orientation
    except (ValueError, SyntaxError, OSError, struct.error):
        return _upright(b"".join(_plain_png(content, ())))


def _upright(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    if 50706 in getattr(image, "tag_v2", ()):  # DNGVersion
        raise UnusableImage("a raw photo (DNG), of which Pillow reads a preview only: export it as JPEG, PNG or TIFF")
    # The second image of a phone's JPEG or HEIC is a preview or a map, and a Photoshop file's are layers: none of them are missed.
    animated = image.format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF") and getattr(image, "is_animated", False)
    turned = upright(image)
    turned.info["animated"] = animated
    return turned


def _ended_jpeg(content: bytes) -> Optional[bytes]:
    """A JPEG that lacks only its end mark, with it; None if pixels are missing too.

    Bytes after the last pixel's are passed over, so what stands there changes the pixels only if some are missing.
    """
    body, mark = content.rstrip(b"\xff"), b"\xff\xd9"
    try:
        ended, filled = (
            Image.open(io.BytesIO(body + filling + mark)).tobytes() for filling in (b"", bytes(range(165, 250)))
        )
    except (ValueError, SyntaxError, OSError, struct.error):
        return None
    return body + mark if ended == filled else None


def _plain_png(content: bytes, keep: tuple[bytes, ...]) -> Iterator[bytes]:
    """The chunks that pixels, transparency and orientation need, and texts under the keywords `keep`. PNG, third edition, 5.3.

    Metadata get the checksum of what they hold: a wrong one says nothing of the pixels.
    """
    yield content[:8]
    place = 8
    while place + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        keyword = content[place + 8 : place + 88].split(b"\0")[0]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"):
            yield content[place : place + 12 + length]
        elif kind == b"eXIf" or (kind[1:] in (b"EXt", b"TXt") and keyword in keep):
            chunk = content[place : place + 8 + length]
            yield chunk + struct.pack(">I", zlib.crc32(chunk[4:]))
        place += 12 + length


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says. Unlike Pillow's own function it does not write the EXIF anew, which fails for values such as 1/0."""
    image.load()
    orientation = None
    for read in (lambda: _orientation(image.info["exif"]), lambda: image.getexif().get(0x0112)):
        with contextlib.suppress(
            Exception
        ):  # an EXIF block that cannot be parsed says nothing, and the pixels are whole
            orientation = orientation or read()
    return image.transpose(TURNS[orientation]) if isinstance(orientation, int) and orientation in TURNS else image


def _orientation(exif: bytes) -> Optional[int]:
    """Of an EXIF block, by its first directory's entries. Pillow reads none behind one that it cannot read. Exif 2.32, 4.6.2."""
    exif = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order = "<" if exif.startswith(b"II") else ">"
    (place,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, place)
    entries = (struct.unpack_from(order + "HHIH", exif, place + 2 + 12 * number) for number in range(count))
    return next((value for tag, kind, _, value in entries if (tag, kind) == (0x0112, 3)), None)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """8-bit RGB, upright: EXIF rotation applied, transparency laid on `background`, 16-bit gray scaled by 1/257, the rest converted."""
    return flatten(upright(image), background)


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """8-bit RGB of an upright image in any mode. Raises UnusableImage for pixels of an unknown scale."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UnusableImage(f"pixel mode {image.mode} is not an 8- or 16-bit image: save it as 8- or 16-bit PNG")
        image = Image.fromarray((values / 257.0 + 0.5).astype(np.uint8))
    if is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode == "LAB":
        raise UnusableImage("its colours are L*a*b*, which Pillow does not convert: save it as RGB")
    return image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixels may be: the mode or format has transparency."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def is_flat(image: Image.Image) -> bool:
    """Whether all pixels of an RGB image have one colour."""
    return all(low == high for low, high in image.getextrema())


class Ink(NamedTuple):
    """How much of a transparent image is drawn, and how much of that is seen on white and on black: mean alpha, 0 to 1.

    A pixel is seen if a channel of its colour is at least a quarter of the range away from the ground.
    """

    drawn: float = 0.0
    white: float = 0.0
    black: float = 0.0

    def lost(self, background: str) -> float:
        """The share of the drawing that is not seen on "white" or "black"."""
        return 1.0 - getattr(self, background) / self.drawn if self.drawn else 0.0


def ink(image: Image.Image) -> Optional[Ink]:
    """Of an upright image; None if it has no transparent pixel."""
    if not is_transparent(image):
        return None
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return None
    image = image.reduce(max(1, int((image.width * image.height / 1e6) ** 0.5)))  # averages, weighted by their alpha
    pixels = np.asarray(image)
    alpha, colours = pixels[:, :, 3] / 255.0, pixels[:, :, :3]
    on_white, on_black = (alpha * seen for seen in (colours.min(axis=2) < 192, colours.max(axis=2) >= 64))
    return Ink(*(float(each.mean()) for each in (alpha, on_white, on_black)))


def ground(total: Ink) -> str:
    """What transparent drawings of that ink, summed, are laid on: white, but black if that loses less and nearly nothing.

    Nearly nothing is a tenth; white must lose a tenth more. Black drawings, coloured ones, and white ones beside black stay on white.
    """
    return "black" if total.lost("black") < 0.1 <= total.lost("white") - total.lost("black") else "white"


# ---- what is wrong -------------------------------------------------------------------------------
