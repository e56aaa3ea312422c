"""Optimizers against float64 NumPy loops of the published formulas."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from shared_optimizers import factor, new_optimizer, optimizer, update

from mindtune.cli import UserError
from mindtune.optim.adafactor import Adafactor
from mindtune.optim.adamw import AdamW
from mindtune.optim.optimizers import check_settings, optimizer_state, set_learning_rates
from mindtune.optim.prodigy import Prodigy

SHAPES = [(3, 5), (7,), (2, 2)]


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def assert_close(params, expected, rtol=1e-5, atol=2e-6):
    for parameter, value in zip(params, expected):
        np.testing.assert_allclose(parameter.asnumpy(), value, rtol=rtol, atol=atol)


# ---- AdamW ---------------------------------------------------------------------------------------


class NumpyAdamW:
    """torch.optim.AdamW's formula, in float64: p *= 1 - lr wd; p -= lr m^ / (sqrt(v^) + eps)."""

    def __init__(self, values, beta1, beta2, eps):
        self.p = [value.astype(np.float64) for value in values]
        self.m = [np.zeros_like(p) for p in self.p]
        self.v = [np.zeros_like(p) for p in self.p]
        self.beta1, self.beta2, self.eps, self.t = beta1, beta2, eps, 0

    def __call__(self, gradients, rates, decays):
        self.t += 1
        for i, (g, lr, decay) in enumerate(zip(gradients, rates, decays)):
            g = g.astype(np.float64)
            self.p[i] *= 1 - lr * decay
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * g
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * g * g
            m, v = self.m[i] / (1 - self.beta1**self.t), self.v[i] / (1 - self.beta2**self.t)
            self.p[i] -= lr * m / (np.sqrt(v) + self.eps)


@pytest.mark.parametrize(
    "betas, eps, offload", [((0.9, 0.999), 1e-8, False), ((0.8, 0.95), 1e-3, False), ((0.9, 0.999), 1e-8, True)]
)
def test_adamw_follows_torchs_formula_for_100_updates(mode, betas, eps, offload):
    """Two groups with different rates and decays; rates change in every update and reach 0. Also with offload."""
    cell, params = optimizer("adamw", arrays(), betas=betas, eps=eps, offload=offload)
    reference, rng = NumpyAdamW(arrays(), *betas, eps), np.random.default_rng(1)
    for k in range(100):
        gradients = [np.float32(rng.standard_normal(shape) * 10.0 ** (k % 5 - 3)) for shape in SHAPES]
        scale = factor("cosine", k, 10, 100)
        set_learning_rates(cell, [1e-2 * scale, 1e-3 * scale])
        update(cell, gradients)
        reference(gradients, [1e-2 * scale] * 2 + [1e-3 * scale], [0.1, 0.1, 0.0])
    assert_close(params, reference.p)
    assert np.abs(reference.p[0] - arrays()[0]).mean() > 0.05  # the weights have moved


@pytest.mark.parametrize("name", ["adamweightdecay", "prodigy", "adafactor"])
def test_8_bit_moments_and_moments_on_the_host_are_of_adamw(name):
    with pytest.raises(UserError, match=f"--use_8bit_adam with --optimizer {name}: .* leave one of the two out"):
        check_settings(name, use_8bit_adam=True, offload_optimizer=False, graph_mode=True)
    with pytest.raises(UserError, match=f"--offload_optimizer with --optimizer {name}: .* leave one of the two out"):
        check_settings(name, use_8bit_adam=False, offload_optimizer=True, graph_mode=True)


def test_moments_are_in_8_bits_or_on_the_host_of_a_graph():
    for eight_bit, offload, graph in ((True, False, True), (True, False, False), (False, True, True), (False,) * 3):
        check_settings("adamw", use_8bit_adam=eight_bit, offload_optimizer=offload, graph_mode=graph)
    with pytest.raises(UserError, match="--offload_optimizer with --use_8bit_adam: .* leave one of the two out"):
        check_settings("adamw", use_8bit_adam=True, offload_optimizer=True, graph_mode=True)
    with pytest.raises(UserError, match="--offload_optimizer with --mindspore_mode 1: .* use mode 0"):
        check_settings("adamw", use_8bit_adam=False, offload_optimizer=True, graph_mode=False)


@pytest.mark.parametrize("name, length", [("adamw", 1.0), ("adamweightdecay", 0.1 / math.sqrt(0.001))])
def test_the_length_of_the_first_update(mode, name, length):
    """AdamW's is the rate, for any gradient. AdamWeightDecay has no bias correction: 3.16 times the rate."""
    cell, params = optimizer(name, arrays(), decays=(0.0, 0.0))
    gradients = [np.sign(a) * 10.0 ** np.arange(-2, a.size - 2).reshape(a.shape).clip(1e-2, 1e3) for a in arrays(1)]
    update(cell, gradients)
    for parameter, before, gradient, rate in zip(params, arrays(), gradients, (1e-2, 1e-2, 1e-3)):
        np.testing.assert_allclose(parameter.asnumpy() - before, -length * rate * np.sign(gradient), rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weights_decay_without_a_gradient(mode, name):
    """By 1 - lr wd per update: decay is decoupled from the gradient."""
    cell, params = optimizer(name, arrays(), rates=(0.1, 0.1), decays=(0.5, 0.0))
    for _ in range(3):
        update(cell, [np.zeros(shape) for shape in SHAPES])
    assert_close(params, [arrays()[0] * 0.95**3, arrays()[1] * 0.95**3, arrays()[2]])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_gradients(mode, name, dtype):
    cell, params = optimizer(name, arrays())
    gradients = [ms.Tensor(a).to(dtype) for a in arrays(1)]
    reference = NumpyAdamW(arrays(), 0.9, 0.999, 1e-8) if name == "adamw" else NumpyAdafactor(arrays())
    cell(ms.mutable(tuple(gradients)))
    reference([g.to(ms.float32).asnumpy() for g in gradients], [1e-2, 1e-2, 1e-3], [0.1, 0.1, 0.0])
    assert_close(params, reference.p)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_first_beta_of_zero_is_no_momentum(name):
    """A step follows the sign of its own gradient; with momentum of 0.9 it would follow the larger gradient before."""
    cell, params = optimizer(name, [a * 0 for a in arrays()], betas=(0.0, 0.999), decays=(0.0, 0.0))
    update(cell, [np.ones(shape) for shape in SHAPES])
    before = [p.asnumpy().copy() for p in params]
    update(cell, [np.full(shape, -0.1) for shape in SHAPES])
    assert all((p.asnumpy() > b).all() for p, b in zip(params, before))


# ---- Prodigy -------------------------------------------------------------------------------------


class NumpyProdigy:
    """The published algorithm as in the prodigyopt package (d_coef 1, no growth limit), in float64."""

    def __init__(
        self,
        values,
        decays,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        beta3=None,
        decouple=True,
        bias_correction=True,
        safeguard=True,
    ):
        self.p = [value.astype(np.float64) for value in values]
        self.p0 = [p.copy() for p in self.p]
        self.m, self.v, self.s = ([np.zeros_like(p) for p in self.p] for _ in range(3))
        self.beta1, self.beta2, self.beta3 = beta1, beta2, math.sqrt(beta2) if beta3 is None else beta3
        self.decays, self.eps = decays, eps
        self.decouple, self.bias_correction, self.safeguard = decouple, bias_correction, safeguard
        self.d = self.d0 = 1e-6
        self.numerator, self.k = 0.0, 0

    def __call__(self, gradients, lr):
        if lr == 0:
            return
        b1, b2, d, d0 = self.beta1, self.beta2, self.d, self.d0
        correction = math.sqrt(1 - b2 ** (self.k + 1)) / (1 - b1 ** (self.k + 1)) if self.bias_correction else 1.0
        dlr = d * lr * correction
        numerator, denominator = self.numerator * self.beta3, 0.0
        for i, g in enumerate(gradients):
            g = g.astype(np.float64)
            if self.decays[i] and not self.decouple:
                g = g + self.decays[i] * self.p[i]
            numerator += d / d0 * dlr * float((g * (self.p0[i] - self.p[i])).sum())
            self.m[i] = b1 * self.m[i] + d * (1 - b1) * g
            self.v[i] = b2 * self.v[i] + d * d * (1 - b2) * g * g
            self.s[i] = self.beta3 * self.s[i] + d / d0 * (d if self.safeguard else dlr) * g
            denominator += np.abs(self.s[i]).sum()
        if denominator == 0:
            return
        self.numerator, self.d = numerator, max(d, numerator / denominator)
        for i in range(len(self.p)):
            if self.decays[i] and self.decouple:
                self.p[i] -= self.decays[i] * dlr * self.p[i]
            self.p[i] -= dlr * self.m[i] / (np.sqrt(self.v[i]) + self.d * self.eps)
        self.k += 1


def quadratic(values, number, rng):
    """Noisy gradients at the reference's weights, of a quadratic function around 3 with a curvature per tensor."""
    noise = [0.1 * rng.standard_normal(value.shape) for value in values]
    return [np.float32((1 + index % 3) * (value - 3.0) + noise[index]) for index, value in enumerate(values)]


def run_prodigy(updates, rate_of, decays=(0.02, 0.0), gradient=quadratic, rtol=2e-4, **changes):
    """Runs Prodigy and the reference, compares d after each update and the weights at the end, and returns both.

    The weights start near 0: the first steps are about 1e-6, which float32 would lose beside 1, in prodigyopt too.
    """
    values = [a * np.float32(1e-4) for a in arrays()]
    cell, params = optimizer("prodigy", values, rates=(1.0, 1.0), decays=decays, **changes)
    renamed = {"use_bias_correction": "bias_correction", "safeguard_warmup": "safeguard"}
    options = {renamed.get(k, k): v for k, v in changes.items()}
    if "betas" in options:
        options["beta1"], options["beta2"] = options.pop("betas")
    reference, rng = NumpyProdigy(values, [decays[0]] * 2 + [decays[1]], **options), np.random.default_rng(2)
    for k in range(updates):
        gradients = gradient(reference.p, k, rng)
        set_learning_rates(cell, [rate_of(k)] * 2)
        update(cell, gradients)
        reference(gradients, rate_of(k))
        assert float(cell.d) == pytest.approx(reference.d, rel=rtol), k
    assert_close(params, reference.p, rtol=rtol, atol=1e-8)
    return cell, reference


def warm_up(k):
    return factor("constant_with_warmup", k, 5, 60)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decouple": False},
        {"safeguard_warmup": False},
        {"use_bias_correction": False},
        {"beta3": 0.9, "betas": (0.8, 0.99), "eps": 1e-4, "decouple": False, "safeguard_warmup": False},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_prodigy_follows_the_published_algorithm(mode, changes):
    """60 updates with a warm-up whose first rate is 0; the step size grows more than a hundredfold."""
    _, reference = run_prodigy(60, warm_up, **changes)
    assert reference.d > 1e-4 and np.abs(reference.p[0]).min() > 1e-3


def test_prodigy_at_rate_zero_changes_nothing(mode):
    """Also in the middle of a run, where a cosine with restarts reaches 0."""
    cell, params = optimizer("prodigy", arrays(), rates=(1.0, 1.0), decays=(0.02, 0.0))
    for _ in range(3):
        update(cell, arrays(1))
    everything = [*params, *optimizer_state(cell).values()]
    before = [p.asnumpy().copy() for p in everything]
    set_learning_rates(cell, [0.0, 0.0])
    update(cell, arrays(2))
    for parameter, value in zip(everything, before):
        np.testing.assert_array_equal(parameter.asnumpy(), value, err_msg=parameter.name)


def test_prodigy_does_not_count_updates_before_the_first_gradient(mode):
    """After two updates without any gradient, the bias correction starts with the third."""

    def late(values, number, rng):
        gradients = quadratic(values, number, rng)
        return [g * 0 for g in gradients] if number < 2 else gradients

    cell, reference = run_prodigy(12, lambda k: 1.0, gradient=late)
    assert reference.k == 10 and int(cell.global_step) == 10


def test_prodigy_decays_only_the_group_with_weight_decay(mode):
    """By 1 - wd d lr, and by nothing else where the gradient is zero."""
    cell, params = optimizer("prodigy", arrays(), rates=(1.0, 1.0), decays=(1e5, 0.0), use_bias_correction=False)
    update(cell, [np.zeros(SHAPES[0]), np.zeros(SHAPES[1]), np.ones(SHAPES[2])])
    assert_close(params[:2], [arrays()[0] * 0.9, arrays()[1] * 0.9])
    np.testing.assert_allclose(params[2].asnumpy(), arrays()[2] - 1e-6 * 0.1 / math.sqrt(0.001), rtol=1e-6)


# ---- Adafactor -----------------------------------------------------------------------------------

# Two groups again: the first two tensors, and the others, with a batch of matrices and a scalar.
AXES = [(3, 5), (7,), (4, 2, 3, 5), (1,), (), (1, 9)]


def tensors(seed, shapes=AXES):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]


class NumpyAdafactor:
    """Algorithm 4 with the paper's beta2, clipping at 1, a given rate and decoupled decay, in float64."""

    def __init__(self, values):
        self.p, self.t = [value.astype(np.float64) for value in values], 0
        self.second = [None] * len(values)

    def __call__(self, gradients, rates, decays):
        self.t += 1
        beta = 1 - self.t**-0.8
        for i, (g, lr, decay) in enumerate(zip(gradients, rates, decays)):
            g = g.astype(np.float64)
            squares = g * g + 1e-30
            now = (squares.sum(axis=-1), squares.sum(axis=-2)) if g.ndim > 1 else (squares,)
            before = self.second[i] or [0.0] * len(now)
            self.second[i] = [beta * old + (1 - beta) * new for old, new in zip(before, now)]
            v = self.second[i][0]
            if g.ndim > 1:
                rows, columns = self.second[i]
                v = np.einsum("...r,...c->...rc", rows, columns) / rows.sum(axis=-1)[..., None, None]
            u = g / np.sqrt(v)
            self.p[i] -= lr * (u / max(1.0, np.sqrt(np.mean(u * u))) + decay * self.p[i])


def test_adafactor_follows_its_formula_for_100_updates(mode):
    """Gradients change in size, so that updates are clipped; rates change; one update has no gradient."""
    cell, params = optimizer("adafactor", tensors(0))
    reference = NumpyAdafactor(tensors(0))
    for k in range(100):
        gradients = [g * np.float32(10.0 ** (k % 5 - 3) * (k != 50)) for g in tensors(100 + k)]
        scale = factor("cosine", k, 10, 100)
        set_learning_rates(cell, [1e-2 * scale, 1e-3 * scale])
        update(cell, gradients)
        reference(gradients, [1e-2 * scale] * 2 + [1e-3 * scale] * 4, [0.1] * 2 + [0.0] * 4)
    assert_close(params, reference.p)
    assert np.abs(reference.p[0] - tensors(0)[0]).mean() > 0.03


def test_adafactor_stores_rows_and_columns_of_matrices():
    """And full second moments of tensors with fewer than two axes."""
    shapes = [p.shape for p in optimizer_state(optimizer("adafactor", tensors(0))[0]).values()]
    assert shapes == [(1,), (3,), (7,), (4, 2, 3), (1,), (), (1,), (5,), (4, 2, 5), (9,)]


def test_the_length_of_adafactors_first_update(mode):
    """Its root mean square is the rate, for any gradient."""
    cell, params = optimizer("adafactor", tensors(0), decays=(0.0, 0.0))
    update(cell, [1e4 * g for g in tensors(1)])
    for parameter, before, rate in zip(params, tensors(0), [1e-2] * 2 + [1e-3] * 4):
        step = np.sqrt(np.mean(np.square(parameter.asnumpy() - before)))
        assert 0.7 * rate < step <= 1.001 * rate


@pytest.mark.parametrize("name", ["adamw", "adamweightdecay", "prodigy", "adafactor"])
@pytest.mark.parametrize("start", [(1e-2, 1e-3), (1e-3, 1e-3)])
def test_every_group_gets_its_rate(name, start):
    """Also when both groups start with the same rate."""
    cell, _ = new_optimizer(name, arrays(), rates=start)
    set_learning_rates(cell, [0.25, 0.5])
    assert [float(rate) for rate in cell.learning_rate] == [0.25, 0.25, 0.5]


def test_a_compiled_optimizer_sees_a_new_rate(mode):
    cell, params = optimizer("adamw", arrays(), decays=(0.0, 0.0))
    for rates in ((0.5, 0.25), (0.0, 0.125)):
        before = [p.asnumpy().copy() for p in params]
        set_learning_rates(cell, rates)
        update(cell, [np.ones(shape) for shape in SHAPES])
        for parameter, value, rate in zip(params, before, (rates[0], rates[0], rates[1])):
            np.testing.assert_allclose(value - parameter.asnumpy(), rate, rtol=1e-4, atol=1e-7)


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamweightdecay", "prodigy", "adafactor"])
def test_five_updates_and_five_resumed_are_ten(mode, name):
    """Weights and state are the same bit for bit, when a new optimizer over other weights resumes."""
    rate = 1.0 if name == "prodigy" else 1e-2
    settings = {"rates": (1.0, 1.0), "decays": (0.02, 0.0)} if name == "prodigy" else {}

    def run(cell, first, last):
        for k in range(first, last):
            set_learning_rates(cell, [rate * factor("linear", k, 3, 12)] * 2)
            update(cell, arrays(100 + k))

    def values(cell, params):
        everything = {**{parameter.name: parameter for parameter in params}, **optimizer_state(cell)}
        return {key: parameter.asnumpy().copy() for key, parameter in everything.items()}

    whole, whole_params = optimizer(name, arrays(), **settings)
    run(whole, 0, 10)
    expected = values(whole, whole_params)
    first, first_params = optimizer(name, arrays(), **settings)
    run(first, 0, 5)
    saved = values(first, first_params)
    second, second_params = new_optimizer(name, arrays(9), **settings)
    fresh = {**{parameter.name: parameter for parameter in second_params}, **optimizer_state(second)}
    assert saved.keys() == fresh.keys()
    for key, value in saved.items():
        fresh[key].set_data(ms.Tensor(value, fresh[key].dtype))
    run(second, 5, 10)
    for key, value in values(second, second_params).items():
        assert value.tobytes() == expected[key].tobytes(), key


@pytest.mark.parametrize("name, per_parameter, single", [("adamw", 2, 1), ("adamweightdecay", 2, 1), ("prodigy", 4, 3)])
def test_the_state_does_not_contain_weights_or_rates(name, per_parameter, single):
    """Two moments per parameter and the counter; prodigy has s, the initial weights, d and its numerator too."""
    cell, params = new_optimizer(name, arrays())
    state = optimizer_state(cell)
    assert len(state) == per_parameter * len(params) + single
    assert not {id(p) for p in state.values()} & {id(p) for p in (*params, *cell.learning_rate)}


def test_create_optimizer_by_name():
    types = {
        name: type(new_optimizer(name, arrays())[0]) for name in ("adamw", "adamweightdecay", "prodigy", "adafactor")
    }
    assert types == {"adamw": AdamW, "adamweightdecay": nn.AdamWeightDecay, "prodigy": Prodigy, "adafactor": Adafactor}
    with pytest.raises(ValueError, match="unknown optimizer sgd"):
        new_optimizer("sgd", arrays())
