"""The pretraining of the small world: stopped at any moment and started again, it ends with the same bytes."""

import shutil

import pytest
from conftest import ROOT, load_script

pretrain = load_script("examples/tiny/pretrain_tiny_flux.py")


@pytest.fixture
def small(monkeypatch):
    """A world of 24 scenes, a transformer of two thin blocks, a checkpoint after every second step."""
    few = pretrain.scenes("train")[::84]
    monkeypatch.setattr(pretrain, "scenes", lambda split: few)
    thin = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "axes_dims_rope": [4, 2, 2],
    }
    monkeypatch.setattr(pretrain, "TRANSFORMER", {**pretrain.TRANSFORMER, **thin})
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain, "AVERAGE_EVERY", 1)


def weights(work):
    files = sorted((work / "flux-shapes").glob("*/*.safetensors"))
    assert len(files) == 4
    return [path.read_bytes() for path in files]


def test_stopped_and_started_again_equals_left_alone(small, tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        shutil.copytree(ROOT / "examples/tiny/flux-shapes/vae", tmp_path / name / "vae")
    steps = ["--steps", "5", "--batch_size", "8"]
    pretrain.main([str(tmp_path / "whole"), *steps])
    real = pretrain.optim.set_learning_rates
    calls = []

    def stop_in_the_fourth_step(optimizer, rates):
        calls.append(rates)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(optimizer, rates)

    monkeypatch.setattr(pretrain.optim, "set_learning_rates", stop_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([str(tmp_path / "stopped"), *steps])
    unfinished = weights(tmp_path / "stopped")
    pretrain.main([str(tmp_path / "stopped"), *steps])  # from the checkpoint after step 2: three more steps
    assert len(calls) == 4 + 3
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole") != unfinished
