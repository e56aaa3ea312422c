"""Validation: when the held-out loss is measured and images are sampled, with which weights, and what is written."""

import contextlib
import json
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from PIL import Image

from mindtune.distributed import ranks
from mindtune.run import validation
from mindtune.run.evaluation import HELD_OUT_INDICES
from mindtune.run.validation import Validation
from mindtune.run.validation_rows import Row


class Step(nn.Cell):
    """Its prediction is the timestep in thousandths, its target the sample id."""

    def predict(self, sample, timestep):
        shape = (1, 1, 1, 1)
        return timestep.reshape(shape) / 1000.0, sample.reshape(shape), sample.reshape(shape)


class FakeRun:
    """A run that is its own curve and tracker, and notes what is logged."""

    def __init__(self, output_dir, step=1, held_out=2, axis="sigma"):
        self.step = step
        self.output_dir = output_dir
        self.axis = axis
        self.hub_id = None
        self.gallery = []
        self.points = []
        self.logged = []
        self.curve = self.tracker = self
        self.data = SimpleNamespace(
            held_out=[None] * held_out, held_out_use=lambda sample_id, timestep: (sample_id, timestep)
        )

    def has(self, step):
        return bool(self.points)

    def add(self, step, places, losses):
        self.points += zip(places, losses)

    def log(self, step, **values):
        self.logged.append(values)

    def image(self, step, name, image):
        self.logged.append((name, image.size))


def two_images(prompt="a cat", condition=None):
    """The rows of a prompt of the flags, with two images of 32 x 32 pixels."""
    return [Row(prompt, 7, 20, 3.5, (32, 32), number, condition=condition) for number in (0, 1)]


def row(prompt, number, place=0):
    """A row of the flags, or with `place` of a file."""
    return Row(prompt, 7, 20, 3.5, (32, 32), number, place=place)


class Sampler:
    """Its images have a colour of their own: red is the index of the row, green says which model."""

    def __init__(self, rows=None):
        self.rows = two_images() if rows is None else rows
        self.calls = []

    def sample(self, final):
        self.calls.append(final)
        names = ("base", "adapter") if final else ("adapter",)
        return {name: [self.image(index, name) for index in range(len(self.rows))] for name in names}

    def image(self, index, name):
        return Image.new("RGB", self.rows[index].size[::-1], (index, 100 if name == "base" else 200, 0))


def make_batch(uses):
    ((sample_id, timestep),) = uses
    return np.float32([sample_id]), np.float32([timestep])


PLACES = np.linspace(1, 0, 1000)


def make_validation(run, sampler, ema=None):
    return Validation(run, Step(), [], make_batch, PLACES, sampler, ema)


@pytest.mark.parametrize("axis", ["sigma", "timestep"])
def test_held_out_loss_is_the_mean_over_samples_at_each_timestep(tmp_path, axis):
    run = FakeRun(tmp_path, step=0, axis=axis)
    validate = make_validation(run, Sampler())
    assert validate() is None  # no images before the first update
    expected = [np.mean([(index / 1000 - sample) ** 2 for sample in (0, 1)]) for index in HELD_OUT_INDICES]
    np.testing.assert_allclose(run.points, list(zip(PLACES[HELD_OUT_INDICES], expected)), rtol=1e-5)
    (logged,) = run.logged
    assert logged.pop("held_out__loss") == pytest.approx(np.mean(expected))
    labels = [f"{PLACES[index]:.3f}" if axis == "sigma" else str(index) for index in HELD_OUT_INDICES]
    assert list(logged) == [f"held_out__loss_at_{label}" for label in labels]
    validate()
    assert len(run.logged) == 1  # measured once per update


def test_images_are_sampled_for_prompts_after_the_first_update(tmp_path):
    run, sampler = FakeRun(tmp_path, held_out=0), Sampler()
    assert make_validation(run, sampler)() == tmp_path / "samples" / "step-000001.png"
    assert make_validation(run, sampler)(final=True) == tmp_path / "samples" / "final.png"
    assert sampler.calls == [False, True] and len(run.logged) == 2
    assert run.logged[1] == ("validation", Image.open(tmp_path / "samples" / "final.png").size)
    assert make_validation(run, Sampler(rows=[]))() is None


def test_the_grid_has_a_row_per_prompt_and_model(tmp_path, monkeypatch):
    """It starts with the condition; images of a file are not in the grid."""
    given = []
    monkeypatch.setattr(validation, "image_grid", lambda *cells: given.append(cells) or Image.new("RGB", (8, 8)))
    condition = Image.new("RGB", (32, 32), "blue")
    rows = [*two_images(), *two_images("a dog", condition), Row("a cow", 7, 20, 3.5, (48, 32), place=1)]
    validate = make_validation(FakeRun(tmp_path, held_out=0), Sampler(rows))
    validate()
    validate(final=True)
    (cells, labels), (final_cells, final_labels) = given
    assert labels == ["a cat", "a dog"]
    assert final_labels == ["a cat (base)", "a cat (adapter)", "a dog (base)", "a dog (adapter)"]
    colours = [[image.getpixel((0, 0)) for image in row] for row in cells]
    assert colours == [[(0, 200, 0), (1, 200, 0)], [(0, 0, 255), (2, 200, 0), (3, 200, 0)]]
    assert [row[-1].getpixel((0, 0)) for row in final_cells] == [(1, 100, 0), (1, 200, 0), (3, 100, 0), (3, 200, 0)]


def test_every_row_of_a_file_is_a_picture_of_its_own(tmp_path):
    """The folder of a validation also has the conditions, at the end the base model's images, and what the rows are."""
    condition = Image.new("RGB", (48, 32), "blue")
    first = Row("a 猫", 1, 20, 3.5, (32, 48), image="a\udce9.png", condition=condition, place=1)
    rows = [*two_images(), first, Row("a dog", 2, 20, 3.5, (64, 32), place=2)]
    run = FakeRun(tmp_path, held_out=0)
    validate = make_validation(run, Sampler(rows))
    assert validate() == tmp_path / "samples" / "step-000001.png"
    assert validate(final=True) == tmp_path / "samples" / "final.png"
    expected = {"row-01.png": (2, 200, 0), "row-01-condition.png": (0, 0, 255), "row-02.png": (3, 200, 0)}
    found = {path.name: Image.open(path) for path in (tmp_path / "samples" / "step-000001").glob("*.png")}
    assert {name: image.getpixel((0, 0)) for name, image in found.items()} == expected
    assert found["row-01.png"].size == (48, 32) and found["row-02.png"].size == (32, 64)
    expected.update({"row-01-base.png": (2, 100, 0), "row-02-base.png": (3, 100, 0)})
    found = {path.name: Image.open(path) for path in (tmp_path / "samples" / "final").glob("*.png")}
    assert {name: image.getpixel((0, 0)) for name, image in found.items()} == expected
    lines = (tmp_path / "samples" / "final" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row.describe() for row in rows[2:]] and "猫" in lines[0]
    logged = [("validation/row-01", (48, 32)), ("validation/row-02", (32, 64))]
    assert [logged_images for logged_images in run.logged if logged_images[0] != "validation"] == logged * 2


def test_a_file_alone_gives_no_grid_and_an_older_validation_is_replaced(tmp_path):
    run = FakeRun(tmp_path, held_out=0)
    file = [Row(prompt, 7, 20, 3.5, (32, 32), place=place) for place, prompt in enumerate("abc", 1)]
    make_validation(run, Sampler(file))()
    assert make_validation(run, Sampler(file[1:2]))() == tmp_path / "samples" / "step-000001"
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000001"]
    assert (tmp_path / "samples" / "step-000001" / "rows.jsonl").read_text().count("\n") == 1


def test_the_gallery_has_one_image_per_prompt_by_the_trained_model(tmp_path):
    """The red ones, by the model that is named last. Only the last validation saves them."""
    red, other = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "gray")
    rows = [row("a cat", 0), row("a cat", 1), row("a dog", 0)]
    for name, images in (("lora", {"base": [other] * 3}), ("controlnet", {})):
        sampler = Sampler(rows)
        sampler.sample = lambda final, images=images: {**images, "trained": [red, other, red]}
        run = FakeRun(tmp_path / name, held_out=0)
        for run.hub_id, final in ((None, True), ("me/model", False)):
            make_validation(run, sampler)(final=final)
            assert run.gallery == [] and not list((tmp_path / name).glob("samples/final-*"))
        make_validation(run, sampler)(final=True)
        assert run.gallery == [("a cat", "samples/final-1.png"), ("a dog", "samples/final-2.png")]
        for _, file in run.gallery:
            assert Image.open(tmp_path / name / file).getpixel((0, 0)) == (255, 0, 0)


def test_the_gallery_of_a_file_names_its_images(tmp_path):
    rows = [row("a cat", 0), row("a dog", 0, place=1)]
    images = {"trained": [Image.new("RGB", (8, 8))] * 2}
    gallery = validation.save_gallery(tmp_path, rows, images)
    assert gallery == [("a cat", "samples/final-1.png"), ("a dog", "samples/final/row-01.png")]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["final-1.png"]


def test_the_last_images_of_an_earlier_end_are_removed(tmp_path):
    """Those of rows and prompts that are not there any more, also if there are none at all. Others stay."""
    run = FakeRun(tmp_path, held_out=0)
    make_validation(run, Sampler([row("a", 0), row("b", 0, place=1), row("c", 0, place=2)]))(final=True)
    samples = tmp_path / "samples"
    (samples / "final-holiday.png").write_bytes(b"mine")
    make_validation(run, Sampler([row("b", 0, place=1)]))(final=True)
    assert not (samples / "final.png").exists()
    assert sorted(path.name for path in (samples / "final").iterdir()) == [
        "row-01-base.png",
        "row-01.png",
        "rows.jsonl",
    ]
    make_validation(run, Sampler([]))(final=True)
    assert not list((samples / "final").iterdir()) and (samples / "final-holiday.png").exists()


def test_a_gallery_of_many_prompts_has_eight_images(tmp_path):
    prompts = [str(number) for number in range(11)]
    images = {"trained": [Image.new("RGB", (8, 8))] * 11}
    gallery = validation.save_gallery(tmp_path, [row(prompt, 0) for prompt in prompts], images)
    assert [prompt for prompt, _ in gallery] == prompts[:8] and len(list((tmp_path / "samples").iterdir())) == 8


def test_other_ranks_validate_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "_rank", 1)
    run, sampler = FakeRun(tmp_path), Sampler()
    validate = make_validation(run, sampler)
    assert validate() is None
    validate.write_result(lambda folder: pytest.fail("written by rank 1"))
    assert run.logged == [] and sampler.calls == []


def test_everything_is_done_with_the_averaged_weights(tmp_path):
    weight = ms.Parameter(ms.Tensor([1.0], ms.float32), name="w")
    seen = []

    class EMA:
        @contextlib.contextmanager
        def averaged(self):
            weight.set_data(ms.Tensor([5.0], ms.float32))
            yield
            weight.set_data(ms.Tensor([1.0], ms.float32))

    class NotingSampler(Sampler):
        def sample(self, final):
            seen.append(float(weight[0]))
            return super().sample(final)

    run = FakeRun(tmp_path, held_out=0)
    validate = make_validation(run, NotingSampler(), EMA())
    validate()
    validate.write_result(lambda folder: (folder / "weights.txt").write_text(str(float(weight[0]))))
    assert seen == [5.0] and (tmp_path / "weights.txt").read_text() == "5.0" and float(weight[0]) == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "weights.txt"]


def test_memory_of_a_vae_loaded_for_the_images_is_freed(monkeypatch, tmp_path):
    freed = []
    monkeypatch.setattr(validation, "free_memory", lambda: freed.append(True))
    make_validation(FakeRun(tmp_path, held_out=0), Sampler())()
    assert freed == [True]
