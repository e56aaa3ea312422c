"""shapes.py and evaluate_shapes.py: images show what their captions say, and the evaluator recognizes it."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import load_script
from PIL import Image

shapes = load_script("examples/tiny/shapes.py")
evaluator = load_script("examples/tiny/evaluate_shapes.py")


def test_train_has_every_colour_and_shape_and_no_held_out_pair():
    train = shapes.pairs("train")
    held_out = shapes.pairs("held_out")
    assert len(train) == 36 and len(held_out) == 12 and not set(train) & set(held_out)
    assert {colour for colour, _ in train} == set(shapes.COLOURS)
    assert {shape for _, shape in train} == set(shapes.SHAPES)
    assert Counter(shape for _, shape in held_out) == dict.fromkeys(shapes.SHAPES, 2)


def test_the_number_of_scenes_and_whole_shapes_inside_the_image():
    """36 and 12 pairs on 7 other colours at 4 positions in 2 sizes; image borders show only the background."""
    assert [len(set(shapes.scenes(split))) for split in ("train", "held_out")] == [36 * 7 * 4 * 2, 12 * 7 * 4 * 2]
    rng = np.random.default_rng(0)
    for anywhere in (False, True):
        for _ in range(50):
            cover = shapes.mask(shapes.sample_scene(rng, "all", anywhere), 64)
            assert cover.max() == 1 and max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max()) == 0


@pytest.mark.parametrize(
    "shape, area", [("circle", np.pi), ("square", 2.0), ("triangle", 1.299), ("ring", 0.75 * np.pi), ("cross", 2.218)]
)
def test_the_areas_of_shapes(shape, area):
    """In units of the radius squared: pi, 2, 3 sqrt(3)/4, 3 pi/4, and two bars 1.9 by 0.72 that cross."""
    scene = shapes.Scene(shape, "red", "blue", (0.47, 0.52), 0.3)
    assert shapes.mask(scene, 128).sum() / 128**2 == pytest.approx(area * 0.3**2, rel=0.03)


def test_an_image_has_its_two_colours_away_from_edges():
    scene = shapes.Scene("square", "orange", "purple")
    pixels = np.asarray(shapes.render(scene, 64))
    cover = shapes.mask(scene, 64)
    assert (pixels[cover == 1] == shapes.COLOURS["orange"]).all()
    assert (pixels[cover == 0] == shapes.COLOURS["purple"]).all()


def test_the_outline_lies_on_the_shapes_edge():
    """Every pixel of the outline has both the shape and the background within three pixels."""
    for kind in shapes.SHAPES:
        scene = shapes.Scene(kind, "red", "blue", (0.55, 0.45), 0.3)
        lit = np.asarray(shapes.render_outline(scene, 64))[..., 0] > 128
        cover = shapes.mask(scene, 64)
        grown = [np.roll(cover, (dy, dx), (0, 1)) for dy in range(-3, 4) for dx in range(-3, 4)]
        assert (np.max(grown, axis=0)[lit] > 0).all() and (np.min(grown, axis=0)[lit] < 1).all()


def test_a_folder_is_a_dataset_and_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        shapes.make_folder(tmp_path / name, 4, 32, 7, "train")
    bytes_of = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("a", "b")]
    assert bytes_of[0] == bytes_of[1] and len(bytes_of[0]) == 9
    rows = datasets.load_dataset(str(tmp_path / "a"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["image", "conditioning_image", "text"] and rows[0]["image"].size == (32, 32)
    with pytest.raises(FileExistsError, match="not empty"):
        shapes.make_folder(tmp_path / "a", 1, 32, 7, "train")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_evaluator_recognizes_exact_images(split):
    rng = np.random.default_rng(3)
    scenes = [shapes.sample_scene(rng, split) for _ in range(100)]
    result = evaluator.score([shapes.render(scene, 64) for scene in scenes], [scene.caption for scene in scenes])
    assert result["all"] > 0.97


def test_the_evaluator_tolerates_noise_but_no_wrong_caption():
    rng = np.random.default_rng(4)
    scenes = [shapes.sample_scene(rng, "all") for _ in range(60)]
    noisy = []
    for scene in scenes:
        pixels = np.asarray(shapes.render(scene, 64), float) + rng.normal(0, 12, (64, 64, 3))
        noisy.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert evaluator.score(noisy, [scene.caption for scene in scenes])["all"] > 0.9
    others = [scenes[(i + 1) % 60].caption for i in range(60)]
    assert evaluator.score(noisy, others)["all"] < 0.1


def test_the_evaluator_tells_the_subject_from_plain_and_other_checkered_shapes(tmp_path):
    shapes.make_subject(tmp_path, 64)
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == 6 and all(evaluator.is_subject(Image.open(path), shapes.SUBJECT) for path in paths)
    assert (tmp_path / "sks-blue.txt").read_text() == "a sks circle on a blue background\n"
    rng = np.random.default_rng(5)
    plain = [shapes.sample_scene(rng, "all") for _ in range(40)]
    others = [scene._replace(colour="purple", second="orange", background="green") for scene in plain]
    halves = [np.asarray(shapes.render(scene._replace(colour="red", background="blue"), 64)).copy() for scene in plain]
    for pixels in halves:  # the right colours, but the left half red and the right half white
        white = (pixels == shapes.COLOURS["red"]).all(-1) & (np.arange(64) > np.nonzero(pixels[..., 0] > 128)[1].mean())
        pixels[white] = shapes.COLOURS["white"]
    images = [shapes.render(scene, 64) for scene in (*plain, *others)] + [Image.fromarray(pixels) for pixels in halves]
    assert not any(evaluator.is_subject(image, shapes.SUBJECT) for image in images)


def test_a_blob_and_an_empty_image_have_no_shape():
    plain = Image.new("RGB", (64, 64), shapes.COLOURS["red"])
    assert evaluator.recognize(plain)[:3] == (None, None, "red")
    pixels = np.asarray(plain).copy()
    pixels[np.random.default_rng(0).random((64, 64)) < 0.3] = shapes.COLOURS["blue"]
    assert evaluator.recognize(Image.fromarray(pixels)).shape is None


def test_the_commands(tmp_path, capsys):
    shapes.main([str(tmp_path / "w"), "--count", "5", "--size", "64", "--split", "held_out"])
    assert "wrote 5 scenes of the split held_out" in capsys.readouterr().out
    lines = (tmp_path / "w" / "metadata.jsonl").read_text().splitlines()
    assert all(shapes.held_out(*json.loads(line)["text"].split()[1:3]) for line in lines)
    evaluator.main(["--folder", str(tmp_path / "w")])
    assert "shape         1.000" in capsys.readouterr().out
