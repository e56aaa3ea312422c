"""DoRA and LoKr in a model: outputs, gradients, files, and the scale at inference, against merged weights of NumPy."""

import mindspore as ms
import numpy as np
import pytest
from adapter_cases import adapted_weights, add_adapter, base_weights, merge
from flux_gradients import FLOAT16, FLOAT32, assert_close, loss_and_gradients, loss_of, recompute
from lora_cases import header
from mindspore import nn
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import loading, lora, lora_files, lora_settings

KINDS = ["dora", "lokr"]


@pytest.fixture
def pynative():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def load(tiny_flux):
    """load(precision, int8): the transformer."""
    return lambda dtypes=FLOAT32, int8=False: loading.load_model(tiny_flux, "transformer", dtypes, int8=int8)


@pytest.fixture(scope="module")
def base(tiny_flux):
    """The weights of the transformer."""
    return base_weights(loading.load_model(tiny_flux, "transformer", FLOAT32))


# ---- outputs and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_merged_weights_compute(pynative, load, base, kind):
    """On every type of layer, in blocks and outside of them."""
    model = add_adapter(load(), kind)
    assert loss_of(model) == pytest.approx(loss_of(merge(load(), adapted_weights(model, base))), rel=1e-5)
    lora.enable_lora(model, False)
    assert loss_of(model) == loss_of(load())
    lora.enable_lora(model, True)
    assert loss_of(model) != loss_of(load())


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_has_no_effect(pynative, load, kind):
    """Bit for bit, with int8 weights too."""
    assert loss_of(add_adapter(load(), kind, trained=False)) == loss_of(load())
    assert loss_of(add_adapter(load(int8=True), kind, trained=False)) == loss_of(load(int8=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_graph_mode_recomputation_and_int8(pynative, small_flux, kind):
    """All blocks recomputed in a graph, with int8 weights, against PyNative that keeps everything."""

    def adapted():
        targets = ["to_q", "add_k_proj", "norm.linear", "proj_mlp", "proj_out", "linear_1"]
        return add_adapter(loading.load_model(small_flux, "transformer", FLOAT32, int8=True), kind, targets=targets)

    expected = loss_and_gradients(adapted())
    assert all(np.abs(gradient).max() > 0 for gradient in expected[1:])
    assert_close(loss_and_gradients(recompute(adapted())), expected, 2e-5)
    ms.set_context(mode=ms.GRAPH_MODE)
    assert_close(loss_and_gradients(recompute(adapted())), expected, 2e-5)


class ClipLoss(nn.Cell):
    def __init__(self, encoder):
        super().__init__(auto_prefix=False)
        self.encoder = encoder

    def construct(self, ids):
        return (self.encoder(ids)[0] ** 3).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_clip_in_graph_mode(pynative, tiny_flux, kind):
    encoder = loading.load_model(tiny_flux, "text_encoder", FLOAT32)
    add_adapter(encoder, kind, targets=["q_proj", "out_proj", "fc1"])
    ids = ms.Tensor(np.arange(77)[None], ms.int32)
    found = []
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        loss, gradients = ms.value_and_grad(ClipLoss(encoder), None, encoder.trainable_params())(ids)
        found.append([loss.asnumpy(), *(gradient.asnumpy() for gradient in gradients)])
    assert all(np.abs(gradient).max() > 0 for gradient in found[0][1:])
    assert_close(found[1], found[0], 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_only_the_adapter_trains_and_in_float32(pynative, load, base, kind):
    model = add_adapter(load(FLOAT16), kind, ms.float16)
    trained = lora.lora_parameters(model)
    assert {p.name.replace(".default.", ".") for p in model.trainable_params()} == set(trained)
    assert {p.dtype for p in trained.values()} == {ms.float32}
    merged = loss_of(merge(load(), adapted_weights(model, base)))
    assert loss_of(model, ms.float16) == pytest.approx(merged, rel=2e-2)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_as_trained(pynative, load, tmp_path, kind, dtype):
    model, path = add_adapter(load(), kind), tmp_path / "adapter.safetensors"
    lora.save_lora(path, {"transformer": model}, dtype)
    loaded = load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32)
    assert loss_of(loaded) == pytest.approx(loss_of(model), rel=1e-5 if dtype == ms.float32 else 1e-2)
    assert loaded.trainable_params() == []


def test_a_dora_has_diffusers_names_and_header_and_magnitudes_in_float32(pynative, load, tmp_path):
    path = tmp_path / "f"
    lora.save_lora(path, {"transformer": add_adapter(load(), "dora", targets=["to_q"])}, ms.float16)
    tensors = load_file(path)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    assert {name: str(value.dtype) for name, value in tensors.items() if name.startswith(layer)} == {
        f"{layer}.lora_A.weight": "float16",
        f"{layer}.lora_B.weight": "float16",
        f"{layer}.lora_magnitude_vector": "float32",
    }
    assert '"transformer.use_dora": true' in header(path)["lora_adapter_metadata"]
    assert "use_dora" not in header(write_lora(load, tmp_path / "g"))["lora_adapter_metadata"]


def write_lora(load, path):
    lora.save_lora(path, {"transformer": add_adapter(load(), "lora", targets=["to_q"])}, ms.float32)
    return path


def test_a_lokr_has_the_names_of_lycoris_and_those_of_kohya_for_clip(pynative, load, tiny_flux, tmp_path):
    """alpha is the rank: the scale is in w1."""
    clip = add_adapter(loading.load_model(tiny_flux, "text_encoder", FLOAT32), "lokr", targets=["q_proj"])
    models = {"transformer": add_adapter(load(), "lokr", targets=["to_q", "ff.net.0.proj"]), "text_encoder": clip}
    lora.save_lora(tmp_path / "f", models, ms.float32)
    tensors = load_file(tmp_path / "f")
    shapes = {name: tensors[name].shape for name in sorted(tensors) if "transformer_blocks_0" in name[:30]}
    assert shapes == {  # 32 is 4 x 8, 128 is 8 x 16
        "lycoris_transformer_blocks_0_attn_to_q.alpha": (),
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": (4, 4),
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": (8, 8),
        "lycoris_transformer_blocks_0_ff_net_0_proj.alpha": (),
        "lycoris_transformer_blocks_0_ff_net_0_proj.lokr_w1": (8, 4),
        "lycoris_transformer_blocks_0_ff_net_0_proj.lokr_w2_a": (16, 4),
        "lycoris_transformer_blocks_0_ff_net_0_proj.lokr_w2_b": (4, 8),
    }
    low = "transformer_blocks.0.ff.net.0.proj"
    own = lora.lora_parameters(models["transformer"])[f"{low}.lokr_w1"].asnumpy()
    name = "lycoris_transformer_blocks_0_ff_net_0_proj"
    np.testing.assert_allclose(tensors[f"{name}.lokr_w1"], 6.0 / 4 * own, rtol=1e-6)
    assert tensors[f"{name}.alpha"] == 4
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lokr_w1" in tensors
    loaded = loading.load_model(tiny_flux, "text_encoder", FLOAT32)
    lora.load_lora(tmp_path / "f", {"transformer": load(), "text_encoder": loaded}, ms.float32)
    ids = ms.Tensor(np.arange(77)[None], ms.int32)
    np.testing.assert_allclose(loaded(ids)[1].asnumpy(), clip(ids)[1].asnumpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind, layout, message",
    [
        ("dora", "kohya", "is a DoRA, which the layout kohya does not hold. Write it as diffusers"),
        ("dora", "comfyui", "is a DoRA, which the layout comfyui does not hold. Write it as diffusers"),
        ("lokr", "diffusers", "is a LoKr, which the layout diffusers does not hold. Write it as lycoris"),
        (
            "lora",
            "lycoris",
            "is a LoRA, which the layout lycoris does not hold. Write it as diffusers or kohya or comfyui",
        ),
    ],
)
def test_a_layout_that_does_not_hold_the_adapter_is_refused(pynative, load, tmp_path, kind, layout, message):
    lora.save_lora(tmp_path / "f", {"transformer": add_adapter(load(), kind, targets=["to_q"])}, ms.float32)
    tensors, alphas = lora_files.read_lora(tmp_path / "f", "--lora")
    with pytest.raises(ValueError, match=message):
        lora_files.write_lora(tmp_path / "g", tensors, alphas, layout)
    assert not (tmp_path / "g").exists()


def test_a_lokr_whose_first_factor_is_stored_as_two(tmp_path, pynative, load, base):
    """LyCORIS writes this with decompose_both; alpha / rank is one scale of the product."""
    rng = np.random.default_rng(0)
    shapes = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}
    factors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    module = "lycoris_transformer_blocks_0_attn_to_q"
    save = {f"{module}.{name}": value for name, value in factors.items()}
    save_file({**save, f"{module}.alpha": np.array(3.0, np.float32)}, tmp_path / "f")
    change = 1.5 * np.kron(factors["lokr_w1_a"] @ factors["lokr_w1_b"], factors["lokr_w2_a"] @ factors["lokr_w2_b"])
    layer = "transformer_blocks.0.attn.to_q"
    expected = loss_of(merge(load(), {layer: base[layer] + change}))
    loaded = load()
    lora.load_lora(tmp_path / "f", {"transformer": loaded}, ms.float32)
    assert loss_of(loaded) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_width_is_refused(pynative, load, tmp_path, kind):
    lora.save_lora(tmp_path / "f", {"transformer": add_adapter(load(), kind, targets=["to_q"])}, ms.float32)
    adapters = lora_files.read_adapters(tmp_path / "f", "--lora")
    layers = {"transformer": dict.fromkeys(lora_files.by_layer(adapters["transformer"]), (64, 64))}
    with pytest.raises(UserError, match=r"made for another model; .* of .*to_q are .* has 64 inputs and 64 outputs"):
        lora_files.check_adapters(tmp_path / "f", "--lora", adapters, layers)


# ---- scale at inference --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_interpolates_between_the_weights_of_base_and_adapter(pynative, load, base, tmp_path, kind, scale):
    model = add_adapter(load(), kind)
    lora.save_lora(tmp_path / "f", {"transformer": model}, ms.float32)
    loaded = load()
    lora.load_lora(tmp_path / "f", {"transformer": loaded}, ms.float32, scale=scale)
    weights = {
        layer: base[layer] + scale * (weight - base[layer]) for layer, weight in adapted_weights(model, base).items()
    }
    assert loss_of(loaded) == pytest.approx(loss_of(merge(load(), weights)), rel=2e-5)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"adapter": "dora", "lora_dropout": 0.1}, "--lora_dropout 0.1: not with --adapter dora. Leave it out"),
        ({"adapter": "lokr", "lora_dropout": 0.1}, "--lora_dropout 0.1: not with --adapter lokr. Leave it out"),
        ({"adapter": "dora", "lokr_factor": 8}, "--lokr_factor 8: only for --adapter lokr"),
        ({"adapter": "lokr", "lokr_factor": 0}, "--lokr_factor 0: must be at least 1, or -1"),
        ({"adapter": "lokr", "lokr_factor": -2}, "--lokr_factor -2: must be at least 1, or -1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        lora_settings.check_settings(lora_settings.Settings(**settings))
