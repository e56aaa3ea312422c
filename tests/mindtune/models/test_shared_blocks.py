"""Blocks that share a function, and when they do not."""

import mindspore as ms
import pytest
from flux_gradients import FLOAT32, TARGETS, add_adapter, blocks_of, loss_of

from mindtune.models import loading, lora, precision, shared_blocks


@pytest.fixture
def flux(tiny_flux):
    return loading.load_model(tiny_flux, "transformer", FLOAT32)


@pytest.fixture(scope="module")
def expected_loss(tiny_flux):
    """The loss without an adapter, in PyNative."""
    return loss_of(loading.load_model(tiny_flux, "transformer", FLOAT32))


def test_equal_blocks_call_one_function(flux):
    model = add_adapter(flux)
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        assert len(blocks) > 1 and len({id(block.shared_block) for block in blocks}) == 1


def test_a_disabled_adapter_has_no_effect(flux, expected_loss):
    model = add_adapter(flux)
    with_adapter = loss_of(model)
    lora.enable_lora(model, False)
    assert loss_of(model) == expected_loss
    lora.enable_lora(model, True)
    assert loss_of(model) == with_adapter != expected_loss


@pytest.mark.slow
def test_blocks_with_dropout_keep_mindones_code(flux, expected_loss, mode):
    """mindone's cells draw the masks. Dropout does nothing outside training."""
    precision.freeze_params(flux)
    lora.add_lora(flux, lora.target_ranks(flux, TARGETS, 4), 1.0, 0.5, ms.float32)
    lora.init_lora(flux, seed=0)
    assert not any(isinstance(block, shared_blocks.SharedBlockCell) for block in blocks_of(flux))
    assert loss_of(flux) == pytest.approx(expected_loss, rel=1e-5)
