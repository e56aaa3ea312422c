"""The rows of metadata.jsonl and metadata.csv, in the dialects that people write."""

import json

import pytest

from mindtune.cli import UserError

from .folder_files import BARE, captions, found, write_rows

CSV = {
    "plain": "file_name,text\na.png,one\nb.jpg,two\n",
    "semicolons, as Excel in Europe": "file_name;text\r\na.png;one\r\nb.jpg;two\r\n",
    "tabs": "file_name\ttext\na.png\tone\nb.jpg\ttwo\n",
    "quoted": '"file_name","text"\n"a.png","one"\n"b.jpg", "two"\n',
    "more columns": "id,text,file_name\n1,one,a.png\n2,two,./b.jpg\n",
    "blank lines": "file_name,text\n\na.png,one\n\nb.jpg,two",
    "other names": "filename,caption\na.png,one\nb.jpg,two\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", CSV.values(), ids=CSV)
def test_dialects_of_csv(image_folder, text, encoding):
    (image_folder / "metadata.csv").write_text(text, encoding=encoding, newline="")
    assert found(image_folder) == ({"a.png": "one", "b.jpg": "two"}, [])


def test_captions_in_csv_may_hold_commas_quotes_and_lines(image_folder):
    (image_folder / "metadata.csv").write_text('file_name,text\na.png,"a ""big"" cat, gray\nand white"\nb.jpg,\n')
    assert found(image_folder)[0] == {"a.png": 'a "big" cat, gray\nand white', "b.jpg": None}


@pytest.mark.parametrize(
    "text, message",
    [
        ("file_name,text\na.png,a cat, gray\nb.jpg,x\n", r"line 2: has 3 fields, the first line 2 .*double quotes"),
        ("file_name,text\na.png,x\nb.jpg\n", r"line 3: has 1 fields, the first line 2"),
        ('file_name,text\na.png,x\nb.jpg,"no end\n', r"line 3: not CSV"),
        ("a.png,x\nb.jpg,y\n", r"its first line must name the columns, like file_name,text; it is 'a.png,x'"),
        ("", r"its first line must name"),
        ("file_name,words\na.png,x\n", r"line 2: lacks text; has file_name, words"),
    ],
)
def test_ambiguous_csv_is_refused_by_its_lines(image_folder, text, message):
    (image_folder / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=f"(?s)metadata.csv: .*{message}"):
        found(image_folder)


def test_a_list_in_json_is_refused(image_folder):
    (image_folder / "metadata.jsonl").write_text('[\n  {"file_name": "a.png",\n   "text": "x"}\n]')
    with pytest.raises(UserError, match=r"metadata.jsonl: is one JSON list; write one object per line .jq"):
        found(image_folder)


def test_jsonl_is_preferred_to_csv_with_a_note(image_folder):
    write_rows(image_folder, ("a.png", "jsonl"), ("b.jpg", "jsonl"))
    (image_folder / "metadata.csv").write_text("file_name,text\na.png,csv\n")
    names, said = found(image_folder)
    assert set(names.values()) == {"jsonl"}
    assert said == [
        f"--instance_data_dir {image_folder}: 1 files are not used: metadata.csv; captions are read from metadata.jsonl"
    ]


def test_metadata_in_utf16_with_a_named_caption_key(image_folder):
    (image_folder / "Metadata.JSONL").write_text('{"image": "a.png", "words": "猫"}\n', encoding="utf-16")
    assert found(image_folder, caption_column="words")[0] == {"a.png": "猫", "b.jpg": None}


@pytest.mark.parametrize("blank", ["", "\n \r\n", "\ufeff\n"])
def test_an_empty_metadata_jsonl_does_not_hide_the_csv(image_folder, blank):
    (image_folder / "metadata.jsonl").write_text(blank)
    (image_folder / "metadata.csv").write_text("file_name,text\na.png,one\nb.jpg,two\n")
    names, said = found(image_folder)
    assert names == {"a.png": "one", "b.jpg": "two"}
    assert said == [
        f"--instance_data_dir {image_folder}: 1 files are not used: metadata.jsonl; captions are read from metadata.csv"
    ]


@pytest.mark.parametrize("name, text", [("metadata.csv", "file_name,text\n"), ("metadata.jsonl", "\n")])
def test_metadata_without_rows_are_reported(image_folder, name, text):
    (image_folder / name).write_text(text)
    assert found(image_folder) == (BARE, [f"--instance_data_dir {image_folder}: {name} has no rows"])


def test_keys_in_upper_or_lower_case(image_folder):
    (image_folder / "metadata.csv").write_text("File_Name,Text\na.png,one\nb.jpg,two\n")
    assert found(image_folder) == ({"a.png": "one", "b.jpg": "two"}, [])


def test_json_over_several_lines_is_refused(image_folder):
    (image_folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}, indent=1) * 300)
    with pytest.raises(
        UserError, match="metadata.jsonl: has objects over several lines; write one object per line .jq"
    ) as error:
        found(image_folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_a_newline_ends_a_json_line(mixed_folder, separator):
    """JSON allows other line separators inside a string."""
    row = json.dumps({"file_name": "a.jpg", "text": f"one{separator}two"}, ensure_ascii=False)
    (mixed_folder / "metadata.jsonl").write_text(
        row + '\r\n{"file_name": "c.png", "text": "three"}\n', encoding="utf-8", newline=""
    )
    assert captions(mixed_folder) == {"B.PNG": None, "a.jpg": f"one{separator}two", "c.png": "three"}


@pytest.mark.parametrize(
    "line",
    ["{broken", "[1]", '"a.jpg"', '{"text": "x"}', '{"file_name": "c.png"}', '{"file_name": "c.png", "text": 3}'],
)
def test_a_bad_json_line_is_reported_by_its_number(mixed_folder, line):
    (mixed_folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "t"}\n' + line)
    with pytest.raises(UserError, match=r"(?s)metadata.jsonl: 1 lines.*line 2: .*--caption_column"):
        captions(mixed_folder)


def test_metadata_that_are_not_utf8_are_refused(mixed_folder):
    (mixed_folder / "metadata.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(UserError, match=r"metadata.jsonl: not UTF-8 after line 0. Save the file as UTF-8 .*GBK"):
        captions(mixed_folder)
