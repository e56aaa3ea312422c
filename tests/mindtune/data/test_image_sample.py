"""Samples: images read from files, bytes, base64, URLs and the cells of data sets."""

import base64
import hashlib
import io

import numpy as np
import pytest

from mindtune.data.folders import samples_in_folder
from mindtune.data.image_sample import Sample, read_cell
from mindtune.data.images import UnusableImage
from mindtune.data.inspection import inspect

from .image_files import noise, png


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["c.png", "a.jpg", "B.PNG"]):
        noise(20, 16, number).save(tmp_path / name)
    return tmp_path


def test_a_sample_reads_its_file(folder):
    sample = samples_in_folder(str(folder), "--instance_data_dir")[2]
    content = (folder / "c.png").read_bytes()
    assert sample.read() == content and sample.digest == hashlib.sha256(content).hexdigest()
    np.testing.assert_array_equal(np.asarray(sample.open()), np.asarray(noise(20, 16, 0)))


@pytest.mark.parametrize("source", ["bytes", "path", "row"])
def test_a_sample_may_be_bytes_a_path_or_a_row(folder, source):
    content = (folder / "c.png").read_bytes()
    rows = [{"column": None}, {"column": str(folder / "c.png")}]
    sample = Sample("c", {"bytes": content, "path": folder / "c.png", "row": (rows, 1, "column")}[source])
    assert sample.read() == content and sample.open().size == (20, 16) and "c.png" not in repr(sample)


def test_the_digest_depends_on_the_background():
    assert (
        Sample("a", png()).digest == hashlib.sha256(png()).hexdigest() != Sample("a", png(), background="black").digest
    )


# ---- cells ---------------------------------------------------------------------------------------


def test_all_kinds_of_cells_are_read(folder):
    """Bytes are used before a path, of which the library keeps only the name. Streaming from the hub gives URLs."""
    path = folder / "c.png"
    content = path.read_bytes()
    for cell in (
        content,
        str(path),
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "absent.png"},
        path.as_uri(),
    ):
        assert read_cell(cell) == content
    assert read_cell({"bytes": b"", "path": str(path)}) == b""


@pytest.mark.parametrize("cell", [None, "", {"bytes": None, "path": None}])
def test_a_cell_without_an_image(cell):
    with pytest.raises(FileNotFoundError, match="the cell of the data set is empty"):
        read_cell(cell)


def test_paths_are_relative_to_the_data_set_first(tmp_path, monkeypatch):
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/a.png").write_bytes(png(seed=1))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/b.png").write_bytes(png(seed=2))
    monkeypatch.chdir(tmp_path / "here")
    root = str(tmp_path / "set")
    assert (
        read_cell("images/a.png", root)
        == read_cell("images\\a.png", root)
        == read_cell({"bytes": None, "path": "./images/a.png"}, root)
        == png(seed=1)
    )
    assert read_cell("b.png", root) == png(seed=2)
    with pytest.raises(FileNotFoundError):
        read_cell("images/a.png")


def test_a_file_whose_name_looks_like_base64_is_read(tmp_path):
    """Many data sets name their images by hashes without a suffix, in folders named by hashes."""
    names = [tmp_path / ("ab01" * 16) / ("cd23" * 16), tmp_path / "iVBORw0KGgo" / ("ef45" * 16)]
    for path in names:
        path.parent.mkdir()
        path.write_bytes(png())
        assert read_cell(str(path)) == read_cell(str(path.relative_to(tmp_path)), str(tmp_path)) == png()
    with pytest.raises(FileNotFoundError):
        read_cell("ab01" * 16)


def test_long_text_is_shortened_in_messages():
    for cell in ("not base64! " * 5000, "x" * 4000, "data:image/svg+xml," + "<svg/>" * 5000):
        message = inspect(Sample("a", ([{"image": cell}], 0, "image"))).problem
        assert isinstance(message, str) and len(message) < 500 and "damaged" not in message


def test_text_too_long_for_a_file_name_is_not_called_a_missing_file():
    """For example truncated base64. The error of the system would be "File name too long"."""
    with pytest.raises(UnusableImage, match="a text of 301 characters that is no path, URL or base64"):
        read_cell("A" * 300 + "%")


# ---- base64 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize(
    "written",
    [
        lambda text: text,
        lambda text: text.encode(),
        lambda text: f"data:image/any;base64,{text}",
        lambda text: text.rstrip("="),
        lambda text: "\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n",
        lambda text: text.translate({ord("+"): "-", ord("/"): "_"}),
    ],
    ids=["text", "bytes", "data URL", "without padding", "in lines", "for URLs"],
)
def test_images_in_base64_are_read(kind, written):
    file = io.BytesIO()
    noise(20, 16).save(file, kind)
    cell = written(base64.b64encode(file.getvalue()).decode())
    assert (
        read_cell(cell)
        == file.getvalue()
        == read_cell({"bytes": None, "path": cell} if isinstance(cell, str) else {"bytes": cell})
    )


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "AVIF", "HEIF", "PNG", "JPEG", "WEBP", "GIF"])
def test_base64_in_a_column_of_bytes_is_read(kind):
    file = io.BytesIO()
    noise(20, 16).save(file, kind)
    assert read_cell(base64.b64encode(file.getvalue())) == file.getvalue() == read_cell(file.getvalue())
