"""Folders as people keep them: every image and caption is used where it is clear, and what is left out is said once."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.folders import holds_no_image, samples_in_folder


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three images, files that are none, a hidden file and an empty subfolder."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for number, name in enumerate(["c.png", "a.jpg", "B.PNG"]):
        noise(20, 16, number).save(folder / name)
    for name in (".hidden.png", "notes.md", "list.csv"):
        (folder / name).write_text("x")
    return folder


def captions(folder, **options):
    return {sample.name: sample.caption for sample in samples_in_folder(str(folder), "--instance_data_dir", **options)}


def test_images_come_in_name_order_without_other_files(folder):
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
    rows = [{"file_name": "inner/a.jpg", "text": "x"}, {"file_name": "absent.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"(?s)metadata.jsonl: names files.*inner/a.jpg .line 1.*absent.png .line 2"):
        captions(folder)


def test_the_caption_column_is_named(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "prompt": "p", "text": "t"}')
    assert captions(folder, caption_column="prompt")["a.jpg"] == "p"


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_a_newline_ends_a_json_line(folder, separator):
    """JSON allows other line separators inside a string."""
    row = json.dumps({"file_name": "a.jpg", "text": f"one{separator}two"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(
        row + '\r\n{"file_name": "c.png", "text": "three"}\n', encoding="utf-8", newline=""
    )
    assert captions(folder) == {"B.PNG": None, "a.jpg": f"one{separator}two", "c.png": "three"}


@pytest.mark.parametrize(
    "line",
    ["{broken", "[1]", '"a.jpg"', '{"text": "x"}', '{"file_name": "c.png"}', '{"file_name": "c.png", "text": 3}'],
)
def test_a_bad_json_line_is_named_by_its_number(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "t"}\n' + line)
    with pytest.raises(UserError, match=r"(?s)metadata.jsonl: 1 lines.*line 2: .*--caption_column"):
        captions(folder)


def test_captions_that_are_not_utf8_are_all_named(folder):
    for name in ("a.txt", "c.txt"):
        (folder / name).write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError) as error:
        captions(folder)
    assert (
        "2 caption files" in str(error.value)
        and "a.txt: byte 3" in str(error.value)
        and "c.txt: byte 3" in str(error.value)
    )


def test_metadata_that_is_not_utf8(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(UserError, match=r"metadata.jsonl: not UTF-8 after line 0. Save the file as UTF-8 .*GBK"):
        captions(folder)


# ---- what is left out ----------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Two images without anything else."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        noise(20, 16).save(folder / name)
    return folder


def found(folder, **options):
    """({name: caption}, the lines that are said)."""
    said = []
    samples = samples_in_folder(str(folder), "--instance_data_dir", say=said.append, **options)
    return {sample.name: sample.caption for sample in samples}, said


BARE = {"a.png": None, "b.jpg": None}


def test_a_plain_folder_is_read_in_silence(photos):
    assert found(photos) == (BARE, [])


@pytest.mark.parametrize(
    "name",
    [
        "Thumbs.db",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        ".DS_Store",
        "._a.png",
        "Icon\r",
        "Picasa.ini",
        "~$notes.docx",
        ".gitattributes",
    ],
)
def test_what_systems_leave_is_passed_over_in_silence(photos, name):
    (photos / name).write_bytes(b"\xd0\xcf\x11\xe0 litter")
    assert found(photos) == (BARE, [])


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN", "#recycle"])
def test_folders_that_systems_leave_are_passed_over_in_silence(photos, name):
    (photos / name).mkdir()
    noise(20, 16).save(photos / name / "a.png")
    assert found(photos) == (BARE, [])


@pytest.mark.parametrize(
    "name, hint",
    [
        ("clip.MP4", "save their frames"), ("clip.mov", "ffmpeg"), ("a.CR2", "raw photos: export"), ("a.dng", "raw photos"),
        ("a.svg", "export them as PNG"), ("a.pdf", "documents"), ("photos.zip", "unpack them"), ("a.xcf", "Pillow does not read"),
        ("a.npz", "no images"), ("a.h5", "no images"),
        ("a.safetensors", "no images"), ("notes.md", "no images"), ("no ending", "no images"),
        (".hidden.png", "rename them"), ("captions.json", "captions are read from metadata.jsonl"), ("list.tsv", "captions are read from"),
    ],
)  # fmt: skip
def test_other_files_are_named_with_what_to_do(photos, name, hint):
    (photos / name).write_bytes(b"something else")
    names, said = found(photos)
    assert names == BARE and len(said) == 1
    assert said[0].startswith(f"--instance_data_dir {photos}: 1 files are not used: {name}") and hint in said[0]


def test_many_files_are_one_line(photos):
    for number in range(100):
        (photos / f"{number:03d}.npz").write_bytes(b"x")
    assert [line.split(": ", 1)[1] for line in found(photos)[1]] == [
        "100 files are not used: 000.npz, 001.npz, 002.npz and 97 more, no images"
    ]


@pytest.mark.parametrize("name", ["c", "c.jpg_large", "c.unknown", "c.jfif", "c.bmp"])
def test_an_image_is_used_whatever_its_name_ends_in(photos, name):
    noise(20, 16).save(photos / name, format="BMP")
    assert found(photos) == ({**BARE, name: None}, [])


def test_empty_and_broken_files_with_an_images_name_stay_for_the_check(photos):
    """They are listed by `preflight`, not left out here."""
    (photos / "c.png").write_bytes(b"")
    (photos / "d.heic").write_bytes(b"no photo")
    assert found(photos) == ({**BARE, "c.png": None, "d.heic": None}, [])


def test_subfolders_are_counted(photos):
    for name in ("side views/far", "x.png", "words", "empty"):
        (photos / name).mkdir(parents=True)
    for path in ("side views/1.png", "side views/far/2.JPG", "side views/.3.png", "x.png/4.heic", "words/a.txt"):
        (photos / path).write_bytes(b"x")
    names, said = found(photos)
    assert names == BARE and len(said) == 1
    assert (
        "subfolders are not used: side views/ with 3 images, words/ with 1 other files, x.png/ with 1 images. Move the images up, "
        "or name them in metadata" in said[0]
    )


def test_without_an_image_at_the_top_the_subfolders_are_named_with_their_images(tmp_path):
    (tmp_path / "10_sks dog").mkdir()
    noise(20, 16).save(tmp_path / "10_sks dog/a.png")
    (tmp_path / "more.zip").write_bytes(b"PK")
    with pytest.raises(
        UserError,
        match=r"(?s)no image.*subdirectories .10_sks dog with 1 images.: give one.*more.zip .archives: unpack them",
    ):
        found(tmp_path)


def test_links_are_followed_and_broken_ones_named(photos, tmp_path):
    noise(20, 16).save(tmp_path / "far.png")
    (tmp_path / "more").mkdir()
    noise(20, 16).save(tmp_path / "more/m.png")
    (photos / "link.png").symlink_to(tmp_path / "far.png")
    (photos / "folder").symlink_to(tmp_path / "more")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "round.png").symlink_to(photos / "round.png")
    names, said = found(photos)
    assert names == {**BARE, "link.png": None}
    assert (
        "2 broken links are not used: gone.png, round.png" in said[0]
        and "folder/ with 1 images" in said[1]
        and len(said) == 2
    )


def test_folders_that_may_not_be_read_are_named(photos, monkeypatch):
    (photos / "secret").mkdir()
    listed = os.scandir

    def scandir(path="."):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "1 subfolders cannot be read" in found(photos)[1][0]
    monkeypatch.setattr(
        Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(path)))
    )
    with pytest.raises(UserError, match="no permission to read this directory. Change its permissions"):
        found(photos)


def test_a_name_that_is_not_utf8(photos):
    """As unpacked from a Windows zip: used, and shown in a way that every terminal and JSON take."""
    content = (photos / "a.png").read_bytes()
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")).write_bytes(content)
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.txt")).write_text("a caption")
    Path(os.fsdecode(os.fsencode(photos) + b"/\xe9.zip")).write_bytes(content)
    names, said = found(photos)
    assert names == {**BARE, "caf\\xe9.png": "a caption"} and "\\xe9.zip" in said[0]
    "\n".join([*names, *said]).encode("utf-8", "strict")
    assert samples_in_folder(str(photos), "x", say=said.append)[2].read() == content


def test_a_folder_whose_name_is_not_utf8(photos):
    folder = Path(os.fsdecode(os.fsencode(photos.parent) + b"/caf\xe9"))
    photos.rename(folder)
    (folder / "a.npz").write_bytes(b"x")
    names, said = found(folder)
    assert names == BARE and "caf\\xe9" in said[0]


def test_a_class_folder_without_images_is_known(photos, tmp_path):
    assert (
        holds_no_image(tmp_path / "absent", "x")
        and not holds_no_image(photos, "x")
        and not holds_no_image(tmp_path, "x")
    )
    (tmp_path / "litter").mkdir()
    for name in ("Thumbs.db", "notes.txt", "a.zip", ".DS_Store"):
        (tmp_path / "litter" / name).write_bytes(b"x")
    assert holds_no_image(tmp_path / "litter", "x")


# ---- caption files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.png.caption", "A.txt", "a .txt"]
)
def test_every_usual_name_of_a_caption_file(photos, name):
    (photos / name).write_text("a caption")
    names, said = found(photos)
    assert names == {"a.png": "a caption", "b.jpg": None}
    assert said == [f"--instance_data_dir {photos}: 1 of 2 images have a caption of their own; without: b.jpg"]


def test_composed_and_decomposed_names_are_one(photos):
    """macOS writes é as e and an accent, Linux and Windows as one character."""
    noise(20, 16).save(photos / unicodedata.normalize("NFD", "café.png"))
    (photos / unicodedata.normalize("NFC", "café.txt")).write_text("coffee")
    assert found(photos)[0][unicodedata.normalize("NFD", "café.png")] == "coffee"


def test_names_that_differ_in_capitals_keep_their_own_captions(photos):
    noise(20, 16).save(photos / "A.jpg")
    for name in ("a", "A"):
        (photos / f"{name}.txt").write_text(f"caption of {name}")
    names, said = found(photos)
    assert names == {"A.jpg": "caption of A", "a.png": "caption of a", "b.jpg": None} and len(said) == 1


def test_several_captions_of_an_image(photos):
    for name in ("a.png.txt", "a.caption", "a.txt", "b.caption", "b.jpg.txt"):
        (photos / name).write_text(f"by {name}")
    names, said = found(photos)
    assert names == {"a.png": "by a.txt", "b.jpg": "by b.jpg.txt"}
    assert len(said) == 1 and "2 images have several captions (a.png, b.jpg); .txt is preferred to .caption" in said[0]
    for name in ("a.png.txt", "a.caption", "a.txt", "b.caption", "b.jpg.txt"):
        (photos / name).write_text("the same")
    assert found(photos) == ({"a.png": "the same", "b.jpg": "the same"}, [])


def test_captions_without_an_image_are_named(photos):
    for name in ("a", "b", "c", "README"):
        (photos / f"{name}.txt").write_text("x")
    assert "2 caption files without an image are not used: README.txt, c.txt" in found(photos)[1][0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(photos, encoding):
    for name in ("a", "b"):
        (photos / f"{name}.txt").write_text("一只猫 café", encoding=encoding)
    assert found(photos)[0] == {"a.png": "一只猫 café", "b.jpg": "一只猫 café"}


def test_other_encodings_are_named_with_what_to_do(photos):
    (photos / "a.txt").write_text("a cat, 小狗", encoding="gbk")
    with pytest.raises(
        UserError,
        match="(?s)1 caption files cannot be read; save them as UTF-8 .*Notepad.*iconv.*a.txt: byte 9 is not UTF-8",
    ):
        found(photos)
    (photos / "a.txt").write_text("a cat", encoding="utf-16-le")
    with pytest.raises(UserError, match="a.txt: byte 1 is zero, as in UTF-16 without"):
        found(photos)


# ---- metadata ------------------------------------------------------------------------------------


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(dict(zip(("file_name", "text"), row))) + "\n" for row in rows)
    )


@pytest.mark.parametrize("name", ["./a.png", "sub/../a.png", ".\\a.png", "A.PNG", " a.png ", "a.png"])
def test_names_in_metadata_as_people_write_them(photos, name):
    write_rows(photos, (name, "a caption"), ("b.jpg", "another"))
    assert found(photos) == ({"a.png": "a caption", "b.jpg": "another"}, [])


def test_a_name_that_could_be_two_files_is_not_guessed(photos):
    noise(20, 16).save(photos / "A.png")
    write_rows(photos, ("a.PNG", "x"))
    with pytest.raises(UserError, match="names files that are not in this directory"):
        found(photos)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_metadata_in_either_form_of_unicode(photos, form):
    for number, other in enumerate(("NFC", "NFD")):
        noise(20, 16, number).save(photos / unicodedata.normalize(other, f"é{number}.png"))
    write_rows(photos, *[(unicodedata.normalize(form, f"é{number}.png"), f"{number}") for number in range(2)])
    assert sorted(filter(None, found(photos)[0].values())) == ["0", "1"]


def test_metadata_may_name_images_in_subfolders(photos):
    (photos / "sub").mkdir()
    for name in ("z.png", "c.png", "left.png"):
        noise(20, 16).save(photos / "sub" / name)
    write_rows(photos, ("a.png", "1"), ("sub/z.png", "2"), ("sub\\c.png", "3"), ("b.jpg", "4"))
    names, said = found(photos)
    assert list(names.items()) == [("a.png", "1"), ("b.jpg", "4"), ("sub/c.png", "3"), ("sub/z.png", "2")]
    assert len(said) == 1 and "sub/ with 1 images" in said[0]


@pytest.mark.parametrize("name", ["../out.png", "sub/../../out.png", "..\\out.png", "OUT"])
def test_metadata_names_nothing_outside(photos, name):
    noise(20, 16).save(photos.parent / "out.png")
    write_rows(photos, (str(photos.parent / "out.png") if name == "OUT" else name, "x"))
    with pytest.raises(UserError, match="is outside the directory"):
        found(photos)


def test_what_metadata_name_is_used_or_refused_by_the_check(photos):
    """Not passed over as the same file would be that nothing names."""
    noise(20, 16).save(photos / ".hidden.png")
    (photos / "clip.mp4").write_bytes(b"x")
    write_rows(photos, ("a.png", "1"), ("b.jpg", "2"), (".hidden.png", "3"), ("clip.mp4", "4"))
    assert found(photos) == ({"a.png": "1", "b.jpg": "2", ".hidden.png": "3", "clip.mp4": "4"}, [])


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_captions_that_may_not_be_read(photos, name):
    (photos / name).write_text("x")
    (photos / name).chmod(0)
    with pytest.raises(UserError, match=rf"{name}.*cannot be read .Permission denied"):
        found(photos)


def test_an_image_named_twice(photos):
    write_rows(photos, ("a.png", "same"), ("./a.png", "same"), ("b.jpg", "b"))
    assert found(photos) == ({"a.png": "same", "b.jpg": "b"}, [])
    write_rows(photos, ("a.png", "one"), ("b.jpg", "b"), ("A.png", "two"))
    with pytest.raises(UserError, match="line 3: another caption for a.png than line 1's"):
        found(photos)


def test_metadata_overrules_caption_files_and_says_so(photos):
    write_rows(photos, ("a.png", "from metadata"), ("b.jpg", "the same"))
    (photos / "a.txt").write_text("from text")
    (photos / "b.caption").write_text("the same")
    names, said = found(photos)
    assert names == {"a.png": "from metadata", "b.jpg": "the same"}
    assert said == [
        f"--instance_data_dir {photos}: metadata.jsonl is used instead of 1 caption files that differ from it: a.txt"
    ]


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
def test_metadata_csv_in_the_usual_dialects(photos, text, encoding):
    (photos / "metadata.csv").write_text(text, encoding=encoding, newline="")
    assert found(photos) == ({"a.png": "one", "b.jpg": "two"}, [])


def test_captions_in_csv_may_hold_commas_quotes_and_lines(photos):
    (photos / "metadata.csv").write_text('file_name,text\na.png,"a ""big"" cat, gray\nand white"\nb.jpg,\n')
    assert found(photos)[0] == {"a.png": 'a "big" cat, gray\nand white', "b.jpg": None}


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
def test_csv_that_is_not_clear_is_refused_by_its_lines(photos, text, message):
    (photos / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=f"(?s)metadata.csv: .*{message}"):
        found(photos)


def test_a_list_in_json_is_refused_in_a_sentence(photos):
    (photos / "metadata.jsonl").write_text('[\n  {"file_name": "a.png",\n   "text": "x"}\n]')
    with pytest.raises(UserError, match=r"metadata.jsonl: is one JSON list; write one object per line .jq"):
        found(photos)


def test_jsonl_wins_over_csv_and_says_so(photos):
    write_rows(photos, ("a.png", "jsonl"), ("b.jpg", "jsonl"))
    (photos / "metadata.csv").write_text("file_name,text\na.png,csv\n")
    names, said = found(photos)
    assert set(names.values()) == {"jsonl"}
    assert said == [
        f"--instance_data_dir {photos}: 1 files are not used: metadata.csv; captions are read from metadata.jsonl"
    ]


def test_metadata_in_utf16_and_with_the_captions_key_named(photos):
    (photos / "Metadata.JSONL").write_text('{"image": "a.png", "words": "猫"}\n', encoding="utf-16")
    assert found(photos, caption_column="words")[0] == {"a.png": "猫", "b.jpg": None}


def test_a_long_cell_is_cut_in_messages(photos):
    write_rows(photos, ("x" * 100_000, "a"), ("a.png", ["y" * 100_000]))
    with pytest.raises(UserError) as error:
        found(photos)
    assert len(str(error.value)) < 1000


def test_a_caption_file_goes_to_the_image_of_exactly_its_name(photos):
    noise(20, 16).save(photos / "A.png")
    (photos / "A.txt").write_text("of the capital one")
    names, said = found(photos)
    assert names == {"A.png": "of the capital one", "a.png": None, "b.jpg": None}
    assert said == [f"--instance_data_dir {photos}: 1 of 3 images have a caption of their own; without: a.png, b.jpg"]


def test_a_caption_file_of_several_images_is_said(photos):
    noise(20, 16).save(photos / "a.jpeg")
    for name in ("a.txt", "b.txt"):
        (photos / name).write_text("a caption")
    names, said = found(photos)
    assert set(names.values()) == {"a caption"}
    assert said == [
        f"--instance_data_dir {photos}: 1 caption files belong to several images each: a.txt to a.jpeg and a.png"
    ]


@pytest.mark.parametrize("blank", ["", "\n \r\n", "\ufeff\n"])
def test_an_empty_metadata_jsonl_does_not_hide_the_csv(photos, blank):
    (photos / "metadata.jsonl").write_text(blank)
    (photos / "metadata.csv").write_text("file_name,text\na.png,one\nb.jpg,two\n")
    names, said = found(photos)
    assert names == {"a.png": "one", "b.jpg": "two"}
    assert said == [
        f"--instance_data_dir {photos}: 1 files are not used: metadata.jsonl; captions are read from metadata.csv"
    ]


@pytest.mark.parametrize("name, text", [("metadata.csv", "file_name,text\n"), ("metadata.jsonl", "\n")])
def test_metadata_without_rows_are_said(photos, name, text):
    (photos / name).write_text(text)
    assert found(photos) == (BARE, [f"--instance_data_dir {photos}: {name} has no rows"])


@pytest.mark.parametrize("through_a_link", [False, True])
def test_absolute_paths_inside_the_folder(photos, tmp_path, through_a_link):
    (tmp_path / "link").symlink_to(photos)
    (photos / "sub").mkdir()
    noise(20, 16).save(photos / "sub/c.png")
    folder = tmp_path / "link" if through_a_link else photos
    write_rows(photos, *((str(folder / name), name) for name in ("a.png", "b.jpg", "sub/c.png")))
    assert found(photos) == ({"a.png": "a.png", "b.jpg": "b.jpg", "sub/c.png": "sub/c.png"}, [])
    write_rows(photos, (str(photos / "absent.png"), "x"))
    with pytest.raises(UserError, match=r"absent.png .line 1.\nFix"):
        found(photos)


def test_captions_beside_images_that_metadata_name_in_subfolders(photos):
    (photos / "sub").mkdir()
    for name in ("a", "c", "left"):
        noise(20, 16).save(photos / f"sub/{name}.png")
        (photos / f"sub/{name}.txt").write_text(f"beside sub/{name}")
    write_rows(photos, ("a.png", "1"), ("b.jpg", "2"), ("sub/a.png", None), ("sub/c.png", "from metadata"))
    names, said = found(photos)
    assert names == {"a.png": "1", "b.jpg": "2", "sub/a.png": "beside sub/a", "sub/c.png": "from metadata"}
    assert [line.split(": ", 1)[1].split(". ")[0] for line in said] == [
        "subfolders are not used: sub/ with 1 images and 1 other files",
        "metadata.jsonl is used instead of 1 caption files that differ from it: sub/c.txt",
    ]


@pytest.mark.parametrize(
    "path, what",
    [
        ("captions/a.txt", "captions/ with 1 other files"), ("vids/c.mp4", "vids/ with 1 other files"),
        ("noend/IMG1", "noend/ with 1 other files"), (".hid/z.png", ".hid/ with 1 images"), ("s/.h/z.png", "s/ with 1 images"),
    ],
)  # fmt: skip
def test_subfolders_of_other_files_are_named(photos, path, what):
    (photos / path).parent.mkdir(parents=True)
    (photos / path).write_bytes(b"x")
    names, said = found(photos)
    assert names == BARE and len(said) == 1 and f"subfolders are not used: {what}. " in said[0]


def test_without_any_image_the_subfolders_of_other_files_are_named_too(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("v.mov", "c.txt"):
        (tmp_path / "sub" / name).write_bytes(b"x")
    with pytest.raises(UserError, match="(?s)no image in this directory. Put 5.*sub/ with 2 other files"):
        found(tmp_path)
    assert holds_no_image(tmp_path, "x")


def test_links_to_folders_inside_subfolders_are_counted_once_and_never_followed_round(photos, tmp_path):
    (tmp_path / "other").mkdir()
    (photos / "s").mkdir()
    noise(20, 16).save(tmp_path / "other/m.png")
    for name, target in (
        ("more", tmp_path / "other"),
        ("again", tmp_path / "other"),
        ("round", photos),
        ("up", tmp_path),
    ):
        (photos / "s" / name).symlink_to(target)
    (tmp_path / "other/back").symlink_to(photos / "s")
    assert "subfolders are not used: s/ with 1 images. " in found(photos)[1][0]


def test_a_file_in_place_of_the_folder(photos):
    with pytest.raises(UserError, match="a.png: is a file. Give the directory that holds the images."):
        found(photos / "a.png")


def test_keys_of_metadata_in_capitals_or_not(photos):
    (photos / "metadata.csv").write_text("File_Name,Text\na.png,one\nb.jpg,two\n")
    assert found(photos) == ({"a.png": "one", "b.jpg": "two"}, [])


def test_a_long_list_of_missing_files_is_cut(photos):
    write_rows(photos, *((f"wrong/{number:04d}.png", "x") for number in range(3000)))
    with pytest.raises(UserError, match=r"0049.png .line 50.\n  and 2950 more\nFix") as error:
        found(photos)
    assert len(str(error.value)) < 3000


def test_json_over_several_lines_is_refused_in_a_sentence(photos):
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}, indent=1) * 300)
    with pytest.raises(
        UserError, match="metadata.jsonl: has objects over several lines; write one object per line .jq"
    ) as error:
        found(photos)
    assert len(str(error.value)) < 500
