"""A FLUX LoRA in the layouts of other tools: equal changes of the weights, and conversion back to equal values."""

import json
import re
import tempfile
from pathlib import Path

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.models import lora_files, lora_layouts, lora_names
from mindtune.models.loading import linear_layers
from mindtune.models.lora_layouts import from_diffusers, to_diffusers

D = 8  # a model's width; its MLPs have 4 D
OTHERS = ["kohya", "comfyui"]

# By hand from `model.py` and `layers.py` of black-forest-labs/flux: native layer -> the diffusers layers in its rows.
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
    "double_blocks.1.txt_attn.qkv": [
        f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")
    ],
    "double_blocks.1.txt_attn.proj": ["transformer_blocks.1.attn.to_add_out"],
    "double_blocks.1.txt_mlp.0": ["transformer_blocks.1.ff_context.net.0.proj"],
    "double_blocks.1.txt_mlp.2": ["transformer_blocks.1.ff_context.net.2"],
    "single_blocks.12.modulation.lin": ["single_transformer_blocks.12.norm.linear"],
    "single_blocks.12.linear1": [
        f"single_transformer_blocks.12.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
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
        tensors[f"{prefix}.{layer}.lora_B.weight"] = (trained * rng.standard_normal((outputs(layer), rank))).astype(
            dtype
        )
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
    """The change of a native weight: those of its layers stacked, with zeros for layers that are not adapted."""
    parts = [(layer, change(tensors, f"transformer.{layer}")) for layer in NATIVE[native]]
    if all(part is None for _, part in parts):
        return None
    rows = np.concatenate([np.zeros((outputs(layer), D)) if part is None else part for layer, part in parts])
    return np.concatenate([rows[D:], rows[:D]]) if native == "final_layer.adaLN_modulation.1" else rows


def assert_same(found, expected):
    """Equal names, dtypes and bytes."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(found[name].astype(np.float64), value.astype(np.float64), err_msg=name)


# ---- names and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_native_weights_change_like_their_layers(layout, case):
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
def test_the_round_trip_gives_equal_tensors(layout, case):
    assert_same(to_diffusers(from_diffusers(ADAPTERS[case], layout)), ADAPTERS[case])


def test_kohyas_names_and_shapes():
    """As in sd-scripts for FLUX.1: three times the rank, a block-diagonal B, and the total rank as alpha."""
    found = from_diffusers(adapter(dict.fromkeys(QKV, 4)), "kohya")
    prefix = "lora_unet_double_blocks_1_img_attn_qkv"
    shapes = {f"{prefix}.lora_down.weight": (12, D), f"{prefix}.lora_up.weight": (3 * D, 12), f"{prefix}.alpha": ()}
    assert {name: value.shape for name, value in found.items()} == shapes
    blocks = found[f"{prefix}.lora_up.weight"].reshape(3, D, 3, 4).transpose(0, 2, 1, 3) != 0
    np.testing.assert_array_equal(blocks.all(axis=(2, 3)), np.eye(3, dtype=bool))
    assert float(found[f"{prefix}.alpha"]) == 12


def test_blocks_are_padded_to_equal_sizes():
    """sd-scripts and diffusers split A and B into equal parts, one per layer."""
    tensors = adapter({LINEAR1[0]: 2, LINEAR1[2]: 5})
    found = from_diffusers(tensors, "kohya")
    down, up, alpha = (
        found[f"lora_unet_single_blocks_12_linear1.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    assert (down.shape, up.shape, float(alpha)) == ((20, D), (7 * D, 20), 20.0)
    for number, rows in enumerate((slice(0, D), slice(D, 2 * D), slice(2 * D, 3 * D), slice(3 * D, 7 * D))):
        block = slice(5 * number, 5 * number + 5)
        ours = change(tensors, f"transformer.{LINEAR1[number]}")
        np.testing.assert_allclose(up[rows, block].astype(float) @ down[block], 0 if ours is None else ours, atol=1e-12)
        assert not np.delete(up[rows], range(block.start, block.stop), axis=1).any()


def test_the_prefix_of_clip_in_every_layout():
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
def test_different_alphas_in_one_weight_are_multiplied_into_b(shared):
    tensors = adapter(dict.fromkeys(QKV, 4), {QKV[0]: 1.0, QKV[1]: 8.0})
    if shared:
        tensors.update(
            {f"transformer.{layer}.lora_A.weight": tensors[f"transformer.{QKV[0]}.lora_A.weight"] for layer in QKV}
        )
    found = from_diffusers(tensors, "kohya")
    assert float(found["lora_unet_double_blocks_1_img_attn_qkv.alpha"]) == (4 if shared else 12)
    expected = expected_change(tensors, "double_blocks.1.img_attn.qkv")
    np.testing.assert_allclose(native_change(found, "double_blocks.1.img_attn.qkv", "kohya"), expected, rtol=1e-6)


# ---- files of others -----------------------------------------------------------------------------


def fused(rank, native="single_blocks.12.linear1", rows=7 * D, alpha=2.0):
    """One A and one full B for the whole native weight, as kohya trains it."""
    rng, name = np.random.default_rng(1), "lora_unet_" + native.replace(".", "_")
    a, b = rng.standard_normal((rank, D)).astype(np.float32), rng.standard_normal((rows, rank)).astype(np.float32)
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": np.array(alpha, np.float32)}


def test_a_fused_lora_is_split_by_rows_of_b():
    tensors = fused(rank=4)
    found = to_diffusers(tensors)
    assert set(lora_layouts.ranks(found).values()) == {4} and len(found) == 3 * 4
    together = np.concatenate([change(found, f"transformer.{layer}") for layer in LINEAR1])
    np.testing.assert_array_equal(together, native_change(tensors, "single_blocks.12.linear1", "kohya"))
    assert_same(from_diffusers(found, "kohya"), tensors)  # and not with four times the rank


def test_comfyui_files_with_lora_down_and_lora_up():
    tensors = {
        name.replace("lora_unet_single_blocks_12_", "diffusion_model.single_blocks.12."): v
        for name, v in fused(rank=4).items()
    }
    assert lora_names.layout_of(tensors) == "comfyui"
    assert_same(to_diffusers(tensors), to_diffusers(fused(rank=4)))


def test_unused_columns_are_removed_with_their_rows_of_a():
    tensors = fused(rank=4)
    b = tensors["lora_unet_single_blocks_12_linear1.lora_up.weight"]
    b[:D, 1:] = 0  # q has the first column only
    b[D : 2 * D] = 0  # k was not adapted
    found = to_diffusers(tensors)
    assert lora_layouts.ranks(found) == {
        f"transformer.{LINEAR1[0]}": 1,
        f"transformer.{LINEAR1[2]}": 4,
        f"transformer.{LINEAR1[3]}": 4,
    }
    np.testing.assert_array_equal(found[f"transformer.{LINEAR1[0]}.lora_A.weight"], tensors[next(iter(tensors))][:1])
    expected = native_change(tensors, "single_blocks.12.linear1", "kohya")
    np.testing.assert_array_equal(change(found, f"transformer.{LINEAR1[0]}"), expected[:D])
    assert not expected[D : 2 * D].any()


@pytest.mark.parametrize("rank, each", [(8, 2), (6, 6)])
def test_an_untrained_lora_is_split_evenly_or_copied(rank, each):
    """B is zero, so nothing shows which layer a row of A belongs to, and no weight changes."""
    tensors = fused(rank)
    tensors["lora_unet_single_blocks_12_linear1.lora_up.weight"][:] = 0
    assert lora_layouts.ranks(to_diffusers(tensors)) == {f"transformer.{layer}": each for layer in LINEAR1}


def test_a_column_of_zeros_in_its_own_block_is_kept():
    """fp16 training can produce one. It is padding only if the row of A is zero too."""
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
def test_layouts_are_recognised_by_names(names, layout):
    assert lora_names.layout_of(names) == layout


# ---- what cannot be converted --------------------------------------------------------------------


def halves(name, a=(4, D), b=(D, 4)):
    return {f"{name}.lora_A.weight": np.ones(a, np.float32), f"{name}.lora_B.weight": np.ones(b, np.float32)}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            halves("lora_unet_down_blocks_0_attentions_0_proj_in"),
            "made for Stable Diffusion 1, 2 or SDXL .lora_unet_down_blocks_0_att",
        ),
        (
            halves("lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
            "adapts T5 .lora_te3_encoder_block_0.* Save it without its T5 part",
        ),
        (
            halves("diffusion_model.joint_blocks.0.x_block.attn.qkv"),
            "made for Stable Diffusion 3 .diffusion_model.joint_blocks.0",
        ),
        ({**fused(4), "lora_unet_img_in.dora_scale": np.ones(1)}, "holds lora_unet_img_in.dora_scale: DoRA"),
        (
            {"lora_unet_img_in.lora_down.weight": np.ones((4, D))},
            r"A and B of lora_unet_img_in are \(4, 8\) and nothing",
        ),
        (halves("lora_unet_img_in", b=(D, 3)), r"A and B of lora_unet_img_in are \(4, 8\) and \(8, 3\)"),
        (halves("lora_unet_img_in", a=(4, D, 1, 1)), "which is not a LoRA of a linear layer"),
        (fused(4, rows=6 * D), "B of lora_unet_single_blocks_12_linear1 has 48 rows, expected 56 for 8 inputs"),
    ],
)
def test_unreadable_files_are_rejected_with_the_layer(tensors, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(tensors)


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            halves("transformer.controlnet_x_embedder"),
            "'s layout has no name for the layer transformer.controlnet_x_embedder",
        ),
        (
            halves("transformer.transformer_blocks.0.attn.to_q", b=(2 * D, 4)),
            r"in .*double_blocks.0.img_attn.qkv are .*expected 8 inputs and 8 outputs",
        ),
        (halves("text_encoder_2.encoder.layer.0"), "no name for the layer text_encoder_2"),
    ],
)
def test_layers_without_a_name_in_the_layout_are_rejected(layout, tensors, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(tensors, layout)


# ---- the files of every tool ---------------------------------------------------------------------

UNDER = str.maketrans(".", "_")
CLIP = "text_model.encoder.layers.11.self_attn.q_proj"
X_FLUX = {  # x-flux `layers.py`: DoubleStreamBlockLoraProcessor (1: images, 2: text) and SingleStreamBlockLoraProcessor
    "double_blocks.1.processor.qkv_lora1": NATIVE["double_blocks.1.img_attn.qkv"],
    "double_blocks.1.processor.proj_lora1": NATIVE["double_blocks.1.img_attn.proj"],
    "double_blocks.1.processor.qkv_lora2": NATIVE["double_blocks.1.txt_attn.qkv"],
    "double_blocks.1.processor.proj_lora2": NATIVE["double_blocks.1.txt_attn.proj"],
    "single_blocks.12.processor.qkv_lora": LINEAR1[:3],
    "single_blocks.12.processor.proj_lora": NATIVE["single_blocks.12.linear2"],
}
OMI = {native.replace("img_in", "img_in.proj"): layers for native, layers in NATIVE.items() if len(layers) == 1}
OMI.update(
    {f"{native}.{n}": [layer] for native, layers in NATIVE.items() if len(layers) > 1 for n, layer in enumerate(layers)}
)
LETTERS = {f"double_blocks.1.img_attn.{letter}": [layer] for letter, layer in zip("qkv", QKV)}
LAYERS, CLIP_LAYERS = {layer: [layer] for layer in ALL}, {CLIP: [CLIP]}
DOLLARS = {layer.replace(".", "$$"): [layer] for layer in ALL}
OLD = {  # diffusers before peft
    "transformer_blocks.1.attn.processor.to_q": [QKV[0]],
    "transformer_blocks.1.attn.processor.to_out": ["transformer_blocks.1.attn.to_out.0"],
    "transformer_blocks.1.attn.processor.add_k_proj": ["transformer_blocks.1.attn.add_k_proj"],
}
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
OLD_ENDS, X_ENDS = ("_lora.down.weight", "_lora.up.weight"), (".down.weight", ".up.weight")

# Tool -> layout, endings of A and B, prefix of the transformer, names of its layers, prefix of CLIP (or None), _ for
# dots.
TOOLS = {
    "diffusers": ("diffusers", AB, "transformer.", LAYERS, "text_encoder.", False),
    "diffusers, before peft": ("diffusers", OLD_ENDS, "transformer.", OLD, "text_encoder.", False),
    "diffusers, .lora.down": (
        "diffusers", (".lora.down.weight", ".lora.up.weight"), "transformer.", LAYERS, None, False,
    ),
    "diffusers, text encoders before peft": (
        "diffusers", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), "transformer.", LAYERS,
        "text_encoder.", False,
    ),
    "diffusers, of a compiled model": ("diffusers", AB, "transformer._orig_mod.", LAYERS, "text_encoder.", False),
    "ai-toolkit": ("diffusers", AB, "transformer.", LAYERS, None, False),
    "ai-toolkit, in training": ("onetrainer", DOWN_UP, "lora_transformer$$", DOLLARS, None, False),
    "ai-toolkit, diffusers' names in ComfyUI's layout": ("comfyui", AB, "diffusion_model.", LAYERS, None, False),
    "peft": ("peft", AB, "base_model.model.", LAYERS, "base_model.model.", False),
    "peft, of a pipeline's part": ("peft", AB, "base_model.model.transformer.", LAYERS, None, False),
    "peft, old scripts": ("peft", NAMED, "unet.base_model.model.", LAYERS, None, False),
    "DiffSynth, peft in training": ("bare", NAMED, "", LAYERS, None, False),
    "kohya's sd-scripts": ("kohya", DOWN_UP, "lora_unet_", NATIVE, "lora_te1_", True),
    "kohya's sd-scripts, older CLIP": ("kohya", DOWN_UP, "lora_unet_", NATIVE, "lora_te_", True),
    "kohya's layout with q, k and v apart": ("kohya", DOWN_UP, "lora_unet_", LETTERS, None, True),
    "kohya's layout with diffusers' names": ("kohya", DOWN_UP, "lora_unet_", LAYERS, "lora_te1_", True),
    "SimpleTuner (LyCORIS, algo=lora)": ("lycoris", DOWN_UP, "lycoris_", LAYERS, None, True),
    "ComfyUI": ("comfyui", AB, "diffusion_model.", NATIVE, "text_encoders.clip_l.transformer.", False),
    "ComfyUI, lora_down and lora_up": (
        "comfyui", DOWN_UP, "model.diffusion_model.", NATIVE, "text_encoders.clip_l.", False,
    ),
    "ComfyUI, USO": (
        "comfyui", DOWN_UP, "diffusion_model.", {"single_blocks.12.linear1_qkv": LINEAR1[:3]}, None, False,
    ),
    "OneTrainer": ("onetrainer", DOWN_UP, "lora_transformer_", LAYERS, "lora_te1_", True),
    "OneTrainer, with dots": ("onetrainer", DOWN_UP, "lora_transformer.", LAYERS, "lora_te1.", False),
    "OneTrainer, OMI": ("omi", DOWN_UP, "transformer.", OMI, "clip_l.", False),
    "x-flux (XLabs)": ("x-flux", X_ENDS, "", X_FLUX, None, False),
    "x-flux in ComfyUI's layout": ("x-flux", X_ENDS, "diffusion_model.", X_FLUX, None, False),
    "Black Forest Labs' names": ("native", AB, "", NATIVE, None, False),
}  # fmt: skip


def rows_of(layers):
    return sum(outputs(layer) for layer in layers)


def tool_file(tool, dtype=np.float32, alpha=None):
    """A file of the tool, rank 2, and its weight changes, alpha / rank * B A of every layer by diffusers' names."""
    _, ends, prefix, layers, clip, underscores = TOOLS[tool]
    rng, tensors, changes = np.random.default_rng(7), {}, {}
    parts = [("transformer", prefix, layers)] + ([("text_encoder", clip, CLIP_LAYERS)] if clip else [])
    for model, start, table in parts:
        for own, targets in table.items():
            name = start + (own.translate(UNDER) if underscores else own)
            a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((2, D), (rows_of(targets), 2)))
            tensors.update({name + ends[0]: a, name + ends[1]: b})
            if alpha is not None:
                tensors[f"{name}.alpha"] = np.asarray(alpha)
            full = (1.0 if alpha is None else np.max(alpha).astype(float) / 2) * (
                b.astype(np.float64) @ a.astype(np.float64)
            )
            if own == "final_layer.adaLN_modulation.1":
                full = np.concatenate([full[D:], full[:D]])
            pieces = np.split(full, np.cumsum([outputs(layer) for layer in targets])[:-1])
            changes.update({f"{model}.{layer}": piece for layer, piece in zip(targets, pieces)})
    return tensors, changes


TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
TYPES.update({"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2})
CODES = {np.dtype(numpy_type): code for code, numpy_type in TYPES.items()}
CODES.update(
    {np.dtype(np.float64): "F64", np.dtype(np.int64): "I64", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}
)


def write(path, tensors):
    """Writes a safetensors file in any dtype; the library cannot write float8."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": CODES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def changes_of(path):
    """B A of every layer, as the scripts read it."""
    parts = lora_files.read_adapters(path, "--lora")
    both = {
        f"{model}.{name}": value.astype(np.float64) for model, part in parts.items() for name, value in part.items()
    }
    layers = [name[: -len(".lora_A.weight")] for name in both if name.endswith(".lora_A.weight")]
    return {layer: both[f"{layer}.lora_B.weight"] @ both[f"{layer}.lora_A.weight"] for layer in layers}


def assert_same_changes(found, expected, rtol=1e-6):
    assert sorted(found) == sorted(expected)
    for layer, change_of_weight in expected.items():
        np.testing.assert_allclose(found[layer], change_of_weight, rtol=rtol, atol=rtol, err_msg=layer)


@pytest.mark.parametrize("alpha", [None, np.float32(1.0)], ids=["no alpha", "alpha 1"])
@pytest.mark.parametrize("tool", TOOLS)
def test_files_of_every_tool_change_the_weights_equally(tmp_path, tool, alpha):
    tensors, changes = tool_file(tool, alpha=alpha)
    assert lora_names.layout_of(tensors) == TOOLS[tool][0]
    assert_same_changes(changes_of(write(tmp_path / "f", tensors)), changes)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "tool", ["diffusers", "kohya's sd-scripts", "ComfyUI", "OneTrainer", "OneTrainer, OMI", "x-flux (XLabs)"]
)
def test_files_of_every_dtype(tmp_path, tool, kind):
    """Also float8, which NumPy does not have."""
    tensors, changes = tool_file(tool, TYPES[kind])
    assert_same_changes(changes_of(write(tmp_path / "f", tensors)), changes)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("tool", TOOLS)
def test_every_supported_file_can_be_exported(tmp_path, tool, layout):
    tensors, changes = tool_file(tool, ml_dtypes.float8_e4m3fn, alpha=np.float32(4.0))
    lora_files.write_lora(tmp_path / "g", *lora_files.read_lora(write(tmp_path / "f", tensors), "--lora"), layout)
    assert_same_changes(changes_of(tmp_path / "g"), changes)


@pytest.mark.parametrize(
    "alpha",
    [
        np.float32(3), np.array([3.0]), np.full(4, 3.0), np.array([[3]]), np.float16(3),
        np.array(3, ml_dtypes.bfloat16), np.array([3], ml_dtypes.float8_e5m2),
    ],
    ids=["scalar", "one", "four equal", "int matrix", "fp16", "bf16", "fp8"],
)  # fmt: skip
def test_alpha_of_any_shape_and_dtype(tmp_path, alpha):
    tensors, changes = tool_file("kohya's sd-scripts", alpha=alpha)
    assert_same_changes(changes_of(write(tmp_path / "f", tensors)), changes)


def test_an_alpha_of_zero_disables_a_layer(tmp_path):
    tensors, _ = tool_file("OneTrainer", alpha=np.float32(0))
    assert not any(change_of_weight.any() for change_of_weight in changes_of(write(tmp_path / "f", tensors)).values())


# ---- files that are refused ----------------------------------------------------------------------

PAIR, NEXT = "lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_q"


def values(*names, shape=(4, 4)):
    return {name: np.ones(shape, np.float32) for name in names}


def pair(module, ends=DOWN_UP):
    return values(module + ends[0], module + ends[1])


# Tool or type of file -> entries, and words of the message.
REJECTED = {
    "LyCORIS LoHa": (
        values(*(f"{PAIR}.hada_{w}" for w in ("w1_a", "w1_b", "w2_a", "w2_b")), f"{PAIR}.alpha"), "LoHa of LyCORIS",
    ),
    "LyCORIS LoKr of q, k and v": (
        values(*(f"lora_unet_double_blocks_0_img_attn_qkv.{x}" for x in ("lokr_w1", "lokr_w2", "alpha"))),
        "DoRA or LoKr of a weight that diffusers divides or reorders",
    ),
    "LoKr of peft": (
        values(*(f"base_model.model.transformer_blocks.0.attn.to_q.lokr_{x}" for x in ("w1", "w2"))), "has no alpha",
    ),
    "LoKr with half of its factors": (
        values(*(f"lycoris_transformer_blocks_0_attn_to_q.{x}" for x in ("lokr_w1", "lokr_w2_a", "alpha"))),
        "which are not those of a linear layer",
    ),
    "LoKr twice for a layer": (
        {
            **values(*(f"lycoris_transformer_blocks_0_attn_to_q.{x}" for x in ("lokr_w1", "lokr_w2", "alpha"))),
            **values(*(f"transformer.transformer_blocks.0.attn.to_q.{x}" for x in ("lokr_w1", "lokr_w2", "alpha"))),
        },
        "both adapt transformer.transformer_blocks.0.attn.to_q. Keep one of them",
    ),
    "LoKr with a Tucker core": (
        values(*(f"{PAIR}.{x}" for x in ("lokr_w1", "lokr_t2", "lokr_w2_a", "lokr_w2_b", "alpha"))), "Tucker core",
    ),
    "LoKr and LoRA in one file": (
        {**pair(NEXT, AB), **values(*(f"{PAIR}.{x}" for x in ("lokr_w1", "lokr_w2", "alpha")))}, "mixes LoRA",
    ),
    "LyCORIS GLoRA": (values(*(f"{PAIR}.{x}.weight" for x in ("a1", "a2", "b1", "b2"))), "GLoRA"),
    "OFT": (values(f"{PAIR}.oft_blocks", f"{PAIR}.alpha"), "OFT"),
    "OFT of OneTrainer": (values("lora_transformer_transformer_blocks_0_attn_to_q.oft_R.weight"), "OFT"),
    "BOFT of peft": (values("base_model.model.transformer_blocks.0.attn.to_q.boft_R"), "BOFT"),
    "IA3": (values(f"{PAIR}.weight", f"{PAIR}.on_input"), "IA3"),
    "VeRA of peft": (values("base_model.model.transformer_blocks.0.attn.to_q.vera_lambda_b"), "VeRA"),
    "DoRA of kohya's layout": ({**pair(PAIR), **values(f"{PAIR}.dora_scale", shape=(4, 1))}, "DoRA"),
    "DoRA of some layers": (
        {**pair(NEXT, AB), **values(f"{NEXT}.lora_magnitude_vector", shape=(4,)),
         **pair("transformer.transformer_blocks.1.attn.to_q", AB)},
        "mixes LoRA, DoRA",
    ),
    "LoCon with a Tucker core": ({**pair(PAIR), **values(f"{PAIR}.lora_mid.weight", shape=(4, 4, 1, 1))}, "Tucker"),
    "full differences": ({**pair(PAIR), **values(f"{PAIR}.diff", f"{PAIR}.diff_b")}, "full differences"),
    "full differences alone": (values("diffusion_model.double_blocks.0.img_attn.proj.diff"), "full differences"),
    "LyCORIS norms": ({**pair(PAIR), **values("lora_unet_double_blocks_0_img_norm.w_norm", shape=(4,))}, "norms"),
    "LoRA with biases of A": ({**pair(NEXT, AB), **values(f"{NEXT}.lora_A.bias", shape=(4,))}, "biases of A"),
    "norms alone": (values("transformer.transformer_blocks.0.attn.norm_q.weight", shape=(4,)), "full weights"),
    "OneTrainer with embeddings": ({**pair(PAIR), **values("bundle_emb.cat.clip_l", shape=(1, 4))}, "embeddings"),
    "peft with embeddings": (
        {**pair(NEXT, AB), **values("text_encoder.token_embedding.lora_embedding_A")}, "embedding",
    ),
    "kohya with T5": ({**pair(PAIR), **pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q")}, "T5"),
    "OneTrainer with T5": (pair("lora_te2_encoder_block_0_layer_1_DenseReluDense_wo"), "T5"),
    "OneTrainer (OMI) with T5": (pair("t5.encoder.block.3.layer.0.SelfAttention.o"), "T5"),
    "ComfyUI with T5": (pair("text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.o", AB), "T5"),
    "diffusers with T5": (pair("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", AB), "T5"),
    "Stable Diffusion 1.5 of kohya": (
        pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"), "Stable Diffusion 1",
    ),
    "SDXL of kohya": (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"), "SDXL"),
    "SDXL's second text encoder": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "SDXL"),
    "SDXL of diffusers": (pair("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", AB), "SDXL"),
    "SDXL LoHa": (values("lora_unet_output_blocks_0_1_proj_in.hada_w1_a"), "SDXL"),
    "Stable Diffusion 3": (pair("lora_unet_joint_blocks_0_x_block_attn_qkv"), "Stable Diffusion 3"),
    "Stable Diffusion 3 of diffusers": (
        pair("transformer.transformer_blocks.23.attn.to_q", AB), "it has 19 of these blocks",
    ),
    "Wan": (pair("diffusion_model.blocks.0.self_attn.q", AB), "Wan"),
    "Wan of kohya": (pair("lora_unet_blocks_0_cross_attn_k"), "Wan"),
    "HunyuanVideo": (pair("diffusion_model.double_blocks.0.img_mlp.fc1", AB), "HunyuanVideo"),
    "FLUX.2": (pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", AB), "FLUX.2"),
    "Qwen-Image": (pair("transformer.transformer_blocks.0.img_mlp.net.2", AB), "Qwen-Image"),
    "Chroma": (pair("diffusion_model.distilled_guidance_layer.in_proj", AB), "Chroma"),
    "Z-Image": (pair("diffusion_model.layers.0.attention.to_q", AB), "Z-Image"),
    "HiDream": (pair("transformer.double_stream_blocks.0.block.attn1.to_q", AB), "HiDream"),
    "AuraFlow": (pair("transformer.joint_transformer_blocks.0.attn.to_q", AB), "AuraFlow"),
    "LTX-Video": (pair("transformer.transformer_blocks.0.attn1.to_q", AB), "LTX-Video"),
    "a language model": (pair("base_model.model.model.layers.0.self_attn.q_proj", AB), "a language model"),
    "IP-Adapter of x-flux": (
        values("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"), "full weights",
    ),
    "a checkpoint of FLUX.1": (
        values("double_blocks.0.img_attn.qkv.weight", "img_in.bias"), "full weights .*double_blocks.0",
    ),
    "a checkpoint of diffusers": (values("transformer_blocks.0.attn.norm_q.weight", "x_embedder.bias"), "full weights"),
    "a checkpoint of SDXL": (values("model.diffusion_model.input_blocks.0.0.weight"), "full weights"),
    "textual inversion": (values("clip_l", "t5xxl"), "textual inversion"),
    "nothing": ({}, "no tensors at all"),
    "other entries": ({**pair(PAIR), **values("something.else")}, "something.else is neither A nor B nor alpha"),
}  # fmt: skip


# Files that are read to generate images: some have biases, which can be used for nothing else.
CONTROL_LORAS = {
    "Control-LoRA of Black Forest Labs": {
        **pair("img_in", AB),
        **values("img_in.lora_B.bias", "double_blocks.0.img_attn.norm.query_norm.scale", shape=(4,)),
    },
    "Control-LoRA of diffusers": {
        **pair(NEXT, AB), **values("transformer.transformer_blocks.0.attn.norm_q.weight", shape=(4,)),
    },
    "LoRA with biases of B": {**pair(NEXT, AB), **values(f"{NEXT}.lora_B.bias", shape=(4,))},
}  # fmt: skip


def adapter_rows(folder=None):
    """(tool or type, an entry of its file, "read" or the error message), from reading a small file of each."""
    with tempfile.TemporaryDirectory() as nowhere:
        path = Path(folder or nowhere) / "lora.safetensors"
        rejected = {kind: tensors for kind, (tensors, _) in REJECTED.items()}
        files = {tool: tool_file(tool)[0] for tool in TOOLS} | CONTROL_LORAS | rejected
        rows = []
        for tool, tensors in files.items():
            try:
                lora_files.read_adapters(write(path, tensors), "--lora", biases=True)
                verdict = "read"
            except UserError as error:
                verdict = str(error)[len(f"--lora {path}: ") :]
            rows.append((tool, next(iter(tensors), ""), verdict))
    return rows


def test_every_file_is_read_or_rejected_by_name(tmp_path):
    rows = {tool: verdict for tool, _, verdict in adapter_rows(tmp_path)}
    assert {tool for tool, verdict in rows.items() if verdict == "read"} == {*TOOLS, *CONTROL_LORAS}
    for kind, (_, words) in REJECTED.items():
        assert re.search(words, rows[kind]), (kind, rows[kind])
        assert re.search(r"\. (Give|Save|Only|Keep) [^.]", rows[kind]), rows[kind]  # what to do


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_control_lora_of_black_forest_labs(tmp_path, dtype):
    """B has biases and is not block-diagonal: every layer gets all of A, and its rows of B and of the bias."""
    tensors, changes = tool_file("Black Forest Labs' names", dtype)
    rng, norms = np.random.default_rng(3), {}
    biases = {name[: -len("weight")] + "bias": len(value) for name, value in tensors.items() if ".lora_B." in name}
    biases = {name: rng.standard_normal(rows).astype(dtype) for name, rows in biases.items()}
    for native, own in {
        "double_blocks.1.img_attn.norm.query_norm": "transformer_blocks.1.attn.norm_q",
        "double_blocks.1.img_attn.norm.key_norm": "transformer_blocks.1.attn.norm_k",
        "double_blocks.1.txt_attn.norm.query_norm": "transformer_blocks.1.attn.norm_added_q",
        "double_blocks.1.txt_attn.norm.key_norm": "transformer_blocks.1.attn.norm_added_k",
        "single_blocks.12.norm.query_norm": "single_transformer_blocks.12.attn.norm_q",
        "single_blocks.12.norm.key_norm": "single_transformer_blocks.12.attn.norm_k",
    }.items():
        norms[f"{own}.weight"] = tensors[f"{native}.scale"] = rng.standard_normal(4).astype(dtype)
    path = write(tmp_path / "f", {**tensors, **biases})
    found = lora_files.read_adapters(path, "--lora", biases=True)["transformer"]
    for name, value in norms.items():
        np.testing.assert_array_equal(found.pop(name), value.astype(np.float32), err_msg=name)
    for native, layers in NATIVE.items():
        whole = biases[f"{native}.lora_B.bias"].astype(np.float32)
        if native == "final_layer.adaLN_modulation.1":
            whole = np.concatenate([whole[D:], whole[:D]])
        for layer, piece in zip(layers, np.split(whole, np.cumsum([outputs(layer) for layer in layers])[:-1])):
            np.testing.assert_array_equal(found.pop(f"{layer}.lora_B.bias"), piece, err_msg=layer)
            a, b = (found.pop(f"{layer}.lora_{half}.weight").astype(np.float64) for half in "AB")
            np.testing.assert_allclose(b @ a, changes[f"transformer.{layer}"], rtol=1e-6, atol=1e-6, err_msg=layer)
    assert not found


NORM_NAMES = [
    "transformer.transformer_blocks.0.attn.norm_q.weight",
    "transformer_blocks.3.attn.norm_added_k.weight",
    "base_model.model.single_transformer_blocks.5.attn.norm_k.weight",
]


@pytest.mark.parametrize("name", NORM_NAMES)
def test_norms_of_a_control_lora_are_read_and_written_again(tmp_path, name):
    """In float32 whatever the file's dtype: near 1, half precision would lose what training changed.

    The layouts of other tools do not hold them.
    """
    tensors = {**pair(NEXT, AB), name: np.array([1.0, 1.25]).astype(ml_dtypes.bfloat16)}
    found, alphas = lora_files.read_lora(write(tmp_path / "f", tensors), "--lora")
    block = re.search("(single_)?transformer_blocks.*", name)[0]
    adapter = lora_files.read_adapters(tmp_path / "f", "--lora")["transformer"]
    assert adapter[block].tolist() == [1.0, 1.25] and adapter[block].dtype == np.float32
    assert list(lora_files.by_layer(adapter)) == ["transformer_blocks.0.attn.to_q"]
    found[f"transformer.{block}"] = np.array([1.0, 1.0 + 2**-20], np.float32)
    summary = lora_files.write_lora(tmp_path / "g", found, alphas, "diffusers", ms.bfloat16)
    assert summary == lora_files.describe(adapter) == "1 layers of rank 4, 1 norms"
    written = lora_files.read_safetensors(tmp_path / "g")[0]
    assert written[f"transformer.{block}"].tolist() == [1.0, 1.0 + 2**-20]
    assert written[f"{NEXT}.lora_A.weight"].dtype == ml_dtypes.bfloat16
    for layout in ("kohya", "comfyui"):
        with pytest.raises(ValueError, match=f"has trained norms .*, which the layout {layout} does not hold"):
            lora_files.write_lora(tmp_path / "h", found, alphas, layout)


def test_every_known_layout_and_adapter_has_a_file():
    assert {layout for layout, *_ in TOOLS.values()} == {layout.name for layout in lora_names.LAYOUTS_READ}
    for layout in lora_names.LAYOUTS_READ:
        assert lora_names.layout_of([layout.example]) == layout.name
    verdicts = "\n".join(verdict for _, _, verdict in adapter_rows())
    for name, _ in lora_names.OTHER_ADAPTERS + lora_names.OTHER_MODELS:
        assert name in verdicts


A, B = (f"{PAIR}{end}" for end in DOWN_UP)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({A: np.ones((2, D))}, rf"A and B of {PAIR} are \(2, 8\) and nothing, .*Give a LoRA of FLUX.1"),
        ({f"{PAIR}.alpha": np.ones(1), **pair(NEXT, AB)}, rf"A and B of {PAIR} are nothing and nothing"),
        ({A: np.ones((0, D)), B: np.ones((D, 0))}, r"\(0, 8\) and \(8, 0\): empty"),
        ({A: np.ones(()), B: np.ones(())}, r"are \(\) and \(\), which is not a LoRA"),
        ({A: np.ones((2, D, 1, 1)), B: np.ones((D, 2, 1, 1))}, "which is not a LoRA of a linear layer"),
        ({A: np.full((2, D), np.nan), B: np.ones((D, 2))}, f"A of {PAIR} holds NaN or infinity"),
        ({A: np.ones((2, D), np.int8), B: np.ones((D, 2), np.int8)}, f"A of {PAIR} is stored as int8"),
        ({**pair(PAIR), f"{PAIR}.alpha": np.float32("nan")}, f"alpha of {PAIR} is nan, expected one finite number"),
        ({**pair(PAIR), f"{PAIR}.alpha": np.float32("inf")}, f"alpha of {PAIR} is inf"),
        ({**pair(PAIR), f"{PAIR}.alpha": np.array([1.0, 2.0])}, f"alpha of {PAIR} is .*expected one finite number"),
        ({**pair(PAIR), f"{PAIR}.alpha": np.zeros(0)}, f"alpha of {PAIR} is .*expected one"),
        (
            {**pair(PAIR), **pair("diffusion_model.double_blocks.0.img_attn.proj", AB)},
            f"{PAIR} and diffusion_model.* both adapt",
        ),
        ({**pair(PAIR), **pair(PAIR, AB)}, "are the same half of one LoRA"),
        (
            {**pair(NEXT, NAMED), **pair(NEXT, (".lora_A.style.weight", ".lora_B.style.weight"))},
            r"several adapters \(default, style\)",
        ),
        (
            pair("transformer.transformer_blocks.19.attn.to_q", AB),
            "FLUX.1 has no layer transformer.transformer_blocks.19.*19",
        ),
        (
            pair("transformer.transformer_blocks.0.attn.to_x", AB),
            "FLUX.1 has no layer transformer.transformer_blocks.0.attn.to_x",
        ),
        ({**pair(NEXT, AB), f"{NEXT}.lora_B.bias": np.ones(4)}, "has biases .*bias.*Only generate images"),
        ({**pair(NEXT, AB), f"{NEXT}.lora_B.bias": np.ones(3)}, r"bias of .*to_q is \(3,\), expected \(4,\)"),
        ({**pair(NEXT, AB), f"{NEXT}.lora_B.bias": np.full(4, np.inf)}, "bias of .*to_q holds NaN"),
        (
            {**pair(NEXT, AB), "transformer.transformer_blocks.0.attn.norm_q.weight": np.full(4, np.nan)},
            "norm_q.weight holds NaN",
        ),
        (pair("text_encoder.text_projection", AB), "FLUX.1 has no layer text_encoder.text_projection"),
        (
            {"": np.ones(2), ".lora_A.weight": np.ones((2, 2)), ".alpha": np.ones(())},
            "is neither A nor B nor alpha|holds no lora",
        ),
    ],
)  # fmt: skip
def test_invalid_entries_are_rejected(tmp_path, tensors, message):
    with pytest.raises(UserError, match=rf"--lora .*f: .*{message}"):
        lora_files.read_adapters(
            write(tmp_path / "f", {name: np.asarray(value) for name, value in tensors.items()}), "--lora"
        )
