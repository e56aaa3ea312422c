"""A FLUX LoRA by other tools' names: the same change of every weight, and back again to the same numbers."""

import ml_dtypes
import numpy as np
import pytest

from mindtune import lora_layouts
from mindtune.lora_layouts import from_diffusers, to_diffusers
from mindtune.weights import linear_layers

D = 8  # a model's width; its MLPs have 4 D
OTHERS = ["kohya", "comfyui"]

# Written by hand from black-forest-labs/flux `model.py` and `layers.py`: layer there, and those of diffusers whose rows it holds.
NATIVE = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "double_blocks.1.img_mod.lin": ["transformer_blocks.1.norm1.linear"],
    "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v")],
    "double_blocks.1.img_attn.proj": ["transformer_blocks.1.attn.to_out.0"],
    "double_blocks.1.img_mlp.0": ["transformer_blocks.1.ff.net.0.proj"],
    "double_blocks.1.img_mlp.2": ["transformer_blocks.1.ff.net.2"],
    "double_blocks.1.txt_mod.lin": ["transformer_blocks.1.norm1_context.linear"],
    "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")],
    "double_blocks.1.txt_attn.proj": ["transformer_blocks.1.attn.to_add_out"],
    "double_blocks.1.txt_mlp.0": ["transformer_blocks.1.ff_context.net.0.proj"],
    "double_blocks.1.txt_mlp.2": ["transformer_blocks.1.ff_context.net.2"],
    "single_blocks.12.modulation.lin": ["single_transformer_blocks.12.norm.linear"],
    "single_blocks.12.linear1": [f"single_transformer_blocks.12.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
    "single_blocks.12.linear2": ["single_transformer_blocks.12.proj_out"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
QKV, LINEAR1 = NATIVE["double_blocks.1.img_attn.qkv"], NATIVE["single_blocks.12.linear1"]
WIDE = ("ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp", "mlp.fc1")


def outputs(layer):
    return 4 * D if layer.endswith(WIDE) else 2 * D if layer == "norm_out.linear" else D


def adapter(ranks, alphas=None, dtype=np.float32, trained=True, prefix="transformer"):
    """Tensors in diffusers' layout: layer -> rank, and alpha where it is not the rank."""
    rng, tensors = np.random.default_rng(0), {}
    for layer, rank in ranks.items():
        tensors[f"{prefix}.{layer}.lora_A.weight"] = rng.standard_normal((rank, D)).astype(dtype)
        tensors[f"{prefix}.{layer}.lora_B.weight"] = (trained * rng.standard_normal((outputs(layer), rank))).astype(dtype)
    tensors.update({f"{prefix}.{layer}.alpha": np.array(alpha, np.float32) for layer, alpha in (alphas or {}).items()})
    return tensors


ALL = {layer: 3 for layers in NATIVE.values() for layer in layers}
ADAPTERS = {
    "every layer": adapter(ALL),
    "a rank for every layer": adapter({layer: 1 + n % 5 for n, layer in enumerate(ALL)}),
    "alpha below the rank": adapter(dict.fromkeys(ALL, 4), dict.fromkeys(ALL, 1.0)),
    "only q": adapter({QKV[0]: 4, LINEAR1[0]: 2}),
    "k of rank 2 and v of rank 5": adapter({QKV[1]: 2, QKV[2]: 5, LINEAR1[1]: 2, LINEAR1[2]: 5}),
    "only the single block's MLP": adapter({LINEAR1[3]: 4}),
    "rank 1": adapter(dict.fromkeys(ALL, 1)),
    "half precision": adapter(ALL, dtype=np.float16),
    "bfloat16": adapter({layer: 1 + n % 5 for n, layer in enumerate(ALL)}, dtype=ml_dtypes.bfloat16),
    "untrained": adapter(ALL, trained=False),
    "untrained, of different ranks": adapter({layer: 1 + n % 5 for n, layer in enumerate(ALL)}, trained=False),
    "untrained, only v": adapter({QKV[2]: 3, LINEAR1[2]: 4}, trained=False),
}


def change(tensors, layer, a="lora_A", b="lora_B"):
    """alpha / rank * B A in float64, or None for a layer that is not adapted."""
    if f"{layer}.{a}.weight" not in tensors:
        return None
    a, b = (tensors[f"{layer}.{half}.weight"].astype(np.float64) for half in (a, b))
    return float(tensors.get(f"{layer}.alpha", a.shape[0])) / a.shape[0] * (b @ a)


def native_change(tensors, layer, layout):
    if layout == "kohya":
        return change(tensors, "lora_unet_" + layer.replace(".", "_"), "lora_down", "lora_up")
    return change(tensors, f"diffusion_model.{layer}")


def expected_change(tensors, native):
    """Of the native weight: the layers' one below the other, zeros for those that are not adapted."""
    parts = [(layer, change(tensors, f"transformer.{layer}")) for layer in NATIVE[native]]
    if all(part is None for _, part in parts):
        return None
    rows = np.concatenate([np.zeros((outputs(layer), D)) if part is None else part for layer, part in parts])
    return np.concatenate([rows[D:], rows[:D]]) if native == "final_layer.adaLN_modulation.1" else rows


def assert_same(found, expected):
    """The same entries with the same bytes in the same type."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(found[name].astype(np.float64), value.astype(np.float64), err_msg=name)


# ---- names and numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_every_native_weight_changes_as_its_layers_do(layout, case):
    tensors = ADAPTERS[case]
    found = from_diffusers(tensors, layout)
    adapted = 0
    for native in NATIVE:
        ours, theirs = expected_change(tensors, native), native_change(found, native, layout)
        assert (ours is None) == (theirs is None), native
        if ours is not None:
            np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-12, err_msg=native)
            adapted += 1
    assert len(found) == 3 * adapted == 3 * len(lora_layouts.ranks(found))  # A, B and alpha, and nothing else


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_there_and_back_gives_the_same_tensors(layout, case):
    assert_same(to_diffusers(from_diffusers(ADAPTERS[case], layout)), ADAPTERS[case])


def test_kohyas_names_and_shapes():
    """As sd-scripts lists them for FLUX.1: rank times 3, B block-diagonal, alpha the rank of the whole."""
    found = from_diffusers(adapter(dict.fromkeys(QKV, 4)), "kohya")
    prefix = "lora_unet_double_blocks_1_img_attn_qkv"
    shapes = {f"{prefix}.lora_down.weight": (12, D), f"{prefix}.lora_up.weight": (3 * D, 12), f"{prefix}.alpha": ()}
    assert {name: value.shape for name, value in found.items()} == shapes
    blocks = found[f"{prefix}.lora_up.weight"].reshape(3, D, 3, 4).transpose(0, 2, 1, 3) != 0
    np.testing.assert_array_equal(blocks.all(axis=(2, 3)), np.eye(3, dtype=bool))
    assert float(found[f"{prefix}.alpha"]) == 12


def test_blocks_are_equal_and_filled_up_with_zeros():
    """sd-scripts and diffusers cut A and B into as many equal parts as the weight holds layers."""
    tensors = adapter({LINEAR1[0]: 2, LINEAR1[2]: 5})
    found = from_diffusers(tensors, "kohya")
    down, up, alpha = (found[f"lora_unet_single_blocks_12_linear1.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert (down.shape, up.shape, float(alpha)) == ((20, D), (7 * D, 20), 20.0)
    for number, rows in enumerate((slice(0, D), slice(D, 2 * D), slice(2 * D, 3 * D), slice(3 * D, 7 * D))):
        block = slice(5 * number, 5 * number + 5)
        ours = change(tensors, f"transformer.{LINEAR1[number]}")
        np.testing.assert_allclose(up[rows, block].astype(float) @ down[block], 0 if ours is None else ours, atol=1e-12)
        assert not np.delete(up[rows], range(block.start, block.stop), axis=1).any()


def test_clip_has_its_own_prefix_in_every_layout():
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    tensors = adapter({f"text_model.encoder.layers.11.{name}": 2 for name in names}, prefix="text_encoder")
    kohya, comfyui = (from_diffusers(tensors, layout) for layout in OTHERS)
    for name in names:
        expected = change(tensors, f"text_encoder.text_model.encoder.layers.11.{name}")
        short = name.replace(".", "_")
        for found in (
            change(kohya, f"lora_te1_text_model_encoder_layers_11_{short}", "lora_down", "lora_up"),
            change(comfyui, f"text_encoders.clip_l.transformer.text_model.encoder.layers.11.{name}"),
        ):
            np.testing.assert_array_equal(found, expected)
    for layout in OTHERS:
        both = {**tensors, **ADAPTERS["every layer"]}
        assert_same(to_diffusers(from_diffusers(both, layout)), both)


@pytest.mark.parametrize("layout", OTHERS)
def test_every_linear_layer_of_the_model_has_a_name(tiny_flux, layout):
    layers = linear_layers(tiny_flux, "transformer")
    tensors = {}
    for layer, (inputs, rows) in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = np.ones((2, inputs), np.float32)
        tensors[f"transformer.{layer}.lora_B.weight"] = np.ones((rows, 2), np.float32)
    assert len(layers) == 2 * 14 + 2 * 6 + 10
    assert_same(to_diffusers(from_diffusers(tensors, layout)), tensors)


@pytest.mark.parametrize("shared", [False, True], ids=["an A for each", "one A"])
def test_alphas_that_differ_within_one_weight_go_into_b(shared):
    tensors = adapter(dict.fromkeys(QKV, 4), {QKV[0]: 1.0, QKV[1]: 8.0})
    if shared:
        tensors.update({f"transformer.{layer}.lora_A.weight": tensors[f"transformer.{QKV[0]}.lora_A.weight"] for layer in QKV})
    found = from_diffusers(tensors, "kohya")
    assert float(found["lora_unet_double_blocks_1_img_attn_qkv.alpha"]) == (4 if shared else 12)
    expected = expected_change(tensors, "double_blocks.1.img_attn.qkv")
    np.testing.assert_allclose(native_change(found, "double_blocks.1.img_attn.qkv", "kohya"), expected, rtol=1e-6)


# ---- files of others ---------------------------------------------------------------------------------------------------------------


def fused(rank, native="single_blocks.12.linear1", rows=7 * D, alpha=2.0):
    """What kohya trains: one A and one full B for the whole native weight."""
    rng, name = np.random.default_rng(1), "lora_unet_" + native.replace(".", "_")
    a, b = rng.standard_normal((rank, D)).astype(np.float32), rng.standard_normal((rows, rank)).astype(np.float32)
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": np.array(alpha, np.float32)}


def test_a_fused_lora_gives_each_layer_its_a_and_its_rows_of_b():
    tensors = fused(rank=4)
    found = to_diffusers(tensors)
    assert set(lora_layouts.ranks(found).values()) == {4} and len(found) == 3 * 4
    together = np.concatenate([change(found, f"transformer.{layer}") for layer in LINEAR1])
    np.testing.assert_array_equal(together, native_change(tensors, "single_blocks.12.linear1", "kohya"))
    assert_same(from_diffusers(found, "kohya"), tensors)  # and not with four times the rank


def test_comfyui_files_may_say_down_and_up():
    tensors = {name.replace("lora_unet_single_blocks_12_", "diffusion_model.single_blocks.12."): v for name, v in fused(rank=4).items()}
    assert lora_layouts.layout_of(tensors) == "comfyui"
    assert_same(to_diffusers(tensors), to_diffusers(fused(rank=4)))


def test_columns_that_a_layer_does_not_use_go_with_their_rows_of_a():
    tensors = fused(rank=4)
    b = tensors["lora_unet_single_blocks_12_linear1.lora_up.weight"]
    b[:D, 1:] = 0  # q has the first column only
    b[D : 2 * D] = 0  # k was not adapted
    found = to_diffusers(tensors)
    assert lora_layouts.ranks(found) == {f"transformer.{LINEAR1[0]}": 1, f"transformer.{LINEAR1[2]}": 4, f"transformer.{LINEAR1[3]}": 4}
    np.testing.assert_array_equal(found[f"transformer.{LINEAR1[0]}.lora_A.weight"], tensors[next(iter(tensors))][:1])
    expected = native_change(tensors, "single_blocks.12.linear1", "kohya")
    np.testing.assert_array_equal(change(found, f"transformer.{LINEAR1[0]}"), expected[:D])
    assert not expected[D : 2 * D].any()


@pytest.mark.parametrize("rank, each", [(8, 2), (6, 6)])
def test_an_untrained_lora_of_others_is_shared_out_evenly_or_given_to_all(rank, each):
    """B is zero: nothing says which layer a row of A is for, and no weight changes."""
    tensors = fused(rank)
    tensors["lora_unet_single_blocks_12_linear1.lora_up.weight"][:] = 0
    assert lora_layouts.ranks(to_diffusers(tensors)) == {f"transformer.{layer}": each for layer in LINEAR1}


def test_a_column_of_zeros_in_a_layers_own_block_stays():
    """As training in fp16 may leave it; only with a row of zeros in A it fills up."""
    tensors = adapter(ALL)
    tensors[f"transformer.{QKV[0]}.lora_B.weight"][:, 1] = 0
    tensors[f"transformer.{LINEAR1[1]}.lora_B.weight"][:] = 0
    assert_same(to_diffusers(from_diffusers(tensors, "kohya")), tensors)


@pytest.mark.parametrize(
    "names, layout",
    [
        (from_diffusers(ADAPTERS["only q"], "kohya"), "kohya"),
        (from_diffusers(ADAPTERS["only q"], "comfyui"), "comfyui"),
        (ADAPTERS["only q"], "diffusers"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "kohya"),
        (["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"], "comfyui"),
        (["model.diffusion_model.img_in.weight", "x_embedder.bias", "x.alpha"], None),
        ([], None),
    ],
)
def test_layouts_are_told_by_their_names(names, layout):
    assert lora_layouts.layout_of(names) == layout


# ---- what cannot be converted ------------------------------------------------------------------------------------------------------


def halves(name, a=(4, D), b=(D, 4)):
    return {f"{name}.lora_A.weight": np.ones(a, np.float32), f"{name}.lora_B.weight": np.ones(b, np.float32)}


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        (halves("lora_unet_down_blocks_0_attentions_0_proj_in"), "FLUX.1 has no layer lora_unet_down_blocks_0_attentions_0_proj_in"),
        (halves("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), "FLUX.1 has no layer lora_te3_encoder_block_0"),
        (halves("diffusion_model.joint_blocks.0.x_block.attn.qkv"), "FLUX.1 has no layer diffusion_model.joint_blocks.0"),
        ({**fused(4), "lora_unet_img_in.dora_scale": np.ones(1)}, "lora_unet_img_in.dora_scale is neither A nor B nor alpha"),
        ({"lora_unet_img_in.lora_down.weight": np.ones((4, D))}, r"A and B of lora_unet_img_in are \(4, 8\) and nothing"),
        (halves("lora_unet_img_in", b=(D, 3)), r"A and B of lora_unet_img_in are \(4, 8\) and \(8, 3\)"),
        (halves("lora_unet_img_in", a=(4, D, 1, 1)), "which is no LoRA of a linear layer"),
        (fused(4, rows=6 * D), "B of lora_unet_single_blocks_12_linear1 has 48 rows, expected 56 for 8 inputs"),
    ],
)
def test_files_that_cannot_be_read_name_the_layer(tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        to_diffusers(tensors)


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize(
    "tensors, sentence",
    [
        (halves("unet.mid_block.to_q"), "'s layout has no name for the layer unet.mid_block.to_q"),
        (halves("transformer.controlnet_x_embedder"), "'s layout has no name for the layer transformer.controlnet_x_embedder"),
        (halves("transformer.transformer_blocks.0.attn.to_q", b=(2 * D, 4)), r"in .*double_blocks.0.img_attn.qkv are .*expected 8 -> 8"),
        (halves("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"), "no name for the layer text_encoder_2"),
    ],
)
def test_layers_without_a_counterpart_are_named(layout, tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_diffusers(tensors, layout)
