"""FLUX with the shared functions in its blocks is mindone's FLUX: outputs, gradients, names; adapters, recomputing, half precision."""

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindtune import flow
from mindtune.models import fast_ops, flux_blocks, loading, lora, precision

FULL = precision.Precision(ms.float32, ms.float32)
# One layer of every kind that can have an adapter.
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


def values(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def inputs(batch=2):
    """Of the tiny FLUX: a picture that is not square, a text of five tokens."""
    arrays = [
        values(batch, 6, 64),
        values(batch, 5, 32, seed=1),
        values(batch, 32, seed=2),
        np.linspace(0.2, 0.9, batch),
    ]
    arrays += [flow.latent_image_ids(4, 6), np.zeros((5, 3)), np.full(batch, 3.5)]
    return [ms.Tensor(array, ms.float32) for array in arrays]


class Loss(nn.Cell):
    def __init__(self, model, dtype=ms.float32):
        super().__init__(auto_prefix=False)
        self.model, self.dtype = model, dtype

    def construct(self, hidden, text, pooled, timestep, img_ids, txt_ids, guidance):
        hidden, text, pooled = hidden.astype(self.dtype), text.astype(self.dtype), pooled.astype(self.dtype)
        out = self.model(hidden, text, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0]
        return ops.square(out.astype(ms.float32)).mean()


def measured(model, dtype=ms.float32):
    """The loss and every gradient."""
    value, gradients = ms.value_and_grad(Loss(model, dtype), None, model.trainable_params())(*inputs())
    return [value.asnumpy(), *(g.asnumpy().astype(np.float64) for g in gradients)]


def close(found, expected, rtol):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=rtol * np.abs(theirs).max() + 1e-9)


def plain_flux(root):
    """mindone's own, with none of our operators but the exact sinusoids: those of mindone's differ by more."""
    model = mindone.diffusers.FluxTransformer2DModel.from_pretrained(str(root / "transformer"))
    model.time_text_embed.time_proj = fast_ops.Timesteps(model.time_text_embed.time_proj)
    return model.set_train(False)


def add_adapter(model, alpha=6.0):
    """Rank 4 with numbers that are not zero, everything else frozen."""
    precision.freeze_params(model)
    lora.add_lora(model, 4, alpha, 0.0, TARGETS, ms.float32)
    for number, parameter in enumerate(lora.lora_parameters(model).values()):
        parameter.set_data(ms.Tensor(values(*parameter.shape, seed=number, scale=0.3)))
    return model


def blocks_of(model):
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def test_a_flux_with_them_is_the_same_flux(tiny_flux, mode):
    """Loss and every gradient within 2e-5, the parameters under the same names."""
    fast, plain = loading.load_model(tiny_flux, "transformer", FULL), plain_flux(tiny_flux)
    assert [(n, p.name) for n, p in fast.parameters_and_names()] == [
        (n, p.name) for n, p in plain.parameters_and_names()
    ]
    close(measured(fast), measured(plain), 2e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_adapters_on_every_kind_of_layer(tiny_flux, mode, monkeypatch, recomputed):
    fast = add_adapter(loading.load_model(tiny_flux, "transformer", FULL))
    if recomputed:
        for block in blocks_of(fast):
            block.recompute()
    found = measured(fast)
    monkeypatch.setattr(lora, "bind", lambda model: model)
    close(found, measured(add_adapter(plain_flux(tiny_flux))), 2e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_that_train_themselves_may_be_recomputed(tiny_flux, mode, recomputed):
    """As in a ControlNet, where every weight has a gradient."""
    model = loading.load_model(tiny_flux, "transformer", FULL)
    expected = measured(plain_flux(tiny_flux))
    if recomputed:
        for block in blocks_of(model):
            block.recompute()
    close(measured(model), expected, 2e-5)


def test_alike_blocks_call_one_function(tiny_flux):
    model = add_adapter(loading.load_model(tiny_flux, "transformer", FULL))
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        assert len(blocks) > 1 and len({id(block.shared) for block in blocks}) == 1


def test_half_precision_is_near_float32(tiny_flux, mode):
    half = precision.Precision(ms.float16, ms.float16)
    near, wide = (loading.load_model(tiny_flux, "transformer", kind) for kind in (half, FULL))
    found, expected = (
        Loss(model, kind)(*inputs()).asnumpy() for model, kind in ((near, ms.float16), (wide, ms.float32))
    )
    assert found == pytest.approx(expected, rel=3e-3)


def test_an_adapter_that_is_switched_off_does_nothing(tiny_flux):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    base = Loss(loading.load_model(tiny_flux, "transformer", FULL))(*inputs()).asnumpy()
    model = add_adapter(loading.load_model(tiny_flux, "transformer", FULL))
    adapted = Loss(model)(*inputs()).asnumpy()
    lora.enable_lora(model, False)
    assert Loss(model)(*inputs()).asnumpy() == base
    lora.enable_lora(model, True)
    assert Loss(model)(*inputs()).asnumpy() == adapted != base


def test_dropout_leaves_the_blocks_to_mindone(tiny_flux, mode):
    """Its masks are drawn in mindone's cells; without training they do nothing."""
    model = loading.load_model(tiny_flux, "transformer", FULL)
    expected = Loss(model)(*inputs()).asnumpy()
    precision.freeze_params(model)
    lora.add_lora(model, 4, 4.0, 0.5, TARGETS, ms.float32)
    lora.init_lora(model, 4, seed=0)
    assert not any(isinstance(block, flux_blocks.Bound) for block in blocks_of(model))
    assert Loss(model)(*inputs()).asnumpy() == pytest.approx(expected, rel=1e-5)
