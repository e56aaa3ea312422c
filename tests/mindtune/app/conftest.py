"""The folders of a form with a data set and a model, and the parsers of the training scripts."""

import pytest
from conftest import load_script

from mindtune.app.__main__ import find_parsers
from mindtune.app.folders import Folders


@pytest.fixture(scope="session")
def scripts():
    """(path, parser) of the training scripts, as the form has them."""
    return find_parsers()


@pytest.fixture
def folders(tmp_path):
    """Folders with data/cats and models/flux; secret/ is beside them, and data-2 has a name that starts like data."""
    for name in ("data/cats", "models/flux", "outputs", "secret", "data-2"):
        (tmp_path / name).mkdir(parents=True)
    load_script("examples/tiny/shapes.py").make_subject(tmp_path / "data/cats", 64)
    return Folders(tmp_path / "data", tmp_path / "models", tmp_path / "outputs")
