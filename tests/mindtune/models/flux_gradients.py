"""Inputs, adapters, losses and gradients of the tiny FLUX, for the tests of its blocks and of int8."""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune import flow
from mindtune.models import lora, precision

FLOAT32 = precision.Precision(ms.float32, ms.float32)
FLOAT16 = precision.Precision(ms.float16, ms.float16)
# One layer of every type that can have an adapter.
TARGETS = [
    "to_q",
    "to_out.0",
    "add_k_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm.linear",
    "proj_mlp",
]


def random_values(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def inputs(batch=2):
    """Inputs of the tiny FLUX: an image that is not square, and a text of five tokens."""
    arrays = [
        random_values(batch, 6, 64),
        random_values(batch, 5, 32, seed=1),
        random_values(batch, 32, seed=2),
        np.linspace(0.2, 0.9, batch),
        flow.latent_image_ids(4, 6),
        np.zeros((5, 3)),
        np.full(batch, 3.5),
    ]
    return [ms.Tensor(array, ms.float32) for array in arrays]


class Loss(nn.Cell):
    """The mean of the squared outputs of a model that computes in `dtype`."""

    def __init__(self, model, dtype=ms.float32):
        super().__init__(auto_prefix=False)
        self.model, self.dtype = model, dtype

    def construct(self, hidden, text, pooled, timestep, img_ids, txt_ids, guidance):
        hidden, text, pooled = hidden.astype(self.dtype), text.astype(self.dtype), pooled.astype(self.dtype)
        out = self.model(hidden, text, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0]
        return ops.square(out.astype(ms.float32)).mean()


def loss_of(model, dtype=ms.float32):
    return Loss(model, dtype)(*inputs()).asnumpy()


def loss_and_gradients(model, dtype=ms.float32):
    """The loss, and the gradient of every trainable parameter."""
    loss, gradients = ms.value_and_grad(Loss(model, dtype), None, model.trainable_params())(*inputs())
    return [loss.asnumpy(), *(gradient.asnumpy().astype(np.float64) for gradient in gradients)]


def assert_close(found, expected, rtol):
    """Equal within `rtol` of the largest value of each array."""
    assert len(found) == len(expected)
    for actual, reference in zip(found, expected):
        np.testing.assert_allclose(actual, reference, atol=rtol * np.abs(reference).max() + 1e-9)


def add_adapter(model, alpha=6.0, compute=ms.float32):
    """Adds an adapter of rank 4 with values that are not zero; everything else is frozen."""
    precision.freeze_params(model)
    lora.add_lora(model, lora.target_ranks(model, TARGETS, 4), alpha / 4, 0.0, compute)
    for number, parameter in enumerate(lora.lora_parameters(model).values()):
        parameter.set_dtype(ms.float32)
        parameter.set_data(ms.Tensor(random_values(*parameter.shape, seed=number, scale=0.3)))
    return model


def blocks_of(model):
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def recompute(model):
    for block in blocks_of(model):
        block.recompute()
    return model
