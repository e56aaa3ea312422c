"""The widened input layer of a Control-LoRA: its shapes from configs, its weights, and adapters that leave it out."""

import shutil

import mindspore as ms
import numpy as np
import pytest
from conftest import edit
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import control_lora, loading, lora, lora_layouts, precision
from mindtune.models.lora_settings import Settings, target_names
from mindtune.models.named_parameters import model_parameters

WEIGHT = "x_embedder.weight"
TARGETS = {"transformer": target_names(None, "flux_control")}


def load(root, fill, kind="no", int8=False):
    return control_lora.load_transformer(root, fill, precision.resolve_precision(kind), int8=int8)


@pytest.mark.parametrize("fill, inputs", [(False, 128), (True, 384)])
def test_shapes_from_configs_are_those_of_the_loaded_model(small_flux, fill, inputs):
    """Of FLUX.1-Canny and FLUX.1-Depth, and of FLUX.1-Fill: two times 64 values per token, and 256 of the mask."""
    model = load(small_flux, fill)
    assert control_lora.count_inputs(small_flux, fill) == inputs == model.config["in_channels"]
    assert model.config["out_channels"] == 64 and model.x_embedder.in_channels == inputs
    shapes = {shape.name: shape.shape for shape in control_lora.component_shapes(small_flux, fill)}
    assert shapes == {name: parameter.shape for name, parameter in model_parameters(model).items()}
    cells = dict(model.cells_and_names())
    layers = control_lora.linear_layers(small_flux, fill)
    assert layers == {name: cells[name].weight.shape[::-1] for name in lora.linear_names(model)}
    norms = {name: p.shape for name, p in model.parameters_and_names() if lora_layouts.NORM.search(name)}
    assert control_lora.norm_shapes(small_flux) == norms and len(norms) == 6


@pytest.mark.parametrize("kind, int8", [("no", False), ("fp16", False), ("bf16", False), ("no", True)])
def test_the_weights_of_further_inputs_are_zero_and_the_others_those_of_the_model(small_flux, kind, int8):
    dtypes = precision.resolve_precision(kind)
    plain = loading.load_model(small_flux, "transformer", dtypes, int8=int8)
    wide = load(small_flux, True, kind, int8)
    weight = wide.x_embedder.weight
    assert weight.dtype == plain.x_embedder.weight.dtype and weight.name == plain.x_embedder.weight.name
    values = weight.astype(ms.float32).asnumpy()
    np.testing.assert_array_equal(values[:, :64], plain.x_embedder.weight.astype(ms.float32).asnumpy())
    assert values.shape == (32, 384) and not values[:, 64:].any() and not weight.requires_grad
    token = np.random.default_rng(0).standard_normal((2, 384)).astype(np.float32)
    both = (
        model.x_embedder(ms.Tensor(part).to(dtypes.compute)) for model, part in ((wide, token), (plain, token[:, :64]))
    )
    found, expected = (each.to(ms.float32).asnumpy() for each in both)
    np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-6 if kind == "no" else 1e-2) * np.abs(expected).max())


def make_wide(root, folder):
    """A pipeline whose transformer reads a condition, as FLUX.1-Depth-dev's does."""
    root = shutil.copytree(root, folder / "depth")
    edit(root / "transformer" / "config.json", in_channels=128, out_channels=64)
    path = root / "transformer" / loading.WEIGHTS
    tensors = load_file(path)
    tensors[WEIGHT] = np.tile(tensors[WEIGHT], (1, 2))
    save_file(tensors, path, metadata={"format": "pt"})
    return root


def test_a_model_that_reads_a_condition_stays_as_it_is(small_flux, tmp_path):
    root = make_wide(small_flux, tmp_path)
    expected = load_file(root / "transformer" / loading.WEIGHTS)[WEIGHT]
    np.testing.assert_array_equal(load(root, False).x_embedder.weight.asnumpy(), expected)


def test_an_adapter_must_adapt_a_widened_input_layer(small_flux, tmp_path):
    """Otherwise its inputs for the condition stay zero. A model that has these inputs may keep them as they are."""
    wide = make_wide(small_flux, tmp_path)
    to_q = {"transformer_blocks.0.attn.to_q.lora_A.weight": 0, "transformer_blocks.0.attn.to_q.lora_B.weight": 0}
    embedder = {"x_embedder.lora_A.weight": 0, "x_embedder.lora_B.weight": 0}
    blocks = Settings(lora_blocks="transformer_blocks.0")

    def check(root, settings=Settings(), initial=None):  # noqa: B008
        control_lora.check_input_layer(root, False, settings, TARGETS, {"transformer": initial} if initial else {})

    for root in (small_flux, wide):
        check(root)
        check(root, initial={**to_q, **embedder})
        check(root, Settings(lora_blocks="x_embedder,transformer_blocks.0"))
    check(wide, blocks)
    check(wide, initial=to_q)
    with pytest.raises(UserError, match="--lora_model_name_or_path: adapts no x_embedder.* Give a Control-LoRA"):
        check(small_flux, initial=to_q)
    with pytest.raises(
        UserError, match=r"--lora_blocks transformer_blocks.0: leaves out x_embedder.* x_embedder,trans"
    ):
        check(small_flux, blocks)
