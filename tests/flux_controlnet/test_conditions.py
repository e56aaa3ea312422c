"""Conditions drawn in white on a transparent ground, as pose and line editors save them, through whole runs."""

import json

import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune.data import pairs


@pytest.fixture
def drawn(tmp_path):
    """Four pairs whose conditions are white bars on nothing; the last bar is missing."""
    folder, rows = tmp_path / "drawn", []
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.full((32, 32, 3), 60 * number, np.uint8)).save(folder / f"{number}.png")
        condition = Image.new("RGBA", (32, 32))
        if number < 3:
            condition.paste((255, 255, 255, 255), (4, 4 + 8 * number, 28, 8 + 8 * number))
        condition.save(folder / f"{number}-lines.png")
        rows.append(
            {
                "file_name": f"{number}.png",
                "conditioning_image_file_name": f"{number}-lines.png",
                "text": "a red circle",
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("more", [["--cache_latents"], ["--streaming"]], ids=["cached", "streamed"])
def test_white_drawings_are_trained_on_and_shown_on_black(control, drawn, tmp_path, capsys, more):
    looking = [
        "--validation_prompt",
        "a red circle",
        "--validation_image",
        drawn / "0-lines.png",
        "--num_validation_images",
        1,
    ]
    control(tmp_path / "out", "--train_data_dir", drawn, *more, *looking, "--max_train_steps", 2)
    printed = capsys.readouterr().out
    where = f"--train_data_dir {drawn}{', 4 pairs of its first 256 rows' if more == ['--streaming'] else ''}"
    hidden = "on white 100% of their drawing would not be visible"
    assert printed.count(f"{where}: 4 transparent condition images are put on black; {hidden}\n") == 1
    assert printed.count(f"{where}: 1 of 4 condition images are blank, all pixels have the same colour: ") == 1
    assert json.loads((tmp_path / "out/run.json").read_text())["data"]["condition_background"] == "black"
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1, 2]
    grid = np.asarray(Image.open(tmp_path / "out/samples/final.png").convert("RGB"))
    shown = grid[-192:, :192]  # the condition, enlarged: a white bar on black
    assert (shown[2, 2] == 0).all() and (shown[6 * 6, 96] == 255).all()


def test_the_conditions_of_white_drawings_differ(load_data, drawn, tmp_path):
    """What reaches the step is the drawing, not a white square."""
    _, data = load_data("--train_data_dir", drawn, "--cache_dir", tmp_path / "cache")
    assert isinstance(data.train, pairs.Pairs) and data.background == "black"
    conditions = [np.asarray(pair.condition.open()) for pair in data.train]
    assert [np.unique(condition).tolist() for condition in conditions] == [[0, 255]] * 3 + [[0]]
    assert len({pair.condition.digest for pair in data.train}) == 4
