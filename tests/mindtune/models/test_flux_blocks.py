"""FLUX with shared block functions against mindone's FLUX: losses, gradients, adapters, recomputation, fp16."""

import mindone.diffusers
import mindspore as ms
import pytest
from flux_gradients import (
    FLOAT16,
    FLOAT32,
    add_adapter,
    assert_close,
    inputs,
    loss_and_gradients,
    loss_of,
    random_values,
    recompute,
)
from mindspore import nn, ops

from mindtune.models import loading, lora, precision, replaced_layers

pytestmark = pytest.mark.slow


def mindone_flux(root):
    """mindone's own model. Only the timestep embeddings are exact: mindone's are off by more than the tolerance."""
    model = mindone.diffusers.FluxTransformer2DModel.from_pretrained(str(root / "transformer"))
    model.time_text_embed.time_proj = replaced_layers.Timesteps(model.time_text_embed.time_proj)
    return model.set_train(False)


@pytest.fixture(scope="module")
def expected(tiny_flux):
    """mindone's loss and gradients, in PyNative."""
    return loss_and_gradients(mindone_flux(tiny_flux))


@pytest.fixture(scope="module")
def expected_with_adapter(tiny_flux):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "use_shared_blocks", lambda model: model)
        return loss_and_gradients(add_adapter(mindone_flux(tiny_flux)))


@pytest.fixture
def flux(tiny_flux):
    return loading.load_model(tiny_flux, "transformer", FLOAT32)


def test_parameters_keep_their_names(flux, tiny_flux):
    names = [(name, parameter.name) for name, parameter in flux.parameters_and_names()]
    assert names == [(name, parameter.name) for name, parameter in mindone_flux(tiny_flux).parameters_and_names()]


def test_full_training_matches_mindone(expected, flux):
    """As in a ControlNet, whose tests compare the graph with PyNative: every weight has a gradient."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert_close(loss_and_gradients(flux), expected, 2e-5)


def test_adapters_match_mindone(expected_with_adapter, flux, mode):
    """With adapters on every type of layer, and all blocks recomputed."""
    assert_close(loss_and_gradients(recompute(add_adapter(flux))), expected_with_adapter, 2e-5)


def test_half_precision_is_close_to_float32(tiny_flux, expected, mode):
    model = loading.load_model(tiny_flux, "transformer", FLOAT16)
    assert loss_of(model, ms.float16) == pytest.approx(expected[0], rel=3e-3)


class LossWithResiduals(nn.Cell):
    """The mean of the squared outputs of a model that gets a ControlNet's residuals [B, 6, d]."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model, self.inputs = model, tuple(inputs())

    def construct(self, first, second, single):
        return ops.square(self.model(*self.inputs, None, (first, second), (single,))[0]).mean()


def test_residuals_match_mindone(tiny_flux, flux):
    """Each of the two double blocks has a residual of its own, the single blocks share one. All are recomputed.

    The FLUX ControlNet's tests compare the graph with PyNative.
    """
    ms.set_context(mode=ms.PYNATIVE_MODE)
    residuals = [ms.Tensor(random_values(2, 6, flux.inner_dim, seed=seed)) for seed in range(3)]

    def loss_and_gradients_of_residuals(model):
        loss, gradients = ms.value_and_grad(LossWithResiduals(model), (0, 1, 2))(*residuals)
        return [loss.asnumpy(), *(gradient.asnumpy() for gradient in gradients)]

    precision.freeze_params(flux)
    found = loss_and_gradients_of_residuals(recompute(flux))
    assert_close(found, loss_and_gradients_of_residuals(mindone_flux(tiny_flux)), 2e-5)
