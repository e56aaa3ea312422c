"""The operators that stand in for slow ones give the same numbers, and a model with them is the same model."""

import mindspore as ms
import numpy as np
import pytest
from mindone.diffusers.models import embeddings
from mindspore import nn, ops

from mindtune import flow, models, operators, precision


def values(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_tanh_gelu_is_the_published_formula_far_into_both_tails(mode):
    x = np.concatenate([values(500, scale=4), np.array([-40.0, -12.0, 0.0, 12.0, 40.0], np.float32)]).astype(np.float64)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ours = operators.TanhGELU()(ms.Tensor(x.astype(np.float32))).asnumpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_rms_norm_keeps_the_type_and_works_in_float32(mode, dtype):
    norm = nn.Cell()
    norm.weight, norm.eps = ms.Parameter(ms.Tensor(1 + 0.1 * values(8)), name="transformer.norm_q.weight"), 1e-6
    x = values(2, 3, 5, 8, seed=1, scale=300.0)  # squares that overflow in fp16
    found = operators.RMSNorm(norm)(ms.Tensor(x, dtype))
    assert found.dtype == dtype
    wide = x.astype(np.float16 if dtype == ms.float16 else np.float32).astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * norm.weight.asnumpy()
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=2e-3 if dtype == ms.float16 else 1e-5)


def test_rotary_embedding_turns_pairs_of_channels_as_complex_numbers(mode):
    x, angles = values(2, 3, 5, 8), values(5, 4, seed=1, scale=3.0)
    cos, sin = (ms.Tensor(np.repeat(f(angles), 2, axis=-1)) for f in (np.cos, np.sin))
    rotate = operators.RotaryEmbedding(8)

    class Rotate(nn.Cell):
        def construct(self, x, cos, sin):
            return rotate(x, (cos, sin))

    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    found = Rotate()(ms.Tensor(x), cos, sin).asnumpy()
    np.testing.assert_allclose(found[..., ::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=2e-6)


@pytest.mark.parametrize("channels, cosine_first, shift", [(256, True, 0), (32, False, 1)])
def test_sinusoids_of_large_timesteps_are_exact(mode, channels, cosine_first, shift):
    """To float32's rounding of an angle of up to a thousand, 6e-5."""
    plain = embeddings.Timesteps(channels, cosine_first, shift)
    timesteps = np.array([0.0, 1.5, 123.4, 999.0], np.float32)
    angles = timesteps[:, None].astype(np.float64) / 10000 ** (np.arange(channels // 2) / (channels // 2 - shift))
    waves = [np.cos(angles), np.sin(angles)] if cosine_first else [np.sin(angles), np.cos(angles)]
    found = operators.Timesteps(plain)(ms.Tensor(timesteps))
    assert found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), np.concatenate(waves, axis=1), atol=8e-5)


def flux_inputs(batch=2):
    arrays = {"hidden_states": values(batch, 6, 64), "timestep": np.linspace(0.2, 0.9, batch, dtype=np.float32)}
    arrays.update(
        guidance=np.full(batch, 3.5, np.float32), pooled_projections=values(batch, 32), encoder_hidden_states=values(batch, 5, 32)
    )
    arrays.update(txt_ids=np.zeros((5, 3), np.float32), img_ids=flow.latent_image_ids(4, 6))
    return {name: ms.Tensor(value) for name, value in arrays.items()}


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, hidden, timestep, guidance, pooled, text, txt_ids, img_ids):
        return ops.square(self.model(hidden, text, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0]).mean()


def test_a_flux_with_them_is_the_same_flux(tiny_flux, mode, monkeypatch):
    """Output and every gradient within 2e-5 of mindone's own modules, the parameters under the same names.

    Both with the exact sinusoids: those of mindone's differ by more.
    """
    full = precision.resolve_precision("no")
    fast = models.load_model(tiny_flux, "transformer", full)
    monkeypatch.setattr(models, "use_fast_operators", lambda model: model)
    plain = models.load_model(tiny_flux, "transformer", full)
    assert isinstance(fast.time_text_embed.time_proj, operators.Timesteps)
    plain.time_text_embed.time_proj = operators.Timesteps(plain.time_text_embed.time_proj)
    assert [(n, p.name) for n, p in fast.parameters_and_names()] == [(n, p.name) for n, p in plain.parameters_and_names()]

    found = []
    for model in (plain, fast):
        value, gradients = ms.value_and_grad(Loss(model), None, model.trainable_params())(*flux_inputs().values())
        found.append([value.asnumpy(), *(g.asnumpy() for g in gradients)])
    for ours, theirs in zip(*found[::-1]):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max() + 1e-9)
