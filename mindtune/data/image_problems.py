"""What is wrong with a file that is no usable image, and what to do about it."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Optional, Union

from PIL import Image, UnidentifiedImageError

from mindtune.cli import shown
from mindtune.data.images import HEIF, UnusableImage, decode

RAW = {
    ".3fr",
    ".arw",
    ".cr2",
    ".cr3",
    ".dng",
    ".erf",
    ".nef",
    ".nrw",
    ".orf",
    ".pef",
    ".raf",
    ".raw",
    ".rw2",
    ".rwl",
    ".srw",
    ".x3f",
}


VIDEO = {
    ".3gp",
    ".avi",
    ".flv",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ogv",
    ".webm",
    ".wmv",
}


DOCUMENT = {".ai", ".doc", ".docx", ".eps", ".odt", ".pdf", ".ppt", ".pptx", ".ps", ".xls", ".xlsx"}


DRAWING = {".emf", ".svg", ".svgz", ".wmf"}


UNREAD = {".heics", ".jxl", ".jxr", ".kra", ".psb", ".xcf"}


ARCHIVE = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"}


HINTS = {
    **dict.fromkeys(VIDEO, "videos: save their frames as images, for example by ffmpeg -i clip.mp4 frame-%04d.png"),
    **dict.fromkeys(RAW, "raw photos: export them as JPEG, PNG or 16-bit TIFF"),
    **dict.fromkeys(DRAWING, "vector drawings: export them as PNG"),
    **dict.fromkeys(DOCUMENT, "documents: export their pages as PNG"),
    **dict.fromkeys(UNREAD, "of a format that Pillow does not read: export them as PNG or JPEG"),
    **dict.fromkeys(ARCHIVE, "archives: unpack them"),
}


PHOTOS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "HEIF", "AVIF")


STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")  # which Pillow opens and cannot decode


LFS_POINTER = b"version https://git-lfs"


# What the first bytes say of a file that Pillow does not know.
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
    """The file name endings of the image formats that are read here, with the dot, in lower case."""
    Image.init()
    found = {
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in STUBS
    }
    return (found | {".heic", ".heif", ".hif", ".avif"}) - set(HINTS)


def is_image(path: Path) -> bool:
    """Whether a file begins as an image does, whatever its name."""
    try:
        with Image.open(path, formats=[kind for kind in PHOTOS if kind in Image.OPEN]):
            return True
    except Exception:  # decoders raise many kinds
        return False


def what_is_it(content: bytes) -> Optional[str]:
    """What a file that Pillow does not know seems to be, and what to do about it; None if its first bytes say nothing."""
    head = content[:512]
    if not content:
        return "the file is empty: copy it again"
    if head[4:8] == b"ftyp":
        if head[8:12] in HEIC_BRANDS:
            need = "pillow-heif cannot read: copy it again" if HEIF else "needs a package: pip install pillow-heif"
            return f"a HEIC photo that {need}, or convert it to JPEG, for example by heif-convert a.heic a.jpg"
        if head[8:12] in (b"avif", b"avis"):
            return (
                "an AVIF image that this Pillow cannot read: copy it again, update Pillow to 11.3, or convert it to PNG"
            )
        return "a raw photo (CR3): export it as JPEG" if head[8:11] == b"crx" else "a video: save its frames as images"
    for signature, kind in SIGNATURES:
        if head.startswith(signature):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "an SVG drawing: export it as PNG"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download went wrong, fetch it again"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "a video: save its frames as images"
    return "it holds zeros only: copy it again" if not any(content[:4096]) else None


def problem(error: Exception, content: Optional[bytes] = None) -> str:
    """What messages say of an image whose decoding raised `error`; `content` are its encoded bytes, if they could be read."""
    if isinstance(error, FileNotFoundError):
        return f"missing ({shown(error.filename or error)})"
    if isinstance(error, UnusableImage):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({errno.errorcode.get(error.errno, error.errno)}: {os.strerror(error.errno)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels for a photograph ({error}): scale it down, for example by magick a.png -resize 4096x4096 b.png"
    if content is None:
        return f"cannot be read ({type(error).__name__}: {shown(error)})"
    kind = what_is_it(content)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that Pillow can read{f': {kind}' if kind else ''}"
    if kind:
        return kind
    if any(
        words in str(error)
        for words in ("Ghostscript", "cannot find loader", "not available", "not supported", "unsupported")
    ):
        return f"of a kind that cannot be decoded here ({shown(error)}): export it as PNG or JPEG"
    if isinstance(error, (OSError, SyntaxError, EOFError, IndexError, struct.error)):
        return f"damaged ({shown(error)})"
    return f"cannot be decoded ({type(error).__name__}: {shown(error)}): save it anew as PNG or JPEG"


def opened(path: Union[str, Path]) -> Image.Image:
    """An image file, decoded and upright. Raises ValueError with what is wrong."""
    content = None
    try:
        content = Path(path).read_bytes()
        return decode(content)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise ValueError(problem(error, content)) from None
