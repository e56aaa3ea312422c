"""Says what is wrong with a file that is not a usable image, and what to do about it."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Optional, Union

from PIL import Image, UnidentifiedImageError

from mindtune.cli import printable
from mindtune.data.images import HEIF_AVAILABLE, UnusableImage, decode

RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl",
    ".srw", ".x3f",
}  # fmt: skip
VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm",
    ".wmv",
}  # fmt: skip
DOCUMENT_SUFFIXES = {".ai", ".doc", ".docx", ".eps", ".odt", ".pdf", ".ppt", ".pptx", ".ps", ".xls", ".xlsx"}
VECTOR_SUFFIXES = {".emf", ".svg", ".svgz", ".wmf"}
UNSUPPORTED_SUFFIXES = {".heics", ".jxl", ".jxr", ".kra", ".psb", ".xcf"}
ARCHIVE_SUFFIXES = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"}
HINTS_BY_SUFFIX = {
    **dict.fromkeys(
        VIDEO_SUFFIXES, "videos: save their frames as images, for example by ffmpeg -i clip.mp4 frame-%04d.png"
    ),
    **dict.fromkeys(RAW_SUFFIXES, "raw photos: export them as JPEG, PNG or 16-bit TIFF"),
    **dict.fromkeys(VECTOR_SUFFIXES, "vector drawings: export them as PNG"),
    **dict.fromkeys(DOCUMENT_SUFFIXES, "documents: export their pages as PNG"),
    **dict.fromkeys(UNSUPPORTED_SUFFIXES, "a format that Pillow does not read: export them as PNG or JPEG"),
    **dict.fromkeys(ARCHIVE_SUFFIXES, "archives: unpack them"),
}
# The formats that `is_image` accepts for files without an image's suffix.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "HEIF", "AVIF")
STUB_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG")  # Pillow opens them and cannot decode them
LFS_POINTER = b"version https://git-lfs"
# The first bytes of files that Pillow does not read, and the message for each.
SIGNATURES = (
    (LFS_POINTER, "a Git LFS pointer: run git lfs pull where the data set was cloned"),
    (b"%PDF", "a PDF: export its pages as PNG"),
    (b"PK\x03\x04", "a ZIP archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"\x1f\x8b", "gzip data: unpack it"),
    (b"\xff\x0a", "JPEG XL: convert it to PNG, for example by djxl a.jxl a.png"),
    (b"\0\0\0\x0cJXL ", "JPEG XL: convert it to PNG, for example by djxl a.jxl a.png"),
    (b"\x1aE\xdf\xa3", "a video: save its frames as images"),
    (b"8BPB", "a Photoshop file: export it as PNG"),
    (b"gimp xcf", "a GIMP file: export it as PNG"),
    (b"\xd0\xcf\x11\xe0", "an Office file or Thumbs.db of Windows: remove it"),
    (b"bplist", "a property list of macOS: remove it"),
    (b"\0\x05\x16\x07", "an AppleDouble file of macOS, which holds no pixels: remove it"),
    (b"\x93NUMPY", "a NumPy array: save it as PNG"),
)
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def readable_suffixes() -> set[str]:
    """The file name suffixes of the supported image formats, with the dot, in lower case."""
    Image.init()
    found = {
        suffix
        for suffix, image_format in Image.registered_extensions().items()
        if image_format in Image.OPEN and image_format not in STUB_FORMATS
    }
    return (found | {".heic", ".heif", ".hif", ".avif"}) - set(HINTS_BY_SUFFIX)


def is_image(path: Path) -> bool:
    """Whether a file starts like an image, whatever its name."""
    try:
        with Image.open(path, formats=[name for name in PHOTO_FORMATS if name in Image.OPEN]):
            return True
    except Exception:  # decoders raise many kinds
        return False


def identify(content: bytes) -> Optional[str]:
    """What the content of a file is if it is not an image, and what to do about it; None if it is unknown."""
    start = content[:512]
    if not content:
        return "the file is empty: copy it again"
    if start[4:8] == b"ftyp":
        return _identify_iso_media(brand=start[8:12])
    for signature, message in SIGNATURES:
        if start.startswith(signature):
            return message
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "an SVG drawing: export it as PNG"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download went wrong, download it again"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "a video: save its frames as images"
    return "contains only zeros: copy it again" if not any(content[:4096]) else None


def _identify_iso_media(brand: bytes) -> str:
    """HEIC, AVIF, raw photos and videos share a container format. Its brand tells them apart."""
    if brand in HEIC_BRANDS:
        reason = (
            "pillow-heif cannot read: copy it again" if HEIF_AVAILABLE else "needs a package: pip install pillow-heif"
        )
        return f"a HEIC photo that {reason}, or convert it to JPEG, for example by heif-convert a.heic a.jpg"
    if brand in (b"avif", b"avis"):
        return "an AVIF image that this Pillow cannot read: copy it again, update Pillow to 11.3, or convert it to PNG"
    return "a raw photo (CR3): export it as JPEG" if brand.startswith(b"crx") else "a video: save its frames as images"


def describe_problem(error: Exception, content: Optional[bytes] = None) -> str:
    """The message for an image whose decoding raised `error`. `content`: its encoded bytes, if they could be read."""
    if isinstance(error, FileNotFoundError):
        return f"missing ({printable(error.filename or error)})"
    if isinstance(error, UnusableImage):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({errno.errorcode.get(error.errno, error.errno)}: {os.strerror(error.errno)})"
    if isinstance(error, Image.DecompressionBombError):
        remedy = "scale it down, for example by magick a.png -resize 4096x4096 b.png"
        return f"too many pixels for a photograph ({error}): {remedy}"
    if content is None:
        return f"cannot be read ({type(error).__name__}: {printable(error)})"
    identified = identify(content)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that Pillow can read{f': {identified}' if identified else ''}"
    return identified or _describe_decoding_error(error)


def _describe_decoding_error(error: Exception) -> str:
    missing_decoder = ("Ghostscript", "cannot find loader", "not available", "not supported", "unsupported")
    if any(words in str(error) for words in missing_decoder):
        return f"a format that cannot be decoded here ({printable(error)}): export it as PNG or JPEG"
    if isinstance(error, (OSError, SyntaxError, EOFError, IndexError, struct.error)):
        return f"damaged ({printable(error)})"
    return f"cannot be decoded ({type(error).__name__}: {printable(error)}): save it again as PNG or JPEG"


def open_image(path: Union[str, Path]) -> Image.Image:
    """An image file, decoded and upright, in its own mode. Raises ValueError that says what is wrong with it."""
    content = None
    try:
        content = Path(path).read_bytes()
        return decode(content)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise ValueError(describe_problem(error, content)) from None
