"""The encoder of the encoder stage: when it compiles, and that its results do not depend on that."""

import mindspore as ms
import numpy as np
import pytest

from mindtune.encode import jobs, vae
from mindtune.models import loading, precision

pytestmark = pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE], indirect=True)


@pytest.fixture
def encoder(mode, tiny_flux, request):
    """An encoder that compiles after its first call."""
    chosen = precision.resolve_precision(getattr(request, "param", "no"))
    return vae.VaeEncoder(loading.load_model(tiny_flux, "vae", chosen), chosen.compute)


def images(count, height, width):
    return np.random.default_rng(0).uniform(-1, 1, (count, 3, height, width)).astype(np.float32)


@pytest.fixture(autouse=True)
def compile_at_once(monkeypatch):
    monkeypatch.setattr(vae, "COMPILE_AFTER", 0.0)


@pytest.mark.parametrize("encoder", ["no", "bf16"], indirect=True)
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 40, 72)])
def test_compiled_moments_are_the_same_to_the_bit(encoder, shape):
    pixels = images(*shape)
    first = encoder(pixels)
    assert encoder.compiled == pixels.shape and first.dtype == np.float32
    expected = encoder.vae.encode(ms.Tensor(pixels).to(encoder.dtype))[0].to(ms.float32).asnumpy()
    for moments in (first, encoder(pixels), encoder(pixels)):
        np.testing.assert_array_equal(moments, expected)
    other = encoder(images(1, 32, 32))  # another size, which is not compiled
    assert encoder.compiled == pixels.shape and other.shape[2:] == (4, 4)


@pytest.mark.parametrize("encoder", ["fp16"], indirect=True)
def test_float16_is_not_compiled(encoder):
    encoder(images(1, 64, 64))
    assert encoder.compiled is None


def test_what_is_not_compiled(encoder, monkeypatch):
    """Sizes that have taken too little time, and large ones, whose graph would keep much memory."""
    monkeypatch.setattr(jobs, "BATCH_PIXELS", 64 * 64)
    encoder(images(1, 64, 72))
    assert encoder.compiled is None
    monkeypatch.setattr(vae, "COMPILE_AFTER", 3600.0)
    encoder(images(1, 64, 64))
    assert encoder.compiled is None
