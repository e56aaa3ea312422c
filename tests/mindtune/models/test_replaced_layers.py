"""Layers that replace mindone's own: timestep embeddings, T5's position buckets and activation, float32 attention."""

import mindone.transformers
import mindspore as ms
import numpy as np
import pytest
import transformers
from mindone.diffusers.models import embeddings
from mindone.diffusers.models.attention_processor import Attention
from mindspore import nn, ops
from test_fast_ops import values

from mindtune.models import loading, precision, replaced_layers


@pytest.mark.parametrize("channels, cosine_first, shift", [(256, True, 0), (32, False, 1)])
def test_embeddings_of_large_timesteps(mode, channels, cosine_first, shift):
    """Within the rounding of an angle of up to 1000 in float32, 6e-5."""
    original = embeddings.Timesteps(channels, cosine_first, shift)
    timesteps = np.array([0.0, 1.5, 123.4, 999.0], np.float32)
    angles = timesteps[:, None].astype(np.float64) / 10000 ** (np.arange(channels // 2) / (channels // 2 - shift))
    waves = [np.cos(angles), np.sin(angles)] if cosine_first else [np.sin(angles), np.cos(angles)]
    found = replaced_layers.Timesteps(original)(ms.Tensor(timesteps))
    assert found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), np.concatenate(waves, axis=1), atol=8e-5)


def test_embeddings_are_those_that_the_models_were_trained_with():
    """The four values that differ most between PyTorch (diffusers' get_timestep_embedding) and exact sinusoids."""
    found = replaced_layers.Timesteps(embeddings.Timesteps(256, True, 0))(ms.Tensor([3500.0], ms.float32)).asnumpy()[0]
    pytorch = {130: 0.69030511, 10: -0.07215314, 147: -0.30369273, 131: -0.64627516}
    np.testing.assert_allclose(found[list(pytorch)], list(pytorch.values()), atol=1e-7)  # exact ones differ by 1e-4


def test_boundaries_of_t5s_position_buckets():
    """Per sign 8 buckets for one distance each and 8 that grow by 16^(1/8). 16, 32 and 64 each start a bucket."""
    distances = np.arange(-600, 601)
    found = replaced_layers.relative_position_bucket(ms.Tensor(distances)).asnumpy()
    for distance, bucket in zip(np.abs(distances).tolist(), found % 16):
        # In integers: the largest k with distance >= 8 * 16^(k / 8), that is distance^2 >= 2^(6 + k).
        grown = next(k for k in range(7, -1, -1) if distance**2 >= 2 ** (6 + k)) if distance >= 8 else 0
        assert bucket == (distance if distance < 8 else 8 + grown), distance
    np.testing.assert_array_equal(found >= 16, distances > 0)
    assert found.dtype == np.int64


def test_t5_uses_the_buckets_and_the_exact_activation(tiny_flux):
    t5 = loading.load_model(tiny_flux, "text_encoder_2", precision.resolve_precision("no"))
    first = t5.encoder.block[0].layer[0].SelfAttention
    bias, table = first.compute_bias(512, 512).asnumpy()[0], first.relative_attention_bias.embedding_table.asnumpy()
    for distance, bucket in ((16, 26), (32, 28), (64, 30), (-16, 10), (-32, 12), (-64, 14), (0, 0), (7, 23), (511, 31)):
        query = max(0, -distance)
        np.testing.assert_array_equal(bias[:, query, query + distance], table[bucket])
    x = values(1000, scale=4)
    expected = (
        0.5 * x.astype(np.float64) * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
    )
    found = t5.encoder.block[0].layer[1].DenseReluDense.act(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)  # ops.tanh has an error of 1e-4


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 8, 3, 4)], ids=["UNet", "VAE"])
def test_attention_cells_compute_as_mindones(mode, shape):
    """Cross attention over [B, T, d], and the attention of a VAE, which has a group norm and adds its input."""
    if len(shape) == 3:
        cell, context = Attention(8, cross_attention_dim=6, heads=2, dim_head=4), [ms.Tensor(values(2, 7, 6, seed=1))]
    else:
        cell, context = Attention(8, heads=1, dim_head=8, norm_num_groups=4, bias=True, residual_connection=True), []
    x = ms.Tensor(values(*shape))
    expected = cell(x, *context).asnumpy()
    found = replaced_layers.use_fast_ops(nn.CellList([cell]))[0](x, *context)
    assert isinstance(cell.processor, replaced_layers.AttentionProcessor)
    np.testing.assert_allclose(found.asnumpy(), expected, atol=2e-6)


def test_float32_attention():
    """upcast_attention of Stable Diffusion 2.1: scores beyond 65,504 are not infinite."""
    cell = Attention(16, heads=2, dim_head=8, upcast_attention=True)
    replaced_layers.use_fast_ops(nn.CellList([cell]))
    x, heads = ms.Tensor(values(1, 5, 16)), []
    for name in ("to_q", "to_k", "to_v"):
        getattr(cell, name).weight.set_data(ms.Tensor(values(16, 16, seed=len(heads), scale=1 if "v" in name else 100)))
        heads.append(getattr(cell, name)(x).astype(ms.float16))
    cell.to_q, cell.to_k, cell.to_v = (Given(head) for head in heads)
    cell.to_out[0] = Given(None)
    found = cell(x.astype(ms.float16))
    q, k, v = (head.asnumpy().astype(np.float64).reshape(1, 5, 2, 8) for head in heads)
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
    assert np.abs(scores).max() > 65504
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
    assert found.dtype == ms.float16
    np.testing.assert_allclose(found.asnumpy(), expected.reshape(1, 5, 16), atol=2e-3)


class Given(nn.Cell):
    """Returns what it was made with, or without that its input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def construct(self, x):
        return x if self.output is None else self.output


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_clip_draws_masks_only_if_it_has_a_dropout(tiny_flux, monkeypatch, rate):
    """In training. An adapter's own dropout is kept at any rate."""
    config = transformers.CLIPTextConfig.from_pretrained(str(tiny_flux / "text_encoder"))
    config.attention_dropout = rate
    model = nn.SequentialCell(mindone.transformers.CLIPTextModel(config), nn.Dropout(p=0.5))
    drawn = []
    dropout = ops.dropout
    monkeypatch.setattr(ops, "dropout", lambda x, **given: drawn.append(given) or dropout(x, **given))
    replaced_layers.use_fast_ops(replaced_layers.use_fast_ops(model)).set_train(True)
    assert model[1].training
    model[0](ms.Tensor(np.arange(5)[None], ms.int64))
    assert {(given["p"], given["training"]) for given in drawn} == {(rate, rate > 0)}


@pytest.mark.parametrize("shape", [(1, 8, 16, 16), (3, 8, 12, 20), (2, 8, 15, 7)])
def test_a_vaes_downsampling_pads_in_its_convolution(mode, shape):
    """The values and the gradient are those of mindone's layer, which pads first: below and at the right."""
    from mindone.diffusers.models.downsampling import Downsample2D

    layer = Downsample2D(8, use_conv=True, out_channels=8, padding=0, name="op")
    x = ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    loss = lambda x: ops.square(layer(x)).sum()  # noqa: E731
    expected, gradient = layer(x).asnumpy(), ms.grad(loss)(x).asnumpy()
    replaced_layers.use_fast_ops(layer)
    assert isinstance(layer.pad, nn.Identity)
    np.testing.assert_array_equal(layer(x).asnumpy(), expected)
    np.testing.assert_allclose(ms.grad(loss)(x).asnumpy(), gradient, rtol=1e-5, atol=1e-5)
