"""Compares our training steps with PyTorch's results that `make parity` keeps in golden.json, without PyTorch."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import optimizers
import pytest
from cases import CASES, Ours, all_settings, arguments, make_batches, make_pipeline, make_stage
from conftest import encode_here

from mindtune.encode import encoder_stage

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in CASES if case.golden])
def test_losses_prediction_and_gradients_are_pytorchs(case, pipelines, monkeypatch):
    monkeypatch.setattr(encoder_stage, "run_in_child", encode_here)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    root = make_pipeline(case, pipelines)
    kept = GOLDEN[case.label]
    settings = all_settings(case, root)
    batches = make_batches(settings, root, len(kept["losses"]), make_stage(settings, root, pipelines / "cache"))
    ours = Ours(settings, root)
    given = [arguments(settings, batch) for batch in batches]

    step = ours.step(train=False)
    prediction = step.predict(*given[0])[0].asnumpy()
    loss = float(step(*given[0])[1])
    np.testing.assert_allclose(prediction.ravel()[:8], kept["prediction"], rtol=0, atol=1e-4 * np.abs(prediction).max())
    assert loss == pytest.approx(kept["losses"][0], rel=1e-5)
    gradients = ours.gradients(step)
    for name, expected in kept["gradients"].items():
        assert np.linalg.norm(gradients[name]) == pytest.approx(expected["norm"][0], rel=2e-3), name
        largest = np.abs(expected["entries"]).max()
        np.testing.assert_allclose(
            gradients[name].ravel()[expected["at"]], expected["entries"], rtol=0, atol=2e-3 * largest, err_msg=name
        )

    step = ours.step()
    assert [float(step(*batch)[1]) for batch in given] == pytest.approx(kept["losses"], rel=1e-3)


@pytest.mark.parametrize("setting", optimizers.SETTINGS)
def test_weights_after_100_updates_are_pytorchs(setting, mode):
    errors = optimizers.check_golden({setting: GOLDEN["optimizers"][setting]})
    assert errors[setting] <= optimizers.SETTINGS[setting]["bound"]
