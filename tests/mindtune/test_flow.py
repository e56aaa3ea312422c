"""The mathematics of rectified flow against loops, closed forms and values computed by hand."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindtune import flow

SCHEDULER = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}  # FLUX.1-dev's
LATENTS = [(1, 16, 4, 4), (3, 2, 6, 10), (2, 3, 8, 2)]
DTYPES = [ms.float32, ms.float16, ms.bfloat16]


class Call(nn.Cell):
    """function(*tensors, *constants), compiled in graph mode."""

    def __init__(self, function, *constants):
        super().__init__()
        self.function, self.constants = function, constants

    def construct(self, *tensors):
        return self.function(*tensors, *self.constants)


class Weighting(nn.Cell):
    def __init__(self, scheme):
        super().__init__()
        self.scheme = scheme

    def construct(self, sigmas):
        return flow.loss_weighting(self.scheme, sigmas)


class ReadsFlags(nn.Cell):
    def __init__(self, args):
        super().__init__()
        self.args = args

    def construct(self, x):
        if self.args.double:
            x = x * 2.0
        if self.args.scheme == "cosmap":
            x = x + self.args.offset
        return x


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- packing -------------------------------------------------------------------------------------


def pack_by_loops(latents):
    b, c, h, w = latents.shape
    tokens = np.empty((b, (h // 2) * (w // 2), 4 * c), latents.dtype)
    for n, channel, i, j in np.ndindex(b, c, h, w):
        tokens[n, (i // 2) * (w // 2) + j // 2, 4 * channel + 2 * (i % 2) + j % 2] = latents[n, channel, i, j]
    return tokens


@pytest.mark.parametrize("shape", LATENTS)
def test_pack_latents(mode, shape):
    latents = random(*shape)
    np.testing.assert_array_equal(Call(flow.pack_latents)(ms.Tensor(latents)).asnumpy(), pack_by_loops(latents))


@pytest.mark.parametrize("shape", LATENTS)
def test_unpack_latents(mode, shape):
    latents = random(*shape)
    tokens = ms.Tensor(pack_by_loops(latents))
    np.testing.assert_array_equal(Call(flow.unpack_latents, *shape[2:])(tokens).asnumpy(), latents)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_keeps_the_dtype(dtype):
    latents = ms.Tensor(random(2, 4, 4, 6)).to(dtype)
    packed = flow.pack_latents(latents)
    back = flow.unpack_latents(packed, 4, 6)
    assert packed.dtype == back.dtype == dtype
    np.testing.assert_array_equal(back.to(ms.float32).asnumpy(), latents.to(ms.float32).asnumpy())


def test_image_ids_are_zero_row_column_in_token_order():
    ids = flow.latent_image_ids(4, 6)
    assert ids.dtype == np.float32
    assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_image_ids_match_the_packed_tokens():
    """Packing a non-square latent that contains its rows and columns gives the ids."""
    h, w = 6, 10
    rows, columns = np.mgrid[0:h, 0:w].astype(np.float32) // 2
    tokens = flow.pack_latents(ms.Tensor(np.stack([rows, columns])[None])).asnumpy()[0]
    np.testing.assert_array_equal(flow.latent_image_ids(h, w)[:, 1:], tokens[:, [0, 4]])


# ---- sigmas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dim", [3, 4])
def test_get_sigmas_looks_up_by_index(mode, n_dim):
    table = np.linspace(1.0, 0.001, 1000).astype(np.float32)
    found = Call(flow.get_sigmas, n_dim)(ms.Tensor(table), ms.Tensor([0, 999, 250], ms.int32)).asnumpy()
    assert found.shape == (3,) + (1,) * (n_dim - 1)
    assert found.ravel().tolist() == [table[0], table[999], table[250]]


def test_a_fixed_shift_moves_sigmas_towards_noise():
    """3 * 0.5 / (1 + 2 * 0.5) = 0.75; 0 and 1 do not change."""
    np.testing.assert_allclose(flow.shift_sigmas(np.array([0.0, 0.5, 1.0]), 3.0), [0.0, 0.75, 1.0], rtol=1e-15)


def test_a_shift_of_one_has_no_effect():
    sigmas = np.linspace(0, 1, 7)
    np.testing.assert_array_equal(flow.shift_sigmas(sigmas, 1.0), sigmas)


def test_the_shift_moves_the_logit():
    """Equation 23 of arXiv 2403.03206: logit(sigma') = logit(sigma) + log(shift)."""
    sigmas = np.array([0.01, 0.3, 0.99])
    shifted = flow.shift_sigmas(sigmas, 4.5)
    np.testing.assert_allclose(np.log(shifted / (1 - shifted)), np.log(sigmas / (1 - sigmas)) + np.log(4.5), rtol=1e-12)


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (4096, 1.15), (2176, 0.825), (1024, 0.63)])
def test_resolution_shift(tokens, mu):
    assert flow.resolution_shift(tokens, SCHEDULER) == pytest.approx(math.exp(mu), rel=1e-12)


# ---- the density of timesteps --------------------------------------------------------------------


class Dice:
    """A generator that returns given values."""

    def __init__(self, u):
        self.u = u

    def random(self):
        return self.u

    def standard_normal(self):
        return self.u


def draws(scheme, mean=0.0, std=1.0, scale=1.29, count=20_000):
    generator = np.random.default_rng(7)
    return np.array([flow.sample_density(generator, scheme, mean, std, scale) for _ in range(count)])


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_other_schemes_draw_uniformly(scheme):
    np.testing.assert_allclose(np.quantile(draws(scheme), [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_quantiles(mean, std):
    """The median is sigmoid(mean); one deviation away it is sigmoid(mean +- std)."""
    expected = 1 / (1 + np.exp(-(mean + std * np.array([-1.0, 0.0, 1.0]))))
    np.testing.assert_allclose(
        np.quantile(draws("logit_normal", mean, std), [0.158655, 0.5, 0.841345]), expected, atol=0.012
    )


@pytest.mark.parametrize(
    "u, scale, expected",
    [
        (1 / 3, 1.29, 0.559166667),
        (0.5, 1.29, 0.5),
        (0.0, 1.29, 1.0),
        (1.0, 1.29, 0.0),
        (1 / 3, 0.0, 2 / 3),
        (2 / 3, -1.0, 0.25),
    ],
)
def test_mode_scheme_by_hand(u, scale, expected):
    """u = 1/3: 1 - 1/3 - 1.29 (3/4 - 1 + 1/3)."""
    assert flow.sample_density(Dice(u), "mode", 0.0, 1.0, scale) == pytest.approx(expected, abs=1e-9)


def test_mode_scheme_stays_in_the_unit_interval():
    values = draws("mode")
    assert 0.0 <= values.min() < 0.01 and 0.99 < values.max() <= 1.0


@pytest.mark.parametrize("normal, u, index", [(1e4, 1.0, 999), (-1e4, 0.0, 0)])
def test_logit_normal_saturates_to_the_table_ends(normal, u, index):
    drawn = flow.sample_density(Dice(normal), "logit_normal", 0.0, 1.0, 1.29)
    assert drawn == u and flow.density_to_index(drawn, 1000) == index


@pytest.mark.parametrize(
    "u, index", [(0.0, 0), (0.0009, 0), (0.001, 1), (0.5, 500), (0.9999, 999), (1.0, 999), (-0.1, 0), (1.2, 999)]
)
def test_index_is_the_floor_inside_the_table(u, index):
    assert flow.density_to_index(u, 1000) == index


# ---- the posterior -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_posterior_is_mean_plus_deviation_times_noise(mode, dtype):
    moments, noise = ms.Tensor(random(2, 6, 4, 2)).to(dtype), random(2, 3, 4, 2, seed=1)
    found = Call(flow.sample_posterior)(moments, ms.Tensor(noise))
    mean, logvar = np.split(moments.to(ms.float32).asnumpy().astype(np.float64), 2, axis=1)
    assert found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), mean + np.exp(logvar / 2) * noise, rtol=1e-5, atol=1e-5)


def test_posterior_clamps_the_log_variance(mode):
    """To [-30, 20]: the deviation stays between exp(-15) and exp(10)."""
    moments = np.zeros((1, 4, 1, 1), np.float32)
    moments[0, 2:, 0, 0] = [100.0, -100.0]
    found = (
        Call(flow.sample_posterior)(ms.Tensor(moments), ms.Tensor(np.ones((1, 2, 1, 1), np.float32))).asnumpy().ravel()
    )
    np.testing.assert_allclose(found, [math.exp(10), math.exp(-15)], rtol=1e-5)


# ---- the loss ------------------------------------------------------------------------------------


def weights(scheme, sigmas):
    """The weights in float64."""
    sigmas = np.asarray(sigmas, np.float64)
    if scheme == "sigma_sqrt":
        return sigmas**-2.0
    if scheme == "cosmap":
        return 2 / (np.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return np.ones_like(sigmas)


def squared_error(prediction, target, weight):
    """The mean over each sample and then over the batch, in float64."""
    return np.mean(
        [w * np.mean((p.astype(np.float64) - t) ** 2) for p, t, w in zip(prediction, target, np.ravel(weight))]
    )


def column(*sigmas):
    return ms.Tensor(np.array(sigmas, np.float32).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("scheme", flow.WEIGHTING_SCHEMES)
def test_weight_of_every_scheme_for_a_batch(mode, scheme):
    sigmas = (0.001, 0.4, 1.0)
    found = Weighting(scheme)(column(*sigmas)).asnumpy()
    assert found.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(found.ravel(), weights(scheme, sigmas), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_squared_error_is_computed_in_float32(mode, dtype):
    prediction, target, weight = (
        ms.Tensor(random(3, 2, 4, 6)).to(dtype),
        random(3, 2, 4, 6, seed=1),
        column(4.0, 0.5, 1.0),
    )
    losses = Call(flow.sample_losses)(prediction, ms.Tensor(target), weight)
    assert losses.dtype == ms.float32 and losses.shape == (3,)
    assert float(losses.mean()) == pytest.approx(
        squared_error(prediction.to(ms.float32).asnumpy(), target, weight.asnumpy()), rel=2e-6
    )


def test_the_squared_error_does_not_overflow_in_fp16():
    """An error of 1000 squares to 1e6, above float16's largest number."""
    prediction = ms.Tensor(np.full((1, 1, 2, 2), 1000.0, np.float16))
    assert float(
        flow.sample_losses(prediction, ms.Tensor(np.zeros((1, 1, 2, 2), np.float16)), column(1.0)).mean()
    ) == pytest.approx(1e6)


def preserving_prior(prediction, target, weighting, prior_weight):
    return flow.prior_preservation_loss(flow.sample_losses(prediction, target, weighting), prior_weight)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_prior_preservation_weights_each_half_by_its_sigmas(mode, scheme):
    prediction, target, sigmas = random(4, 2, 4, 6), random(4, 2, 4, 6, seed=1), np.array([0.1, 0.7, 0.9, 0.3])
    weight = weights(scheme, sigmas)
    tensors = ms.Tensor(prediction), ms.Tensor(target), column(*weight)
    expected = squared_error(prediction[:2], target[:2], weight[:2]) + 0.25 * squared_error(
        prediction[2:], target[2:], weight[2:]
    )
    assert float(Call(preserving_prior, 0.25)(*tensors)) == pytest.approx(expected, rel=5e-6)


def test_class_sigmas_do_not_weight_instance_errors():
    """Class images that are predicted exactly add nothing, for any sigma."""
    prediction, target = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    prediction[1] = target[1]
    losses = [
        float(preserving_prior(ms.Tensor(prediction), ms.Tensor(target), column(*weights("sigma_sqrt", (0.5, s))), 1.0))
        for s in (0.01, 0.99)
    ]
    assert losses[0] == losses[1] == pytest.approx(squared_error(prediction[:1], target[:1], [4.0]), rel=1e-6)


def pseudo_huber(error, delta, loss):
    """In float64, as arXiv 2403.16728 writes it."""
    value = 2 * (np.sqrt(error.astype(np.float64) ** 2 + delta**2) - delta)
    return delta * value if loss == "huber" else value


@pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_huber_losses_of_a_batch_with_a_delta_per_sample(mode, dtype, loss):
    prediction, target = ms.Tensor(random(3, 2, 4, 6)).to(dtype), random(3, 2, 4, 6, seed=1)
    deltas, weight = np.array([1.0, 0.1, 0.004], np.float32), np.array([4.0, 0.5, 1.0], np.float32)
    found = Call(SampleLosses(loss))(prediction, ms.Tensor(target), column(*weight), column(*deltas))
    error = prediction.to(ms.float32).asnumpy() - target
    expected = [w * pseudo_huber(e, d, loss).mean() for e, d, w in zip(error, deltas.astype(np.float64), weight)]
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=5e-6)


class SampleLosses(nn.Cell):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def construct(self, prediction, target, weighting, deltas):
        return flow.sample_losses(prediction, target, weighting, self.loss, deltas)


@pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
def test_the_gradient_of_huber_losses(mode, loss):
    """Of the formula, in float64: w 2e / sqrt(e^2 + d^2), for huber times d, over the number of latents. Also at 0."""
    prediction, target = random(2, 2, 4, 6), random(2, 2, 4, 6, seed=1)
    prediction[0, 0, 0, 0] = target[0, 0, 0, 0]
    deltas, weight = np.array([0.5, 0.01]), np.array([2.0, 1.0])
    inputs = ms.Tensor(prediction), ms.Tensor(target), column(*weight), column(*deltas)
    found = ms.grad(SampleLosses(loss))(*inputs).asnumpy()  # of the sum of the losses
    error, d, w = (prediction.astype(np.float64) - target), deltas.reshape(2, 1, 1, 1), weight.reshape(2, 1, 1, 1)
    expected = w * 2 * error / np.sqrt(error**2 + d**2) * (d if loss == "huber" else 1) / 48
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("error, delta", [(1e-5, 1.0), (1e-3, 100.0), (30.0, 1e-3)])
def test_huber_losses_of_errors_far_from_delta(error, delta):
    """Below delta huber is the squared error, without cancelling in float32; above it grows linearly."""
    prediction, target = (
        ms.Tensor(np.full((1, 1, 2, 2), error, np.float32)),
        ms.Tensor(np.zeros((1, 1, 2, 2), np.float32)),
    )
    found = float(flow.sample_losses(prediction, target, column(1.0), "huber", column(delta)).mean())
    assert found == pytest.approx(error**2 if error < delta else 2 * delta * error, rel=1e-4)


def test_weights_per_latent():
    """Errors count with the weights of their place; the mean is over all places."""
    prediction, target, weights = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1), np.abs(random(2, 1, 4, 6, seed=2))
    found = flow.sample_losses(*map(ms.Tensor, (prediction, target, weights))).asnumpy()
    expected = (weights.astype(np.float64) * (prediction - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_deltas_fall_from_the_image_to_the_noise():
    """Along rectified flow t is sigma, and the share of the signal 1 - sigma."""
    sigmas = np.array([0.0, 0.25, 0.5, 1.0])
    assert flow.huber_deltas("constant", 0.3, sigmas, 1 - sigmas).tolist() == [0.3] * 4
    np.testing.assert_allclose(flow.huber_deltas("exponential", 0.01, sigmas, 1 - sigmas), [1, 10**-0.5, 0.1, 0.01])
    np.testing.assert_allclose(
        flow.huber_deltas("snr", 0.2, sigmas, 1 - sigmas), [1.0, 0.8 * 0.5625 + 0.2, 0.8 * 0.25 + 0.2, 0.2]
    )
    np.testing.assert_array_equal(
        flow.huber_deltas(None, None, sigmas, 1 - sigmas), flow.huber_deltas("exponential", 0.1, sigmas, 1 - sigmas)
    )


# ---- flags inside a graph ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "double, scheme, expected", [(True, "cosmap", 6.5), (False, "cosmap", 3.5), (True, "none", 6.0)]
)
def test_a_graph_reads_wrapped_flags(mode, double, scheme, expected):
    cell = ReadsFlags(flow.AttrJitWrapper(double=double, scheme=scheme, offset=0.5))
    assert float(cell(ms.Tensor(3.0, ms.float32))) == expected


def test_the_scale_of_latents():
    """One shift and scale for all channels, or one per channel: (z - mean) * scaling_factor / std."""
    assert flow.latent_scale({"scaling_factor": 0.18215}) == (0.0, 0.18215)
    assert flow.latent_scale({"scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": None}) == (
        0.1159,
        0.3611,
    )
    shift, scale = flow.latent_scale(
        {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": [1.0, -2.0], "latents_std": [4.0, 5.0]}
    )
    latents = (np.array([[[[5.0]], [[3.0]]]]) - shift) * scale
    np.testing.assert_allclose(latents.ravel(), [(5 - 1) * 0.5 / 4, (3 + 2) * 0.5 / 5], rtol=1e-6)
    assert shift.dtype == scale.dtype == np.float32 and shift.shape == (1, 2, 1, 1)


# ---- sources, masks, tables ----------------------------------------------------------------------


def test_the_ids_of_a_source_start_with_1():
    ids = flow.source_image_ids(4, 6)
    assert ids.dtype == np.float32 and ids.tolist() == [[1.0, y, x] for y in range(2) for x in range(3)]
    np.testing.assert_array_equal(flow.latent_image_ids(4, 6)[:, 1:], ids[:, 1:])


def test_the_pixels_of_a_mask_are_channels_of_their_latent():
    """Row by row. Not square, and with a factor that is no power of the sizes."""
    mask = random(1, 6, 9)
    found = flow.mask_channels(mask, 3)
    assert found.shape == (9, 2, 3)
    for y, x in np.ndindex(6, 9):
        assert found[y % 3 * 3 + x % 3, y // 3, x // 3] == mask[0, y, x]


def test_the_mean_of_the_posterior():
    moments = random(2, 6, 4, 5)
    found = flow.posterior_mean(ms.Tensor(moments.astype(np.float16)))
    assert found.dtype == ms.float32
    np.testing.assert_array_equal(found.asnumpy(), moments[:, :3].astype(np.float16).astype(np.float32))


def test_tables_of_several_sizes_are_read_by_one_index():
    sigmas = np.array([[1.0, 0.5], [0.8, 0.2]], np.float32)
    tables = flow.timestep_tables(sigmas, "exponential", 0.01)
    indices = ms.Tensor(np.array([3, 0], np.int32))
    found = [flow.get_sigmas(table, indices).asnumpy().ravel() for table in tables]
    np.testing.assert_allclose(found, [[0.2, 1.0], [0.01**0.2, 0.01]], rtol=1e-6)
