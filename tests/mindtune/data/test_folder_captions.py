"""The captions of a folder of images: caption files, metadata, and the file names in it."""

import json
import os
import unicodedata

import pytest

from mindtune.cli import UserError

from .folder_files import captions, found, write_rows
from .image_files import noise

# ---- caption files -------------------------------------------------------------------------------


def test_captions_of_text_files(mixed_folder):
    (mixed_folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "un café\r\n".encode())
    (mixed_folder / "c.txt").write_text("  a cat\n")
    assert captions(mixed_folder) == {"B.PNG": None, "a.jpg": "un café", "c.png": "a cat"}


def test_all_caption_files_that_are_not_utf8_are_listed(mixed_folder):
    for name in ("a.txt", "c.txt"):
        (mixed_folder / name).write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError) as error:
        captions(mixed_folder)
    assert (
        "2 caption files" in str(error.value)
        and "a.txt: byte 3" in str(error.value)
        and "c.txt: byte 3" in str(error.value)
    )


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.png.caption", "A.txt", "a .txt"]
)
def test_names_of_caption_files(image_folder, name):
    (image_folder / name).write_text("a caption")
    names, said = found(image_folder)
    assert names == {"a.png": "a caption", "b.jpg": None}
    assert said == [f"--instance_data_dir {image_folder}: 1 of 2 images have a caption of their own; without: b.jpg"]


def test_composed_and_decomposed_names_match(image_folder):
    """macOS writes é as e and an accent, Linux and Windows as one character."""
    noise(20, 16).save(image_folder / unicodedata.normalize("NFD", "café.png"))
    (image_folder / unicodedata.normalize("NFC", "café.txt")).write_text("coffee")
    assert found(image_folder)[0][unicodedata.normalize("NFD", "café.png")] == "coffee"


def test_names_that_differ_in_case_keep_their_own_captions(image_folder):
    noise(20, 16).save(image_folder / "A.jpg")
    for name in ("a", "A"):
        (image_folder / f"{name}.txt").write_text(f"caption of {name}")
    names, said = found(image_folder)
    assert names == {"A.jpg": "caption of A", "a.png": "caption of a", "b.jpg": None} and len(said) == 1


def test_images_with_several_captions(image_folder):
    for name in ("a.png.txt", "a.caption", "a.txt", "b.caption", "b.jpg.txt"):
        (image_folder / name).write_text(f"by {name}")
    names, said = found(image_folder)
    assert names == {"a.png": "by a.txt", "b.jpg": "by b.jpg.txt"}
    assert len(said) == 1 and "2 images have several captions (a.png, b.jpg); .txt is preferred to .caption" in said[0]
    for name in ("a.png.txt", "a.caption", "a.txt", "b.caption", "b.jpg.txt"):
        (image_folder / name).write_text("the same")
    assert found(image_folder) == ({"a.png": "the same", "b.jpg": "the same"}, [])


def test_captions_without_an_image_are_reported(image_folder):
    for name in ("a", "b", "c", "README"):
        (image_folder / f"{name}.txt").write_text("x")
    assert "2 caption files without an image are not used: README.txt, c.txt" in found(image_folder)[1][0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(image_folder, encoding):
    for name in ("a", "b"):
        (image_folder / f"{name}.txt").write_text("一只猫 café", encoding=encoding)
    assert found(image_folder)[0] == {"a.png": "一只猫 café", "b.jpg": "一只猫 café"}


def test_other_encodings_are_refused_with_a_remedy(image_folder):
    (image_folder / "a.txt").write_text("a cat, 小狗", encoding="gbk")
    with pytest.raises(
        UserError,
        match="(?s)1 caption files cannot be read; save them as UTF-8 .*Notepad.*iconv.*a.txt: byte 9 is not UTF-8",
    ):
        found(image_folder)
    (image_folder / "a.txt").write_text("a cat", encoding="utf-16-le")
    with pytest.raises(UserError, match="a.txt: byte 1 is zero, as in UTF-16 without"):
        found(image_folder)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_captions_without_read_permission_are_refused(image_folder, name):
    (image_folder / name).write_text("x")
    (image_folder / name).chmod(0)
    with pytest.raises(UserError, match=rf"{name}.*cannot be read .Permission denied"):
        found(image_folder)


def test_a_caption_file_belongs_to_the_image_of_exactly_its_name(image_folder):
    noise(20, 16).save(image_folder / "A.png")
    (image_folder / "A.txt").write_text("of the capital one")
    names, said = found(image_folder)
    assert names == {"A.png": "of the capital one", "a.png": None, "b.jpg": None}
    assert said == [
        f"--instance_data_dir {image_folder}: 1 of 3 images have a caption of their own; without: a.png, b.jpg"
    ]


def test_a_caption_file_of_several_images_is_reported(image_folder):
    noise(20, 16).save(image_folder / "a.jpeg")
    for name in ("a.txt", "b.txt"):
        (image_folder / name).write_text("a caption")
    names, said = found(image_folder)
    assert set(names.values()) == {"a caption"}
    assert said == [
        f"--instance_data_dir {image_folder}: 1 caption files belong to several images each: a.txt to a.jpeg and a.png"
    ]


# ---- metadata ------------------------------------------------------------------------------------


def test_metadata_are_preferred_to_text_files(mixed_folder):
    rows = [{"file_name": "a.jpg", "text": "from metadata"}, {"file_name": "B.PNG", "text": ""}]
    (mixed_folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    (mixed_folder / "a.txt").write_text("from text")
    (mixed_folder / "c.txt").write_text("from text")
    assert captions(mixed_folder) == {"B.PNG": None, "a.jpg": "from metadata", "c.png": "from text"}


def test_missing_files_in_metadata_are_listed(mixed_folder):
    rows = [{"file_name": "inner/a.jpg", "text": "x"}, {"file_name": "absent.png", "text": "x"}]
    (mixed_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"(?s)metadata.jsonl: names files.*inner/a.jpg .line 1.*absent.png .line 2"):
        captions(mixed_folder)


def test_the_caption_column_can_be_named(mixed_folder):
    (mixed_folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "prompt": "p", "text": "t"}')
    assert captions(mixed_folder, caption_column="prompt")["a.jpg"] == "p"


@pytest.mark.parametrize("name", ["./a.png", "sub/../a.png", ".\\a.png", "A.PNG", " a.png ", "a.png"])
def test_spellings_of_names_in_metadata(image_folder, name):
    write_rows(image_folder, (name, "a caption"), ("b.jpg", "another"))
    assert found(image_folder) == ({"a.png": "a caption", "b.jpg": "another"}, [])


def test_an_ambiguous_name_is_refused(image_folder):
    noise(20, 16).save(image_folder / "A.png")
    write_rows(image_folder, ("a.PNG", "x"))
    with pytest.raises(UserError, match="names files that are not in this directory"):
        found(image_folder)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_metadata_in_both_forms_of_unicode(image_folder, form):
    for number, other in enumerate(("NFC", "NFD")):
        noise(20, 16, number).save(image_folder / unicodedata.normalize(other, f"é{number}.png"))
    write_rows(image_folder, *[(unicodedata.normalize(form, f"é{number}.png"), f"{number}") for number in range(2)])
    assert sorted(filter(None, found(image_folder)[0].values())) == ["0", "1"]


def test_metadata_may_name_images_in_subfolders(image_folder):
    (image_folder / "sub").mkdir()
    for name in ("z.png", "c.png", "left.png"):
        noise(20, 16).save(image_folder / "sub" / name)
    write_rows(image_folder, ("a.png", "1"), ("sub/z.png", "2"), ("sub\\c.png", "3"), ("b.jpg", "4"))
    names, said = found(image_folder)
    assert list(names.items()) == [("a.png", "1"), ("b.jpg", "4"), ("sub/c.png", "3"), ("sub/z.png", "2")]
    assert len(said) == 1 and "sub/ with 1 images" in said[0]


@pytest.mark.parametrize("name", ["../out.png", "sub/../../out.png", "..\\out.png", "OUT"])
def test_metadata_may_not_name_files_outside(image_folder, name):
    noise(20, 16).save(image_folder.parent / "out.png")
    write_rows(image_folder, (str(image_folder.parent / "out.png") if name == "OUT" else name, "x"))
    with pytest.raises(UserError, match="is outside the directory"):
        found(image_folder)


def test_all_files_that_metadata_name_are_samples(image_folder):
    """Files that are ignored without metadata are samples if metadata name them."""
    noise(20, 16).save(image_folder / ".hidden.png")
    (image_folder / "clip.mp4").write_bytes(b"x")
    write_rows(image_folder, ("a.png", "1"), ("b.jpg", "2"), (".hidden.png", "3"), ("clip.mp4", "4"))
    assert found(image_folder) == ({"a.png": "1", "b.jpg": "2", ".hidden.png": "3", "clip.mp4": "4"}, [])


def test_an_image_named_twice_must_have_one_caption(image_folder):
    write_rows(image_folder, ("a.png", "same"), ("./a.png", "same"), ("b.jpg", "b"))
    assert found(image_folder) == ({"a.png": "same", "b.jpg": "b"}, [])
    write_rows(image_folder, ("a.png", "one"), ("b.jpg", "b"), ("A.png", "two"))
    with pytest.raises(UserError, match="line 3: another caption for a.png than line 1's"):
        found(image_folder)


def test_overruled_caption_files_are_reported(image_folder):
    write_rows(image_folder, ("a.png", "from metadata"), ("b.jpg", "the same"))
    (image_folder / "a.txt").write_text("from text")
    (image_folder / "b.caption").write_text("the same")
    names, said = found(image_folder)
    assert names == {"a.png": "from metadata", "b.jpg": "the same"}
    note = "metadata.jsonl is used instead of 1 caption files that differ from it: a.txt"
    assert said == [f"--instance_data_dir {image_folder}: {note}"]


def test_long_cells_are_shortened_in_messages(image_folder):
    write_rows(image_folder, ("x" * 100_000, "a"), ("a.png", ["y" * 100_000]))
    with pytest.raises(UserError) as error:
        found(image_folder)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("through_a_link", [False, True])
def test_absolute_paths_inside_the_folder(image_folder, tmp_path, through_a_link):
    (tmp_path / "link").symlink_to(image_folder)
    (image_folder / "sub").mkdir()
    noise(20, 16).save(image_folder / "sub/c.png")
    folder = tmp_path / "link" if through_a_link else image_folder
    write_rows(image_folder, *((str(folder / name), name) for name in ("a.png", "b.jpg", "sub/c.png")))
    assert found(image_folder) == ({"a.png": "a.png", "b.jpg": "b.jpg", "sub/c.png": "sub/c.png"}, [])
    write_rows(image_folder, (str(image_folder / "absent.png"), "x"))
    with pytest.raises(UserError, match=r"absent.png .line 1.\nFix"):
        found(image_folder)


def test_caption_files_in_subfolders_that_metadata_name(image_folder):
    (image_folder / "sub").mkdir()
    for name in ("a", "c", "left"):
        noise(20, 16).save(image_folder / f"sub/{name}.png")
        (image_folder / f"sub/{name}.txt").write_text(f"beside sub/{name}")
    write_rows(image_folder, ("a.png", "1"), ("b.jpg", "2"), ("sub/a.png", None), ("sub/c.png", "from metadata"))
    names, said = found(image_folder)
    assert names == {"a.png": "1", "b.jpg": "2", "sub/a.png": "beside sub/a", "sub/c.png": "from metadata"}
    assert [line.split(": ", 1)[1].split(". ")[0] for line in said] == [
        "subfolders are not used: sub/ with 1 images and 1 other files",
        "metadata.jsonl is used instead of 1 caption files that differ from it: sub/c.txt",
    ]


def test_a_long_list_of_missing_files_is_shortened(image_folder):
    write_rows(image_folder, *((f"wrong/{number:04d}.png", "x") for number in range(3000)))
    with pytest.raises(UserError, match=r"0049.png .line 50.\n  and 2950 more\nFix") as error:
        found(image_folder)
    assert len(str(error.value)) < 3000
