"""The check of a data set before a run: its findings against folders made for the purpose, and that it leaves them alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from mindtune.check_data import cropped_away, main
from mindtune.cli import UserError
from mindtune.encode.encoder_stage import Stage


def picture(path, width, height, seed=0):
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

    def run(*flags):
        code = main([*map(str, flags), "--json", str(tmp_path / "report.json")])
        return code, json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


@pytest.fixture
def folder(tmp_path):
    """Two good pictures, one of them twice, one too small, one torn, one that is none; one caption is 100 words long."""
    data = tmp_path / "data"
    data.mkdir()
    picture(data / "a.png", 64, 64)
    picture(data / "b.png", 96, 64, seed=1)
    (data / "c.png").write_bytes((data / "a.png").read_bytes())
    picture(data / "small.png", 40, 63, seed=2)
    (data / "torn.png").write_bytes((data / "b.png").read_bytes()[:2000])
    (data / "words.png").write_text("not a picture")
    (data / "a.txt").write_text("cat " * 100)
    return data


def test_every_finding_is_in_the_table_and_in_the_json(check, folder, tiny_flux):
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


def test_a_folder_that_can_start_says_what_the_run_will_cost(
    check, photos, tiny_flux, encoder_cache, lora_script, flags, tmp_path
):
    """The bytes of the cache are those that the encode stage writes, headers apart."""
    cache = tmp_path / "cache"
    args = lora_script.parse_args(flags(tmp_path / "out", "--cache_dir", cache))
    stage = lora_script.make_stage(args, tiny_flux, "no")
    assert isinstance(stage, Stage)
    samples = lora_script.load_samples(args, [(32, 32)])
    stage.prepare({s.caption for s in samples}, [(s, (32, 32), flip) for s in samples for flip in (False, True)])
    more = [
        "--pretrained_model_name_or_path",
        tiny_flux,
        "--instance_prompt",
        "a photo of sks cat",
        "--max_sequence_length",
        16,
        "--random_flip",
    ]
    code, report, table = check("--instance_data_dir", photos, "--resolution", 32, *more)
    assert code == 0 and "a run can start" in table
    wanted = sum(report["cache_bytes"].values())
    written = sum(path.stat().st_size for path in (cache / "mindtune").iterdir())
    assert wanted <= written <= wanted + 600 * len(list((cache / "mindtune").iterdir()))


def test_pictures_without_any_caption_cannot_start(check, photos):
    code, report, _ = check("--instance_data_dir", photos, "--resolution", 64)
    assert code == 1 and len(report["without_caption"]) == 5 and not report["problems"]
    assert check("--instance_data_dir", photos, "--resolution", 64, "--instance_prompt", "a cat")[0] == 0


def test_class_pictures_are_looked_at_too(check, photos, folder):
    more = ["--instance_prompt", "a cat", "--class_data_dir", folder, "--class_prompt", "a dog", "--resolution", 64]
    code, report, _ = check("--instance_data_dir", photos, *more)
    assert (
        code == 1 and report["found"] == 11 and report["usable"] == 8 and report["data"] == [str(photos), str(folder)]
    )


def test_pairs_of_other_sizes_and_what_buckets_leave_out(check, tmp_path):
    pairs = tmp_path / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(pairs, 4, 64, seed=0, split="train")
    before = snapshot(pairs)
    code, report, table = check("--train_data_dir", pairs, "--aspect_ratio_buckets", "64,64;32,64")
    assert code == 0 and (report["kind"], report["usable"]) == ("pairs", 4) and snapshot(pairs) == before
    assert [b["pictures"] for b in report["buckets"]] == [4, 0]
    conditions = sorted((pairs / "conditioning").iterdir())
    picture(conditions[1], 72, 64)
    code, report, table = check("--train_data_dir", pairs, "--aspect_ratio_buckets", "64,32")
    assert code == 1 and len(report["problems"]) == 1 and "64x64, its condition 72x64" in report["problems"][0]
    assert report["buckets"][0]["cropped_away_mean"] == pytest.approx(0.5) and " 50.0%" in table


def test_what_a_run_would_say_of_the_data_is_in_both(check, tmp_path):
    data = tmp_path / "data"
    (data / "side").mkdir(parents=True)
    picture(data / "a.png", 64, 64)
    picture(data / "side/b.png", 64, 64)
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


def test_white_drawings_on_transparent_ground(check, tmp_path):
    (tmp_path / "pairs").mkdir()
    rows = []
    for number in range(3):
        picture(tmp_path / f"pairs/{number}.png", 64, 64, seed=number)
        drawing = Image.new("RGBA", (64, 64))
        drawing.paste((255, 255, 255, 255), (5, 10 + number, 50, 20))
        drawing.save(tmp_path / f"pairs/{number}-drawn.png")
        rows.append({"file_name": f"{number}.png", "conditioning_image_file_name": f"{number}-drawn.png", "text": "x"})
    (tmp_path / "pairs/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, report, table = check("--train_data_dir", tmp_path / "pairs", "--resolution", 64)
    assert (
        code == 0 and "3 transparent condition images are put on black" in report["notes"][0] and report["notes"][0] in table
    )


def test_names_that_are_not_utf8_are_printed_and_written(photos, tmp_path):
    """On a terminal that takes nothing else, with --json."""
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
    assert "bad\\xe9.png: not an image" in printed and "caf\\xe9: 3 pictures, 2 usable" in printed
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["problems"][0].startswith("bad\\xe9.png") and report["data"] == [str(folder)]


def test_the_help_speaks_of_images(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "picture" not in capsys.readouterr().out


def test_what_cropping_leaves_out():
    """Of a picture of 300 x 100 a square of 100 is kept; of 100 x 400 for a bucket of 32 high and 64 wide, 50 of 400 rows."""
    assert cropped_away((300, 100), (64, 64)) == pytest.approx(2 / 3)
    assert cropped_away((100, 400), (32, 64)) == pytest.approx(1 - 50 / 400)
    assert cropped_away((640, 320), (32, 64)) == pytest.approx(0)


def test_sizes_of_flux_dev_without_a_model(check, photos):
    """A caption of FLUX.1-dev's 512 tokens of 4096 numbers and CLIP's 768; 16 channels of moments, mean and variance, at an eighth."""
    _, report, table = check("--instance_data_dir", photos, "--resolution", 64, "--instance_prompt", "a cat")
    assert report["cache_for"] == "FLUX.1-dev" and "not counted without" in table
    assert report["cache_bytes"] == {"text": 4 * (512 * 4096 + 768), "latents": 5 * 4 * 32 * 8 * 8}


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["--dataset_name, --train_data_dir and --jsonl_for_train", "none"]),
        (["--instance_data_dir", "no/where"], ["--instance_data_dir no/where", "no such directory"]),
        (["--instance_data_dir", "x", "--train_data_dir", "y"], ["--train_data_dir", "holds pairs"]),
        (["--train_data_dir", "no/where"], ["--train_data_dir no/where", "no such directory"]),
        (["--instance_data_dir", "x", "--max_train_samples", "0"], ["--max_train_samples 0: must be at least 1"]),
        (["--instance_data_dir", "x", "--max_train_samples", "-1"], ["--max_train_samples -1: must be at least 1"]),
        (["--instance_data_dir", "x", "--max_sequence_length", "0"], ["--max_sequence_length 0: must be at least 1"]),
        (["--train_data_dir", "x", "--aspect_ratio_buckets", "3"], ["--aspect_ratio_buckets", "height,width"]),
    ],
)
def test_what_cannot_be_read_is_named(flags, parts):
    with pytest.raises(UserError) as caught:
        main(flags)
    assert all(part in str(caught.value) for part in parts)


def test_the_command_ends_with_the_code_that_a_shell_can_ask_for(photos, tmp_path):
    line = [
        sys.executable,
        "-m",
        "mindtune.check_data",
        "--instance_data_dir",
        str(photos),
        "--instance_prompt",
        "a cat",
        "--resolution",
    ]
    assert subprocess.run([*line, "64"], capture_output=True).returncode == 0
    assert subprocess.run([*line, "80"], capture_output=True).returncode == 1
    done = subprocess.run([*line[:-3], "--resolution", "64", "--dataset_name", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: give either")
