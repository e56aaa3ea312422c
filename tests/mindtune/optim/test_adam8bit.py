"""8-bit AdamW against a float64 NumPy loop that finds the nearest of all 256 values, and against float32 AdamW."""

import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindtune.optim.adam8bit import BLOCK, MIN_SIZE, AdamW8bit, Quantiser, dynamic_codes
from mindtune.optim.optimizers import AdamW, Settings, create_optimizer, optimizer_state, set_learning_rates
from mindtune.optim.schedules import Schedule
from mindtune.run import checkpoint

ms.runtime.launch_blocking()

# Whole blocks; one element more than the smallest; odd sizes of one, two and four axes; and those that keep float32 moments.
SHAPES = [(64, 64), (MIN_SIZE + 1,), (17, 31, 3, 3), (67, 129), (MIN_SIZE - 1,), (3, 5), (1,), ()]


def arrays(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in map(tuple, shapes)]


def optimizer(values, eight_bit=True, rates=(1e-2, 1e-3), decays=(0.1, 0.0), betas=(0.9, 0.999)):
    """Over two groups, of every second parameter; and the parameters."""
    params = [ms.Parameter(ms.Tensor(np.asarray(value)), name=f"p{number}") for number, value in enumerate(values)]
    groups = [{"params": params[k::2], "lr": rates[k], "weight_decay": decays[k]} for k in range(2)]
    settings = Settings(use_8bit_adam=eight_bit, adam_beta1=betas[0], adam_beta2=betas[1])
    return create_optimizer(settings, groups), params


def update(cell, gradients):
    cell(tuple(ms.Tensor(np.float32(g)) for g in [*gradients[0::2], *gradients[1::2]]))


# ---- codes ---------------------------------------------------------------------------------------


def expected_codes(signed):
    """Bit by bit, as the paper draws them: zero bits in front are the exponent, what follows the first one is the fraction."""
    bits, found = (7 if signed else 8), {0.0, 1.0}
    for code in range(1 if signed else 2, 2**bits):
        fraction_bits = code.bit_length() - 1
        fraction = (code - 2**fraction_bits + 0.5) / 2**fraction_bits
        found.add(10.0 ** (fraction_bits - bits + 1) * (0.1 + 0.9 * fraction))
    return np.array(sorted(found | ({-value for value in found if 0 < value < 1} if signed else set())))


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_the_papers(signed):
    values = dynamic_codes(signed)
    assert values.shape == (256,) and (np.diff(values) > 0).all()
    np.testing.assert_allclose(values, expected_codes(signed), rtol=1e-12)


class Both(nn.Cell):
    """Codes, scales and what they stand for."""

    def __init__(self, signed):
        super().__init__()
        self.quantiser = Quantiser(signed)

    def construct(self, x):
        codes, scale = self.quantiser.encode(x)
        return codes, scale, self.quantiser.decode(codes, scale)


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_that_of_the_nearest_value(mode, signed):
    """Of values in every decade, of all codes' values, and of float32's neighbours of the middles between them."""
    values, rng = dynamic_codes(signed), np.random.default_rng(0)
    middles = np.float32((values[1:] + values[:-1]) / 2)
    spread = rng.uniform(0.1, 1, 20000) * 10.0 ** rng.integers(-9, 1, 20000)
    edges = [np.nextafter(middles, np.float32(way)) for way in (-2, 2)]
    x = np.concatenate([spread * (rng.choice([-1, 1], 20000) if signed else 1), values, *edges]).astype(np.float32)
    x = x[: x.size // 255 * 255].reshape(-1, 255)
    x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)  # the scale of every block is 1
    codes, scale, back = (t.asnumpy() for t in Both(signed)(ms.Tensor(x)))
    assert codes.dtype == np.uint8 and codes.shape == x.shape and scale.shape == (len(x), 1) and (scale == 1).all()
    error = np.abs(x[..., None].astype(np.float64) - values[0 if signed else 1 :]).min(axis=-1)
    np.testing.assert_allclose(np.abs(x.astype(np.float64) - values[codes]), error, atol=1e-7)
    np.testing.assert_array_equal(back, np.float32(values)[codes])


def test_the_second_moment_has_no_zero(mode):
    codes, _, back = (t.asnumpy() for t in Both(False)(ms.Tensor(np.eye(1, BLOCK, dtype=np.float32))))
    assert codes[0, 0] == 255 and set(codes[0, 1:]) == {1}
    np.testing.assert_allclose(back[0, 1:], 3.25e-7, rtol=1e-6)


def test_an_outlier_coarsens_its_own_block_only(mode):
    """Where the largest is 1 an error is at most half of a part of the highest decade, 0.9/64; where it is 1e6, a million times that."""
    x = np.random.default_rng(0).uniform(-1, 1, (2, BLOCK)).astype(np.float32)
    x[1, 0] = 1e6
    _, scale, back = (t.asnumpy() for t in Both(True)(ms.Tensor(x)))
    np.testing.assert_array_equal(scale[:, 0], np.abs(x).max(axis=1))
    assert np.abs(back - x)[0].max() <= 0.9 / 128 and 0.1 < np.abs(back - x)[1, 1:].max() <= 1


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-7, 1e20])
def test_blocks_of_any_magnitude(mode, size):
    x = np.float32(size) * np.random.default_rng(0).uniform(-1, 1, (3, BLOCK)).astype(np.float32)
    _, _, back = (t.asnumpy() for t in Both(True)(ms.Tensor(x)))
    assert np.abs(back - x).max() <= 0.0071 * size


# ---- the formula ---------------------------------------------------------------------------------


class NumpyAdamW8bit:
    """torch.optim.AdamW's formula in float64; large tensors' moments go through the nearest of all values in between."""

    def __init__(self, values, rates, decays, betas=(0.9, 0.999), eps=1e-8):
        self.p = [np.asarray(value, np.float64) for value in values]
        self.m, self.v = ([np.zeros_like(p) for p in self.p] for _ in range(2))
        self.betas, self.eps, self.decays, self.t = betas, eps, decays, 0

    def __call__(self, gradients, rates):
        self.t += 1
        b1, b2 = self.betas
        for i, gradient in enumerate(gradients):
            g, lr = np.asarray(gradient, np.float64), rates[i % 2]
            m, v = b1 * self.m[i] + (1 - b1) * g, b2 * self.v[i] + (1 - b2) * g * g
            self.p[i] = self.p[i] * (1 - lr * self.decays[i % 2])
            self.p[i] -= lr * (m / (1 - b1**self.t)) / (np.sqrt(v / (1 - b2**self.t)) + self.eps)
            large = g.size >= MIN_SIZE
            self.m[i], self.v[i] = (
                (rounded(m, dynamic_codes(True)), rounded(v, dynamic_codes(False)[1:])) if large else (m, v)
            )


def rounded(x, values):
    flat = np.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    scale = np.abs(flat).max(axis=1, keepdims=True)
    nearest = values[np.abs((flat / scale)[..., None] - values).argmin(axis=-1)]
    return (nearest * scale).ravel()[: x.size].reshape(x.shape)


def apart(found, expected, start):
    """Distance of the weights relative to the way moved."""
    way = np.linalg.norm((np.asarray(expected, np.float64) - start).ravel())
    return np.linalg.norm((found.asnumpy().astype(np.float64) - expected).ravel()) / way


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_weights_follow_the_formula(mode, betas):
    """20 updates, two groups of other rates and decays, rates that change; a moment that float32 rounds to another code is the bound."""
    cell, params = optimizer(arrays(), betas=betas)
    reference = NumpyAdamW8bit(arrays(), (1e-2, 1e-3), (0.1, 0.0), betas)
    for k in range(20):
        rates = [rate * Schedule(1.0, 20, "cosine", 3).factor(k) for rate in (1e-2, 1e-3)]
        gradients = [g * np.float32(10.0 ** (k % 5 - 3)) for g in arrays(100 + k)]
        set_learning_rates(cell, rates)
        update(cell, gradients)
        reference(gradients, rates)
    errors = [apart(*row) for row in zip(params, reference.p, arrays())]
    assert max(errors) < 1e-3, errors


def test_small_tensors_are_updated_as_by_adamw(mode):
    shapes = [(MIN_SIZE - 1,), (3, 5), (1,), ()]
    (eight, found), (full, expected) = (optimizer(arrays(0, shapes), eight_bit) for eight_bit in (True, False))
    for k in range(5):
        update(eight, arrays(k, shapes))
        update(full, arrays(k, shapes))
    assert type(eight) is AdamW8bit and type(full) is AdamW
    for ours, theirs in zip(found, expected):
        np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())
    assert [p.shape for p in optimizer_state(eight).values()] == [p.shape for p in optimizer_state(full).values()]


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_gradients(mode, dtype):
    gradients = [ms.Tensor(g).to(dtype) for g in arrays(1, SHAPES[:4])]
    (cell, params), (full, expected) = (optimizer(arrays(0, SHAPES[:4])) for _ in range(2))
    cell((*gradients[0::2], *gradients[1::2]))
    update(full, [g.to(ms.float32).asnumpy() for g in gradients])
    for found, right in zip(params, expected):
        np.testing.assert_allclose(found.asnumpy(), right.asnumpy(), rtol=1e-6)


def test_a_vanishing_second_moment_makes_no_giant_step(mode):
    """One gradient of 1e-4 beside others of 1, then none: float32 AdamW goes on by 0.67 of the rate. With v at 0 it would be 4,204."""
    first = np.ones(MIN_SIZE, np.float32)
    first[0] = 1e-4
    cell, (p, _) = optimizer([first * 0, first * 0], rates=(1.0, 1.0), decays=(0.0, 0.0))
    update(cell, [first, first])
    before = p.asnumpy()[0]
    update(cell, [first * 0, first * 0])
    assert 0 < before - p.asnumpy()[0] < 1


def test_what_is_not_a_number_reaches_the_weights(mode):
    """So that the training loop, which looks at the loss, says so."""
    cell, (p, _) = optimizer(arrays(0, SHAPES[:2]))
    gradients = arrays(1, SHAPES[:2])
    gradients[0][3, 5] = np.nan
    for _ in range(2):
        update(cell, gradients)
    assert np.isnan(p.asnumpy()[3, 5])


# ---- memory, and what is remembered --------------------------------------------------------------


def test_two_bytes_a_parameter():
    """Of all quantised tensors together at most 2.2, whatever their shapes; the smallest has the most padding."""

    def share(shapes):
        state = optimizer_state(optimizer(arrays(0, shapes))[0]).values()
        count = sum(int(np.prod(shape)) for shape in shapes)
        return sum(p.asnumpy().nbytes for p in state if p.shape != (1,)) / count

    assert share([SHAPES[1], SHAPES[1]]) <= 2.2
    assert share(SHAPES[:4]) <= 2.2
    assert share([(512, 1024), (1024, 256)]) == pytest.approx(2 + 8 / BLOCK)


def test_five_updates_and_five_resumed_are_ten(mode, tmp_path):
    """Through a file, in an optimizer made afresh over other weights: bit for bit the weights and the state."""

    def go_on(cell, first, last):
        for k in range(first, last):
            set_learning_rates(cell, [rate * Schedule(1.0, 12, "linear", 3).factor(k) for rate in (1e-2, 1e-3)])
            update(cell, arrays(100 + k))

    def everything(cell, params):
        return {**{p.name: p for p in params}, **optimizer_state(cell)}

    straight, first, second = optimizer(arrays()), optimizer(arrays()), optimizer(arrays(9))
    go_on(straight[0], 0, 10)
    go_on(first[0], 0, 5)
    checkpoint.save_state(tmp_path / "state.safetensors", everything(*first))
    checkpoint.load_state(tmp_path / "state.safetensors", everything(*second))
    go_on(second[0], 5, 10)
    found, right = everything(*second), everything(*straight)
    assert int(right["global_step"]) == 10 and {str(p.dtype) for p in right.values()} == {"Int32", "Float32", "UInt8"}
    for name in right:
        assert found[name].asnumpy().tobytes() == right[name].asnumpy().tobytes(), name


# ---- quality -------------------------------------------------------------------------------------


class Student(nn.Cell):
    """Two layers that learn what two others compute of noise, with noise on it."""

    def __init__(self):
        super().__init__()
        draw = np.random.default_rng(0)
        sizes = {"first": (64, 96), "bias": (96,), "last": (96, 65)}
        self.w = ms.ParameterTuple(
            [
                ms.Parameter(ms.Tensor(draw.standard_normal(s).astype(np.float32) / np.float32(8)), name=n)
                for n, s in sizes.items()
            ]
        )

    def construct(self, x, y):
        return ops.square(ops.matmul(ops.relu(ops.matmul(x, self.w[0]) + self.w[1]), self.w[2]) - y).mean()


def last_loss(eight_bit, updates=200):
    draw, student = np.random.default_rng(1), Student()
    teacher = [draw.standard_normal(shape).astype(np.float32) / 8 for shape in ((64, 96), (96, 65))]
    groups = [{"params": list(student.w), "lr": 3e-3, "weight_decay": 0.01}]
    cell = create_optimizer(Settings(use_8bit_adam=eight_bit), groups)
    step, losses = ms.value_and_grad(student, None, cell.parameters), []
    for _ in range(updates):
        x = draw.standard_normal((64, 64)).astype(np.float32)
        y = np.maximum(x @ teacher[0], 0) @ teacher[1] + 0.1 * draw.standard_normal((64, 65)).astype(np.float32)
        loss, gradients = step(ms.Tensor(x), ms.Tensor(y))
        cell(gradients)
        losses.append(float(loss))
    return losses[0], float(np.mean(losses[-20:]))


def test_it_learns_as_well_as_adamw():
    """The loss after 200 updates is within 2% of float32 AdamW's, and far below the first."""
    (first, full), (_, eight) = last_loss(False), last_loss(True)
    assert eight == pytest.approx(full, rel=0.02) and eight < 0.2 * first, (first, full, eight)


GROWTH = """
import sys
from pathlib import Path
import mindspore as ms, numpy as np
from mindtune.models import execution
from mindtune.optim import optimizers

def own_memory():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10

execution.set_up_device(graph_mode=sys.argv[1] == "0")
params = [ms.Parameter(ms.Tensor(np.ones((1024, 1024), np.float32)), name=f"p{n}") for n in range(int(sys.argv[2]))]
group = {"params": params, "lr": 1e-3, "weight_decay": 0.01}
optimizer = optimizers.create_optimizer(optimizers.Settings(use_8bit_adam=True), [group])
gradients = tuple(ms.Tensor(np.full((1024, 1024), 0.5, np.float32)) for _ in params)
before = own_memory()
optimizer(gradients)
params[-1].asnumpy()
print(own_memory() - before)
"""


def test_float32_moments_are_there_for_a_tensor_at_a_time(mode, tmp_path):
    """For every tensor more an update takes, and the pool keeps, its state (2 bytes an element) and little else.

    In graph mode 24 bytes at most; it was above 75 while divisions kept their workspaces and all tensors were updated at once. float32
    AdamW takes 8.
    """
    script = tmp_path / "growth.py"
    script.write_text(GROWTH)
    grown = []
    for count in (4, 16):
        done = subprocess.run(
            [sys.executable, script, str(mode), str(count)], stdout=subprocess.PIPE, text=True, check=True
        )
        grown.append(int(done.stdout.splitlines()[-1]))
    assert (grown[1] - grown[0]) / (12 << 20) < (24 if mode == 0 else 4), grown
