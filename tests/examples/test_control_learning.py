"""A ControlNet learns to fill outlines in minutes, and learns nothing when outlines and pictures do not belong together."""

import json
import shlex

import numpy as np
import pytest
from conftest import load_script

demo = load_script("examples/demo_flux_controlnet.py")
shapes = load_script("examples/tiny/shapes.py")
STEPS = 250


@pytest.fixture(scope="module", params=["paired", "shuffled"])
def trained(request, tmp_path_factory):
    """(how outlines were paired, the directory of a short run of the demonstration)."""
    out = tmp_path_factory.mktemp(request.param)
    shapes.make_folder(out / "train", 400, 64, 0, "train")
    shapes.make_folder(out / "held_out", 16, 64, 0, "held_out")
    if request.param == "shuffled":
        path = out / "train" / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        outlines = [row["conditioning_image_file_name"] for row in rows]
        for row, other in zip(rows, np.random.default_rng(0).permutation(outlines)):
            row["conditioning_image_file_name"] = str(other)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = demo.TRAIN.format(out=shlex.quote(str(out)), steps=STEPS) + " --validation_split 0 --report_to none"
    quick += f" --cache_dir {shlex.quote(str(tmp_path_factory.getbasetemp() / 'control-cache'))}"  # both pairings are of the same pictures
    demo.run(quick.replace("{", "{{").replace("}", "}}"))
    return request.param, out


def test_the_drawn_shape_follows_the_outline_it_was_taught_with(trained):
    """Intersection over union with the outlined shape on held-out pairs, against the base alone."""
    how, out = trained
    covered = np.mean(demo.draw(out, "controlled", 1.0)[1])
    if how == "shuffled":
        assert covered < 0.5
    else:
        assert covered >= 0.58 and covered >= np.mean(demo.draw(out, "base", 0.0)[1]) + 0.25
