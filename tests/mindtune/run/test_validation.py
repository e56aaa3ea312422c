"""Validation: when the held-out loss is measured and images are sampled, with which weights, and what is written."""

import contextlib
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from PIL import Image

from mindtune.cli import UserError
from mindtune.distributed import ranks
from mindtune.run import validation
from mindtune.run.evaluation import HELD_OUT_INDICES
from mindtune.run.validation import Validation, load_conditions, match_conditions


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

    def image(self, step, name, grid):
        self.logged.append(grid.size)


class Sampler:
    def __init__(self, prompts=("a cat",)):
        self.prompts = prompts
        self.calls = []

    def sample(self, final):
        self.calls.append(final)
        return [[Image.new("RGB", (32, 32))] * 2], ["a cat"]


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
    assert Image.open(tmp_path / "samples" / "final.png").size == run.logged[1]
    assert make_validation(run, Sampler(prompts=()))() is None


def test_the_gallery_has_one_image_per_prompt_by_the_trained_model(tmp_path):
    """The red ones: of a LoRA the last row, of a ControlNet the last image. Only the last validation saves them."""
    red, other = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "gray")
    adapter = Sampler(["a cat", "a dog"])
    adapter.sample = lambda final: (
        [[other, other], [other, red]] * (2 if final else 1),
        ["label"] * (4 if final else 2),
    )
    controlnet = Sampler([("a cat", other), ("a cat", other), ("a dog", other)])
    controlnet.sample = lambda final: ([[other, other, red]] * 3, ["label"] * 3)
    for name, sampler, prompts in (
        ("lora", adapter, ["a cat", "a dog"]),
        ("controlnet", controlnet, ["a cat", "a cat", "a dog"]),
    ):
        run = FakeRun(tmp_path / name, held_out=0)
        for run.hub_id, final in ((None, True), ("me/model", False)):
            make_validation(run, sampler)(final=final)
            assert run.gallery == [] and not list((tmp_path / name).glob("samples/final-*"))
        make_validation(run, sampler)(final=True)
        assert run.gallery == [(prompt, f"samples/final-{number}.png") for number, prompt in enumerate(prompts, 1)]
        for _, file in run.gallery:
            assert Image.open(tmp_path / name / file).getpixel((0, 0)) == (255, 0, 0)


def test_a_gallery_of_many_prompts_has_eight_images(tmp_path):
    prompts = [str(number) for number in range(11)]
    gallery = validation.save_gallery(tmp_path, prompts, [[Image.new("RGB", (8, 8))]] * 11)
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


def test_prompts_and_condition_images_are_matched(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in paths:
        Image.new("RGB", (80, 40), "white").save(path)
    assert match_conditions(["x", "y"], paths) == [("x", paths[0]), ("y", paths[1])]
    assert match_conditions(["x"], paths) == [("x", paths[0]), ("x", paths[1])]
    assert match_conditions(["x", "y"], paths[:1]) == [("x", paths[0]), ("y", paths[0])]
    assert match_conditions([], []) == []
    with pytest.raises(UserError, match="--validation_prompt has 3 and --validation_image 2"):
        match_conditions(["x", "y", "z"], paths)
    with pytest.raises(UserError, match="--validation_image .*absent.png"):
        match_conditions(["x"], [str(tmp_path / "absent.png")])
    ((prompt, image),) = load_conditions([("x", paths[0])], 32, 16, "white")
    assert prompt == "x" and image.size == (64, 32)  # the shorter side is the resolution


def test_memory_of_a_vae_loaded_for_the_images_is_freed(monkeypatch, tmp_path):
    freed = []
    monkeypatch.setattr(validation, "free_memory", lambda: freed.append(True))
    make_validation(FakeRun(tmp_path, held_out=0), Sampler())()
    assert freed == [True]
