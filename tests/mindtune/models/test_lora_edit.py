"""Sums and ranks of LoRAs against full products and their singular values in float64."""

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mindtune.cli import UserError
from mindtune.models import lora_edit
from mindtune.models.lora_edit import Pair


def random_pair(rank, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    return Pair(rng.standard_normal((rank, inputs), np.float32), rng.standard_normal((outputs, rank), np.float32))


def product(pair):
    return pair.b.astype(np.float64) @ pair.a.astype(np.float64)


# The rank may be larger than the widths of the layer.
SHAPES = pytest.mark.parametrize(
    "rank, inputs, outputs", [(6, 20, 30), (6, 31, 9), (12, 8, 30), (12, 30, 7), (1, 5, 5)]
)


# ---- sums ----------------------------------------------------------------------------------------


def test_a_sum_is_the_weighted_sum_of_the_products():
    """With different ranks per layer, and layers that only one LoRA has."""
    first = {"q": random_pair(4, 20, 30, 1), "k": random_pair(2, 20, 10, 2)}
    second = {"q": random_pair(7, 20, 30, 3), "x": random_pair(3, 9, 10, 4)}
    found = lora_edit.weighted_sum([first, second, first], [0.5, -2.0, 1.0])
    assert {name: len(pair.a) for name, pair in found.items()} == {"q": 15, "k": 4, "x": 3}
    expected = {
        "q": 1.5 * product(first["q"]) - 2 * product(second["q"]),
        "k": 1.5 * product(first["k"]),
        "x": -2 * product(second["x"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(product(found[name]), value, atol=1e-5)


def test_layers_of_different_widths_cannot_be_added():
    loras = [{"q": random_pair(4, 20, 30)}, {"q": random_pair(4, 20, 31)}]
    with pytest.raises(ValueError, match="q has 20 inputs and 30 outputs in one LoRA, 20 and 31 in another"):
        lora_edit.weighted_sum(loras, [1, 1])


# ---- ranks ---------------------------------------------------------------------------------------


@SHAPES
def test_singular_values_and_norm_are_those_of_the_product(rank, inputs, outputs):
    pair = random_pair(rank, inputs, outputs)
    expected = np.linalg.svd(product(pair), compute_uv=False)
    found = lora_edit.svd(pair)
    np.testing.assert_allclose(found.s, expected[: len(found.s)], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.u * found.s @ found.vt, product(pair), atol=1e-4)
    assert lora_edit.norm(pair) == pytest.approx(np.linalg.norm(product(pair)), rel=1e-6)


@SHAPES
@pytest.mark.parametrize("target", [1, 3, 5])
def test_a_lower_rank_loses_the_smallest_singular_values(rank, inputs, outputs, target):
    """The error in the Frobenius norm is that of the best approximation."""
    pair = random_pair(rank, inputs, outputs)
    squares = np.linalg.svd(product(pair), compute_uv=False) ** 2
    found = lora_edit.reduce_rank(pair, rank=target)
    assert len(found.pair.a) == found.pair.b.shape[1] == min(rank, target)
    error = np.sum((product(found.pair) - product(pair)) ** 2)
    assert error == pytest.approx(squares[target:].sum(), rel=1e-4, abs=1e-6)
    assert (found.kept, found.energy) == pytest.approx((squares[:target].sum(), squares.sum()), rel=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 1.0])
def test_the_lowest_rank_that_keeps_the_energy(energy):
    pair = random_pair(12, 30, 40)
    squares = np.linalg.svd(product(pair), compute_uv=False)[:12] ** 2
    share = np.cumsum(squares) / squares.sum()
    found = lora_edit.reduce_rank(pair, energy=energy)
    rank = len(found.pair.a)
    assert share[rank - 1] >= energy - 1e-6 and (rank == 1 or share[rank - 2] < energy)
    assert found.kept / found.energy == pytest.approx(share[rank - 1], rel=1e-5)


def test_energy_finds_the_true_rank():
    """Two equal LoRAs have the rank of one."""
    lora = {"q": random_pair(4, 20, 30)}
    doubled = lora_edit.weighted_sum([lora, lora], [0.5, 0.5])["q"]
    found = lora_edit.reduce_rank(doubled, energy=0.999999)
    assert len(doubled.a) == 8 and len(found.pair.a) == 4
    np.testing.assert_allclose(product(found.pair), product(lora["q"]), atol=1e-5)


def test_a_layer_that_has_the_rank_is_unchanged():
    pair = random_pair(4, 20, 30)
    assert lora_edit.reduce_rank(pair, rank=4).pair is pair
    assert lora_edit.reduce_rank(pair, energy=1.0).pair is pair


@pytest.mark.parametrize("target", [{"rank": 2}, {"energy": 0.9}])
def test_an_untrained_layer_stays_zero(target):
    pair = random_pair(4, 20, 30)
    found = lora_edit.reduce_rank(pair._replace(b=np.zeros_like(pair.b)), **target)
    assert found.kept == found.energy == 0 and len(found.pair.a) <= 2
    assert np.array_equal(product(found.pair), np.zeros((30, 20)))


# ---- matrices ------------------------------------------------------------------------------------


def matrix_with(values, shape, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in shape)
    return (u * values @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (700, 600), (600, 700)])
def test_a_matrix_of_low_rank_is_recovered(shape):
    matrix = matrix_with([5, 1, 0.1, 1e-3], shape)
    found = lora_edit.from_matrix(matrix, 4)
    np.testing.assert_allclose(product(found.pair), matrix, atol=1e-5 * np.abs(matrix).max())
    assert found.kept == pytest.approx(found.energy, rel=1e-5)


@pytest.mark.parametrize("values, least", [(1 / np.arange(1, 601), 0.99999), (np.ones(600), 0.99)])
def test_block_krylov_iteration_is_near_the_best(values, least):
    """For singular values that decay, and for the worst case, where all are alike."""
    matrix = matrix_with(values, (700, 600))
    found = lora_edit.from_matrix(matrix, 6)
    assert len(lora_edit.truncated_svd(matrix, 6).s) < 600, "decomposed as a whole"
    assert found.energy == pytest.approx(np.sum(values**2), rel=1e-5)
    assert least * np.sum(values[:6] ** 2) <= found.kept <= 1.00001 * np.sum(values[:6] ** 2)
    error = np.sum((product(found.pair) - matrix) ** 2)
    assert error == pytest.approx(found.energy - found.kept, rel=1e-4)
    again = lora_edit.from_matrix(matrix, 6)
    assert np.array_equal(again.pair.a, found.pair.a) and np.array_equal(again.pair.b, found.pair.b)


def test_a_rank_above_the_widths_is_exact():
    matrix = np.random.default_rng(0).standard_normal((9, 5), np.float32)
    found = lora_edit.from_matrix(matrix, 64)
    assert found.pair.a.shape == (5, 5) and found.pair.b.shape == (9, 5)
    np.testing.assert_allclose(product(found.pair), matrix, atol=1e-5)


# ---- files ---------------------------------------------------------------------------------------

LAYER = "transformer.transformer_blocks.0.attn.to_q"


def test_tensors_that_are_neither_a_nor_b_are_not_lost():
    adapter = {f"q.{name}": np.ones((4, 4), np.float32) for name in ("lora_A.weight", "lora_B.weight", "magnitude")}
    with pytest.raises(UserError, match=r"--lora f: holds transformer.q.magnitude. Only plain LoRA \(A and B\)"):
        lora_edit.to_pairs("f", "--lora", {"transformer": adapter})


def test_a_written_file_has_the_dtype(tmp_path):
    lora_edit.write(tmp_path / "f", {LAYER: random_pair(4, 32, 32)}, "diffusers", ms.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "f").values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_values_beyond_the_range_of_the_dtype_are_refused(tmp_path):
    pair = random_pair(4, 32, 32)
    pairs = {LAYER: pair._replace(b=pair.b * 1e6)}
    with pytest.raises(ValueError, match=f"B of {LAYER} has values beyond the range of float16"):
        lora_edit.write(tmp_path / "f", pairs, "diffusers", ms.float16)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ([np.float16], ms.float16),
        ([ml_dtypes.bfloat16], ms.bfloat16),
        ([ml_dtypes.float8_e4m3fn], ms.float16),
        ([np.float16, ml_dtypes.float8_e5m2], ms.float16),
        ([np.float16, ml_dtypes.bfloat16], ms.float32),
        ([np.float64], ms.float32),
    ],
)
def test_the_dtype_of_the_output_is_that_of_all_inputs(dtypes, expected):
    assert lora_edit.common_dtype(dtypes) == expected
