"""pretrain_tiny_flux.py: an interrupted run ends with the same bytes as an uninterrupted one."""

import shutil

import pytest
from conftest import ROOT, load_script

pretrain = load_script("examples/tiny/pretrain_tiny_flux.py")


@pytest.fixture
def small(monkeypatch):
    """24 scenes, two narrow blocks and one layer per text encoder, a checkpoint after every second step.

    In PyNative, which need not compile.
    """
    monkeypatch.setattr(pretrain.execution, "set_up_device", lambda graph_mode: None)
    few = pretrain.scenes("train")[::84]
    monkeypatch.setattr(pretrain, "scenes", lambda split: few)
    narrow = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "axes_dims_rope": [4, 2, 2],
    }
    monkeypatch.setattr(pretrain, "TRANSFORMER", {**pretrain.TRANSFORMER, **narrow})
    monkeypatch.setattr(pretrain, "CLIP", {**pretrain.CLIP, "num_hidden_layers": 1})
    monkeypatch.setattr(pretrain, "T5", {**pretrain.T5, "num_layers": 1})
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain, "AVERAGE_EVERY", 1)


def weights(work):
    files = sorted((work / "flux-shapes").glob("*/*.safetensors"))
    assert len(files) == 4
    return [path.read_bytes() for path in files]


def test_an_interrupted_run_equals_an_uninterrupted_one(small, tmp_path, monkeypatch):
    """A copy of the directory in the fourth step has what an interruption then leaves."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    shutil.copytree(ROOT / "examples/tiny/flux-shapes/vae", whole / "vae")
    real = pretrain.optimizers.set_learning_rates
    calls = []

    def copy_in_the_fourth_step(optimizer, rates):
        calls.append(rates)
        if len(calls) == 4:
            shutil.copytree(whole, stopped)
        real(optimizer, rates)

    monkeypatch.setattr(pretrain.optimizers, "set_learning_rates", copy_in_the_fourth_step)
    steps = ["--steps", "5", "--batch_size", "2"]
    pretrain.main([str(whole), *steps])
    unfinished = weights(stopped)
    pretrain.main([str(stopped), *steps])  # resumes after step 2: three more steps
    assert len(calls) == 5 + 3
    assert weights(stopped) == weights(whole) != unfinished
