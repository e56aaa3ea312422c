"""What was learnt of images: an unchanged one is not decoded again, a changed one is, and a kill does no harm."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import image_facts
from mindtune.data.buckets import Settings, of_samples
from mindtune.data.checks import preflight
from mindtune.data.columns import Source
from mindtune.data.image_facts import FILE, ImageFacts
from mindtune.data.image_sample import Sample
from mindtune.data.inspection import inspect
from mindtune.data.pair_checks import preflight_pairs
from mindtune.data.pairs import load_pairs
from mindtune.distributed import ranks

from .image_files import png
from .pair_files import CONDITIONS, COUNT, FORMS, RED, WHITE, as_folder, drawing, table


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that were decoded."""
    names = []

    def note(sample, condition=False):
        names.append(sample.name)
        return inspect(sample, condition)

    monkeypatch.setattr(image_facts, "inspect", note)
    return names


@pytest.fixture
def folder(tmp_path):
    """Three images."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(20, 16, seed=number))
    return tmp_path / "images"


def checked(folder, facts, **options):
    """The samples of a folder after the check."""
    samples = [Sample(path.name, path) for path in sorted(folder.glob("*.png"))]
    return preflight(samples, 16, "--flag", False, facts=facts, **options)


def test_unchanged_images_are_not_decoded_again(folder, tmp_path, decoded):
    first = checked(folder, ImageFacts(tmp_path / "cache"))
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]  # by threads
    again = checked(folder, ImageFacts(tmp_path / "cache"))
    assert len(decoded) == 3
    assert [(s.size, s.digest) for s in again] == [(s.size, s.digest) for s in first]
    assert [s.digest for s in again] == [Sample("", path).digest for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("change", ["content", "time", "replaced by an older file"])
def test_a_changed_image_is_decoded_again(folder, tmp_path, decoded, change):
    checked(folder, ImageFacts(tmp_path / "cache"))
    path = folder / "1.png"
    if change == "content":
        path.write_bytes(png(18, 16, seed=9))
    elif change == "time":
        os.utime(path, (1, 1))
    else:
        (tmp_path / "old.png").write_bytes(png(20, 16, seed=9))
        os.utime(tmp_path / "old.png", (1, 1))
        os.replace(tmp_path / "old.png", path)
    again = checked(folder, ImageFacts(tmp_path / "cache"))
    assert decoded[3:] == ["1.png"]
    assert again[1].digest == Sample("", path).digest and again[1].size == Image.open(path).size


def test_an_image_that_is_damaged_later_is_refused(folder, tmp_path):
    checked(folder, ImageFacts(tmp_path / "cache"))
    (folder / "2.png").write_bytes(b"no image")
    for _ in range(2):  # problems are not remembered
        with pytest.raises(UserError, match=r"2\.png"):
            checked(folder, ImageFacts(tmp_path / "cache"))


def test_other_sizes_are_checked_without_decoding(folder, tmp_path, decoded):
    checked(folder, ImageFacts(tmp_path / "cache"))
    samples = [Sample(path.name, path) for path in sorted(folder.glob("*.png"))]
    with pytest.raises(UserError, match="20x16 is smaller than --resolution 32"):
        preflight(samples, 32, "--flag", False, facts=ImageFacts(tmp_path / "cache"))
    assert len(decoded) == 3


def test_verify_decodes_all(folder, tmp_path, decoded):
    checked(folder, ImageFacts(tmp_path / "cache"))
    checked(folder, ImageFacts(tmp_path / "cache", verify=True))
    assert len(decoded) == 6


def test_buckets_need_no_image_after_the_check(folder, monkeypatch):
    samples = checked(folder, ImageFacts())
    monkeypatch.setattr(Sample, "open", lambda self: pytest.fail("opened"))
    _, ids, _ = of_samples(samples, Settings(aspect_ratio_buckets="16,32;16,16"), 1)
    assert ids.tolist() == [1, 1, 1]


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 200, 20))
def test_a_line_that_a_kill_has_cut_off_is_ignored(folder, tmp_path, decoded, cut):
    """And what is appended after it is read."""
    checked(folder, ImageFacts(tmp_path / "cache"))
    file = tmp_path / "cache" / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    checked(folder, ImageFacts(tmp_path / "cache"))
    assert 4 <= len(decoded) <= 5
    lines = len(decoded)
    checked(folder, ImageFacts(tmp_path / "cache"))
    assert len(decoded) == lines


def test_a_foreign_file_is_ignored(folder, tmp_path, decoded):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(np.random.default_rng(0).bytes(5000) + b"\n{}\nkey {}\nkey []\n\n")
    checked(folder, ImageFacts(tmp_path / "cache"))
    assert len(decoded) == 3
    checked(folder, ImageFacts(tmp_path / "cache"))
    assert len(decoded) == 3


def test_a_damaged_line_is_ignored(folder, tmp_path, decoded):
    checked(folder, ImageFacts(tmp_path / "cache"))
    file = tmp_path / "cache" / FILE
    for damage in ((b'"size"', b'"seze"'), (b'"digests"', b'"digests'), (b"[20, 16]", b"2")):
        content = file.read_bytes()
        file.write_bytes(content.replace(*damage))
        decoded.clear()
        assert [s.size for s in checked(folder, ImageFacts(tmp_path / "cache"))] == [(20, 16)] * 3
        assert len(decoded) == 3
        file.write_bytes(content)


def test_only_the_main_process_writes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_rank", 1)
    checked(folder, ImageFacts(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


WRITER = """
import sys
from pathlib import Path
from mindtune.data.checks import preflight
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import Sample
folder, cache = map(Path, sys.argv[1:])
preflight([Sample(p.name, p) for p in sorted(folder.glob("*.png"))], 16, "--flag", False, facts=ImageFacts(cache))
"""


def test_two_processes_may_write_at_the_same_time_and_be_killed(tmp_path, decoded):
    """Every line that is there afterwards is whole and right."""
    folder, cache = tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03d}.png").write_bytes(png(16 + number % 5, 16, seed=number))
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, folder, cache]) for _ in range(2)]
    deadline = time.monotonic() + 60
    while not (cache / FILE).exists() or (cache / FILE).stat().st_size < 10_000:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    processes[0].send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-9, 0]
    again = checked(folder, ImageFacts(cache))
    assert decoded == []
    assert [s.digest for s in again] == [Sample("", path).digest for path in sorted(folder.glob("*.png"))]
    assert {s.size for s in again} == {(16 + number, 16) for number in range(5)}


# ---- pairs ---------------------------------------------------------------------------------------


def checked_pairs(arguments, cache):
    return preflight_pairs(load_pairs(Source(**arguments)), 16, "--flag", False, facts=ImageFacts(cache))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_pairs_of_every_form(sources, form, tmp_path, decoded):
    first = checked_pairs(sources[form], tmp_path / "facts")
    assert len(decoded) == 2 * COUNT
    again = checked_pairs(sources[form], tmp_path / "facts")
    assert len(decoded) == 2 * COUNT
    for pairs in (first, again):
        for pair, condition in zip(pairs, CONDITIONS):
            assert pair.image.size == pair.condition.size == (16, 16)
            assert pair.image.known_digest == Sample("", pair.image.read()).digest
            assert pair.condition.known_digest == Sample("", condition).digest


def test_a_changed_row_is_decoded_again(tmp_path, decoded):
    """The parquet file has another time and size, so all of its rows count as changed."""
    arguments = {"train_data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "datasets")}
    (tmp_path / "data").mkdir()
    for seed in (0, 1):
        table(image=[png(seed=seed)] * COUNT).to_parquet(tmp_path / "data" / "train.parquet")
        pairs = checked_pairs(arguments, tmp_path / "facts")
        assert len(decoded) == 2 * COUNT * (seed + 1)
        assert pairs[3].image.digest == Sample("", png(seed=seed)).digest


def test_what_is_remembered_of_transparent_conditions(tmp_path, decoded, capsys):
    """The background is chosen as before, and belongs to the digest."""
    transparent = [drawing(WHITE, number) for number in range(COUNT)]
    (tmp_path / "data").mkdir()
    table(image=[drawing(RED, 0)] * COUNT, conditioning_image=transparent).save_to_disk(tmp_path / "data")
    said = []
    for _ in range(2):
        pairs = checked_pairs({"train_data_dir": str(tmp_path / "data")}, tmp_path / "facts")
        assert pairs.background == "black"
        assert pairs[0].condition.known_digest == Sample("", transparent[0], background="black").digest
        said.append([line for line in capsys.readouterr().out.splitlines() if "transparent" in line])
    assert len(decoded) == 2 * COUNT and said[0] == said[1] and len(said[0]) == 1


def test_an_image_that_is_also_a_condition(tmp_path, decoded):
    """The two are inspected for different things."""
    files = as_folder(tmp_path)
    path = Path(files["train_data_dir"]) / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["conditioning_image_file_name"] = row["file_name"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(tmp_path / "conditions", ignore_errors=True)
    for _ in range(2):
        checked_pairs(files, tmp_path / "facts")
        assert len(decoded) == 2 * COUNT


def test_facts_follow_a_selection(sources):
    pairs = preflight_pairs(load_pairs(Source(**sources[FORMS[0]])), 16, "--flag", False).select([4, 1]).select([1])
    assert pairs[0].image.known_digest == Sample("", pairs[0].image.read()).digest
    assert next(iter(pairs)).condition.known_digest == Sample("", pairs[0].condition.read()).digest
