"""The check of a data set before a run: its report on prepared folders, which it does not change."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from mindtune.check_data import main
from mindtune.cli import UserError, run_script
from mindtune.data.buckets import cropped_share
from mindtune.data.folders import samples_in_folder
from mindtune.encode import child
from mindtune.encode.encoder_stage import EncoderStage


def write_image(path, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def snapshot(*folders):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def check(tmp_path, capsys):
    """check(*flags): exit code, the JSON and the printed table."""

    def check(*flags):
        code = main([*map(str, flags), "--json", str(tmp_path / "report.json")])
        return code, json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return check


@pytest.fixture
def folder(tmp_path):
    """Two good images, one of them twice, one too small, one truncated, one that is text; a caption of 100 words."""
    data = tmp_path / "data"
    data.mkdir()
    write_image(data / "a.png", 64, 64)
    write_image(data / "b.png", 96, 64, seed=1)
    (data / "c.png").write_bytes((data / "a.png").read_bytes())
    write_image(data / "small.png", 40, 63, seed=2)
    (data / "torn.png").write_bytes((data / "b.png").read_bytes()[:2000])
    (data / "words.png").write_text("not an image")
    (data / "a.txt").write_text("cat " * 100)
    return data


def test_all_problems_are_in_the_text_and_in_the_json(check, folder, tiny_flux):
    before = snapshot(folder, tiny_flux)
    more = ["--pretrained_model_name_or_path", tiny_flux, "--instance_prompt", "a cat", "--max_sequence_length", 64]
    code, report, table = check("--instance_data_dir", folder, "--resolution", 64, *more)
    assert code == 1 and not report["can_start"] and "would not start" in table
    assert (report["kind"], report["found"], report["usable"]) == ("pictures", 6, 3)
    assert [problem.split(":")[0] for problem in report["problems"]] == ["small.png", "torn.png", "words.png"]
    assert "40x63 is smaller than --resolution 64" in report["problems"][0] and "damaged" in report["problems"][1]
    assert report["duplicates"] == [["a.png", "c.png"]] and "a.png = c.png" in table
    long = {item["encoder"]: item for item in report["captions_too_long"]}
    assert {item["name"] for item in long.values()} == {"a.png"}
    assert (
        long["CLIP"]["limit"] == 77
        and long["CLIP"]["tokens"] > 100
        and long["T5"]["limit"] == 64
        and long["T5"]["tokens"] > 64
    )
    assert all(name in table for name in ("small.png: 40x63", "torn.png: damaged", "a.png: "))
    assert snapshot(folder, tiny_flux) == before


def test_the_size_of_the_cache(check, photos, tiny_flux, tmp_path):
    """The size of the cache is that of the entries that the encoder stage writes, without their headers."""
    stage = EncoderStage(
        root=tiny_flux, variant=None, precision="no", cache_dir=tmp_path / "cache", max_sequence_length=16
    )
    samples = samples_in_folder(str(photos), "--instance_data_dir")
    child.encode_captions(stage, ["a photo of sks cat"])
    child.encode_images(stage, [(sample, (32, 32), flip) for sample in samples for flip in (False, True)])
    pipeline = ["--pretrained_model_name_or_path", tiny_flux, "--max_sequence_length", 16]
    prompt = ["--instance_prompt", "a photo of sks cat", "--random_flip"]
    code, report, text = check("--instance_data_dir", photos, "--resolution", 32, *pipeline, *prompt)
    assert code == 0 and "a run can start" in text
    expected = sum(report["cache_bytes"].values())
    entries = list((tmp_path / "cache").rglob("*.safetensors"))
    written = sum(path.stat().st_size for path in entries)
    assert len(entries) == 2 + 2 * 5 and expected <= written <= expected + 600 * len(entries)


def test_images_without_any_caption_cannot_start(check, photos):
    code, report, _ = check("--instance_data_dir", photos, "--resolution", 64)
    assert code == 1 and len(report["without_caption"]) == 5 and not report["problems"]
    assert check("--instance_data_dir", photos, "--resolution", 64, "--instance_prompt", "a cat")[0] == 0


def test_class_images_are_checked_too(check, photos, folder):
    more = ["--instance_prompt", "a cat", "--class_data_dir", folder, "--class_prompt", "a dog", "--resolution", 64]
    code, report, _ = check("--instance_data_dir", photos, *more)
    assert (
        code == 1 and report["found"] == 11 and report["usable"] == 8 and report["data"] == [str(photos), str(folder)]
    )


def test_pairs_of_different_sizes_and_cropping_to_buckets(check, tmp_path):
    pairs = tmp_path / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(pairs, 4, 64, seed=0, split="train")
    before = snapshot(pairs)
    code, report, table = check("--train_data_dir", pairs, "--aspect_ratio_buckets", "64,64;32,64")
    assert code == 0 and (report["kind"], report["usable"]) == ("pairs", 4) and snapshot(pairs) == before
    assert [b["pictures"] for b in report["buckets"]] == [4, 0]
    conditions = sorted((pairs / "conditioning").iterdir())
    write_image(conditions[1], 72, 64)
    code, report, table = check("--train_data_dir", pairs, "--aspect_ratio_buckets", "64,32")
    assert code == 1 and len(report["problems"]) == 1 and "64x64, its condition 72x64" in report["problems"][0]
    assert report["buckets"][0]["cropped_away_mean"] == pytest.approx(0.5) and " 50.0%" in table


@pytest.fixture
def edits(tmp_path):
    """Pairs with a condition of the same size, of another shape, smaller, and two without one."""
    folder = tmp_path / "edits"
    folder.mkdir()
    rows = []
    for number, condition in enumerate([(64, 64), (90, 60), (32, 32), None, None]):
        write_image(folder / f"{number}.png", 64, 64, seed=number)
        row = {"file_name": f"{number}.png", "text": "make it red"}
        if condition:
            write_image(folder / f"{number}-source.png", *condition, seed=10 + number)
            row["source_file_name"] = f"{number}-source.png"
        rows.append(row)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--train_data_dir", folder, "--cond_image_column", "source", "--resolution", 64]


def test_pairs_of_kontext_may_lack_a_condition_or_have_one_of_another_size(check, edits):
    code, report, table = check(*edits, "--task", "kontext")
    assert code == 0 and (report["usable"], report["without_condition"]) == (5, 2)
    assert "5 pairs, 5 usable, 2 of them without a condition" in table
    keys = ("height", "width", "condition", "pictures")
    assert [[bucket[key] for key in keys] for bucket in report["buckets"]] == [
        [64, 64, None, 2],
        [64, 64, [64, 64], 2],
        [64, 64, [48, 80], 1],
    ]
    assert [line.split()[:3] for line in table.splitlines() if line.startswith("64,64")] == [
        ["64,64", "none", "2"],
        ["64,64", "64,64", "2"],
        ["64,64", "48,80", "1"],
    ]
    lacking, small = report["notes"]
    assert "2 of 5 pairs have no condition, such as " in lacking
    note = "1 conditions are smaller than their crops, and are enlarged: those of"
    assert small == f"--train_data_dir {edits[1]}: {note} {edits[1] / '2.png'}"
    latent = 4 * 32  # bytes of the mean and the variance of 16 channels at one place, in float32
    assert report["cache_bytes"]["latents"] == latent * (5 * 8 * 8 + 2 * 8 * 8 + 6 * 10)


def test_pairs_to_fill_may_lack_a_mask_and_masks_have_the_size_of_the_image(check, edits):
    """Masks are not encoded."""
    code, report, _ = check(*edits, "--task", "fill")
    assert code == 1 and len(report["problems"]) == 2 and "64x64, its condition 90x60" in report["problems"][0]
    assert report["without_condition"] == 2 and report["buckets"][0]["pictures"] == 3
    assert "condition" not in report["buckets"][0] and report["cache_bytes"]["latents"] == 3 * 4 * 32 * 8 * 8


def test_pairs_of_a_controlnet_need_a_condition_each(check, edits):
    with pytest.raises(UserError, match="2 lines of metadata.jsonl cannot be used"):
        check(*edits[:2], "--conditioning_image_column", "source", *edits[4:])


def test_notes_of_a_run_are_in_both(check, tmp_path):
    data = tmp_path / "data"
    (data / "side").mkdir(parents=True)
    write_image(data / "a.png", 64, 64)
    write_image(data / "side/b.png", 64, 64)
    (data / "clip.mov").write_bytes(b"x")
    classes = tmp_path / "class"
    classes.mkdir()
    (classes / "Thumbs.db").write_bytes(b"x")
    more = ["--instance_prompt", "a cat", "--class_data_dir", classes, "--resolution", 64]
    code, report, table = check("--instance_data_dir", data, *more)
    assert code == 0 and all(note in table for note in report["notes"])
    videos, subfolders, no_class = report["notes"]
    assert (
        "clip.mov (videos: save" in videos
        and "side/ with 1 images" in subfolders
        and "no image yet; a run generates them" in no_class
    )


def test_white_drawings_on_a_transparent_background(check, tmp_path):
    (tmp_path / "pairs").mkdir()
    rows = []
    for number in range(3):
        write_image(tmp_path / f"pairs/{number}.png", 64, 64, seed=number)
        drawing = Image.new("RGBA", (64, 64))
        drawing.paste((255, 255, 255, 255), (5, 10 + number, 50, 20))
        drawing.save(tmp_path / f"pairs/{number}-drawn.png")
        rows.append({"file_name": f"{number}.png", "conditioning_image_file_name": f"{number}-drawn.png", "text": "x"})
    (tmp_path / "pairs/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, report, table = check("--train_data_dir", tmp_path / "pairs", "--resolution", 64)
    assert (
        code == 0
        and "3 transparent condition images are put on black" in report["notes"][0]
        and report["notes"][0] in table
    )


def test_names_that_are_not_utf8_are_printed_and_written(photos, tmp_path):
    """On a terminal that accepts UTF-8 only, with --json."""
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    for name in ("b.png", "bad\udce9.png", "\udce8.png"):
        (folder / name).write_bytes((photos / "0.png").read_bytes() if "bad" not in name else b"x")
    line = [
        sys.executable,
        "-m",
        "mindtune.check_data",
        "--instance_data_dir",
        str(folder),
        "--instance_prompt",
        "a cat",
    ]
    line += ["--resolution", "64", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(line, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    printed = done.stdout.decode("utf-8")
    assert "bad\\xe9.png: not an image" in printed and "caf\\xe9: 3 images, 2 usable" in printed
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["problems"][0].startswith("bad\\xe9.png") and report["data"] == [str(folder)]


def test_the_help_says_image_not_picture(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "picture" not in capsys.readouterr().out


def test_cropped_share():
    """A square keeps 100 of 300 columns; a bucket 32 high and 64 wide keeps 50 of 400 rows."""
    assert cropped_share((300, 100), (64, 64)) == pytest.approx(2 / 3)
    assert cropped_share((100, 400), (32, 64)) == pytest.approx(1 - 50 / 400)
    assert cropped_share((640, 320), (32, 64)) == pytest.approx(0)


def test_sizes_of_flux_dev_without_a_model(check, photos):
    """512 T5 tokens of width 4096 and CLIP's 768; mean and variance of 16 channels at an eighth of the size."""
    _, report, table = check("--instance_data_dir", photos, "--resolution", 64, "--instance_prompt", "a cat")
    assert report["cache_for"] == "FLUX.1-dev" and "not counted without" in table
    assert report["cache_bytes"] == {"text": 4 * (512 * 4096 + 768), "latents": 5 * 4 * 32 * 8 * 8}


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["--dataset_name, --train_data_dir and --jsonl_for_train", "none"]),
        (["--instance_data_dir", "no/where"], ["--instance_data_dir no/where", "no such directory"]),
        (["--instance_data_dir", "x", "--train_data_dir", "y"], ["--train_data_dir", "holds pairs"]),
        (["--instance_data_dir", "x", "--task", "fill"], ["--task fill", "is for pairs"]),
        (["--train_data_dir", "no/where"], ["--train_data_dir no/where", "no such directory"]),
        (["--instance_data_dir", "x", "--max_train_samples", "0"], ["--max_train_samples 0: must be at least 1"]),
        (["--instance_data_dir", "x", "--max_train_samples", "-1"], ["--max_train_samples -1: must be at least 1"]),
        (["--instance_data_dir", "x", "--max_sequence_length", "0"], ["--max_sequence_length 0: must be at least 1"]),
        (["--train_data_dir", "x", "--aspect_ratio_buckets", "3"], ["--aspect_ratio_buckets", "height,width"]),
    ],
)
def test_unreadable_data_are_refused(flags, parts):
    with pytest.raises(UserError) as caught:
        main(flags)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    "flags, code",
    [(["--resolution", "64"], 0), (["--resolution", "80"], 1), (["--resolution", "64", "--dataset_name", "x"], 2)],
)
def test_exit_codes_of_the_command(photos, monkeypatch, capsys, flags, code):
    monkeypatch.setattr("mindtune.cli.signal.signal", lambda *_: None)  # `run` replaces the handlers of the tests
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(["--instance_data_dir", str(photos), "--instance_prompt", "a cat", *flags]))
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith("error: give either") == (code == 2)
