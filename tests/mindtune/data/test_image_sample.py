"""Images and captions: read, checked, and turned into the right pixels."""

import base64
import hashlib
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.checks import inspect, preflight
from mindtune.data.crops import INTERPOLATIONS, crop_box, pixel_values, resize_shorter_side
from mindtune.data.folders import samples_in_folder
from mindtune.data.image_sample import Sample, read_cell
from mindtune.data.images import UnusableImage
from mindtune.data.order import prefetch

WHITE = (255, 255, 255)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- samples -------------------------------------------------------------------------------------


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
def test_a_sample_may_be_bytes_or_a_path_or_a_row(folder, source):
    content = (folder / "c.png").read_bytes()
    rows = [{"picture": None}, {"picture": str(folder / "c.png")}]
    sample = Sample("c", {"bytes": content, "path": folder / "c.png", "row": (rows, 1, "picture")}[source])
    assert sample.read() == content and sample.open().size == (20, 16) and "c.png" not in repr(sample)


def test_every_kind_of_cell_is_read(folder):
    """Bytes win over a path beside them, which the library keeps for its name only. A URL is what streaming from the hub gives."""
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


def png(seed=0):
    file = io.BytesIO()
    noise(20, 16, seed).save(file, "PNG")
    return file.getvalue()


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


def test_16_bit_images_with_8_bit_values_are_named(tmp_path, capsys):
    """What programs write that forget to scale: black to the eye and to the model."""
    for name, most in (("dark", 255), ("scaled", 65535), ("black", 0)):
        Image.fromarray(np.linspace(0, most, 400).astype(np.uint16).reshape(20, 20)).save(tmp_path / f"{name}.png")
    samples = [Sample(name, tmp_path / f"{name}.png") for name in ("dark", "scaled", "black")]
    assert preflight(samples, 16, "--flag", skip_bad=False) == samples
    said = "--flag: 1 images are 16-bit without a value above 255 of 65535, so nearly black; save them as 8-bit PNG: dark\n"
    assert capsys.readouterr().out == said


def test_a_file_with_a_name_as_in_base64_is_a_file(tmp_path):
    """A hash without ending, in a folder of hashes, is how many data sets name images."""
    names = [tmp_path / ("ab01" * 16) / ("cd23" * 16), tmp_path / "iVBORw0KGgo" / ("ef45" * 16)]
    for path in names:
        path.parent.mkdir()
        path.write_bytes(png())
        assert read_cell(str(path)) == read_cell(str(path.relative_to(tmp_path)), str(tmp_path)) == png()
    with pytest.raises(FileNotFoundError):
        read_cell("ab01" * 16)


def test_paths_are_read_from_the_data_set_first(tmp_path, monkeypatch):
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/a.png").write_bytes(png(1))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/b.png").write_bytes(png(2))
    monkeypatch.chdir(tmp_path / "here")
    root = str(tmp_path / "set")
    assert (
        read_cell("images/a.png", root)
        == read_cell("images\\a.png", root)
        == read_cell({"bytes": None, "path": "./images/a.png"}, root)
        == png(1)
    )
    assert read_cell("b.png", root) == png(2)
    with pytest.raises(FileNotFoundError):
        read_cell("images/a.png")


def test_text_that_is_no_image_is_cut_in_messages():
    for cell in ("not base64! " * 5000, "x" * 4000, "data:image/svg+xml," + "<svg/>" * 5000):
        message = inspect(Sample("a", ([{"image": cell}], 0, "image"))).problem
        assert isinstance(message, str) and len(message) < 500 and "damaged" not in message


@pytest.mark.parametrize("cell", [None, "", {"bytes": None, "path": None}])
def test_a_cell_without_picture(cell):
    with pytest.raises(FileNotFoundError, match="the cell of the data set is empty"):
        read_cell(cell)


# ---- preflight -----------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Two good pictures and four that cannot be used."""
    noise(40, 32).save(tmp_path / "good.png")
    noise(32, 90).save(tmp_path / "good2.jpg")
    noise(40, 31).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    noise(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    (tmp_path / "whole.jpg").unlink()
    return tmp_path


PROBLEMS = [
    "small.png: 40x31 is smaller than --resolution 32",
    "torn.jpg: damaged",
    "text.png: not an image",
    "empty.png: not an image",
]


def check(folder, **options):
    samples = samples_in_folder(str(folder), "--instance_data_dir")
    return preflight(samples, 32, "--instance_data_dir", **{"skip_bad": False, **options})


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_preflight_lists_all_problems_at_once(mixed, threads):
    with pytest.raises(UserError) as error:
        check(mixed, threads=threads)
    assert "4 of 6 files cannot be used" in str(error.value) and "--skip_bad_images" in str(error.value)
    assert all(problem in str(error.value) for problem in PROBLEMS)
    assert "good" not in str(error.value)


def test_preflight_goes_on_without_bad_pictures_if_asked(mixed, capsys):
    assert [sample.name for sample in check(mixed, skip_bad=True)] == ["good.png", "good2.jpg"]
    printed = capsys.readouterr().out
    assert "continuing without 4 of 6" in printed and all(problem in printed for problem in PROBLEMS)


def test_preflight_needs_one_usable_picture(mixed):
    for name in ("good.png", "good2.jpg"):
        (mixed / name).unlink()
    with pytest.raises(UserError, match="no usable image is left"):
        check(mixed, skip_bad=True)


def test_preflight_changes_nothing_on_disk(mixed):
    before = {path.name: path.read_bytes() for path in mixed.iterdir()}
    check(mixed, skip_bad=True)
    assert {path.name: path.read_bytes() for path in mixed.iterdir()} == before


def test_preflight_measures_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 31).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(UserError, match=r"a.jpg: 31x40 is smaller"):
        check(tmp_path)


def test_preflight_names_every_bad_file(tmp_path):
    samples = []
    for number in range(25):
        (tmp_path / f"{number:02d}.png").write_bytes(b"no")
        samples.append(Sample(f"{number:02d}.png", tmp_path / f"{number:02d}.png"))
    with pytest.raises(UserError, match=r"(?s)25 of 25.*00.png.*24.png"):
        preflight(samples, 32, "--instance_data_dir", False)


def test_preflight_names_what_is_missing(tmp_path):
    samples = [Sample("a", tmp_path / "a.png"), Sample("b", ([{"image": None}], 0, "image"))]
    with pytest.raises(UserError, match=r"(?s)a: missing \(.*/a.png\).*b: missing \(the cell of the data set is empty\)"):
        preflight(samples, 32, "--dataset_name", False)


def test_preflight_says_what_it_uses_of_animations(tmp_path, capsys):
    noise(40, 40).save(tmp_path / "a.gif", save_all=True, append_images=[noise(40, 40, 1)])
    noise(40, 40).save(tmp_path / "still.gif")
    assert len(check(tmp_path)) == 2
    assert "1 images have several frames or pages, of which the first is used: a.gif\n" in capsys.readouterr().out


def test_the_digest_tells_what_an_image_is_laid_on():
    assert (
        Sample("a", png()).digest == hashlib.sha256(png()).hexdigest() != Sample("a", png(), background="black").digest
    )


# ---- pixels --------------------------------------------------------------------------------------


def test_the_shorter_side_becomes_the_resolution_and_the_shape_is_kept():
    for width in (*range(16, 40), 333, 1000):
        for height in (16, 17, 31, 64, 999):
            found = resize_shorter_side(Image.new("L", (width, height)), 24, "nearest").size
            assert min(found) == 24
            assert max(found) == pytest.approx(24 * max(width, height) / min(width, height), abs=0.5), (width, height)


def test_a_picture_of_the_right_size_is_left_alone():
    image = noise(24, 30)
    assert resize_shorter_side(image, 24, "lanczos") is image


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_interpolation_keeps_a_flat_picture_flat(name):
    shown = np.asarray(resize_shorter_side(Image.new("RGB", (50, 37), (10, 200, 30)), 16, name))
    assert shown.shape == (16, 22, 3) and (shown == (10, 200, 30)).all()


@pytest.mark.parametrize(
    "size, left, top",
    [((8, 8), 0, 0), ((12, 8), 2, 0), ((8, 14), 0, 3), ((11, 8), 2, 0), ((8, 9), 0, 0), ((13, 8), 2, 0)],
)
def test_the_central_crop_as_torchvision_rounds_it(size, left, top):
    """Odd rooms of 3, 1 and 5 pixels: halves go to the even number."""
    assert crop_box(size, 8, None) == (left, top, left + 8, top + 8)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 6, 7, 1000])
def test_a_random_crop_stays_inside_and_reaches_both_ends(room):
    almost_one = float(np.nextafter(1.0, 0.0))
    assert crop_box((8 + room, 8), 8, (0.0, 0.0)) == (0, 0, 8, 8)
    assert crop_box((8 + room, 8), 8, (almost_one, almost_one)) == (room, 0, room + 8, 8)
    assert crop_box((8, 8 + room), 8, (almost_one, almost_one)) == (0, room, 8, room + 8)


def test_every_place_of_a_random_crop_is_equally_likely():
    lefts = [crop_box((11, 8), 8, (u, 0.0))[0] for u in (np.arange(400) + 0.5) / 400]
    assert np.bincount(lefts).tolist() == [100, 100, 100, 100]


@pytest.mark.parametrize("width, height", [(11, 8), (8, 13), (8, 8)])
@pytest.mark.parametrize("u", [None, (0.0, 0.0), (0.6, 0.4), (0.999, 0.999)])
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_the_crop_from_minus_one_to_one(width, height, u, flip):
    """By loops over the picture's own pixels: no resizing is due at this size."""
    image = noise(width, height)
    found = pixel_values(image, 8, "lanczos", u, flip)
    left, top, _, _ = crop_box(image.size, 8, u)
    assert found.dtype == np.float32 and found.shape == (3, 8, 8)
    for channel, y, x in np.ndindex(3, 8, 8):
        value = image.getpixel((left + (7 - x if flip else x), top + y))[channel]
        assert found[channel, y, x] == pytest.approx(value / 127.5 - 1.0, abs=1e-6)


def test_black_is_minus_one_and_white_is_one():
    image = Image.new("RGB", (8, 8))
    image.paste(WHITE, (0, 0, 4, 8))
    assert pixel_values(image, 8, "lanczos")[:, :, [0, 7]].reshape(-1, 2).tolist() == [[1.0, -1.0]] * 24


def test_pixels_of_a_larger_picture_are_resized_before_the_crop():
    """Four times the size in flat 4x4 tiles, with the box filter: exactly the tiles come back."""
    small = noise(11, 8)
    large = small.resize((44, 32), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(pixel_values(large, 8, "box"), pixel_values(small, 8, "box"))


@pytest.mark.parametrize("height, width", [(24, 24), (16, 40), (40, 16), (17, 31), (31, 30)])
def test_a_picture_just_covers_height_and_width(height, width):
    """One side fits to the pixel, the other has at least enough, and the shape is kept."""
    for size in ((16, 16), (17, 40), (333, 100), (31, 32), (24, 999), (width, height), (width * 3, height * 3)):
        found = resize_shorter_side(Image.new("L", size), (height, width), "nearest").size
        scale = max(width / size[0], height / size[1])
        assert found[0] >= width and found[1] >= height and (found[0] == width or found[1] == height)
        assert found == pytest.approx((size[0] * scale, size[1] * scale), abs=0.5)


def test_one_number_is_a_square():
    image = noise(37, 29)
    for u, flip in ((None, False), ((0.7, 0.2), True)):
        np.testing.assert_array_equal(
            pixel_values(image, 16, "lanczos", u, flip), pixel_values(image, (16, 16), "lanczos", u, flip)
        )


@pytest.mark.parametrize("u", [None, (0.0, 0.0), (0.6, 0.4), (0.999, 0.999)])
@pytest.mark.parametrize("size", [(12, 8), (17, 8), (12, 13)])
def test_the_crop_has_height_and_width(size, u):
    """8 high and 12 wide; central, or at the given share of the room, whose last place is reached."""
    left, top, right, bottom = crop_box(size, (8, 12), u)
    assert (right - left, bottom - top) == (12, 8)
    room = (size[0] - 12, size[1] - 8)
    assert (left, top) == (
        tuple(round(r / 2) for r in room) if u is None else tuple(int(v * (r + 1)) for v, r in zip(u, room))
    )


def test_pixels_of_a_crop_that_is_not_square():
    """No resizing is due at this size: the picture's own pixels, by loops."""
    image = noise(15, 8)
    found = pixel_values(image, (8, 12), "lanczos", (0.99, 0.5), flip=True)
    assert found.dtype == np.float32 and found.shape == (3, 8, 12)
    for channel, y, x in np.ndindex(3, 8, 12):
        assert found[channel, y, x] == pytest.approx(image.getpixel((3 + 11 - x, y))[channel] / 127.5 - 1.0, abs=1e-6)


# ---- reading ahead -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_keeps_the_order(workers):
    """Though the first ones take longest."""

    def slow(position):
        time.sleep(0.02 if position < 8 and position % 3 == 0 else 0)
        return position * position

    assert list(prefetch(slow, range(5, 25), workers)) == [p * p for p in range(5, 25)]


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_of_nothing(workers):
    assert list(prefetch(lambda p: p, range(0), workers)) == []


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_raises_what_making_raised_in_its_place(workers):
    def make(position):
        if position == 4:
            raise OSError("file 4 has gone")
        return position

    ahead, seen = prefetch(make, range(10), workers), []
    with pytest.raises(OSError, match="file 4"):
        for value in ahead:
            seen.append(value)
    assert seen == [0, 1, 2, 3]


def test_prefetch_works_in_threads_and_not_far_ahead():
    made, threads = [], set()

    def make(position):
        threads.add(threading.get_ident())
        made.append(position)
        return position

    ahead = prefetch(make, range(1000), 3)
    assert [next(ahead) for _ in range(4)] == [0, 1, 2, 3]
    time.sleep(0.05)
    assert len(made) <= 4 + 3 + 2 and threading.get_ident() not in threads
    ahead.close()


def test_prefetch_can_be_left_in_the_middle():
    """As a run does that is stopped: no thread goes on reading."""
    made = []
    ahead = prefetch(lambda p: made.append(p), range(1000), 3)
    next(ahead)
    ahead.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count < 10


def test_text_too_long_for_a_file_name_is_no_missing_file():
    """Such as base64 that is cut off; the system's own error says "File name too long"."""
    with pytest.raises(UnusableImage, match="a text of 301 characters that is no path, URL or base64"):
        read_cell("A" * 300 + "%")
