"""The data set of the form: the table is that of `python -m mindtune.check_data`, the thumbnails are the images."""

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from mindtune import check_data
from mindtune.app import data
from mindtune.cli import UserError


def test_images_have_the_report_of_check_data_and_a_thumbnail_each(tmp_path, capsys):
    for number, size in enumerate([(600, 300), (64, 80)]):
        Image.new("RGB", size, (200, 40 * number, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    (tmp_path / "0.txt").write_text("a wide cat")
    values = {"instance_data_dir": str(tmp_path), "instance_prompt": "a cat", "resolution": 64, "output_dir": "x"}
    report, thumbnails = data.check({**values, "caption_column": None})
    check_data.main([f"--{name}={values[name]}" for name in ("instance_data_dir", "instance_prompt", "resolution")])

    def without_free_disk(text):
        return [line for line in text.splitlines() if not line.startswith("free: ")]

    assert without_free_disk(report) == without_free_disk(capsys.readouterr().out)
    assert "torn.png" in report and "a run would not start with this data" in report
    assert [(image.size, caption) for image, caption in thumbnails] == [((256, 128), "a wide cat"), ((64, 80), "a cat")]
    assert thumbnails[1][0].getpixel((3, 3)) == (200, 40, 0)


def test_a_pair_is_one_thumbnail_with_the_condition_on_the_right(tmp_path):
    load_script("examples/tiny/shapes.py").make_folder(tmp_path, 5, 64, seed=0, split="train")
    report, thumbnails = data.check({"train_data_dir": str(tmp_path), "resolution": 64}, count=3)
    assert "5 pairs, 5 usable" in report and len(thumbnails) == 3
    image, caption = thumbnails[0]
    assert image.size == (128, 64) and " on a " in caption
    halves = np.asarray(image)[:, :64], np.asarray(image)[:, 64:]
    for half, folder in zip(halves, ("images", "conditioning")):
        first = sorted((tmp_path / folder).iterdir())[0]
        assert np.array_equal(half, np.asarray(Image.open(first).convert("RGB")))


def test_pairs_are_checked_by_the_rules_of_their_script(tmp_path, scripts):
    """A source may have another size, or be missing; a mask may be missing; the condition of a Control-LoRA may not."""
    for name, size in (("a", (64, 64)), ("b", (96, 64)), ("c", (64, 64))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    lines = ['"a.png", "conditioning_image_file_name": "b.png"', '"c.png", "conditioning_image_file_name": "a.png"']
    lines = [f'{{"file_name": {line}, "text": "x"}}\n' for line in lines]

    def usable(script, **values):
        values = {"train_data_dir": str(tmp_path), "resolution": 64, **values}
        task = data.task_of(str(scripts[script][0]), values)
        report, thumbnails = data.check(values, task=task)
        return task, "2 pairs, 2 usable" in report, [image.width for image, _ in thumbnails]

    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    assert usable("FLUX Kontext LoRA") == ("kontext", True, [160, 128])
    assert usable("FLUX Control-LoRA", fill=False) == ("controlnet", False, [160, 128])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + lines[1])
    assert usable("FLUX Control-LoRA", fill=True)[:2] == ("fill", True)


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no image in this directory"):
        data.check({"instance_data_dir": str(tmp_path), "resolution": 64})
