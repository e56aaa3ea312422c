"""Rows that name image files: .jsonl files of pairs, and the metadata of a folder."""

import base64
import io
import json
from itertools import islice

import pytest
from PIL import Image

from mindtune.data.columns import Source
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import load_pairs

from .image_files import png
from .pair_files import (
    CONDITIONS,
    IMAGES,
    WANTED,
    as_folder,
    as_parquet,
    contents,
    notes_on_pairs,
    refusal,
    write_files,
    write_lines,
)

# ---- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
@pytest.mark.parametrize("flag", ["jsonl_for_train", "train_data_dir"])
def test_all_bad_lines_are_listed_by_their_numbers(tmp_path, open_pairs, flag):
    good = '{"image": "a.png", "conditioning_image": "a.png", "text": "t"}'
    bad = [
        "{broken",
        "[1]",
        '{"image": "a.png", "text": "t"}',
        '{"image": 3, "conditioning_image": "a.png", "text": ["t"]}',
        "{}",
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join([good, *bad, good]))
    found = refusal(
        open_pairs, **{flag: str(tmp_path / "metadata.jsonl") if flag == "jsonl_for_train" else str(tmp_path)}
    )
    assert f"--{flag}" in found and "5 lines of metadata.jsonl cannot be used" in found
    assert "line 2: not JSON (Expecting property name enclosed in double quotes at character 2)" in found
    assert "line 3: not a JSON object" in found
    assert "line 4: lacks conditioning_image; has image, text" in found
    assert "line 5: image is 3, not text; text is ['t'], not text" in found
    assert "line 6: lacks image, conditioning_image, text; has no keys" in found


def test_a_jsonl_file_that_lacks_a_column_from_the_first_line_on(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a.png", "text": "t"}])
    assert "--conditioning_image_column: " in refusal(jsonl_for_train=str(path))
    found = refusal(jsonl_for_train=str(path), caption_column="txt")
    assert f"--caption_column txt: --jsonl_for_train {path} has the columns image, text" in found


def test_all_missing_files_are_listed_at_once(tmp_path):
    (tmp_path / "there.png").write_bytes(png())
    rows = [{"image": f"{n}.png", "conditioning_image": "there.png", "text": ""} for n in range(30)]
    found = refusal(jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))
    assert (
        "30 files named in a.jsonl are missing" in found
        and f"{tmp_path}/29.png (line 30)" in found
        and "there.png" not in found
    )


def test_a_jsonl_file_without_lines_or_in_another_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "a.jsonl has no lines" in refusal(jsonl_for_train=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    assert "b.jsonl is not UTF-8" in refusal(jsonl_for_train=str(tmp_path / "b.jsonl"))


def test_jsonl_keys_may_be_named_and_a_byte_order_mark_is_skipped(tmp_path):
    write_files(tmp_path)
    row = {"photo": "images/0.png", "edges_file_name": "conditions/0.png", "words": "one\u2028two", "image": 5}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig", newline="")
    columns = {"image_column": "photo", "conditioning_image_column": "edges_file_name", "caption_column": "words"}
    pairs = load_pairs(Source(jsonl_for_train=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), **columns))
    assert contents(pairs) == [(IMAGES[0], CONDITIONS[0], "one\u2028two")]


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_ambiguous_lines_of_csv_are_listed(tmp_path, open_pairs):
    write_files(tmp_path)
    lines = [
        "file_name,conditioning_image_file_name,text",
        "images/0.png,conditions/0.png,a cat, gray",
        "images/1.png,conditions/1.png",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    found = refusal(open_pairs, train_data_dir=str(tmp_path))
    assert (
        "2 lines of metadata.csv cannot be used" in found
        and "line 2: has 4 fields, the first line 3" in found
        and "line 3: has 2" in found
    )


def test_tab_separated_values(tmp_path):
    write_files(tmp_path)
    (tmp_path / "a.tsv").write_text("Image\tconditioning_image\tText\nimages/0.png\tconditions/0.png\ta, b\n")
    pairs = load_pairs(Source(jsonl_for_train=str(tmp_path / "a.tsv"), cache_dir=str(tmp_path / "cache")))
    assert contents(pairs) == [(IMAGES[0], CONDITIONS[0], "a, b")]


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_long_cells_are_shortened_in_messages(tmp_path, open_pairs):
    rows = [{"image": "x." * 50_000, "conditioning_image": "y." * 50_000, "text": ""}]
    assert len(refusal(open_pairs, jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))) < 2000
    rows = [{"image": ["x" * 100_000], "conditioning_image": "y", "text": ""}]
    assert len(refusal(open_pairs, jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))) < 2000


def test_other_files_than_jsonl_are_refused_with_a_remedy(tmp_path):
    as_parquet(tmp_path)
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    for name in ("train.parquet", "a.png"):
        found = refusal(jsonl_for_train=str(tmp_path / name))
        assert (
            f"{name}: not a text file. Give a .jsonl file with a line for every pair; give a directory of" in found
            and len(found) < 400
        )
    assert "is a directory. Give it as --train_data_dir" in refusal(jsonl_for_train=str(tmp_path))


# ---- paths, URLs and base64 ----------------------------------------------------------------------


def one_pair(folder, image, condition="b.png", name="a.jsonl", **options):
    """The first pair of a .jsonl file of one line."""
    path = write_lines(folder / name, [{"image": image, "conditioning_image": condition, "text": ""}])
    return load_pairs(Source(jsonl_for_train=str(path), cache_dir=str(folder / "cache"), **options))[0]


def test_relative_paths_are_tried_from_the_working_directory_too(tmp_path, monkeypatch):
    """The directory of the file comes first. The metadata of a folder may not name files outside it."""
    for place in ("lists", "pr"):
        (tmp_path / place).mkdir()
    (tmp_path / "pr/a.png").write_bytes(IMAGES[0])
    (tmp_path / "b.png").write_bytes(IMAGES[1])
    (tmp_path / "lists/b.png").write_bytes(IMAGES[2])
    monkeypatch.chdir(tmp_path)
    pair = one_pair(tmp_path / "lists", "pr/a.png")
    assert (pair.image.read(), pair.condition.read()) == (IMAGES[0], IMAGES[2])
    assert pair.image.name == str(tmp_path / "pr/a.png")
    write_lines(tmp_path / "lists/metadata.jsonl", [{"image": "pr/a.png", "conditioning_image": "b.png", "text": ""}])
    assert "lists/pr/a.png (line 1)" in refusal(train_data_dir=str(tmp_path / "lists"))


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_absolute_paths_in_a_folders_own_metadata(tmp_path, open_pairs):
    (tmp_path / "d").mkdir()
    for place in ("d/a.png", "out.png"):
        (tmp_path / place).write_bytes(IMAGES[0])
    (tmp_path / "link").symlink_to(tmp_path / "d")
    lines = [{"image": str(tmp_path / d / "a.png"), "conditioning_image": "a.png", "text": ""} for d in ("d", "link")]
    write_lines(tmp_path / "d/metadata.jsonl", lines)
    pairs = open_pairs(Source(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")))
    assert [pair.image.read() for pair in islice(pairs, 2)] == [IMAGES[0]] * 2
    write_lines(tmp_path / "d/metadata.jsonl", [{**lines[0], "image": str(tmp_path / "out.png")}])
    assert "out.png is outside the directory" in refusal(open_pairs, train_data_dir=str(tmp_path / "d"))


def test_file_urls_and_urls_in_upper_case(tmp_path):
    (tmp_path / "a b#1.png").write_bytes(IMAGES[0])
    (tmp_path / "b.png").write_bytes(IMAGES[1])
    pair = one_pair(tmp_path, f"file://{tmp_path}/a%20b#1.png", f"FILE:{tmp_path}/b.png")
    assert (pair.image.read(), pair.condition.read()) == (IMAGES[0], IMAGES[1])
    assert one_pair(tmp_path, "HTTPS://Host/A.png").image.name == "https://Host/A.png"


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}"])
def test_base64_of_a_single_colour_image_is_short_but_read(tmp_path, form):
    file = io.BytesIO()
    Image.new("L", (80, 80)).save(file, "png")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) < 200
    pair = one_pair(tmp_path, form.format(text), form.format(text))
    assert pair.image.read() == pair.condition.read() == file.getvalue()


def test_damaged_base64_is_not_called_a_missing_file(tmp_path):
    text = base64.b64encode(png(64, 64)).decode()
    rows = [
        {"image": cell, "conditioning_image": text, "text": ""}
        for cell in (text[:201], text[:300] + "%" + text[300:], "data:image/png;base64,%" + text)
    ]
    found = refusal(jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))
    assert found.count("is base64 that is damaged or truncated") == 3 and "missing" not in found and len(found) < 1200


# ---- the cache -----------------------------------------------------------------------------------


def test_an_edited_jsonl_file_is_read_again(tmp_path):
    write_files(tmp_path)
    row = {"image": "images/0.png", "conditioning_image": "conditions/0.png"}
    for text in ("before", "after!"):
        path = write_lines(tmp_path / "a.jsonl", [{**row, "text": text}])
        assert load_pairs(Source(jsonl_for_train=str(path), cache_dir=str(tmp_path / "cache")))[0].caption == text


def test_a_renamed_file_is_found(tmp_path):
    """The rows in the cache hold paths, so they are written again when the paths change."""
    as_folder(tmp_path / "d")
    arguments = {"train_data_dir": str(tmp_path / "d"), "cache_dir": str(tmp_path / "cache")}
    assert contents(load_pairs(Source(**arguments))) == WANTED
    (tmp_path / "d/images/0.png").rename(tmp_path / "d/images/0.PNG")
    assert contents(load_pairs(Source(**arguments))) == WANTED


# ---- files that are not used ---------------------------------------------------------------------


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_unused_files_of_a_folder_are_reported_once(tmp_path, open_pairs):
    folder = tmp_path / "pairs"
    as_folder(folder)
    arguments = {"train_data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "images/._0.png").write_bytes(b"x")
    assert notes_on_pairs(open_pairs, **arguments) == []
    (folder / "images/more.png").write_bytes(IMAGES[0])
    (folder / "clip.mp4").write_bytes(b"x")
    (folder / "metadata.csv").write_text("file_name,text\n")
    line = (folder / "metadata.jsonl").read_text().splitlines()[3]
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(line + "\n")
    assert notes_on_pairs(open_pairs, **arguments) == [
        "1 lines of metadata.jsonl repeat an earlier line; each is a sample of its own",
        "2 files next to metadata.jsonl are not used: clip.mp4, metadata.csv",
        "1 images are not used, because metadata.jsonl does not name them: images/more.png",
    ]


def test_files_that_metadata_name_are_not_reported_as_unused(tmp_path):
    """Whatever their suffix. Hidden images, and those in linked folders, are reported if nothing names them."""
    for name in ("d", "far"):
        (tmp_path / name).mkdir()
    for name in ("d/a.JPG_large", "d/a.mp4", "d/.z.png", "far/m.png", "d/notes.bin"):
        (tmp_path / name).write_bytes(IMAGES[0])
    (tmp_path / "d/more").symlink_to(tmp_path / "far")
    write_lines(tmp_path / "d/metadata.jsonl", [{"image": "a.JPG_large", "conditioning_image": "a.mp4", "text": ""}])
    assert notes_on_pairs(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")) == [
        "1 files next to metadata.jsonl are not used: notes.bin",
        "2 images are not used, because metadata.jsonl does not name them: .z.png, more/m.png",
    ]


# ---- lines without a condition -------------------------------------------------------------------


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
@pytest.mark.parametrize("column", [None, "source_file_name"])
def test_the_first_line_may_lack_the_condition(tmp_path, open_pairs, column):
    """The keys of all lines count."""
    write_files(tmp_path)
    key = column or "conditioning_image_file_name"
    rows = [{"file_name": f"images/{n}.png", "text": str(n)} for n in range(3)]
    rows[1][key] = "conditions/1.png"
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    source = Source(jsonl_for_train=str(path), conditioning_image_column=column, condition_optional=True)
    found = sorted(contents(islice(open_pairs(source), 3)), key=lambda pair: pair[2])
    assert found == [(IMAGES[0], None, "0"), (IMAGES[1], CONDITIONS[1], "1"), (IMAGES[2], None, "2")]


def test_an_optional_condition_that_a_line_names_must_be_there(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    rows = [{"image": "a.png", "text": "x"}, {"image": "a.png", "conditioning_image": "b.png", "text": "x"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = refusal(jsonl_for_train=str(path), condition_optional=True)
    assert "1 files named in a.jsonl are missing" in found and "b.png (line 2)" in found
    path = write_lines(tmp_path / "a.jsonl", [rows[0], {**rows[1], "conditioning_image": 3}, {"text": "x"}])
    found = refusal(jsonl_for_train=str(path), condition_optional=True)
    assert "line 2: conditioning_image is 3, not text" in found and "line 3: lacks image; has text" in found
    assert "--conditioning_image_column source: " in refusal(
        jsonl_for_train=str(path), condition_optional=True, conditioning_image_column="source"
    )


def test_a_file_without_any_condition_is_named_with_all_of_its_keys(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    rows = [{"image": "a.png", "text": "x"}, {"image": "a.png", "text": "y", "source": "a.png"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    (line,) = notes_on_pairs(jsonl_for_train=str(path), condition_optional=True)
    assert line.startswith("has the columns image, text, source; none is known to hold conditions, so no pair has one")


def test_text_in_another_encoding_after_the_first_line_is_one_error(tmp_path):
    """Also where the keys of all lines are read before."""
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    line = b'{"image": "a.png", "text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 2 + line.replace(b"x", b"caf\xe9") + line)
    found = refusal(jsonl_for_train=str(tmp_path / "a.jsonl"), condition_optional=True)
    assert "a.jsonl is not UTF-8" in found
