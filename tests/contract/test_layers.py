"""Layers of `mint.nn`, of which mindone 0.5.0 builds its models, are treated like those of `nn`; runs on 0.3.0, too."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import mint, nn

from mindtune.cli import UserError
from mindtune.models import lora, lora_files, lora_settings, precision


class Model(nn.Cell):
    """A linear layer and a convolution of each kind, and a norm of mint."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Dense(4, 3)
        self.to_k = mint.nn.Linear(4, 3)
        self.conv = nn.Conv2d(2, 3, 3)
        self.conv_ext = mint.nn.Conv2d(2, 3, 3)
        self.norm = mint.nn.GroupNorm(2, 4)


def test_targets_are_found_among_both_kinds():
    names = lora.linear_names(Model())
    lora_settings.check_targets(names, ["to_q", "to_k"], "--lora_layers")
    with pytest.raises(UserError, match="Similar names: to_q, to_k"):
        lora_settings.check_targets(names, ["to_l"], "--lora_layers")


@pytest.mark.parametrize("name", ["to_q", "to_k"])
def test_a_file_for_another_width_is_refused_of_both_kinds(monkeypatch, tmp_path, name):
    halves = {"A": np.zeros((2, 5), np.float32), "B": np.zeros((3, 2), np.float32)}
    part = {f"{name}.lora_{half}.weight": value for half, value in halves.items()}
    # Without the check that the layers belong to FLUX.1.
    monkeypatch.setattr(lora_files, "read_adapters", lambda *_, **__: {"transformer": part})
    message = r"A and B of to_. are \(2, 5\) and \(3, 2\), but the layer of this transformer has 4 inputs and 3 outputs"
    with pytest.raises(UserError, match=message):
        lora.load_lora(tmp_path / "lora.safetensors", {"transformer": Model()}, ms.float32)


def test_both_kinds_compute_in_the_type_asked_for():
    model = precision.set_compute_dtype(Model(), ms.float16)
    x = ms.Tensor(np.ones((2, 4), np.float32))
    assert model.to_q(x).dtype == model.to_k(x).dtype == ms.float16
    # mint's norm refuses a half-precision input beside its float32 weight.
    assert model.norm(ms.Tensor(np.ones((2, 4, 3)), ms.float16)).dtype == ms.float16
    assert model.conv_ext.fp16 and model.conv.fp16  # mint's convolution has no CPU kernel
