"""Files of LoRA adapters: the alpha of every layer, layouts of other tools, the header, and files that are rejected."""

import json

import numpy as np
import pytest
from lora_cases import Q0, Q1, SINGLE, WIDTH, header, weight_changes, write_adapter
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import lora_files, lora_names


def check_scales(path, tensors, scales):
    """B is multiplied by the scale of its layer; A is unchanged."""
    adapter = lora_files.read_adapters(path, "--lora")["transformer"]
    assert set(adapter) == {f"{layer}.lora_{half}.weight" for layer in scales for half in "AB"}
    for layer, scale in scales.items():
        a, b = (tensors[f"transformer.{layer}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_array_equal(adapter[f"{layer}.lora_A.weight"], a)
        np.testing.assert_allclose(adapter[f"{layer}.lora_B.weight"], scale * b, rtol=1e-6)


# ---- alpha ---------------------------------------------------------------------------------------


def test_without_alpha_the_scale_is_one(tmp_path):
    check_scales(*write_adapter(tmp_path / "f", {Q0: 2, Q1: 4, SINGLE: 8}), {Q0: 1.0, Q1: 1.0, SINGLE: 1.0})


def test_alpha_entries_set_the_scale_of_their_layer(tmp_path):
    """The scale is alpha / rank, and 1 for a layer without an entry."""
    extra = {
        f"transformer.{Q0}.alpha": np.array(1.0, np.float32),
        f"transformer.{SINGLE}.alpha": np.array([6.0], np.float32),
    }
    path, tensors = write_adapter(tmp_path / "f", {Q0: 4, Q1: 4, SINGLE: 4}, extra=extra)
    check_scales(path, tensors, {Q0: 0.25, Q1: 1.0, SINGLE: 1.5})


def test_alpha_entries_with_different_ranks(tmp_path):
    extra = {f"transformer.{layer}.alpha": np.array(4.0, np.float32) for layer in (Q0, Q1, SINGLE)}
    path, tensors = write_adapter(tmp_path / "f", {Q0: 2, Q1: 4, SINGLE: 8}, extra=extra)
    check_scales(path, tensors, {Q0: 2.0, Q1: 1.0, SINGLE: 0.5})


def with_config(path, ranks, **config):
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    return write_adapter(path, ranks, metadata)


def test_alpha_in_the_header(tmp_path):
    path, tensors = with_config(tmp_path / "f", {Q0: 4, SINGLE: 8}, r=4, lora_alpha=2)
    check_scales(path, tensors, {Q0: 0.5, SINGLE: 0.25})


@pytest.mark.parametrize("key", [SINGLE, "attn.to_q", f"^{SINGLE}"])
def test_the_alpha_pattern_overrides_alpha(tmp_path, key):
    """peft matches a key with whole names, with their ends, or as a regular expression."""
    path, tensors = with_config(
        tmp_path / "f",
        {Q0: 4, SINGLE: 8},
        r=4,
        lora_alpha=2,
        rank_pattern={SINGLE: 8},
        alpha_pattern={key: 12},
    )
    check_scales(path, tensors, {Q0: 3.0 if key == "attn.to_q" else 0.5, SINGLE: 1.5})


def test_rslora_divides_alpha_by_the_root_of_the_rank(tmp_path):
    path, tensors = with_config(tmp_path / "f", {Q0: 4, SINGLE: 16}, r=4, lora_alpha=3, use_rslora=True)
    check_scales(path, tensors, {Q0: 3 / 2, SINGLE: 3 / 4})


def write_peft(folder, ranks):
    """adapter_model.safetensors as peft's save_pretrained writes it."""
    path, tensors = write_adapter(folder / "adapter_model.safetensors", ranks)
    save_file({name.replace("transformer.", "base_model.model.", 1): value for name, value in tensors.items()}, path)
    return path, tensors


def test_peft_keeps_alpha_in_a_separate_file(tmp_path):
    path, tensors = write_peft(tmp_path, {Q0: 4, SINGLE: 8})
    check_scales(path, tensors, {Q0: 1.0, SINGLE: 1.0})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "alpha_pattern": {SINGLE: 12}}))
    assert lora_files.find_lora(str(tmp_path), "--lora") == path
    check_scales(path, tensors, {Q0: 0.5, SINGLE: 1.5})


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"lora_alpha": "x"}', '{"lora_alpha": NaN}', '{"alpha_pattern": {"[": 1}}', "[" * 100_000]
)
def test_an_unusable_config_is_rejected(tmp_path, text):
    path, _ = write_peft(tmp_path, {Q0: 4})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"--lora .*adapter_model.safetensors: its LoRA config cannot be"):
        lora_files.read_lora(path, "--lora")


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_layouts_of_other_tools_change_the_weights_equally(tmp_path, layout):
    """With different ranks and alphas, q alone in one block, and the layer whose halves are swapped."""
    to_k = "single_transformer_blocks.0.attn.to_k"
    path, tensors = write_adapter(tmp_path / "f", {Q0: 2, SINGLE: 8, to_k: 4})
    rng = np.random.default_rng(2)
    tensors["transformer.norm_out.linear.lora_A.weight"] = rng.standard_normal((3, WIDTH)).astype(np.float32)
    tensors["transformer.norm_out.linear.lora_B.weight"] = rng.standard_normal((2 * WIDTH, 3)).astype(np.float32)
    alphas = {f"transformer.{Q0}": 6.0, "transformer.norm_out.linear": 1.0}
    summary = lora_files.write_lora(path, tensors, alphas, layout)
    assert summary == "3 layers of rank 3, 6, 32"
    assert lora_names.layout_of(load_file(path)) == layout
    changes = weight_changes(path)
    scales = {Q0: 3.0, SINGLE: 1.0, to_k: 1.0, "norm_out.linear": 1 / 3}
    assert set(changes) == {f"transformer.{layer}" for layer in scales}
    for layer, scale in scales.items():
        a, b = (tensors[f"transformer.{layer}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        np.testing.assert_allclose(changes[f"transformer.{layer}"], scale * (b @ a), rtol=1e-5, atol=1e-6)


def test_alpha_scales_the_bias_of_b(tmp_path):
    """As in peft: it is part of what B computes."""
    bias = np.arange(WIDTH, dtype=np.float32)
    extra = {f"transformer.{Q0}.alpha": np.array(6.0, np.float32), f"transformer.{Q0}.lora_B.bias": bias}
    path, _ = write_adapter(tmp_path / "f", {Q0: 4}, extra=extra)
    adapter = lora_files.read_adapters(path, "--lora", biases=True)["transformer"]
    np.testing.assert_array_equal(adapter[f"{Q0}.lora_B.bias"], 1.5 * bias)


def test_the_last_layer_has_the_default_rank(tmp_path):
    """proj_out is also the end of single_transformer_blocks.1.proj_out, which a key of peft's pattern would match."""
    assert lora_files.rank_and_pattern({"a.proj_out": 3, "b": 3, "proj_out": 2}) == (2, {"a.proj_out": 3, "b": 3})
    assert lora_files.rank_and_pattern({"a": 4, "b": 2, "c": 4}) == (4, {"b": 2})


# ---- files that are rejected ---------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no safetensors", (100).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_not_safetensors(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=r"--lora .*f: cannot be read as safetensors"):
        lora_files.read_adapters(tmp_path / "f", "--lora")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"--adapter .*absent: cannot be read"):
        lora_files.read_adapters(tmp_path / "absent", "--adapter")


def test_a_file_without_lora_weights(tiny_flux):
    with pytest.raises(UserError, match="holds no lora_A/lora_B or lora_down/lora_up weights"):
        lora_files.read_adapters(tiny_flux / "vae" / "diffusion_pytorch_model.safetensors", "--lora")


def test_a_lora_without_one_half(tmp_path):
    _, tensors = write_adapter(tmp_path / "f", {Q0: 4, Q1: 4})
    del tensors[f"transformer.{Q1}.lora_B.weight"]
    save_file(tensors, tmp_path / "f")
    with pytest.raises(UserError, match=Q1):
        lora_files.read_adapters(tmp_path / "f", "--lora")


def test_a_lora_of_stable_diffusion(tmp_path):
    save_file({f"unet.mid_block.to_q.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}, tmp_path / "f")
    with pytest.raises(UserError, match="unet"):
        lora_files.read_adapters(tmp_path / "f", "--lora")


def test_other_adapters_are_rejected(tmp_path):
    """DoRA scales the sum of weight and change, so its other entries cannot be ignored."""
    extra = {f"transformer.{Q0}.dora_scale": np.ones((WIDTH, 1), np.float32)}
    path, _ = write_adapter(tmp_path / "f", {Q0: 4}, extra=extra)
    with pytest.raises(UserError, match="dora_scale: DoRA"):
        lora_files.read_adapters(path, "--lora")


LAYERS = {"transformer": {Q0: (WIDTH, WIDTH), Q1: (WIDTH, WIDTH)}}


def check(path, layers=LAYERS):
    lora_files.check_adapters(path, "--lora", lora_files.read_adapters(path, "--lora"), layers)


def test_layers_that_the_model_does_not_have(tmp_path):
    path, _ = write_adapter(tmp_path / "f", {Q0: 4, "transformer_blocks.7.attn.to_q": 4})
    with pytest.raises(
        UserError, match=r"made for another model; this transformer has no layer transformer_blocks.7.attn.to_q"
    ):
        check(path)


def test_a_lora_of_another_width(tmp_path):
    """The layers of every FLUX have the same names; only the widths differ."""
    tensors = {
        f"transformer.{Q0}.lora_A.weight": np.zeros((4, 3072), np.float32),
        f"transformer.{Q0}.lora_B.weight": np.zeros((3072, 4), np.float32),
    }
    save_file(tensors, tmp_path / "f")
    with pytest.raises(UserError, match=f"made for another model; .*{Q0}.*has 32 inputs and 32 outputs"):
        check(tmp_path / "f")


def test_an_adapter_for_a_model_that_is_not_given(tmp_path):
    clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    extra = {f"{clip}.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}
    path, _ = write_adapter(tmp_path / "f", {Q0: 4}, extra=extra)
    with pytest.raises(UserError, match="it adapts text_encoder, not transformer"):
        check(path)


# ---- descriptions and the header -----------------------------------------------------------------


def test_descriptions(tmp_path):
    path, _ = write_adapter(tmp_path / "f", {Q0: 4, Q1: 2, SINGLE: 4})
    assert lora_files.describe_adapters(lora_files.read_adapters(path, "")) == "transformer: 3 layers of rank 2, 4"


def test_written_files_have_diffusers_header(tmp_path):
    _, tensors = write_adapter(tmp_path / "f", {Q0: 4, Q1: 2, SINGLE: 4})
    alphas = {f"transformer.{layer}": 8.0 for layer in (Q0, Q1, SINGLE)}
    lora_files.write_lora(tmp_path / "g", tensors, alphas, "diffusers")
    found = header(tmp_path / "g")
    config = json.loads(found["lora_adapter_metadata"])
    assert found["format"] == "pt" and found["trained_lora_alpha"] == "8.0"
    assert config == {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.target_modules": sorted([Q0, Q1, SINGLE]),
        "transformer.rank_pattern": {Q1: 2},
        "transformer.alpha_pattern": {Q1: 2},
    }
