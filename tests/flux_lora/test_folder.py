"""Runs on folders and data sets as people have them: what is clear is trained on, what is left out is reported once."""

import base64
import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import metrics
from PIL import Image

from mindtune.data.image_facts import ImageFacts


def smooth(seed, width=64, height=48):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 4, np.full_like(x, 40 * seed)], 2).astype(np.uint8))


@pytest.fixture
def ugly(tmp_path):
    """Seven images of many origins among the files that phones, Windows, macOS and other tools write."""
    folder = tmp_path / "ugly"
    (folder / "side views").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(0).save(folder / "IMG_0001.HEIC", format="HEIF", exif=exif.tobytes())
    smooth(1).save(folder / "b.avif")
    smooth(2).save(folder / "c.gif", save_all=True, append_images=[smooth(3)])
    smooth(3).save(folder / "wrong ending.png", format="JPEG")
    smooth(4).save(folder / "no ending", format="PNG")
    smooth(5).save(folder / "é.png")
    smooth(6).save(folder / os.fsdecode(b"caf\xe9.png"))
    smooth(6).save(folder / "side views/1.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._b.avif"):
        (folder / name).write_bytes(b"\xd0\xcf\x11\xe0")
    for name in ("clip.mov", "b.npz", "meta_cap.json"):
        (folder / name).write_bytes(b"{}")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "b.caption").write_text("by kohya")
    (folder / "c.gif.TXT").write_text("在盒子里", encoding="utf-16")
    (folder / "lonely.txt").write_text("of no image")
    (folder / "metadata.csv").write_text(
        'file_name;text\r\n./IMG_0001.heic;"a cat; sleeping"\r\ne\u0301.png;decomposed\r\n', encoding="utf-8-sig"
    )
    return folder


SAID = (
    "1 broken links are not used: gone.png",
    "1 files are not used: clip.mov (videos: save their frames",
    "1 files are not used: b.npz, no images",
    "1 files are not used: meta_cap.json; captions are read from metadata.csv",
    "subfolders are not used: side views/ with 1 images",
    "1 caption files without an image are not used: lonely.txt",
    "4 of 7 images have a caption of their own; without: caf\\xe9.png, no ending, wrong ending.png",
    "1 images have several frames or pages, of which the first is used: c.gif",
)


def test_an_ugly_folder_is_trained_on(train, ugly, tmp_path, monkeypatch):
    """In a process whose terminal takes only UTF-8."""
    before = {path: path.read_bytes() for path in ugly.rglob("*") if path.is_file()}
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    more = ["--max_train_steps", 2, "--train_batch_size", 2, "--validation_split", 0.3, "--cache_latents"]
    done = train(tmp_path / "out", "--instance_data_dir", ugly, *more, encoding="utf-8")
    assert [done.stdout.count(line) for line in SAID] == [1] * len(SAID), done.stdout
    assert "Thumbs.db" not in done.stdout and "\n5 samples per epoch, 2 held out" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1, 2]
    assert len(json.loads((tmp_path / "out/run.json").read_text())["data"]["held_out"]) == 2
    assert {path: path.read_bytes() for path in ugly.rglob("*") if path.is_file()} == before


def saved(folder, cells):
    data = datasets.Dataset.from_dict({"image": cells, "text": ["one", "two", ""]})
    data.cast_column("image", datasets.Image()).save_to_disk(folder)


def plain(folder, cells):
    folder.mkdir()
    pq.write_table(pa.table({"image": pa.array(cells), "text": ["one", "two", ""]}), folder / "train.parquet")


def base64_text(folder, cells):
    folder.mkdir()
    images = [base64.b64encode(cell["bytes"]).decode() for cell in cells]
    pq.write_table(pa.table({"image": images, "text": ["one", "two", ""]}), folder / "train.parquet")


@pytest.mark.parametrize("write", [saved, plain, base64_text])
def test_a_data_set_of_any_form_gives_the_same_samples(lora_script, flags, tmp_path, write):
    """Names apart, what the run's identity is made of: contents and captions in their order."""
    cells = []
    for number in range(3):
        file = io.BytesIO()
        smooth(number).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": f"{number}.png"})
    write(tmp_path / "set", cells)
    source = ["--instance_data_dir", "", "--dataset_name", tmp_path / "set", "--caption_column", "text"]
    args = lora_script.parse_args(flags(tmp_path / "out", *source, "--cache_dir", tmp_path / "cache"))
    samples = lora_script.load_samples(args, 32, ImageFacts())
    assert [sample.read() for sample in samples] == [cell["bytes"] for cell in cells]
    assert [sample.caption for sample in samples] == ["one", "two", "a photo of sks cat"]
