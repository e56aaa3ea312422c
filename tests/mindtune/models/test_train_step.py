"""The base class of the training steps: accumulation, clipping and the recorded norm, in graph mode and in PyNative."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindtune.models import precision
from mindtune.models.train_step import TrainStep

FIRST, SECOND = np.float32([3.0, 0.0, 1.0]), np.float32([3.0, 8.0, -1.0])  # the gradients of two micro-batches
MEAN = np.float32([3.0, 4.0, 0.0])  # its norm is 5


class Weight(nn.Cell):
    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(np.ones(3), ms.float32), name="weight")


class DotProductStep(TrainStep):
    """The gradient is the input."""

    def forward(self, x):
        loss = (self.model.weight * x).sum()
        return self.scale_loss(loss), loss


def make_step(scale, max_grad_norm):
    model = Weight()
    return DotProductStep(
        model,
        nn.SGD(model.trainable_params(), learning_rate=1.0),
        loss_scaler=precision.loss_scaler(scale),
        gradient_accumulation_steps=2,
        max_grad_norm=max_grad_norm,
    )


@pytest.mark.parametrize("scale, max_grad_norm, factor", [("no", 0.0, 1.0), ("fp16", 1.0, 0.2)])
def test_two_micro_batches_make_one_update(mode, scale, max_grad_norm, factor):
    """Twice in a row: the accumulated gradient starts from zero again."""
    step = make_step(scale=scale, max_grad_norm=max_grad_norm)
    expected = np.ones(3, np.float32)
    for _ in range(2):
        scaled, loss = step(ms.Tensor(FIRST))
        assert float(loss) == pytest.approx(float(expected @ FIRST), abs=1e-5)
        assert float(scaled) == pytest.approx(float(expected @ FIRST) / 2, abs=1e-5)
        np.testing.assert_allclose(step.model.weight.asnumpy(), expected, rtol=1e-6, atol=1e-6)
        step(ms.Tensor(SECOND))
        expected = expected - factor * MEAN
        np.testing.assert_allclose(step.model.weight.asnumpy(), expected, rtol=1e-5, atol=1e-5)
        assert float(step.grad_clipper.norm) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE], indirect=True)
def test_cells_learn_of_a_graph_when_it_is_compiled(mode, monkeypatch):
    """MindSpore tells all cells the graph's name at every call. Ours pass it on when it changes."""
    step = make_step(scale="no", max_grad_norm=0.0)
    told = []
    monkeypatch.setattr(Weight, "compile_phase", property(lambda cell: "", lambda cell, name: told.append(name)), False)
    for x in (FIRST, SECOND, np.stack([FIRST, SECOND]), np.stack([SECOND, FIRST])):
        step(ms.Tensor(x))
    assert len(told) == 2 and told[0] != told[1]  # one for each shape
