"""Fixtures for the tests of data sets."""

import datasets
import pytest

from .image_files import noise
from .pair_files import FORMS, SOME_FORMS


@pytest.fixture(autouse=True, scope="module")
def library_cache(tmp_path_factory):
    """A cache of the datasets library for these tests alone. Even a stream creates a lock file there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("library"))
        yield


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """For each form, the arguments of a `Source` that opens it, with a cache of its own."""
    found = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp(form.__name__)
        found[form] = {**form(folder), "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return found


@pytest.fixture(scope="session")
def some_sources(tmp_path_factory):
    """As `sources`, of the forms in which some pairs have no condition."""
    found = {}
    for form in SOME_FORMS:
        options = {"cache_dir": str(tmp_path_factory.mktemp("cache")), "condition_optional": True}
        found[form] = {**form(tmp_path_factory.mktemp(form.__name__)), **options}
    return found


@pytest.fixture
def mixed_folder(tmp_path):
    """Three images, files that are no images, a hidden file and an empty subfolder."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for number, name in enumerate(["c.png", "a.jpg", "B.PNG"]):
        noise(20, 16, number).save(folder / name)
    for name in (".hidden.png", "notes.md", "list.csv"):
        (folder / name).write_text("x")
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Two images without anything else."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        noise(20, 16).save(folder / name)
    return folder
