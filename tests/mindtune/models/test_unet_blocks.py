"""A UNet's blocks that are recomputed in a graph have the gradients of mindone's own blocks, which keep everything."""

import mindspore as ms
import numpy as np
import pytest
from mindone.diffusers.models.attention import BasicTransformerBlock
from mindone.diffusers.models.resnet import ResnetBlock2D
from mindspore import nn, ops

from mindtune.models import precision
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.replaced_layers import use_fast_ops
from mindtune.models.unet_blocks import use_recomputed_block


class Level(nn.Cell):
    """Two residual and two transformer blocks, as a UNet's levels have them; the second of each is frozen.

    The first residual block has a shortcut.
    """

    def __init__(self, storage=ms.float32, compute=ms.float32, upcast=False):
        super().__init__()
        residual = {"temb_channels": 12, "groups": 4}
        transformer = {"cross_attention_dim": 12, "upcast_attention": upcast}
        self.resnets = nn.CellList([ResnetBlock2D(in_channels=n, out_channels=16, **residual) for n in (8, 16)])
        self.transformers = nn.CellList([BasicTransformerBlock(16, 2, 8, **transformer) for _ in range(2)])
        use_fast_ops(self).set_train(True)
        rng = np.random.default_rng(0)
        for parameter in self.get_parameters():
            offset = 1.0 if parameter.name.endswith("weight") and parameter.ndim == 1 else 0.0
            values = offset + 0.2 * rng.standard_normal(parameter.shape)
            parameter.set_data(ms.Tensor(values, ms.float32))
        for number, block in enumerate(self.blocks()):
            if number % 2:
                precision.freeze_params(block)
                precision.cast_cell(block, precision.Precision(storage, compute))
            else:
                precision.set_compute_dtype(block, compute)

    def blocks(self):
        return [*self.resnets, *self.transformers]

    def recompute(self):
        assert all(use_recomputed_block(block) for block in self.blocks())
        return self

    def construct(self, x, temb, text):
        for block in self.resnets:
            x = block(x, temb)
        x = x.reshape(x.shape[:2] + (-1,)).swapaxes(1, 2)
        for block in self.transformers:
            x = block(x, encoder_hidden_states=text)
        return x


class Loss(nn.Cell):
    def __init__(self, level, dtype):
        super().__init__(auto_prefix=False)
        self.level, self.dtype = level, dtype

    def construct(self, x, temb, text):
        out = self.level(x.astype(self.dtype), temb.astype(self.dtype), text.astype(self.dtype))
        return ops.square(out.astype(ms.float32)).mean()


def inputs():
    """An image [2, 8, 5, 7], the embedding of a timestep, and a text of three tokens."""
    rng = np.random.default_rng(1)
    return [ms.Tensor(rng.standard_normal(shape), ms.float32) for shape in ((2, 8, 5, 7), (2, 12), (2, 3, 12))]


def gradients(level, dtype=ms.float32):
    """The loss and its gradients by all inputs and trained weights, in a graph."""
    ms.set_context(mode=ms.GRAPH_MODE)
    gradient = ms.value_and_grad(Loss(level, dtype), (0, 1, 2), level.trainable_params())
    loss, (by_inputs, by_weights) = gradient(*inputs())
    return [value.asnumpy().astype(np.float64) for value in (loss, *by_inputs, *by_weights)]


def assert_close(found, expected, rtol):
    assert len(found) == len(expected)
    for actual, reference in zip(found, expected):
        assert np.abs(reference).max() > 0
        np.testing.assert_allclose(actual, reference, rtol=0, atol=rtol * np.abs(reference).max())


# Settings of the level, dtype of the activations, bound.
CASES = {
    "float32": ({}, ms.float32, 2e-6),
    "float16, attention in float32": (
        {"storage": ms.float16, "compute": ms.float16, "upcast": True},
        ms.float16,
        1e-2,
    ),
    "frozen weights in bfloat16": ({"storage": ms.bfloat16}, ms.float32, 2e-6),
}


@pytest.mark.parametrize("case", CASES)
def test_recomputed_blocks_have_the_gradients_of_mindones(case):
    settings, dtype, rtol = CASES[case]
    expected = gradients(Level(**settings), dtype)
    assert_close(gradients(Level(**settings).recompute(), dtype), expected, rtol)


def test_recomputed_blocks_make_validation_images_in_pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    expected = Level()(*inputs()).asnumpy()
    np.testing.assert_allclose(Level().recompute()(*inputs()).asnumpy(), expected, rtol=0, atol=1e-5)


def test_unusual_blocks_are_left_to_mindspore():
    """Residual blocks that scale and shift by the timestep or have dropout, and attention without a text."""
    unusual = [
        ResnetBlock2D(in_channels=8, groups=4, temb_channels=12, time_embedding_norm="scale_shift"),
        ResnetBlock2D(in_channels=8, groups=4, temb_channels=12, dropout=0.1),
        ResnetBlock2D(in_channels=8, groups=4, temb_channels=None),
        BasicTransformerBlock(16, 2, 8),
        BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, activation_fn="gelu"),
    ]
    for block in unusual:
        cls = type(block)
        assert not use_recomputed_block(block) and type(block) is cls


class UNet(nn.Cell):
    """What `recompute_blocks` looks for in a UNet."""

    def __init__(self, level):
        super().__init__()
        self.down_blocks = [level]
        self.mid_block = None


def test_a_graph_frees_what_pynative_marks():
    """In a graph the blocks become recomputed ones; in PyNative they keep mindone's code and are marked."""
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        level = Level()
        recompute_blocks(1, UNet(level))
        assert hasattr(level.resnets[0], "recomputed_block") == (mode == ms.GRAPH_MODE)
        assert not hasattr(level.resnets[1], "recomputed_block")
