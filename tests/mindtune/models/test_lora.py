"""Low-rank layers on the real transformer: where they go, how they start, and what travels in the file."""

import json

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.flow import latent_image_ids
from mindtune.models import lora, lora_files, lora_layouts, lora_names
from mindtune.models.loading import load_model, narrow_transformer
from mindtune.models.precision import cast_training_params, freeze_params, resolve_precision

ms.runtime.launch_blocking()  # as the scripts do on a CPU; see test_optim.py

TARGETS = lora.TRANSFORMER_TARGETS
# The tiny transformer: 2 double blocks of width 32 whose image half has to_out.0, 2 single blocks that have none.
MODULES = sorted(
    [f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in TARGETS]
    + [f"single_transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in TARGETS[:3]]
)
WIDTH = 32


@pytest.fixture(autouse=True)
def pynative():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def load(tiny_flux):
    """load(precision): the transformer, frozen."""

    def make(precision="no", name="transformer"):
        model = load_model(tiny_flux, name, resolve_precision(precision))
        freeze_params(model)
        return model

    return make


def adapt(model, rank=4, alpha=4.0, seed=0, compute=ms.float32, targets=TARGETS):
    lora.add_lora(model, rank, alpha, 0.0, targets, compute)
    cast_training_params([model])
    lora.init_lora(model, rank, seed)
    return model


def train(model, seed=1):
    """Stands in for training: B gets numbers, A other ones."""
    rng = np.random.default_rng(seed)
    for parameter in lora.lora_parameters(model).values():
        parameter.set_data(ms.Tensor(0.2 * rng.standard_normal(parameter.shape), parameter.dtype))
    return model


def model_output(model, compute=ms.float32):
    """The prediction for a batch of two latents of 4 x 6."""
    rng = np.random.default_rng(5)

    def numbers(*shape):
        return ms.Tensor(rng.standard_normal(shape), ms.float32).to(compute)

    return model(
        hidden_states=numbers(2, 6, 64),
        encoder_hidden_states=numbers(2, 5, WIDTH),
        pooled_projections=numbers(2, WIDTH),
        timestep=ms.Tensor([0.3, 0.9], ms.float32),
        img_ids=ms.Tensor(latent_image_ids(4, 6)),
        txt_ids=ms.Tensor(np.zeros((5, 3), np.float32)),
        guidance=ms.Tensor([3.5, 3.5], ms.float32),
        return_dict=False,
    )[0].to(ms.float32)


def forward(model, compute=ms.float32):
    return model_output(model, compute).asnumpy()


def header(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def folded(model, tensors, scale_of):
    """The base with scale * B A added to each weight, by NumPy: what an adapter means."""
    cells = dict(model.cells_and_names())
    for module in {name.rsplit(".lora_", 1)[0] for name in tensors}:
        a, b = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        weight = cells[module.removeprefix("transformer.")].weight
        weight.set_data(ms.Tensor(weight.asnumpy() + scale_of(module) * (b @ a), ms.float32))
    return model


# ---- adding --------------------------------------------------------------------------------------


def test_what_trains_is_the_adapter_and_nothing_else(load):
    model = adapt(load(), rank=4)
    names = sorted(f"{module}.lora_{x}.weight" for module in MODULES for x in "AB")
    assert sorted(lora.lora_parameters(model)) == names
    assert sorted(p.name.replace(".default.", ".") for p in model.trainable_params()) == names
    assert sum(p.size for p in model.trainable_params()) == len(MODULES) * 4 * (WIDTH + WIDTH)


def test_other_targets_take_their_own_widths(load):
    """Rank times (inputs + outputs) for each: the feed-forward is 32 -> 128 in both double blocks, x_embedder 64 -> 32."""
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


def test_a_text_encoder_takes_one_too(load):
    model = adapt(load(name="text_encoder"), rank=2, targets=lora.TEXT_ENCODER_TARGETS)
    assert sum(p.size for p in model.trainable_params()) == 2 * 4 * 2 * (WIDTH + WIDTH)


@pytest.mark.parametrize("precision, half", [("fp16", ms.float16), ("bf16", ms.bfloat16)])
def test_the_adapter_of_a_half_precision_model_trains_in_float32(load, precision, half):
    compute = resolve_precision(precision).compute
    model = adapt(load(precision), compute=compute)
    assert {p.dtype for p in model.trainable_params()} == {ms.float32}
    assert {p.dtype for p in model.get_parameters() if not p.requires_grad} == {half}
    base = forward(load(precision), compute)
    np.testing.assert_array_equal(forward(model, compute), base)
    trained = forward(train(model), compute)
    assert np.isfinite(trained).all() and np.abs(trained - base).max() > 1e-2


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("loaded", [False, True])
def test_low_rank_products_are_of_the_models_type(load, tmp_path, precision, loaded):
    """Though their weights are float32."""
    model, compute = load(precision), resolve_precision(precision).compute
    if loaded:
        lora.load_lora(foreign(tmp_path / "f", {Q0: 4})[0], {"transformer": model}, compute)
    else:
        adapt(model, compute=compute)
    layer = dict(model.cells_and_names())[f"{Q0}.lora_A.default"]
    assert layer.weight.dtype == ms.float32 and layer(ms.Tensor(np.ones((2, WIDTH), np.float32))).dtype == compute


# ---- the start -----------------------------------------------------------------------------------


def test_a_is_normal_with_deviation_1_over_rank_and_b_is_zero(load):
    """14 modules of 32 columns: 3584 numbers at rank 8."""
    parameters = lora.lora_parameters(adapt(load(), rank=8))
    a = np.concatenate([p.asnumpy().ravel() for name, p in parameters.items() if ".lora_A." in name]) * 8
    np.testing.assert_allclose([a.mean(), a.std(), (a**4).mean()], [0, 1, 3], atol=0.25)
    np.testing.assert_allclose([a.mean(), a.std()], [0, 1], atol=0.05)
    assert all(not p.asnumpy().any() for name, p in parameters.items() if ".lora_B." in name)


def test_the_start_depends_on_the_seed_and_the_name_alone(load):
    """The same with more targets, in another order, on a model that was adapted before."""
    model = adapt(load(), seed=3)
    values = {name: p.asnumpy().copy() for name, p in lora.lora_parameters(model).items()}
    again = {
        name: p.asnumpy()
        for name, p in lora.lora_parameters(adapt(load(), seed=3, targets=["proj_out", *TARGETS[::-1]])).items()
    }
    for name, value in values.items():
        np.testing.assert_array_equal(again[name], value)
    lora.init_lora(model, 4, seed=4)
    other = {name: p.asnumpy() for name, p in lora.lora_parameters(model).items()}
    assert all((other[name] != values[name]).all() for name in values if ".lora_A." in name)


def test_no_two_layers_start_alike(load):
    a = [p.asnumpy().tobytes() for name, p in lora.lora_parameters(adapt(load())).items() if ".lora_A." in name]
    assert len(set(a)) == len(MODULES)


def test_a_fresh_adapter_changes_nothing(load):
    """B = 0: bit for bit the base model."""
    base = forward(load())
    np.testing.assert_array_equal(forward(adapt(load())), base)


def test_the_adapter_adds_alpha_over_rank_times_b_a(load):
    """Against the base with that product added to its weights by NumPy."""
    model = train(adapt(load(), rank=4, alpha=10.0))
    tensors = {name: p.asnumpy() for name, p in lora.lora_parameters(model).items()}
    expected = forward(folded(load(), tensors, lambda module: 10.0 / 4))
    np.testing.assert_allclose(forward(model), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - forward(load())).max() > 0.1


def test_switched_off_it_is_the_base_and_on_again_the_adapter(load):
    base, model = forward(load()), train(adapt(load()))
    trained = forward(model)
    lora.enable_lora(model, False)
    np.testing.assert_array_equal(forward(model), base)
    lora.enable_lora(model, True)
    np.testing.assert_array_equal(forward(model), trained)
    assert np.abs(trained - base).max() > 0.1


# ---- the file ------------------------------------------------------------------------------------


def save(path, model, dtype=ms.float32):
    lora.save_lora(path, {"transformer": model}, dtype)
    return path


@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (4, 10.0), (8, 1.0)])
def test_a_saved_adapter_loads_as_it_was_trained(load, tmp_path, rank, alpha):
    model = train(adapt(load(), rank, alpha))
    path = save(tmp_path / "lora.safetensors", model)
    fresh = load()
    lora.load_lora(path, {"transformer": fresh}, ms.float32)
    np.testing.assert_allclose(forward(fresh), forward(model), rtol=1e-5, atol=1e-5)
    assert fresh.trainable_params() == []


@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (4, 10.0)])
def test_tools_that_ignore_the_header_get_the_same_adapter(load, tmp_path, rank, alpha):
    """They add B A as it stands in the file; the file holds nothing but A and B."""
    model = train(adapt(load(), rank, alpha))
    tensors = load_file(save(tmp_path / "lora.safetensors", model))
    expected = forward(folded(load(), tensors, lambda module: 1.0))
    np.testing.assert_allclose(forward(model), expected, rtol=1e-4, atol=1e-4)


def test_names_and_header_are_those_of_diffusers(load, tmp_path):
    path = save(tmp_path / "lora.safetensors", adapt(load(), rank=4, alpha=10.0))
    assert sorted(load_file(path)) == sorted(
        f"transformer.{module}.lora_{x}.weight" for module in MODULES for x in "AB"
    )
    found = header(path)
    settings = json.loads(found["lora_adapter_metadata"])
    assert found["format"] == "pt" and float(found["trained_lora_alpha"]) == 10.0
    assert (settings["transformer.r"], settings["transformer.lora_alpha"], settings["transformer.target_modules"]) == (
        4,
        4,
        MODULES,
    )


def test_two_models_share_a_file(load, tmp_path):
    models = {
        "transformer": train(adapt(load(), alpha=6.0)),
        "text_encoder": train(adapt(load(name="text_encoder"), alpha=6.0, targets=lora.TEXT_ENCODER_TARGETS), seed=2),
    }
    lora.save_lora(tmp_path / "lora.safetensors", models, ms.float32)
    tensors, settings = (
        load_file(tmp_path / "lora.safetensors"),
        json.loads(header(tmp_path / "lora.safetensors")["lora_adapter_metadata"]),
    )
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight" in tensors
    assert settings["text_encoder.target_modules"][0] == "text_model.encoder.layers.0.self_attn.k_proj"
    fresh = {"transformer": load(), "text_encoder": load(name="text_encoder")}
    lora.load_lora(tmp_path / "lora.safetensors", fresh, ms.float32)
    np.testing.assert_allclose(forward(fresh["transformer"]), forward(models["transformer"]), rtol=1e-5, atol=1e-5)
    ids = ms.Tensor(np.arange(77)[None], ms.int32)
    pooled = [
        model(ids)[1].asnumpy() for model in (fresh["text_encoder"], models["text_encoder"], load(name="text_encoder"))
    ]
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=1e-5, atol=1e-5)
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-2


def test_a_file_for_the_transformer_alone_leaves_the_text_encoder_alone(load, tmp_path):
    path, encoder = save(tmp_path / "lora.safetensors", train(adapt(load()))), load(name="text_encoder")
    lora.load_lora(path, {"transformer": load(), "text_encoder": encoder}, ms.float32)
    assert lora.lora_parameters(encoder) == {}


@pytest.mark.parametrize(
    "dtype, numpy_type", [(ms.float32, np.float32), (ms.float16, np.float16), (ms.bfloat16, ml_dtypes.bfloat16)]
)
def test_the_file_is_in_the_type_asked_for(load, tmp_path, dtype, numpy_type):
    """alpha / rank is multiplied in float32, before the rounding."""
    model = train(adapt(load(), 4, 10.0))
    tensors = load_file(save(tmp_path / "lora.safetensors", model, dtype))
    assert {value.dtype for value in tensors.values()} == {np.dtype(numpy_type)}
    for name, parameter in lora.lora_parameters(model).items():
        value = parameter.asnumpy() * np.float32(2.5 if ".lora_B." in name else 1.0)
        np.testing.assert_array_equal(
            tensors[f"transformer.{name}"].astype(np.float32), value.astype(numpy_type).astype(np.float32)
        )
    fresh = load()
    lora.load_lora(tmp_path / "lora.safetensors", {"transformer": fresh}, ms.float32)
    assert {p.dtype for p in lora.lora_parameters(fresh).values()} == {ms.float32}


def test_equal_adapters_leave_equal_bytes(load, tmp_path):
    contents = {save(tmp_path / f"{n}.safetensors", train(adapt(load()))).read_bytes() for n in range(3)}
    assert len(contents) == 1


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_weakens_the_adapter(load, tmp_path, scale):
    model = train(adapt(load(), 4, 10.0))
    path, fresh = save(tmp_path / "lora.safetensors", model), load()
    lora.load_lora(path, {"transformer": fresh}, ms.float32, scale=scale)
    expected = forward(folded(load(), load_file(path), lambda module: scale))
    np.testing.assert_allclose(forward(fresh), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_adapter_loads_into_a_half_precision_model(load, tmp_path, precision):
    """Near to what the float32 model gives: within the few percent that half precision leaves."""
    path = save(tmp_path / "lora.safetensors", train(adapt(load())))
    outputs = {}
    for kind in ("no", precision):
        fresh, compute = load(kind), resolve_precision(kind).compute
        lora.load_lora(path, {"transformer": fresh}, compute)
        outputs[kind] = forward(fresh, compute)
    error = np.abs(outputs[precision] - outputs["no"]).max() / np.abs(outputs["no"]).max()
    assert 0 < error < 0.03


# ---- files of others -----------------------------------------------------------------------------


def foreign(path, ranks, metadata=None, extra=None):
    """A file of another tool: module -> rank."""
    rng, tensors = np.random.default_rng(0), {}
    for module, rank in ranks.items():
        tensors[f"transformer.{module}.lora_A.weight"] = rng.standard_normal((rank, WIDTH)).astype(np.float32) * 0.2
        tensors[f"transformer.{module}.lora_B.weight"] = rng.standard_normal((WIDTH, rank)).astype(np.float32) * 0.2
    save_file({**tensors, **(extra or {})}, path, metadata=metadata)
    return path, tensors


Q0, Q1, SINGLE = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_q",
    "single_transformer_blocks.0.attn.to_q",
)


def check_scales(load, path, tensors, scales):
    fresh = load()
    lora.load_lora(path, {"transformer": fresh}, ms.float32)
    expected = forward(folded(load(), tensors, lambda module: scales[module.removeprefix("transformer.")]))
    np.testing.assert_allclose(forward(fresh), expected, rtol=1e-4, atol=1e-4)


def test_a_file_without_any_alpha_runs_at_one(load, tmp_path):
    check_scales(load, *foreign(tmp_path / "f", {Q0: 4, SINGLE: 4}), {Q0: 1.0, SINGLE: 1.0})


def test_alpha_entries_give_each_module_its_scale(load, tmp_path):
    """alpha / rank; a module without an entry runs at 1."""
    extra = {
        f"transformer.{Q0}.alpha": np.array(1.0, np.float32),
        f"transformer.{SINGLE}.alpha": np.array([6.0], np.float32),
    }
    check_scales(
        load, *foreign(tmp_path / "f", {Q0: 4, Q1: 4, SINGLE: 4}, extra=extra), {Q0: 0.25, Q1: 1.0, SINGLE: 1.5}
    )


def test_different_ranks_without_alpha_all_run_at_one(load, tmp_path):
    check_scales(load, *foreign(tmp_path / "f", {Q0: 2, Q1: 4, SINGLE: 8}), {Q0: 1.0, Q1: 1.0, SINGLE: 1.0})


def test_different_ranks_with_alpha_entries(load, tmp_path):
    extra = {f"transformer.{name}.alpha": np.array(4.0, np.float32) for name in (Q0, Q1, SINGLE)}
    check_scales(
        load, *foreign(tmp_path / "f", {Q0: 2, Q1: 4, SINGLE: 8}, extra=extra), {Q0: 2.0, Q1: 1.0, SINGLE: 0.5}
    )


def test_the_headers_alpha_counts(load, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    check_scales(load, *foreign(tmp_path / "f", {Q0: 4, SINGLE: 8}, metadata), {Q0: 0.5, SINGLE: 0.25})


@pytest.mark.parametrize("key", [SINGLE, "attn.to_q", f"^{SINGLE}"])
def test_the_headers_alpha_of_a_module_counts_more(load, tmp_path, key):
    """peft's alpha_pattern, by whole names, by their ends or as an expression."""
    settings = {
        "transformer.r": 4,
        "transformer.lora_alpha": 2,
        "transformer.rank_pattern": {SINGLE: 8},
        "transformer.alpha_pattern": {key: 12},
    }
    path, tensors = foreign(tmp_path / "f", {Q0: 4, SINGLE: 8}, {"lora_adapter_metadata": json.dumps(settings)})
    check_scales(load, path, tensors, {Q0: 3.0 if key == "attn.to_q" else 0.5, SINGLE: 1.5})


def test_the_headers_rslora_divides_alpha_by_the_root_of_the_rank(load, tmp_path):
    settings = {"transformer.r": 4, "transformer.lora_alpha": 3, "transformer.use_rslora": True}
    path, tensors = foreign(tmp_path / "f", {Q0: 4, SINGLE: 16}, {"lora_adapter_metadata": json.dumps(settings)})
    check_scales(load, path, tensors, {Q0: 3 / 2, SINGLE: 3 / 4})


def test_pefts_directory_has_alpha_in_its_own_file(load, tmp_path):
    """peft's save_pretrained: adapter_model.safetensors, and what it was trained with in adapter_config.json."""
    path, tensors = foreign(tmp_path / "adapter_model.safetensors", {Q0: 4, SINGLE: 8})
    save_file({name.replace("transformer.", "base_model.model.", 1): value for name, value in tensors.items()}, path)
    check_scales(load, path, tensors, {Q0: 1.0, SINGLE: 1.0})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "alpha_pattern": {SINGLE: 12}}))
    assert lora_files.find_lora(str(tmp_path), "--lora") == path
    check_scales(load, path, tensors, {Q0: 0.5, SINGLE: 1.5})


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"lora_alpha": "x"}', '{"lora_alpha": NaN}', '{"alpha_pattern": {"[": 1}}', "[" * 100_000]
)
def test_settings_that_cannot_be_used_are_said(tmp_path, text):
    path, tensors = foreign(tmp_path / "adapter_model.safetensors", {Q0: 4})
    save_file({name.replace("transformer.", "base_model.model.", 1): value for name, value in tensors.items()}, path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"--lora .*adapter_model.safetensors: its LoRA config cannot be"):
        lora_files.read_lora(path, "--lora")


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_the_layouts_of_other_tools_load_as_ours(load, tmp_path, layout):
    """Different ranks and alphas, q alone in one block, and the layer whose halves are exchanged."""
    path, tensors = foreign(tmp_path / "f", {Q0: 2, SINGLE: 8, "single_transformer_blocks.0.attn.to_k": 4})
    rng = np.random.default_rng(2)
    tensors["transformer.norm_out.linear.lora_A.weight"] = rng.standard_normal((3, WIDTH)).astype(np.float32)
    tensors["transformer.norm_out.linear.lora_B.weight"] = rng.standard_normal((2 * WIDTH, 3)).astype(np.float32)
    alphas = {f"transformer.{Q0}": 6.0, "transformer.norm_out.linear": 1.0}
    assert lora_files.write_lora(path, tensors, alphas, layout) == lora_layouts.ranks(load_file(path))
    assert lora_names.layout_of(load_file(path)) == layout
    scales = {Q0: 3.0, SINGLE: 1.0, "single_transformer_blocks.0.attn.to_k": 1.0, "norm_out.linear": 1 / 3}
    check_scales(load, path, tensors, scales)


def test_the_last_layer_is_not_taken_for_the_single_blocks_of_the_same_name(load, tmp_path):
    """peft would match proj_out with the end of single_transformer_blocks.0.proj_out, in targets and in patterns."""
    path, tensors = tmp_path / "f", {}
    for name, rank, inputs, outputs in (
        ("proj_out", 2, WIDTH, 64),
        ("single_transformer_blocks.1.proj_out", 3, 5 * WIDTH, WIDTH),
    ):
        tensors[f"transformer.{name}.lora_A.weight"] = np.full((rank, inputs), 0.1, np.float32)
        tensors[f"transformer.{name}.lora_B.weight"] = np.full((outputs, rank), 0.1, np.float32)
    lora_files.write_lora(path, {**tensors, **foreign(tmp_path / "g", {Q0: 3})[1]}, {}, "comfyui")
    model = load()
    lora.load_lora(path, {"transformer": model}, ms.float32)
    ranks = {"proj_out": 2, "single_transformer_blocks.1.proj_out": 3, Q0: 3}
    assert {name: p.shape[0] for name, p in lora.lora_parameters(model).items() if ".lora_A." in name} == {
        f"{name}.lora_A.weight": rank for name, rank in ranks.items()
    }
    settings = json.loads(header(save(tmp_path / "h", model))["lora_adapter_metadata"])
    assert settings["transformer.r"] == 2 and settings["transformer.rank_pattern"] == {
        k: 3 for k in ranks if k != "proj_out"
    }


@pytest.mark.parametrize("content", [b"", b"no safetensors", (100).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_not_safetensors(load, tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=r"--lora .*f: cannot be read as safetensors"):
        lora.load_lora(tmp_path / "f", {"transformer": load()}, ms.float32)


def test_a_file_that_is_not_there(load, tmp_path):
    with pytest.raises(UserError, match=r"--adapter .*absent: cannot be read"):
        lora.load_lora(tmp_path / "absent", {"transformer": load()}, ms.float32, flag="--adapter")


def test_a_file_without_lora_weights(load, tiny_flux):
    """A model's own weights, say."""
    with pytest.raises(UserError, match="holds no lora_A/lora_B or lora_down/lora_up weights"):
        lora.load_lora(tiny_flux / "vae" / "diffusion_pytorch_model.safetensors", {"transformer": load()}, ms.float32)


def test_a_lora_with_layers_that_the_model_lacks(load, tmp_path):
    path, _ = foreign(tmp_path / "f", {Q0: 4, "transformer_blocks.7.attn.to_q": 4})
    with pytest.raises(
        UserError, match=r"made for another model; this transformer has no layer transformer_blocks.7.attn.to_q"
    ):
        lora.load_lora(path, {"transformer": load()}, ms.float32)


def test_a_lora_of_another_width(load, tmp_path):
    """The names are those of every FLUX; only the widths tell."""
    tensors = {
        f"transformer.{Q0}.lora_A.weight": np.zeros((4, 3072), np.float32),
        f"transformer.{Q0}.lora_B.weight": np.zeros((3072, 4), np.float32),
    }
    save_file(tensors, tmp_path / "f")
    with pytest.raises(UserError, match=f"made for another model; .*{Q0}"):
        lora.load_lora(tmp_path / "f", {"transformer": load()}, ms.float32)


def test_a_lora_that_lacks_a_half(load, tmp_path):
    _, tensors = foreign(tmp_path / "f", {Q0: 4, Q1: 4})
    del tensors[f"transformer.{Q1}.lora_B.weight"]
    save_file(tensors, tmp_path / "f")
    with pytest.raises(UserError, match=Q1):
        lora.load_lora(tmp_path / "f", {"transformer": load()}, ms.float32)


def test_a_lora_for_other_parts_is_not_silently_dropped(load, tmp_path):
    """One of Stable Diffusion names a unet."""
    save_file({f"unet.mid_block.to_q.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}, tmp_path / "f")
    with pytest.raises(UserError, match="unet"):
        lora.load_lora(tmp_path / "f", {"transformer": load()}, ms.float32)


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [*TARGETS, "add_q_proj", "ff.net.0.proj", "x_embedder", "transformer_blocks.1.attn.to_q"]
)
def test_names_of_linear_layers_are_targets(tiny_flux, target):
    lora.check_targets(narrow_transformer(tiny_flux), [target], "--lora_layers")


@pytest.mark.parametrize(
    "target, near", [("to_qq", "to_q"), ("q_proj", "add_q_proj"), ("proj_mpl", "proj_mlp"), ("to_out", "to_out.0")]
)
def test_a_wrong_target_is_answered_with_near_names(tiny_flux, target, near):
    with pytest.raises(UserError) as error:
        lora.check_targets(narrow_transformer(tiny_flux), ["to_k", target], "--lora_layers")
    head, names = str(error.value).split(" Similar names: ")
    assert head == f"--lora_layers {target}: no linear layer has that name." and near in names.rstrip(".").split(", ")


@pytest.mark.parametrize("target", ["norm_q", "attn", "o_q", "zzz", ""])
def test_what_is_no_linear_layer_is_no_target(tiny_flux, target):
    """A normalisation, a block, part of a name, nothing alike, nothing."""
    with pytest.raises(UserError, match=r"no linear layer has that name. Similar names: .*[a-z]"):
        lora.check_targets(narrow_transformer(tiny_flux), [target], "--lora_layers")


def test_a_part_for_a_model_that_is_not_there_is_not_silently_dropped(load, tmp_path):
    clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    extra = {f"{clip}.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}
    path, _ = foreign(tmp_path / "f", {Q0: 4}, extra=extra)
    with pytest.raises(UserError, match="it adapts text_encoder, not transformer"):
        lora.load_lora(path, {"transformer": load()}, ms.float32)


def test_other_kinds_of_adapters_are_refused(load, tmp_path):
    """DoRA scales the sum of weight and change: leaving its entries out would draw something else."""
    path, _ = foreign(
        tmp_path / "f", {Q0: 4}, extra={f"transformer.{Q0}.lora_magnitude_vector": np.ones(WIDTH, np.float32)}
    )
    with pytest.raises(UserError, match="lora_magnitude_vector: DoRA"):
        lora.load_lora(path, {"transformer": load()}, ms.float32)


# ---- going on from a file ------------------------------------------------------------------------

MIXED = {Q0: 4, Q1: 2, SINGLE: 4, "single_transformer_blocks.1.attn.to_v": 8}


def go_on(model, path, alpha, compute=ms.float32):
    lora.add_trained_lora(model, lora_files.read_adapters(path, "--lora")["transformer"], alpha, 0.0, compute)
    return model


def weight_changes(path):
    """scale * B A by layer, float64, as the file says."""
    tensors, alphas = lora_files.read_lora(path, "")
    parts = {name[: -len(".lora_A.weight")]: name for name in tensors if name.endswith(".lora_A.weight")}
    return {
        layer: alphas[layer] / tensors[a].shape[0] * (tensors[a.replace("_A.", "_B.")].astype(np.float64) @ tensors[a])
        for layer, a in parts.items()
    }


@pytest.mark.parametrize("alpha", [None, 4.0, 1.0, 12.0])
@pytest.mark.parametrize("file_alpha", [None, 6.0])
def test_the_start_is_what_the_file_says_whatever_the_scale(load, tmp_path, alpha, file_alpha):
    """Ranks of the file, scale alpha / 4, the most frequent rank, and B divided by it; saved again it changes the weights the same."""
    extra = (
        {} if file_alpha is None else {f"transformer.{name}.alpha": np.array(file_alpha, np.float32) for name in MIXED}
    )
    path, tensors = foreign(tmp_path / "f", MIXED, extra=extra)
    model = go_on(load(), path, alpha)
    expected = forward(
        folded(
            load(), tensors, lambda name: 1.0 if file_alpha is None else file_alpha / MIXED[name[len("transformer.") :]]
        )
    )
    np.testing.assert_allclose(forward(model), expected, rtol=1e-4, atol=1e-4)
    scale = 1.0 if alpha is None else alpha / 4
    for name, rank in MIXED.items():
        own = {x: lora.lora_parameters(model)[f"{name}.lora_{x}.weight"].asnumpy() for x in "AB"}
        np.testing.assert_array_equal(own["A"], tensors[f"transformer.{name}.lora_A.weight"])
        ratio = (1.0 if file_alpha is None else file_alpha / rank) / scale
        np.testing.assert_allclose(own["B"], ratio * tensors[f"transformer.{name}.lora_B.weight"], rtol=1e-6)
    again = weight_changes(save(tmp_path / "again", model))
    for name, value in weight_changes(path).items():
        np.testing.assert_allclose(again[name], value, rtol=1e-6, atol=1e-7)


def test_the_header_names_other_ranks(load, tmp_path):
    path = save(tmp_path / "again", go_on(load(), foreign(tmp_path / "f", MIXED)[0], 8.0))
    settings = json.loads(header(path)["lora_adapter_metadata"])
    others = {Q1: 2, "single_transformer_blocks.1.attn.to_v": 8}
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 4)
    assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"] == others
    assert settings["transformer.target_modules"] == sorted(MIXED) and header(path)["trained_lora_alpha"] == "8.0"


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_what_goes_on_trains_in_float32_and_all_of_it(load, tmp_path, precision):
    compute = resolve_precision(precision).compute
    model = go_on(load(precision), foreign(tmp_path / "f", MIXED)[0], None, compute)
    assert {p.name for p in model.trainable_params()} == {p.name for p in lora.lora_parameters(model).values()}
    assert {p.dtype for p in model.trainable_params()} == {ms.float32} and len(model.trainable_params()) == 2 * len(
        MIXED
    )
    gradients = ms.value_and_grad(lambda: (model_output(model, compute) ** 2).mean(), None, model.trainable_params())()[
        1
    ]
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)
