"""LoRA adapters in the transformer: which layers get one, how they start, and saving and loading them."""

import json

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from lora_cases import Q0, Q1, SINGLE, WIDTH, header, weight_changes, write_adapter
from safetensors.numpy import load_file

from mindtune.cli import UserError
from mindtune.flow import latent_image_ids
from mindtune.models import lora, lora_files, lora_settings
from mindtune.models.loading import linear_layers, load_model
from mindtune.models.lora_settings import TEXT_ENCODER_TARGETS, TRANSFORMER_TARGETS
from mindtune.models.precision import cast_training_params, freeze_params, resolve_precision

ms.runtime.launch_blocking()  # as the scripts do on the CPU

TARGETS = TRANSFORMER_TARGETS
# The tiny transformer has 2 double blocks of width 32 with to_out.0, and 2 single blocks without.
LAYERS = sorted(
    [f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in TARGETS]
    + [f"single_transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in TARGETS[:3]]
)


@pytest.fixture(autouse=True)
def pynative():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def load(tiny_flux):
    """load(precision): the frozen transformer."""

    def make(precision="no", name="transformer"):
        model = load_model(tiny_flux, name, resolve_precision(precision))
        freeze_params(model)
        return model

    return make


@pytest.fixture(scope="module")
def base_output(tiny_flux):
    """The output of the transformer without an adapter."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    output = forward(load_model(tiny_flux, "transformer", resolve_precision("no")))
    ms.set_context(mode=before)
    return output


def adapt(model, rank=4, alpha=4.0, seed=0, compute=ms.float32, targets=TARGETS):
    lora.add_lora(model, lora.target_ranks(model, targets, rank), alpha / rank, 0.0, compute)
    cast_training_params([model])
    lora.init_lora(model, seed)
    return model


def train(model, seed=1):
    """Replaces training: sets A and B to random values."""
    rng = np.random.default_rng(seed)
    for parameter in lora.lora_parameters(model).values():
        parameter.set_data(ms.Tensor(0.2 * rng.standard_normal(parameter.shape), parameter.dtype))
    return model


def model_output(model, compute=ms.float32):
    """The prediction for a batch of two latents of 4 x 6."""
    rng = np.random.default_rng(5)

    def random_tensor(*shape):
        return ms.Tensor(rng.standard_normal(shape), ms.float32).to(compute)

    return model(
        hidden_states=random_tensor(2, 6, 64),
        encoder_hidden_states=random_tensor(2, 5, WIDTH),
        pooled_projections=random_tensor(2, WIDTH),
        timestep=ms.Tensor([0.3, 0.9], ms.float32),
        img_ids=ms.Tensor(latent_image_ids(4, 6)),
        txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)),
        guidance=ms.Tensor([3.5, 3.5], ms.float32),
        return_dict=False,
    )[0].to(ms.float32)


def forward(model, compute=ms.float32):
    return model_output(model, compute).asnumpy()


def merged(model, tensors, scale_of):
    """The base model with scale * B A added to every weight by NumPy."""
    cells = dict(model.cells_and_names())
    for layer in {name.rsplit(".lora_", 1)[0] for name in tensors}:
        a, b = (tensors[f"{layer}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        weight = cells[layer.removeprefix("transformer.")].weight
        weight.set_data(ms.Tensor(weight.asnumpy() + scale_of(layer) * (b @ a), ms.float32))
    return model


# ---- adding --------------------------------------------------------------------------------------


def test_only_the_adapter_trains(load):
    model = adapt(load(), rank=4)
    names = sorted(f"{layer}.lora_{x}.weight" for layer in LAYERS for x in "AB")
    assert sorted(lora.lora_parameters(model)) == names
    assert sorted(p.name.replace(".default.", ".") for p in model.trainable_params()) == names
    assert sum(p.size for p in model.trainable_params()) == len(LAYERS) * 4 * (WIDTH + WIDTH)


def test_targets_of_other_widths(load):
    """rank * (inputs + outputs) parameters each: ff is 32 -> 128 in both double blocks, x_embedder 64 -> 32."""
    model = adapt(load(), rank=3, targets=["ff.net.0.proj", "x_embedder"])
    assert {
        name: p.shape for name, p in lora.lora_parameters(model).items() if not name.startswith("transformer_blocks.1")
    } == {
        "transformer_blocks.0.ff.net.0.proj.lora_A.weight": (3, 32),
        "transformer_blocks.0.ff.net.0.proj.lora_B.weight": (128, 3),
        "x_embedder.lora_A.weight": (3, 64),
        "x_embedder.lora_B.weight": (32, 3),
    }
    assert sum(p.size for p in model.trainable_params()) == 3 * (2 * (32 + 128) + (64 + 32))


def test_an_adapter_in_a_text_encoder(load):
    model = adapt(load(name="text_encoder"), rank=2, targets=TEXT_ENCODER_TARGETS)
    assert sum(p.size for p in model.trainable_params()) == 2 * 4 * 2 * (WIDTH + WIDTH)


@pytest.mark.parametrize("precision, storage", [("fp16", ms.float16), ("bf16", ms.bfloat16)])
def test_the_adapter_of_a_half_precision_model_trains_in_float32(load, precision, storage):
    compute = resolve_precision(precision).compute
    model = load(precision)
    base = forward(model, compute)
    adapt(model, compute=compute)
    assert {p.dtype for p in model.trainable_params()} == {ms.float32}
    assert {p.dtype for p in model.get_parameters() if not p.requires_grad} == {storage}
    np.testing.assert_array_equal(forward(model, compute), base)
    trained = forward(train(model), compute)
    assert np.isfinite(trained).all() and np.abs(trained - base).max() > 1e-2


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("loaded", [False, True])
def test_low_rank_layers_compute_in_the_models_dtype(load, tmp_path, precision, loaded):
    """Their weights are float32."""
    model, compute = load(precision), resolve_precision(precision).compute
    if loaded:
        lora.load_lora(write_adapter(tmp_path / "f", {Q0: 4})[0], {"transformer": model}, compute)
    else:
        adapt(model, compute=compute)
    layer = dict(model.cells_and_names())[f"{Q0}.lora_A.default"]
    assert layer.weight.dtype == ms.float32 and layer(ms.Tensor(np.ones((2, WIDTH), np.float32))).dtype == compute


# ---- initialisation ------------------------------------------------------------------------------


def test_a_is_normal_with_deviation_1_over_rank_and_b_is_zero(load):
    """14 layers with 32 inputs at rank 8: 3584 values."""
    parameters = lora.lora_parameters(adapt(load(), rank=8))
    a = np.concatenate([p.asnumpy().ravel() for name, p in parameters.items() if ".lora_A." in name]) * 8
    np.testing.assert_allclose([a.mean(), a.std(), (a**4).mean()], [0, 1, 3], atol=0.25)
    np.testing.assert_allclose([a.mean(), a.std()], [0, 1], atol=0.05)
    assert all(not p.asnumpy().any() for name, p in parameters.items() if ".lora_B." in name)


def test_initial_values_depend_only_on_seed_and_name(load):
    """More targets in another order do not change them."""
    model = adapt(load(), seed=3)
    values = {name: p.asnumpy().copy() for name, p in lora.lora_parameters(model).items()}
    other_model = adapt(load(), seed=3, targets=["proj_out", *TARGETS[::-1]])
    again = {name: p.asnumpy() for name, p in lora.lora_parameters(other_model).items()}
    for name, value in values.items():
        np.testing.assert_array_equal(again[name], value)
    lora.init_lora(model, seed=4)
    other_seed = {name: p.asnumpy() for name, p in lora.lora_parameters(model).items()}
    assert all((other_seed[name] != values[name]).all() for name in values if ".lora_A." in name)
    assert len({value.tobytes() for name, value in values.items() if ".lora_A." in name}) == len(LAYERS)


def test_a_new_adapter_has_no_effect(load, base_output):
    """B = 0: the output is equal bit for bit."""
    np.testing.assert_array_equal(forward(adapt(load())), base_output)


def test_the_adapter_adds_alpha_over_rank_times_b_a(load, base_output):
    model = train(adapt(load(), rank=4, alpha=10.0))
    tensors = {name: p.asnumpy() for name, p in lora.lora_parameters(model).items()}
    expected = forward(merged(load(), tensors, lambda layer: 10.0 / 4))
    np.testing.assert_allclose(forward(model), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - base_output).max() > 0.1


def test_disabling_and_enabling(load, base_output):
    model = train(adapt(load()))
    trained = forward(model)
    lora.enable_lora(model, False)
    np.testing.assert_array_equal(forward(model), base_output)
    lora.enable_lora(model, True)
    np.testing.assert_array_equal(forward(model), trained)
    assert np.abs(trained - base_output).max() > 0.1


# ---- saving and loading --------------------------------------------------------------------------


def save(path, model, dtype=ms.float32):
    lora.save_lora(path, {"transformer": model}, dtype)
    return path


@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (4, 10.0), (8, 1.0)])
def test_a_saved_adapter_loads_as_trained(load, tmp_path, rank, alpha):
    """Also for tools that ignore the header: they add B A as it is stored."""
    model = train(adapt(load(), rank, alpha))
    path, trained = save(tmp_path / "lora.safetensors", model), forward(model)
    loaded = load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32)
    np.testing.assert_allclose(forward(loaded), trained, rtol=1e-5, atol=1e-5)
    assert loaded.trainable_params() == []
    expected = forward(merged(load(), load_file(path), lambda layer: 1.0))
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_weakens_the_adapter(load, base_output, tmp_path, scale):
    path, loaded = save(tmp_path / "lora.safetensors", train(adapt(load(), 4, 10.0))), load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32, scale=scale)
    expected = forward(merged(load(), load_file(path), lambda layer: scale)) if scale else base_output
    np.testing.assert_allclose(forward(loaded), expected, rtol=1e-4, atol=1e-4)


# A Control-LoRA of each origin: the norms and biases of these layers by the names in its file, and then in the model.
NORM, ADDED = "transformer_blocks.1.attn.norm_added_k.weight", "single_transformer_blocks.0.attn.norm_q.weight"
CONTROL_NAMES = {
    "ours": {f"transformer.{NORM}": NORM, f"transformer.{ADDED}": ADDED},
    "diffusers' script": {f"transformer.transformer.{NORM}": NORM, f"transformer.transformer.{ADDED}": ADDED},
    "native": {
        "double_blocks.1.txt_attn.norm.key_norm.scale": NORM,
        "single_blocks.0.norm.query_norm.scale": ADDED,
    },
}


@pytest.mark.parametrize("origin, scale", zip(CONTROL_NAMES, (1.0, 0.25, 0.25)))
def test_norms_and_biases_of_a_file(load, base_output, tmp_path, origin, scale):
    """Norms move towards those of the file, and biases of B are added to those of the layers. Both can be disabled."""
    rng, expected = np.random.default_rng(4), load()
    extra = {
        f"transformer.{layer}.lora_B.bias": rng.standard_normal(WIDTH).astype(np.float32) for layer in (Q0, SINGLE)
    }
    for name, value in extra.items():
        layer = dict(expected.cells_and_names())[name[len("transformer.") : -len(".lora_B.bias")]]
        layer.bias.set_data(ms.Tensor(layer.bias.asnumpy() + scale * 1.5 * value))
    for entry, name in CONTROL_NAMES[origin].items():
        norm = dict(expected.parameters_and_names())[name]
        extra[entry] = rng.uniform(0.5, 2.0, norm.shape).astype(np.float32)
        norm.set_data(ms.Tensor((1 - scale) * norm.asnumpy() + scale * extra[entry]))
    extra.update({f"transformer.{layer}.alpha": np.array(6.0, np.float32) for layer in (Q0, SINGLE)})
    path, tensors = write_adapter(tmp_path / "f", {Q0: 4, SINGLE: 4}, extra=extra)
    loaded = load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32, scale=scale)
    found = forward(loaded)
    np.testing.assert_allclose(
        found, forward(merged(expected, tensors, lambda layer: 1.5 * scale)), rtol=1e-4, atol=1e-4
    )
    assert np.abs(found - base_output).max() > 0.1 * scale
    lora.enable_lora(loaded, False)
    np.testing.assert_array_equal(forward(loaded), base_output)
    lora.enable_lora(loaded, True)
    np.testing.assert_array_equal(forward(loaded), found)


@pytest.mark.parametrize("name, size", [(NORM.replace("1", "7"), 16), (NORM, 8)])
def test_norms_that_the_model_does_not_have(load, tmp_path, name, size):
    path, _ = write_adapter(tmp_path / "f", {Q0: 4}, extra={f"transformer.{name}": np.ones(size, np.float32)})
    with pytest.raises(UserError, match=f"made for another model; this transformer has no {name} .{size},."):
        lora.load_lora(path, {"transformer": load()}, ms.float32)


def test_layers_with_different_ranks_and_scales(load, tmp_path):
    """The file of another tool, with alpha entries."""
    extra = {f"transformer.{layer}.alpha": np.array(4.0, np.float32) for layer in (Q0, Q1, SINGLE)}
    path, tensors = write_adapter(tmp_path / "f", {Q0: 2, Q1: 4, SINGLE: 8}, extra=extra)
    scales = {f"transformer.{Q0}": 2.0, f"transformer.{Q1}": 1.0, f"transformer.{SINGLE}": 0.5}
    loaded = load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32)
    expected = forward(merged(load(), tensors, scales.get))
    np.testing.assert_allclose(forward(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_the_layer_with_swapped_halves_in_other_layouts(load, tmp_path, layout):
    rng, path = np.random.default_rng(2), tmp_path / "f"
    tensors = {
        "transformer.norm_out.linear.lora_A.weight": rng.standard_normal((3, WIDTH)).astype(np.float32),
        "transformer.norm_out.linear.lora_B.weight": rng.standard_normal((2 * WIDTH, 3)).astype(np.float32),
    }
    lora_files.write_lora(path, tensors, {"transformer.norm_out.linear": 1.0}, layout)
    loaded = load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32)
    expected = forward(merged(load(), tensors, lambda layer: 1 / 3))
    np.testing.assert_allclose(forward(loaded), expected, rtol=1e-4, atol=1e-4)


def test_names_and_header_are_those_of_diffusers(load, tmp_path):
    path = save(tmp_path / "lora.safetensors", adapt(load(), rank=4, alpha=10.0))
    assert sorted(load_file(path)) == sorted(f"transformer.{layer}.lora_{x}.weight" for layer in LAYERS for x in "AB")
    found = header(path)
    config = json.loads(found["lora_adapter_metadata"])
    assert found["format"] == "pt" and float(found["trained_lora_alpha"]) == 10.0
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 4)
    assert config["transformer.target_modules"] == LAYERS


def test_two_models_share_a_file(load, tmp_path):
    models = {
        "transformer": train(adapt(load(), alpha=6.0)),
        "text_encoder": train(adapt(load(name="text_encoder"), alpha=6.0, targets=TEXT_ENCODER_TARGETS), seed=2),
    }
    path = tmp_path / "lora.safetensors"
    lora.save_lora(path, models, ms.float32)
    config = json.loads(header(path)["lora_adapter_metadata"])
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight" in load_file(path)
    assert config["text_encoder.target_modules"][0] == "text_model.encoder.layers.0.self_attn.k_proj"
    ids = ms.Tensor(np.arange(77)[None], ms.int32)
    loaded = {"transformer": load(), "text_encoder": load(name="text_encoder")}
    base = loaded["text_encoder"](ids)[1].asnumpy()
    lora.load_lora(path, loaded, ms.float32)
    np.testing.assert_allclose(forward(loaded["transformer"]), forward(models["transformer"]), rtol=1e-5, atol=1e-5)
    found, expected = (encoders["text_encoder"](ids)[1].asnumpy() for encoders in (loaded, models))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - base).max() > 1e-2


def test_a_file_for_the_transformer_does_not_adapt_the_text_encoder(load, tmp_path):
    path, encoder = write_adapter(tmp_path / "f", {Q0: 4})[0], load(name="text_encoder")
    lora.load_lora(path, {"transformer": load(), "text_encoder": encoder}, ms.float32)
    assert lora.lora_parameters(encoder) == {}


@pytest.mark.parametrize(
    "dtype, numpy_type", [(ms.float32, np.float32), (ms.float16, np.float16), (ms.bfloat16, ml_dtypes.bfloat16)]
)
def test_the_dtype_of_the_file(load, tmp_path, dtype, numpy_type):
    """alpha / rank is multiplied in float32 before rounding. Equal adapters give equal bytes."""
    model = train(adapt(load(), 4, 10.0))
    path = save(tmp_path / "lora.safetensors", model, dtype)
    tensors = load_file(path)
    assert {value.dtype for value in tensors.values()} == {np.dtype(numpy_type)}
    for name, parameter in lora.lora_parameters(model).items():
        value = parameter.asnumpy() * np.float32(2.5 if ".lora_B." in name else 1.0)
        np.testing.assert_array_equal(
            tensors[f"transformer.{name}"].astype(np.float32), value.astype(numpy_type).astype(np.float32)
        )
    for number in range(3):  # the order of the library's own metadata would differ
        assert save(tmp_path / f"{number}.safetensors", model, dtype).read_bytes() == path.read_bytes()
    loaded = load()
    lora.load_lora(path, {"transformer": loaded}, ms.float32)
    assert {p.dtype for p in lora.lora_parameters(loaded).values()} == {ms.float32}


def test_an_adapter_loads_into_a_half_precision_model(load, tmp_path):
    """The output is close to the float32 model's, within the few percent of half precision."""
    path = save(tmp_path / "lora.safetensors", train(adapt(load())))
    outputs = {}
    for precision in ("no", "fp16", "bf16"):
        loaded, compute = load(precision), resolve_precision(precision).compute
        lora.load_lora(path, {"transformer": loaded}, compute)
        outputs[precision] = forward(loaded, compute)
    expected = outputs.pop("no")
    for precision, output in outputs.items():
        assert 0 < np.abs(output - expected).max() / np.abs(expected).max() < 0.03, precision


def test_the_last_layer_does_not_match_single_blocks(load, tmp_path):
    """proj_out is also the end of single_transformer_blocks.1.proj_out, which peft would match, also in patterns."""
    path, tensors = tmp_path / "f", write_adapter(tmp_path / "g", {Q0: 3})[1]
    for layer, rank, inputs, outputs in (
        ("proj_out", 2, WIDTH, 64),
        ("single_transformer_blocks.1.proj_out", 3, 5 * WIDTH, WIDTH),
    ):
        tensors[f"transformer.{layer}.lora_A.weight"] = np.full((rank, inputs), 0.1, np.float32)
        tensors[f"transformer.{layer}.lora_B.weight"] = np.full((outputs, rank), 0.1, np.float32)
    lora_files.write_lora(path, tensors, {}, "comfyui")
    model = load()
    lora.load_lora(path, {"transformer": model}, ms.float32)
    ranks = {"proj_out": 2, "single_transformer_blocks.1.proj_out": 3, Q0: 3}
    assert {name: p.shape[0] for name, p in lora.lora_parameters(model).items() if ".lora_A." in name} == {
        f"{layer}.lora_A.weight": rank for layer, rank in ranks.items()
    }
    config = json.loads(header(save(tmp_path / "h", model))["lora_adapter_metadata"])
    assert config["transformer.r"] == 2
    assert config["transformer.rank_pattern"] == {layer: 3 for layer in ranks if layer != "proj_out"}


def test_files_for_another_model_are_rejected(load, tmp_path):
    """test_lora_files has the other reasons. `flag` is in the message."""
    path, _ = write_adapter(tmp_path / "f", {Q0: 4, "transformer_blocks.7.attn.to_q": 4})
    with pytest.raises(UserError, match=r"--adapter .*made for another model; .* no layer transformer_blocks.7.attn"):
        lora.load_lora(path, {"transformer": load()}, ms.float32, flag="--adapter")


# ---- targets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names(tiny_flux):
    return list(linear_layers(tiny_flux, "transformer"))


def test_the_names_in_configs_are_those_of_the_loaded_model(names, load):
    assert sorted(names) == sorted(lora.linear_names(load()))


@pytest.mark.parametrize(
    "target",
    [*TARGETS, "add_q_proj", "ff.net.0.proj", "x_embedder", "transformer_blocks.1.attn.to_q", lora_settings.ALL_LINEAR],
)
def test_names_of_linear_layers_are_targets(names, target):
    lora_settings.check_targets(names, [target], "--lora_layers")


@pytest.mark.parametrize(
    "target, similar", [("to_qq", "to_q"), ("q_proj", "add_q_proj"), ("proj_mpl", "proj_mlp"), ("to_out", "to_out.0")]
)
def test_a_wrong_target_is_rejected_with_similar_names(names, target, similar):
    with pytest.raises(UserError) as error:
        lora_settings.check_targets(names, ["to_k", target], "--lora_layers")
    head, found = str(error.value).split(" Similar names: ")
    assert head == f"--lora_layers {target}: no linear layer has that name."
    assert similar in found.rstrip(".").split(", ")


@pytest.mark.parametrize("target", ["norm_q", "attn", "o_q", "zzz", ""])
def test_other_names_are_no_targets(names, target):
    """A norm, a block, part of a name, a name without similar ones, an empty name."""
    with pytest.raises(UserError, match=r"no linear layer has that name. Similar names: .*[a-z]"):
        lora_settings.check_targets(names, [target], "--lora_layers")


# ---- training on from a file ---------------------------------------------------------------------

MIXED_RANKS = {Q0: 4, Q1: 2, SINGLE: 4, "single_transformer_blocks.1.attn.to_v": 8}


def add_from_file(model, path, alpha, compute=ms.float32):
    adapter = lora_files.read_adapters(path, "--lora")["transformer"]
    lora.add_trained_lora(model, adapter, alpha, 0.0, compute)
    return model


@pytest.mark.parametrize("file_alpha", [None, 6.0])
def test_training_starts_from_the_file_for_every_alpha(load, tmp_path, file_alpha):
    """The layers have the file's ranks. The scale is alpha / 4, the most common rank, and B is divided by it.

    Saved again, the adapter changes the weights equally.
    """
    entries = {f"transformer.{layer}.alpha": np.array(file_alpha, np.float32) for layer in MIXED_RANKS}
    path, tensors = write_adapter(tmp_path / "f", MIXED_RANKS, extra=entries if file_alpha else None)
    scales = {layer: file_alpha / rank if file_alpha else 1.0 for layer, rank in MIXED_RANKS.items()}
    expected = forward(merged(load(), tensors, lambda layer: scales[layer.removeprefix("transformer.")]))
    changes = weight_changes(path)
    for alpha in (None, 4.0, 1.0, 12.0):
        model = add_from_file(load(), path, alpha)
        np.testing.assert_allclose(forward(model), expected, rtol=1e-4, atol=1e-4)
        scale = 1.0 if alpha is None else alpha / 4
        parameters = lora.lora_parameters(model)
        for layer in MIXED_RANKS:
            a, b = (parameters[f"{layer}.lora_{half}.weight"].asnumpy() for half in "AB")
            np.testing.assert_array_equal(a, tensors[f"transformer.{layer}.lora_A.weight"])
            expected_b = scales[layer] / scale * tensors[f"transformer.{layer}.lora_B.weight"]
            np.testing.assert_allclose(b, expected_b, rtol=1e-6)
        saved = weight_changes(save(tmp_path / "saved", model))
        for layer, change in changes.items():
            np.testing.assert_allclose(saved[layer], change, rtol=1e-6, atol=1e-7)


def test_the_header_has_different_ranks(load, tmp_path):
    path = save(tmp_path / "saved", add_from_file(load(), write_adapter(tmp_path / "f", MIXED_RANKS)[0], 8.0))
    config = json.loads(header(path)["lora_adapter_metadata"])
    others = {Q1: 2, "single_transformer_blocks.1.attn.to_v": 8}
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 4)
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == others
    assert config["transformer.target_modules"] == sorted(MIXED_RANKS)
    assert header(path)["trained_lora_alpha"] == "8.0"


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_an_adapter_from_a_file_trains_in_float32(load, tmp_path, precision):
    compute = resolve_precision(precision).compute
    model = add_from_file(load(precision), write_adapter(tmp_path / "f", MIXED_RANKS)[0], None, compute)
    trainable = model.trainable_params()
    assert {p.name for p in trainable} == {p.name for p in lora.lora_parameters(model).values()}
    assert {p.dtype for p in trainable} == {ms.float32} and len(trainable) == 2 * len(MIXED_RANKS)
    _, gradients = ms.value_and_grad(lambda: (model_output(model, compute) ** 2).mean(), None, trainable)()
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)
