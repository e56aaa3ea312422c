"""Data sets of images with captions, in every form that can be read. Those of pairs are in test_pairs.py."""

import json

import datasets
import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.data.columns import Source, check_source
from mindtune.data.tables import samples_in_dataset

from .image_files import noise, png
from .table_files import CELLS, FORMS, WORDS, as_parquet, as_saved, as_shard, notes_on_images, read_dataset, typed


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagefolder")
    for number in range(3):
        noise(20, 16, number).save(folder / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "text": f"caption {n}", "other": n} for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_samples_hold_the_bytes_and_captions_of_the_files(imagefolder, tmp_path):
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
        ({"image_column": "text"}, "(?s)3 files named in metadata.jsonl are missing.*caption 0 .line 1"),
    ],
)
def test_a_wrong_column_is_refused_with_the_existing_ones(imagefolder, tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_dataset(imagefolder, tmp_path, **columns)


def test_an_unreadable_data_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"(?s)--dataset_name .*cannot read it.* folder of images .* as --instance_data_dir"
    ):
        read_dataset(tmp_path / "empty", tmp_path)


def test_images_without_metadata_are_in_name_order(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(seed=number))
    assert [sample.read() for sample in read_dataset(tmp_path, tmp_path / "cache")] == [
        png(seed=number) for number in range(3)
    ]


# ---- one data set in every form ------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_images_and_captions(tmp_path, form):
    (tmp_path / "set").mkdir()
    form(tmp_path / "set")
    samples = read_dataset(
        tmp_path / "set", tmp_path / "cache", "png" if form is as_shard else None, "txt" if form is as_shard else "text"
    )
    assert [sample.read() for sample in samples] == [png(seed=number) for number in range(3)]
    assert [sample.caption for sample in samples] == WORDS
    assert samples[1].name == f"{tmp_path / 'set'}[1]"


def test_the_first_column_of_images_is_used(tmp_path):
    """A column of images is preferred to a column of text with the name of an image column."""
    rows = {"image": ["words", "words"], "photo": CELLS[:2], "png": CELLS[1:]}
    table = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).cast_column("png", datasets.Image())
    table.select_columns(["image", "photo"]).to_parquet(tmp_path / "train.parquet")
    assert [sample.read() for sample in read_dataset(tmp_path, tmp_path / "cache")] == [png(seed=0), png(seed=1)]


# ---- what is not used, and what cannot be read ---------------------------------------------------


def test_unused_splits_and_files_are_reported(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    as_parquet(folder)
    (captions,) = notes_on_images(folder)
    (folder / "README.md").write_text("x")
    (folder / "extra.csv").write_text("a,b\n1,2\n")
    assert notes_on_images(folder) == [
        f"--dataset_name {folder}: 1 files are not used; those used end in .parquet: extra.csv",
        captions,
    ]
    (folder / "extra.csv").unlink()
    typed().to_parquet(folder / "test.parquet")
    assert notes_on_images(folder) == [f"--dataset_name {folder}: only the split train is used, not test", captions]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_unused_captions_are_reported(tmp_path, form):
    folder = tmp_path / "set"
    folder.mkdir()
    form(folder)
    name = "txt" if form is as_shard else "text"
    line = (
        f"--dataset_name {folder}: the column {name} is not used; add --caption_column {name} to read captions from it"
    )
    assert line in notes_on_images(folder)
    line = f"--dataset_name {folder}: 2 of 3 images have a caption of their own; without: {folder}[1]"
    found = notes_on_images(folder, caption_column=name)
    assert line in found and not any("--caption_column" in line for line in found)


def test_one_column_is_not_both_image_and_caption(tmp_path):
    (tmp_path / "set").mkdir()
    as_parquet(tmp_path / "set")
    with pytest.raises(UserError, match="column image is named for two purposes"):
        notes_on_images(tmp_path / "set", image_column="image", caption_column="image")


def test_metadata_next_to_data_files_are_not_used(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    as_saved(folder)
    (folder / "metadata.csv").write_text("something,else\n1,2\n")
    (folder / "metadata.jsonl").write_text("{}")
    assert len(samples_in_dataset(Source(str(folder)), print)) == 3


def test_images_that_metadata_do_not_name_are_reported(tmp_path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png"):
        (folder / name).write_bytes(png())
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "clip.mp4").write_bytes(b"x")
    rows = [
        {"file_name": "A.png", "text": "x"},
        {"file_name": "sub\\d.png", "text": "y"},
        {"file_name": "a.png", "text": "x"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    repeated, others, unnamed = notes_on_images(folder, caption_column="text")
    assert "1 lines of metadata.jsonl repeat an earlier line; each is a sample of its own" in repeated
    assert "1 files next to metadata.jsonl are not used: clip.mp4" in others
    assert "2 images are not used, because metadata.jsonl does not name them: b.png, sub/c.png" in unnamed


def test_a_folder_of_images_with_caption_files_is_refused_with_a_remedy(tmp_path):
    """The library reads it as a data set of text."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png())
    for name in "abc":
        (tmp_path / f"set/{name}.txt").write_text("a caption")
    with pytest.raises(
        UserError, match="--image_column: .*Give a folder of images with caption files as --instance_data_dir"
    ):
        notes_on_images(tmp_path / "set")


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    as_saved(tmp_path / "set")
    with pytest.raises(UserError, match=r"caf.xe9 is not UTF-8, which the datasets library needs"):
        notes_on_images(folder)


def test_the_id_of_a_data_set_on_modelscope_is_refused_before_anything_else(tmp_path, monkeypatch):
    """The datasets library would look for the id on the Hugging Face hub, where it may be another data set."""
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: pytest.fail("looked for"))
    message = "--dataset_name club/set: is no directory, .*modelscope download --dataset club/set --local_dir DIR"
    with pytest.raises(UserError, match=message):
        samples_in_dataset(Source(dataset_name="club/set", hub="modelscope"))
    with pytest.raises(UserError, match=message):
        check_source(Source(dataset_name="club/set", hub="modelscope"))
    check_source(Source(dataset_name=str(tmp_path), hub="modelscope"))
    check_source(Source(train_data_dir="pairs", hub="modelscope"))
    check_source(Source(dataset_name="club/set"))
