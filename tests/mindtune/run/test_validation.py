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
    """Notes what a validation logs."""

    def __init__(self, step=1, held_out=2):
        self.step = step
        self.output_dir = None
        self.logged = []
        self.data = SimpleNamespace(
            held_out=[None] * held_out, held_out_use=lambda sample_id, timestep: (sample_id, timestep)
        )

    def needs_held_out(self):
        return bool(self.data.held_out)

    def log_held_out(self, places, losses):
        self.logged.append((places, losses))

    def log_images(self, grid, final):
        self.logged.append((grid.size, final))
        return "path"


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


def test_held_out_loss_is_the_mean_over_samples_at_each_timestep():
    run = FakeRun(step=0)
    assert make_validation(run, Sampler())() is None  # no images before the first update
    ((places, losses),) = run.logged
    assert places == {index: pytest.approx(PLACES[index]) for index in HELD_OUT_INDICES}
    expected = [np.mean([(index / 1000 - sample) ** 2 for sample in (0, 1)]) for index in HELD_OUT_INDICES]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_images_are_sampled_for_prompts_after_the_first_update():
    run, sampler = FakeRun(held_out=0), Sampler()
    assert make_validation(run, sampler)() == "path"
    assert make_validation(run, sampler)(final=True) == "path"
    assert sampler.calls == [False, True] and [final for _, final in run.logged] == [False, True]
    assert make_validation(run, Sampler(prompts=()))() is None


def test_other_ranks_validate_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "_rank", 1)
    run, sampler = FakeRun(), Sampler()
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

    run = FakeRun(held_out=0)
    run.output_dir = tmp_path
    validate = make_validation(run, NotingSampler(), EMA())
    validate()
    validate.write_result(lambda folder: (folder / "weights.txt").write_text(str(float(weight[0]))))
    assert seen == [5.0] and (tmp_path / "weights.txt").read_text() == "5.0" and float(weight[0]) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["weights.txt"]


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


def test_memory_of_a_vae_loaded_for_the_images_is_freed(monkeypatch):
    freed = []
    monkeypatch.setattr(validation, "free_memory", lambda: freed.append(True))
    make_validation(FakeRun(held_out=0), Sampler())()
    assert freed == [True]
