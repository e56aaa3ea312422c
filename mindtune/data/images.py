"""Decodes image files upright, and converts images of any mode to RGB on a background colour."""

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
    HEIF_AVAILABLE = True
except ImportError:  # needed for HEIC photos only
    HEIF_AVAILABLE = False

# Pillow warns above 89 million pixels and raises above 178 million. Scans are large: ignore the warning, keep the
# error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow warns of truncated TIFF metadata. The pixels do not depend on them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

ORIENTATION_TAG = 0x0112
TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DNG_VERSION_TAG = 50706
JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"
DECODING_ERRORS = (ValueError, SyntaxError, OSError, struct.error)


class UnusableImage(ValueError):
    """An intact image that cannot be used. The text says why and what to do."""


# ---- decoding ------------------------------------------------------------------------------------


def decode(content: bytes) -> Image.Image:
    """The first frame of an encoded image: fully decoded, upright, in its own mode.

    info["animated"] says whether there are more frames. A PNG whose metadata cannot be read is decoded without them.
    A JPEG may lack its end marker. Raises UnusableImage, or the exceptions of Pillow's decoders.
    """
    try:
        return _open_upright(content)
    except DECODING_ERRORS:
        if content.startswith(JPEG_START) and (completed := _with_end_marker(content)):
            return _open_upright(completed)
        if not content.startswith(PNG_START):
            raise
    try:
        orientation_keywords = (b"XML:com.adobe.xmp", b"Raw profile type exif")
        return _open_upright(b"".join(_essential_png_chunks(content, keywords=orientation_keywords)))
    except DECODING_ERRORS:
        return _open_upright(b"".join(_essential_png_chunks(content, keywords=())))


def _open_upright(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    if DNG_VERSION_TAG in getattr(image, "tag_v2", ()):
        raise UnusableImage("a raw photo (DNG), of which Pillow reads only a preview: export it as JPEG, PNG or TIFF")
    # Other formats have secondary images, not frames: previews and depth maps in JPEG and HEIC, layers in Photoshop
    # files.
    animated = image.format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF") and getattr(image, "is_animated", False)
    result = apply_orientation(image)
    result.info["animated"] = animated
    return result


def _with_end_marker(content: bytes) -> Optional[bytes]:
    """A JPEG that lacks nothing but its end marker, with the marker added; None if pixels are missing too.

    Decoders skip bytes between the last pixel and the end marker. So if inserting bytes there changes the decoded
    image, the decoder read them as pixels, and pixels are missing.
    """
    body = content.rstrip(b"\xff")
    padding = bytes(range(165, 250))
    try:
        decoded = Image.open(io.BytesIO(body + JPEG_END)).tobytes()
        decoded_with_padding = Image.open(io.BytesIO(body + padding + JPEG_END)).tobytes()
    except DECODING_ERRORS:
        return None
    return body + JPEG_END if decoded == decoded_with_padding else None


def _essential_png_chunks(content: bytes, keywords: tuple[bytes, ...]) -> Iterator[bytes]:
    """The chunks of a PNG that hold pixels, transparency and EXIF, and the text chunks with one of `keywords`.

    The checksums of EXIF and text chunks are recomputed: a wrong one there does not affect the pixels. PNG, third
    edition, 5.3.
    """
    yield content[:8]
    start = 8
    while start + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        keyword = content[start + 8 : start + 88].split(b"\0")[0]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"):
            yield content[start : start + 12 + length]
        elif kind == b"eXIf" or (kind[1:] in (b"EXt", b"TXt") and keyword in keywords):
            chunk = content[start : start + 8 + length]
            yield chunk + struct.pack(">I", zlib.crc32(chunk[4:]))
        start += 12 + length


def apply_orientation(image: Image.Image) -> Image.Image:
    """The image rotated and mirrored as its EXIF orientation says.

    Pillow's ImageOps.exif_transpose also rewrites the EXIF, which fails for values such as 1/0.
    """
    image.load()
    orientation = None
    for read in (lambda: _read_orientation(image.info["exif"]), lambda: image.getexif().get(ORIENTATION_TAG)):
        with contextlib.suppress(Exception):  # an invalid EXIF block raises many kinds; the pixels do not depend on it
            orientation = orientation or read()
    if isinstance(orientation, int) and orientation in TRANSPOSE_BY_ORIENTATION:
        return image.transpose(TRANSPOSE_BY_ORIENTATION[orientation])
    return image


def _read_orientation(exif: bytes) -> Optional[int]:
    """The orientation in the first directory of an EXIF block, None if it has none. Exif 2.32, 4.6.2.

    Pillow stops at the first entry that it cannot read; this skips it.
    """
    exif = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    byte_order = "<" if exif.startswith(b"II") else ">"
    (start,) = struct.unpack_from(byte_order + "I", exif, 4)
    (count,) = struct.unpack_from(byte_order + "H", exif, start)
    for number in range(count):
        tag, kind, _, value = struct.unpack_from(byte_order + "HHIH", exif, start + 2 + 12 * number)
        if (tag, kind) == (ORIENTATION_TAG, 3):
            return value
    return None


# ---- converting to RGB ---------------------------------------------------------------------------


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An image in any mode as upright 8-bit RGB. See `flatten`."""
    return flatten(apply_orientation(image), background)


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """An upright image in any mode as 8-bit RGB, with transparent pixels on `background`.

    16-bit gray is scaled by 1/257. Raises UnusableImage for pixels of an unknown range and for L*a*b* colours.
    """
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
    """Whether the mode or format of the image has transparency; all of its pixels may be opaque nevertheless."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def has_single_colour(image: Image.Image) -> bool:
    """Whether all pixels of an RGB image have the same colour."""
    return all(low == high for low, high in image.getextrema())


# ---- backgrounds for transparent images ----------------------------------------------------------


class Visibility(NamedTuple):
    """The drawn share of a transparent image, and its shares visible on white and on black: mean alpha, 0 to 1.

    A pixel is visible on a background if a channel of its colour differs from the background by at least a quarter of
    the range.
    """

    drawn: float = 0.0
    on_white: float = 0.0
    on_black: float = 0.0

    def hidden_share(self, background: str) -> float:
        """The share of the drawing that is not visible on "white" or "black"."""
        visible = {"white": self.on_white, "black": self.on_black}[background]
        return 1.0 - visible / self.drawn if self.drawn else 0.0


def measure_visibility(image: Image.Image) -> Optional[Visibility]:
    """The visibility of an upright image; None if all of its pixels are opaque."""
    if not is_transparent(image):
        return None
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return None
    image = image.reduce(max(1, int((image.width * image.height / 1e6) ** 0.5)))  # averages weighted by alpha
    pixels = np.asarray(image)
    alpha = pixels[:, :, 3] / 255.0
    colours = pixels[:, :, :3]
    visible_on_white = colours.min(axis=2) < 192
    visible_on_black = colours.max(axis=2) >= 64
    return Visibility(
        drawn=float(alpha.mean()),
        on_white=float((alpha * visible_on_white).mean()),
        on_black=float((alpha * visible_on_black).mean()),
    )


def choose_background(total: Visibility) -> str:
    """The background for transparent images whose visibilities sum to `total`: "white", or "black" if it hides less.

    Black must hide less than a tenth of the drawings, and white a tenth more than black. So black and coloured
    drawings, and white ones next to black ones, stay on white.
    """
    hidden_on_white = total.hidden_share("white")
    hidden_on_black = total.hidden_share("black")
    return "black" if hidden_on_black < 0.1 <= hidden_on_white - hidden_on_black else "white"
