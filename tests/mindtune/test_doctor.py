"""python -m mindtune.doctor: it passes on the CPU, it names an operator that is wrong, and its references are right."""

import json
import os

import mindspore as ms
import numpy as np
import pytest
import scipy.signal
import scipy.special
from mindspore import ops

from mindtune.doctor import __main__ as doctor
from mindtune.doctor import cases, compare, machine, references, training
from mindtune.models import fast_ops


@pytest.fixture(autouse=True)
def keep_the_mode():
    before = ms.get_context("mode")
    yield
    ms.set_context(mode=before)


@pytest.fixture
def no_scripts(monkeypatch):
    monkeypatch.setattr(training, "SCRIPTS", {})


def case(name):
    (found,) = (case for case in cases.table(graph_mode=True) if case.name == name)
    return found


# ---- the command ---------------------------------------------------------------------------------


def test_it_passes_on_the_cpu_and_reports_everything(no_scripts, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert doctor.main(["--mindspore_mode", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert report["problems"] == [] and printed.endswith("checks that found a problem: 0\n")
    assert report["mode"] == "PyNative" and report["device"]["target"] == "CPU" and report["device"]["memory_mb"] > 500
    assert report["versions"]["mindspore"] == ms.__version__ and report["versions"]["CANN"] is None
    assert report["memory_mb"].keys() > {"memory_allocated", "max_memory_allocated", "memory_reserved"}
    assert [note for note in report["notes"] if note.startswith("bfloat16: not on this device")]
    checked = {(row["name"], row["dtype"]) for row in report["operators"]}
    expected = {(case.name, dtype) for case in cases.table(False) for dtype in case.dtypes if dtype != "bfloat16"}
    assert checked == expected and len(checked) > 50
    for row in report["operators"]:
        assert 0 <= row["error"] <= row["bound"] and row["milliseconds"] > 0, row
    assert report["updates"] == []


@pytest.mark.slow
def test_an_update_of_a_script(monkeypatch, tmp_path):
    """One of the six; together they take three minutes."""
    monkeypatch.setattr(training, "SCRIPTS", {"FLUX LoRA": training.SCRIPTS["FLUX LoRA"]})
    path = tmp_path / "report.json"
    assert doctor.main(["--mindspore_mode", "1", "--only", "FLUX LoRA", "--json", str(path)]) == 0
    (update,) = json.loads(path.read_text())["updates"]
    assert update["name"] == "FLUX LoRA" and 0 < update["loss"] < 10 and update["problem"] is None


def test_graph_mode_and_only(no_scripts, capsys):
    assert doctor.main(["--mindspore_mode", "0", "--only", "adamw"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok")]
    assert [line[6:26].strip() for line in lines] == ["AdamW", "8-bit AdamW", "AdamW on the host"]


def test_only_the_package_is_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "REPOSITORY", tmp_path)
    assert doctor.main(["--mindspore_mode", "1", "--only", "SiLU"]) == 0
    assert "updates: not run, because the training scripts are not beside the package" in capsys.readouterr().out


def test_a_script_that_stops_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "make.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[2]).mkdir()")
    (tmp_path / "script.py").write_text("raise ValueError('no kernel')")
    monkeypatch.setattr(training, "REPOSITORY", tmp_path)
    monkeypatch.setattr(training, "MAKER", "make.py")
    monkeypatch.setattr(training, "SCRIPTS", {"FLUX LoRA": training.Script("script.py", "flux", "bf16", ())})
    assert doctor.main(["--mindspore_mode", "1", "--only", "LoRA"]) == 1
    problem = "FLUX LoRA update: exit code 1: ValueError: no kernel"
    assert capsys.readouterr().out.endswith(f"checks that found a problem: 1\n  {problem}\n")


@pytest.mark.parametrize("loss, problem", [("NaN", "the loss is nan"), ("0.0", "the loss is 0.0"), ("0.5", None)])
def test_a_loss_that_cannot_be_is_a_problem(monkeypatch, tmp_path, loss, problem):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux-lora").mkdir()
    (tmp_path / "flux-lora" / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}}}\n')
    monkeypatch.setattr(training, "_call", lambda *words: None)
    assert training.run("FLUX LoRA", tmp_path, mindspore_mode=1).problem == problem


# ---- operators that are wrong --------------------------------------------------------------------

right = {name: getattr(fast_ops, name) for name in ("linear", "rms_norm", "attention", "square_sum", "rotate")}


def scaled(x, weight):
    return right["rms_norm"](x, weight) * 1.001


def not_a_number(q, k, v):
    return right["attention"](q, k, v) * float("nan")


def no_kernel(x):
    raise RuntimeError("no kernel for Square\nmore lines of the compiler")


def in_half_precision(x, layer):
    narrow = [tensor.astype(ms.float16) for tensor in layer]
    return right["linear"](x.astype(ms.float16), narrow).astype(x.dtype)


def without_gradient(x, rotary):
    return ops.stop_gradient(right["rotate"](x, rotary))


def one_token_less(q, k, v):
    return right["attention"](q, k, v)[:, 1:]


@pytest.mark.parametrize(
    "operator, wrong, name, problem",
    [
        ("rms_norm", scaled, "RMS norm", "has an error of"),
        ("attention", not_a_number, "attention 64 cross", "has an error of nan"),
        ("square_sum", no_kernel, "square sum", "RuntimeError: no kernel for Square"),
        ("linear", in_half_precision, "linear", "has an error of"),
        ("rotate", without_gradient, "rotate", "the gradient of x has an error of 1.0e+00"),
        ("attention", one_token_less, "attention 40 self", "the output has the shape"),
    ],
)
def test_a_wrong_operator_is_named(monkeypatch, no_scripts, capsys, operator, wrong, name, problem):
    monkeypatch.setattr(fast_ops, operator, wrong)
    assert doctor.main(["--mindspore_mode", "1", "--only", name]) == 1
    found = capsys.readouterr().out.split("checks that found a problem: ")[1].splitlines()[1:]
    assert found[0].startswith(f"  {name}, float32: ") and problem in found[0]
    if wrong is not in_half_precision:  # which is right for float16
        assert found[-1].startswith(f"  {name}, {case(name).dtypes[-1].replace('bfloat16', 'float16')}: ")


def test_a_code_that_is_off_by_one_is_found():
    """One code of the 2048."""

    def off_by_one(g, x):
        codes, gradients = references.encode(g, x)
        codes[3, 5] += 1
        return codes, gradients

    row = compare.check(case("8-bit encode")._replace(reference=off_by_one), "float32")
    assert row.error == pytest.approx(1 / 255) and "has an error of 3.9e-03" in row.problem


def test_bounds_come_from_the_dtype_and_the_length_of_the_sum():
    product = case("linear")._replace(roundings=2, terms=100)
    single, half = 2.0**-23, 2.0**-10
    assert compare.error_bound(product, ms.float32) == pytest.approx(single + 10 * single)
    assert compare.error_bound(product, ms.float16) == pytest.approx(half + 10 * single)
    assert compare.error_bound(product, ms.bfloat16) == pytest.approx(8 * half + 10 * single)


def test_cann_its_missing_wheels_and_the_driver_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert machine.cann_version() is None
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "version.info").write_text("Timestamp=1\nVersion=8.3.0.1.200\n")
    assert machine.cann_version() == "8.3.0.1.200 (version.info)"
    stub = tmp_path / "npu-smi"
    stub.write_text("#!/bin/sh\necho '| npu-smi 25.3.rc1          Version: 25.3.rc1          |'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.driver_version() == "25.3.rc1"
    notes = doctor.notes({"CANN": "8.3", "te": None, "hccl": "0.1"}, on_cpu=False)
    assert notes == ["the wheel te of CANN is not installed (docs/ascend.md)"]


# ---- the references ------------------------------------------------------------------------------

WITHOUT_GRADIENT = ("timesteps", "8-bit encode", "8-bit decode", "AdamW", "8-bit AdamW")


@pytest.mark.parametrize("name", [case.name for case in cases.table(False) if case.name not in WITHOUT_GRADIENT])
def test_gradients_of_the_references_are_those_of_finite_differences(name):
    """Along a random direction per input: the slope of the sum of g times the output."""
    checked, rng, step = case(name), np.random.default_rng(1), 1e-5
    inputs = [array.astype(np.float64) for array in checked.inputs]
    dtypes = [ms.float32 if array.dtype == np.float64 else None for array in checked.inputs]
    out = checked.function(*(ms.Tensor(array, dtype) for array, dtype in zip(checked.inputs, dtypes)))
    g = rng.standard_normal(out.shape)
    _, gradients = checked.reference(g, *inputs)
    assert len(gradients) == len(inputs) and any(gradient is not None for gradient in gradients)
    for number, gradient in enumerate(gradients):
        if gradient is None:
            continue
        assert gradient.shape == inputs[number].shape
        direction = rng.standard_normal(gradient.shape)
        sums = []
        for sign in (1, -1):
            values = [*inputs]
            values[number] = inputs[number] + sign * step * direction
            sums.append((g * checked.reference(g, *values)[0]).sum())
        assert (sums[0] - sums[1]) / (2 * step) == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-4)


def output(reference, *inputs, shape=()):
    return reference(np.zeros(shape), *inputs)[0]


def test_references_against_scipy_and_complex_numbers():
    x = cases.normal(2, 5, 8)
    np.testing.assert_allclose(output(references.gelu, x), x * scipy.special.ndtr(x), rtol=1e-12)
    np.testing.assert_allclose(output(references.silu, x), x * scipy.special.expit(x), rtol=1e-12)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    np.testing.assert_allclose(output(references.tanh_gelu, x), x * scipy.special.expit(2 * inner), rtol=1e-12)
    q, k, v = (cases.normal(2, 3, 7, 4, seed=seed) for seed in range(3))
    weights = scipy.special.softmax(np.einsum("bhtd,bhsd->bhts", q, k) / 2, -1)
    found = output(references.attention, q, k, v, shape=q.shape)
    np.testing.assert_allclose(found, np.einsum("bhts,bhsd->bhtd", weights, v), rtol=1e-12)
    angles = cases.normal(5, 1, 4)
    tables = [np.repeat(f(angles), 2, -1) for f in (np.cos, np.sin)]
    y = cases.normal(2, 5, 3, 8)
    turned = (y[..., ::2] + 1j * y[..., 1::2]) * np.exp(1j * angles)
    found = output(references.rotate, y, *tables, shape=y.shape)
    np.testing.assert_allclose(found[..., ::2] + 1j * found[..., 1::2], turned, rtol=1e-12)
    # Of the two norms, each row has the mean 0 (layer norm) and the mean square 1, but for epsilon.
    normed = output(references.layer_norm, x, np.ones(8), np.zeros(8), shape=x.shape)
    np.testing.assert_allclose((normed.mean(-1), (normed**2).mean(-1)), (np.zeros((2, 5)), np.ones((2, 5))), atol=1e-3)
    image, kernel, bias = cases.normal(1, 2, 6, 6), cases.normal(3, 2, 3, 3), cases.normal(3)
    found = output(references.convolution, image, kernel, bias, shape=(1, 3, 3, 3))
    padded = np.pad(image[0], ((0, 0), (1, 1), (1, 1)))
    for channel in range(3):
        full = sum(scipy.signal.correlate2d(padded[i], kernel[channel, i], "valid") for i in range(2))
        np.testing.assert_allclose(found[0, channel], full[::2, ::2] + bias[channel], rtol=1e-11)


def test_adamw_of_constant_gradients_moves_by_the_rate_and_the_decay():
    parameter = output(references.adamw, np.array([2.0, -3.0]), *[np.array([5.0, -0.01])] * 3)
    by_hand = np.array([2.0, -3.0])
    for _ in range(3):
        by_hand = by_hand - 0.1 * (np.array([1.0, -1.0]) + 0.1 * by_hand)
    np.testing.assert_allclose(parameter, by_hand, rtol=1e-6)
