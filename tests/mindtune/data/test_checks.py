"""The check of all images before a run."""

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.checks import preflight
from mindtune.data.folders import samples_in_folder
from mindtune.data.image_sample import Sample

from .image_files import noise


@pytest.fixture
def mixed(tmp_path):
    """Two good images and four files that cannot be used."""
    noise(40, 32).save(tmp_path / "good.png")
    noise(32, 90).save(tmp_path / "good2.jpg")
    noise(40, 31).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("this is not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    noise(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    (tmp_path / "whole.jpg").unlink()
    return tmp_path


PROBLEMS = [
    "small.png: 40x31 is smaller than --resolution 32",
    "torn.jpg: damaged",
    "text.png: not an image",
    "empty.png: not an image",
]


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


def test_preflight_can_skip_bad_images(mixed, capsys):
    assert [sample.name for sample in check(mixed, skip_bad=True)] == ["good.png", "good2.jpg"]
    printed = capsys.readouterr().out
    assert "continuing without 4 of 6" in printed and all(problem in printed for problem in PROBLEMS)


def test_preflight_needs_one_usable_image(mixed):
    for name in ("good.png", "good2.jpg"):
        (mixed / name).unlink()
    with pytest.raises(UserError, match="no usable image is left"):
        check(mixed, skip_bad=True)


def test_preflight_changes_nothing_on_disk(mixed):
    before = {path.name: path.read_bytes() for path in mixed.iterdir()}
    check(mixed, skip_bad=True)
    assert {path.name: path.read_bytes() for path in mixed.iterdir()} == before


def test_preflight_measures_the_upright_image(tmp_path):
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
    with pytest.raises(
        UserError, match=r"(?s)a: missing \(.*/a.png\).*b: missing \(the cell of the data set is empty\)"
    ):
        preflight(samples, 32, "--dataset_name", False)


# ---- notes ---------------------------------------------------------------------------------------


def test_preflight_reports_animations(tmp_path, capsys):
    noise(40, 40).save(tmp_path / "a.gif", save_all=True, append_images=[noise(40, 40, 1)])
    noise(40, 40).save(tmp_path / "still.gif")
    assert len(check(tmp_path)) == 2
    assert "1 images have several frames or pages, of which the first is used: a.gif\n" in capsys.readouterr().out


def test_preflight_reports_16_bit_images_with_8_bit_values(tmp_path, capsys):
    """Programs that do not scale their values write such images. They look black."""
    for name, most in (("dark", 255), ("scaled", 65535), ("black", 0)):
        Image.fromarray(np.linspace(0, most, 400).astype(np.uint16).reshape(20, 20)).save(tmp_path / f"{name}.png")
    samples = [Sample(name, tmp_path / f"{name}.png") for name in ("dark", "scaled", "black")]
    assert preflight(samples, 16, "--flag", skip_bad=False) == samples
    note = "1 images are 16-bit without a value above 255 of 65535, so nearly black; save them as 8-bit PNG: dark"
    assert capsys.readouterr().out == f"--flag: {note}\n"
