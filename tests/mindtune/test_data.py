"""Pictures and captions: found, checked, and turned into the right pixels."""

import hashlib
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import (
    INTERPOLATIONS,
    Sample,
    crop_box,
    encoded,
    pixel_values,
    prefetch,
    preflight,
    resize_shorter_side,
    samples_in_dataset,
    samples_in_folder,
    to_rgb,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reopened(image, path, **options):
    """What a decoder makes of the saved file."""
    image.save(path, **options)
    return Image.open(path)


def close_to(image, place, colour, tolerance=4):
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel(place), colour, atol=tolerance)


# ---- every kind of picture to RGB --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "orientation, size, red",
    [(1, (32, 16), (4, 8)), (3, (32, 16), (28, 8)), (6, (16, 32), (8, 4)), (8, (16, 32), (8, 28)), (2, (32, 16), (28, 8))],
)
def test_a_jpeg_is_turned_upright_by_its_exif(tmp_path, orientation, size, red):
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


def test_a_palette_png_with_a_transparent_colour_lies_on_white(tmp_path):
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


def test_rgba_is_laid_on_white(tmp_path):
    """a c + (1 - a) 255; what a transparent pixel hides does not show."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(100, 0, 200, 255), (100, 0, 200, 0), (100, 0, 200, 51)])
    shown = to_rgb(reopened(image, tmp_path / "a.png"))
    for x, colour in enumerate([(100, 0, 200), WHITE, (224, 204, 244)]):
        close_to(shown, (x, 0), colour, tolerance=1)


def test_gray_with_alpha_is_laid_on_white(tmp_path):
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
def test_pixels_of_an_unknown_scale_are_refused(values):
    with pytest.raises(ValueError, match="not an 8- or 16-bit picture"):
        to_rgb(Image.fromarray(values))


# ---- finding samples ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three pictures, files that are none, a hidden file and a subdirectory."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for number, name in enumerate(["c.png", "a.jpg", "B.PNG"]):
        noise(20, 16, number).save(folder / name)
    for name in (".hidden.png", "notes.md", "list.csv"):
        (folder / name).write_text("x")
    return folder


def captions(folder, **options):
    return {sample.name: sample.caption for sample in samples_in_folder(str(folder), "--instance_data_dir", **options)}


def test_pictures_come_in_name_order_without_other_files(folder):
    assert list(captions(folder).items()) == [("B.PNG", None), ("a.jpg", None), ("c.png", None)]


def test_a_missing_and_an_empty_directory(tmp_path, folder):
    with pytest.raises(UserError, match=r"--instance_data_dir .*no such directory"):
        captions(folder / "absent")
    with pytest.raises(UserError, match=r"no image.*Put 5 to 20 images there"):
        captions(folder / "inner")
    with pytest.raises(UserError, match=r"no image.*subdirectories .pictures."):
        captions(tmp_path)


def test_captions_of_text_files_also_with_a_byte_order_mark(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "un café\r\n".encode())
    (folder / "c.txt").write_text("  a cat\n")
    assert captions(folder) == {"B.PNG": None, "a.jpg": "un café", "c.png": "a cat"}


def test_captions_of_metadata_win_over_text_files(folder):
    rows = [{"file_name": "a.jpg", "text": "from metadata"}, {"file_name": "B.PNG", "text": ""}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    (folder / "a.txt").write_text("from text")
    (folder / "c.txt").write_text("from text")
    assert captions(folder) == {"B.PNG": None, "a.jpg": "from metadata", "c.png": "from text"}


def test_metadata_of_absent_files_is_listed(folder):
    """A picture in a subdirectory would otherwise lose its caption in silence."""
    rows = [{"file_name": "inner/a.jpg", "text": "x"}, {"file_name": "absent.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"(?s)metadata.jsonl: names files.*absent.png.*inner/a.jpg"):
        captions(folder)


def test_the_caption_column_is_named(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "prompt": "p", "text": "t"}')
    assert captions(folder, caption_column="prompt")["a.jpg"] == "p"


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_a_newline_ends_a_json_line(folder, separator):
    """JSON allows other line separators inside a string."""
    row = json.dumps({"file_name": "a.jpg", "text": f"one{separator}two"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + '\r\n{"file_name": "c.png", "text": "three"}\n', encoding="utf-8", newline="")
    assert captions(folder) == {"B.PNG": None, "a.jpg": f"one{separator}two", "c.png": "three"}


@pytest.mark.parametrize(
    "line", ["{broken", "[1]", '"a.jpg"', '{"text": "x"}', '{"file_name": "c.png"}', '{"file_name": "c.png", "text": 3}']
)
def test_a_bad_json_line_is_named_by_its_number(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "t"}\n' + line)
    with pytest.raises(UserError, match=r"metadata.jsonl, line 2: expected .*--caption_column"):
        captions(folder)


def test_captions_that_are_not_utf8_are_all_named(folder):
    for name in ("a.txt", "c.txt"):
        (folder / name).write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError) as error:
        captions(folder)
    assert "2 caption files" in str(error.value) and "a.txt: byte 3" in str(error.value) and "c.txt: byte 3" in str(error.value)


def test_metadata_that_is_not_utf8(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(UserError, match=r"metadata.jsonl: byte 13 is not UTF-8"):
        captions(folder)


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
    for cell in (content, str(path), {"bytes": None, "path": str(path)}, {"bytes": content, "path": "absent.png"}, path.as_uri()):
        assert encoded(cell) == content
    assert encoded({"bytes": b"", "path": str(path)}) == b""


@pytest.mark.parametrize("cell", [None, "", {"bytes": None, "path": None}])
def test_a_cell_without_picture(cell):
    with pytest.raises(FileNotFoundError, match="the dataset has none here"):
        encoded(cell)


# ---- a dataset ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagefolder")
    for number in range(3):
        noise(20, 16, number).save(folder / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "text": f"caption {n}", "other": n} for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def read_dataset(folder, cache, image_column=None, caption_column=None):
    return samples_in_dataset(str(folder), None, str(cache), image_column, caption_column)


def test_a_dataset_gives_the_files_bytes_and_captions(imagefolder, tmp_path):
    samples = read_dataset(imagefolder, tmp_path, caption_column="text")
    assert [sample.caption for sample in samples] == ["caption 0", "caption 1", "caption 2"]
    for number, sample in enumerate(samples):
        assert sample.read() == (imagefolder / f"{number}.png").read_bytes()
        np.testing.assert_array_equal(np.asarray(sample.open()), np.asarray(noise(20, 16, number)))


def test_a_dataset_without_caption_column_has_no_captions(imagefolder, tmp_path):
    assert [sample.caption for sample in read_dataset(imagefolder, tmp_path)] == [None] * 3


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"caption_column": "txt"}, "--caption_column txt: .*has the columns image, text, other"),
        ({"image_column": "img"}, "--image_column img: .*has the columns"),
        ({"image_column": "text"}, "--image_column text: not an image column"),
    ],
)
def test_a_wrong_column_is_answered_with_the_right_ones(imagefolder, tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_dataset(imagefolder, tmp_path, **columns)


def test_a_dataset_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--dataset_name .*cannot read it"):
        read_dataset(tmp_path / "empty", tmp_path)


# ---- preflight ---------------------------------------------------------------------------------------------------------------------


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


PROBLEMS = ["small.png: 40x31 is smaller than --resolution 32", "torn.jpg: damaged", "text.png: not an image", "empty.png: not an image"]


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
    assert "going on without 4 of 6" in printed and all(problem in printed for problem in PROBLEMS)


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
    with pytest.raises(UserError, match=r"(?s)a: missing \(.*/a.png\).*b: missing \(the dataset has none here\)"):
        preflight(samples, 32, "--dataset_name", False)


# ---- pixels ------------------------------------------------------------------------------------------------------------------------


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
    "size, left, top", [((8, 8), 0, 0), ((12, 8), 2, 0), ((8, 14), 0, 3), ((11, 8), 2, 0), ((8, 9), 0, 0), ((13, 8), 2, 0)]
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
        np.testing.assert_array_equal(pixel_values(image, 16, "lanczos", u, flip), pixel_values(image, (16, 16), "lanczos", u, flip))


@pytest.mark.parametrize("u", [None, (0.0, 0.0), (0.6, 0.4), (0.999, 0.999)])
@pytest.mark.parametrize("size", [(12, 8), (17, 8), (12, 13)])
def test_the_crop_has_height_and_width(size, u):
    """8 high and 12 wide; central, or at the given share of the room, whose last place is reached."""
    left, top, right, bottom = crop_box(size, (8, 12), u)
    assert (right - left, bottom - top) == (12, 8)
    room = (size[0] - 12, size[1] - 8)
    assert (left, top) == (tuple(round(r / 2) for r in room) if u is None else tuple(int(v * (r + 1)) for v, r in zip(u, room)))


def test_pixels_of_a_crop_that_is_not_square():
    """No resizing is due at this size: the picture's own pixels, by loops."""
    image = noise(15, 8)
    found = pixel_values(image, (8, 12), "lanczos", (0.99, 0.5), flip=True)
    assert found.dtype == np.float32 and found.shape == (3, 8, 12)
    for channel, y, x in np.ndindex(3, 8, 12):
        assert found[channel, y, x] == pytest.approx(image.getpixel((3 + 11 - x, y))[channel] / 127.5 - 1.0, abs=1e-6)


# ---- reading ahead -----------------------------------------------------------------------------------------------------------------


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
