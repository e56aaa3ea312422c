"""Files that are no usable image: what each is, and what to do about it."""

import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mindtune.data import image_problems
from mindtune.data.image_problems import open_image
from mindtune.data.image_sample import Sample
from mindtune.data.inspection import inspect

from .image_files import encode, noise, same, smooth

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


def test_without_pillow_heif_the_message_names_the_package(monkeypatch):
    monkeypatch.setattr(image_problems, "HEIF_AVAILABLE", False)
    for kind in ("HEIF", "HEIC", "MIF1"):
        monkeypatch.delitem(Image.OPEN, kind, raising=False)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind in Image.OPEN])
    message = inspect(Sample("a", HEIC)).problem
    assert "HEIC photo" in message and "pip install pillow-heif" in message and "heif-convert" in message


OTHERS = {
    "HEIC photo": HEIC,
    "AVIF image": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(500),
    "a video: save its frames": b"\0\0\0\x18ftypisom" + bytes(100),
    "a raw photo": b"\0\0\0\x18ftypcrx " + bytes(100),
    "a PDF: export": b"%PDF-1.7\n",
    "an SVG drawing: export": b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "a web page: the download": b"\n<!DOCTYPE html><html><body>404",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "a ZIP archive: unpack": b"PK\x03\x04" + bytes(50),
    "JPEG XL: convert": b"\xff\x0a" + bytes(50),
    "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(50),
    "AppleDouble": b"\0\x05\x16\x07" + bytes(50),
    "the file is empty": b"",
    "contains only zeros": bytes(5000),
}


@pytest.mark.parametrize("text", OTHERS)
def test_other_files_are_identified_with_a_remedy(text):
    message = inspect(Sample("a", OTHERS[text])).problem
    assert text in message and "damaged" not in message


def test_a_file_that_needs_another_program_is_not_called_damaged():
    assert "cannot be decoded here" in inspect(Sample("a", encode(smooth(), "EPS"))).problem


def test_the_preview_in_a_raw_photo_is_not_used(tmp_path):
    smooth(16, 16).save(tmp_path / "a.dng", format="TIFF", tiffinfo={50706: b"\1\4\0\0"})
    assert "raw photo (DNG)" in inspect(Sample("a", tmp_path / "a.dng")).problem


def test_colours_and_ranges_that_cannot_be_converted_are_refused():
    assert "L*a*b*" in inspect(Sample("a", encode(smooth().convert("LAB"), "TIFF"))).problem
    assert inspect(Sample("a", encode(Image.fromarray(np.float32([[0.5, 1]])), "TIFF"))).problem.startswith(
        "pixel mode F is not"
    )


def test_a_scan_of_too_many_pixels_is_refused_with_a_remedy():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0))
    message = inspect(Sample("a", b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))).problem
    assert message.startswith("too many pixels") and "-resize" in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_half_a_file_is_refused(kind):
    content = encode(noise(64, 48), kind)
    assert inspect(Sample("a", content[: len(content) // 2])).problem


def test_a_file_without_read_permission_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert inspect(Sample("a", tmp_path / "a.png")).problem == "cannot be read (EACCES: Permission denied)"
    assert inspect(Sample("a", "x")).problem == "cannot be read (EACCES: Permission denied)"


@pytest.mark.skipif(sys.platform != "linux", reason="errors have other numbers")
def test_a_directory_is_refused(tmp_path):
    assert "EISDIR" in inspect(Sample("a", tmp_path)).problem


def test_the_suffix_of_another_format_does_not_matter(tmp_path):
    smooth().save(tmp_path / "a.png", format="JPEG")
    same(open_image(tmp_path / "a.png"), smooth(), 12)
