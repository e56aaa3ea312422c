"""Folders of images: which files are used, and what is said of the others."""

import os
from pathlib import Path

import pytest

from mindtune.cli import UserError
from mindtune.data.folders import holds_no_image, samples_in_folder

from .folder_files import BARE, captions, found
from .image_files import noise


def test_images_come_in_name_order_without_other_files(mixed_folder):
    assert list(captions(mixed_folder).items()) == [("B.PNG", None), ("a.jpg", None), ("c.png", None)]


def test_a_missing_or_empty_directory_is_refused(tmp_path, mixed_folder):
    with pytest.raises(UserError, match=r"--instance_data_dir .*no such directory"):
        captions(mixed_folder / "absent")
    with pytest.raises(UserError, match=r"no image.*Put 5 to 20 images there"):
        captions(mixed_folder / "inner")
    with pytest.raises(UserError, match=r"no image.*subdirectories .images."):
        captions(tmp_path)


def test_a_folder_of_images_is_read_without_notes(image_folder):
    assert found(image_folder) == (BARE, [])


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
def test_system_files_are_ignored_without_a_note(image_folder, name):
    (image_folder / name).write_bytes(b"\xd0\xcf\x11\xe0 litter")
    assert found(image_folder) == (BARE, [])


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN", "#recycle"])
def test_system_folders_are_ignored_without_a_note(image_folder, name):
    (image_folder / name).mkdir()
    noise(20, 16).save(image_folder / name / "a.png")
    assert found(image_folder) == (BARE, [])


@pytest.mark.parametrize(
    "name, hint",
    [
        ("clip.MP4", "save their frames"),
        ("clip.mov", "ffmpeg"),
        ("a.CR2", "raw photos: export"),
        ("a.dng", "raw photos"),
        ("a.svg", "export them as PNG"),
        ("a.pdf", "documents"),
        ("photos.zip", "unpack them"),
        ("a.xcf", "Pillow does not read"),
        ("a.npz", "no images"),
        ("a.h5", "no images"),
        ("a.safetensors", "no images"),
        ("notes.md", "no images"),
        ("no ending", "no images"),
        (".hidden.png", "rename them"),
        ("captions.json", "captions are read from metadata.jsonl"),
        ("list.tsv", "captions are read from"),
    ],
)
def test_other_files_are_reported_with_a_remedy(image_folder, name, hint):
    (image_folder / name).write_bytes(b"something else")
    names, said = found(image_folder)
    assert names == BARE and len(said) == 1
    assert said[0].startswith(f"--instance_data_dir {image_folder}: 1 files are not used: {name}") and hint in said[0]


def test_many_files_are_reported_in_one_line(image_folder):
    for number in range(100):
        (image_folder / f"{number:03d}.npz").write_bytes(b"x")
    assert [line.split(": ", 1)[1] for line in found(image_folder)[1]] == [
        "100 files are not used: 000.npz, 001.npz, 002.npz and 97 more, no images"
    ]


@pytest.mark.parametrize("name", ["c", "c.jpg_large", "c.unknown", "c.jfif", "c.bmp"])
def test_an_image_is_used_whatever_its_suffix(image_folder, name):
    noise(20, 16).save(image_folder / name, format="BMP")
    assert found(image_folder) == ({**BARE, name: None}, [])


def test_empty_and_damaged_images_are_samples(image_folder):
    """`preflight` lists them."""
    (image_folder / "c.png").write_bytes(b"")
    (image_folder / "d.heic").write_bytes(b"no photo")
    assert found(image_folder) == ({**BARE, "c.png": None, "d.heic": None}, [])


def test_images_in_subfolders_are_counted(image_folder):
    for name in ("side views/far", "x.png", "words", "empty"):
        (image_folder / name).mkdir(parents=True)
    for path in ("side views/1.png", "side views/far/2.JPG", "side views/.3.png", "x.png/4.heic", "words/a.txt"):
        (image_folder / path).write_bytes(b"x")
    names, said = found(image_folder)
    assert names == BARE and len(said) == 1
    counts = "side views/ with 3 images, words/ with 1 other files, x.png/ with 1 images"
    assert f"subfolders are not used: {counts}. Move the images up, or name them in metadata" in said[0]


def test_without_images_the_error_names_subfolders_with_images(tmp_path):
    (tmp_path / "10_sks dog").mkdir()
    noise(20, 16).save(tmp_path / "10_sks dog/a.png")
    (tmp_path / "more.zip").write_bytes(b"PK")
    with pytest.raises(
        UserError,
        match=r"(?s)no image.*subdirectories .10_sks dog with 1 images.: give one.*more.zip .archives: unpack them",
    ):
        found(tmp_path)


def test_links_are_followed_and_broken_ones_reported(image_folder, tmp_path):
    noise(20, 16).save(tmp_path / "far.png")
    (tmp_path / "more").mkdir()
    noise(20, 16).save(tmp_path / "more/m.png")
    (image_folder / "link.png").symlink_to(tmp_path / "far.png")
    (image_folder / "folder").symlink_to(tmp_path / "more")
    (image_folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (image_folder / "round.png").symlink_to(image_folder / "round.png")
    names, said = found(image_folder)
    assert names == {**BARE, "link.png": None}
    assert (
        "2 broken links are not used: gone.png, round.png" in said[0]
        and "folder/ with 1 images" in said[1]
        and len(said) == 2
    )


def test_folders_without_read_permission_are_reported(image_folder, monkeypatch):
    (image_folder / "secret").mkdir()
    listed = os.scandir

    def scandir(path="."):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "1 subfolders cannot be read" in found(image_folder)[1][0]
    monkeypatch.setattr(
        Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(path)))
    )
    with pytest.raises(UserError, match="no permission to read this directory. Change its permissions"):
        found(image_folder)


def test_a_file_name_that_is_not_utf8(image_folder):
    """As unpacked from a Windows archive: used, and printed in a form that terminals and JSON accept."""
    content = (image_folder / "a.png").read_bytes()
    Path(os.fsdecode(os.fsencode(image_folder) + b"/caf\xe9.png")).write_bytes(content)
    Path(os.fsdecode(os.fsencode(image_folder) + b"/caf\xe9.txt")).write_text("a caption")
    Path(os.fsdecode(os.fsencode(image_folder) + b"/\xe9.zip")).write_bytes(content)
    names, said = found(image_folder)
    assert names == {**BARE, "caf\\xe9.png": "a caption"} and "\\xe9.zip" in said[0]
    "\n".join([*names, *said]).encode("utf-8", "strict")
    assert samples_in_folder(str(image_folder), "x", say=said.append)[2].read() == content


def test_a_folder_name_that_is_not_utf8(image_folder):
    folder = Path(os.fsdecode(os.fsencode(image_folder.parent) + b"/caf\xe9"))
    image_folder.rename(folder)
    (folder / "a.npz").write_bytes(b"x")
    names, said = found(folder)
    assert names == BARE and "caf\\xe9" in said[0]


def test_holds_no_image(image_folder, tmp_path):
    assert (
        holds_no_image(tmp_path / "absent", "x")
        and not holds_no_image(image_folder, "x")
        and not holds_no_image(tmp_path, "x")
    )
    (tmp_path / "litter").mkdir()
    for name in ("Thumbs.db", "notes.txt", "a.zip", ".DS_Store"):
        (tmp_path / "litter" / name).write_bytes(b"x")
    assert holds_no_image(tmp_path / "litter", "x")


@pytest.mark.parametrize(
    "path, what",
    [
        ("captions/a.txt", "captions/ with 1 other files"),
        ("vids/c.mp4", "vids/ with 1 other files"),
        ("noend/IMG1", "noend/ with 1 other files"),
        (".hid/z.png", ".hid/ with 1 images"),
        ("s/.h/z.png", "s/ with 1 images"),
    ],
)
def test_other_files_in_subfolders_are_reported(image_folder, path, what):
    (image_folder / path).parent.mkdir(parents=True)
    (image_folder / path).write_bytes(b"x")
    names, said = found(image_folder)
    assert names == BARE and len(said) == 1 and f"subfolders are not used: {what}. " in said[0]


def test_without_images_the_error_names_other_files_in_subfolders(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("v.mov", "c.txt"):
        (tmp_path / "sub" / name).write_bytes(b"x")
    with pytest.raises(UserError, match="(?s)no image in this directory. Put 5.*sub/ with 2 other files"):
        found(tmp_path)
    assert holds_no_image(tmp_path, "x")


def test_linked_folders_are_counted_once_and_cycles_are_not_followed(image_folder, tmp_path):
    (tmp_path / "other").mkdir()
    (image_folder / "s").mkdir()
    noise(20, 16).save(tmp_path / "other/m.png")
    for name, target in (
        ("more", tmp_path / "other"),
        ("again", tmp_path / "other"),
        ("round", image_folder),
        ("up", tmp_path),
    ):
        (image_folder / "s" / name).symlink_to(target)
    (tmp_path / "other/back").symlink_to(image_folder / "s")
    assert "subfolders are not used: s/ with 1 images. " in found(image_folder)[1][0]


def test_a_file_instead_of_a_folder_is_refused(image_folder):
    with pytest.raises(UserError, match="a.png: is a file. Give the directory that holds the images."):
        found(image_folder / "a.png")
