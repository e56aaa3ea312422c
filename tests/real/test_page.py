"""docs/models.md says what the tests show, and the tests cover what it says."""

import re
from pathlib import Path

import pytest
import real_controlnets
import real_pipelines
from conftest import ROOT, load_script

from .verdicts import CONTROLNETS, FILES, OWNERS, PIPELINES, VAES

PAGE = ROOT / "docs" / "models.md"


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_page_has_the_rows_of_the_tables():
    """Write it anew with `python tests/models_page.py`."""
    assert rows(PAGE.read_text()) == rows(load_script("tests/models_page.py").page())


def test_every_published_model_has_a_verdict():
    assert PIPELINES.keys() == real_pipelines.PIPELINES.keys() and VAES.keys() == real_controlnets.VAES.keys()
    assert CONTROLNETS.keys() == real_controlnets.CONTROLNETS.keys() | real_controlnets.FLUX_CONTROLNETS.keys()
    assert {name for names in OWNERS.values() for name in names} <= {*PIPELINES, *VAES, *CONTROLNETS}


@pytest.mark.parametrize("what", FILES)
def test_every_row_about_files_names_its_test(what):
    file, _, test = FILES[what][1].partition("::")
    assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE)
