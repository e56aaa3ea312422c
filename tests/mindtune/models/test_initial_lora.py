"""The layers that a new adapter adapts, and the adapter of a file that a run starts from; no model is loaded."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindtune import files
from mindtune.cli import UserError
from mindtune.models import initial_lora, lora_files, lora_settings
from mindtune.models.initial_lora import find_adapters

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
ATTENTION = [f"{DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
ADDED = [f"{DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
FEED_FORWARD = [f"{DOUBLE}.{part}.net.{name}" for part in ("ff", "ff_context") for name in ("0.proj", "2")]
OF_SINGLE = [f"{SINGLE}.attn.to_{name}" for name in "qkv"]
NAMES = ["x_embedder", *ATTENTION, *ADDED, *FEED_FORWARD, *OF_SINGLE, f"{SINGLE}.proj_mlp", f"{SINGLE}.proj_out"]
LAYERS = {"transformer": dict.fromkeys(NAMES, (8, 8)), "text_encoder": {"layers.0.q_proj": (4, 4)}}
NORM = "transformer_blocks.0.attn.norm_q.weight"


def settings(system="flux_lora", **values):
    return initial_lora.Settings(system, "out", **values)


def chosen(system, **values):
    """The layers that a new adapter of a system adapts."""
    targets, initial, digest = find_adapters(settings(system, **values), lora_settings.Settings(), LAYERS)
    assert initial == {} and digest is None
    return list(lora_settings.Settings().ranks(NAMES, targets["transformer"], in_blocks=True))


def test_every_system_adapts_layers_of_its_own():
    """Those of Kontext are the ones of diffusers' example."""
    assert chosen("flux_lora") == [*ATTENTION, *OF_SINGLE]
    assert chosen("flux_kontext") == [*ATTENTION, *ADDED, *FEED_FORWARD, *OF_SINGLE, f"{SINGLE}.proj_mlp"]
    assert chosen("flux_control") == NAMES
    assert chosen("flux_lora", lora_layers="all-linear") == NAMES
    assert chosen("flux_lora", lora_layers="ff.net.2, proj_mlp") == [f"{DOUBLE}.ff.net.2", f"{SINGLE}.proj_mlp"]


def test_a_control_lora_adapts_the_input_layer_whatever_the_flags_name():
    assert chosen("flux_control", lora_layers="to_k") == ["x_embedder", f"{DOUBLE}.attn.to_k", f"{SINGLE}.attn.to_k"]
    assert lora_settings.target_names("x_embedder,to_q", "flux_control") == ["x_embedder", "to_q"]


def test_clip_has_targets_if_it_trains():
    targets, *_ = find_adapters(settings(train_text_encoder=True), lora_settings.Settings(), LAYERS)
    assert targets["text_encoder"] == lora_settings.TEXT_ENCODER_TARGETS


def test_patterns_without_effect_are_refused():
    with pytest.raises(UserError, match="--learning_rate_pattern proj_mlp: matches no layer that gets an adapter"):
        find_adapters(settings(learning_rate_pattern="proj_mlp=1"), lora_settings.Settings(), LAYERS)
    with pytest.raises(UserError, match="--lora_rank_pattern net: matches no layer"):
        find_adapters(settings(), lora_settings.Settings(lora_rank_pattern="net=2"), LAYERS)


# ---- a file --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """file(norms=..., kind=...): a file with an adapter of rank 2 for one layer, and norms by name."""

    def make(norms=None, layer=ATTENTION[0], widths=(8, 8), prefix="transformer"):
        halves = {"A": (2, widths[0]), "B": (widths[1], 2)}
        tensors = {f"{prefix}.{layer}.lora_{half}.weight": np.ones(shape, np.float32) for half, shape in halves.items()}
        tensors.update({f"transformer.{name}": np.full(size, 1.5, np.float32) for name, size in (norms or {}).items()})
        save_file(tensors, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    return make


def start(path, system="flux_control", norms=None, **values):
    given = settings(system, lora_model_name_or_path=str(path), **values)
    return find_adapters(given, lora_settings.Settings(), LAYERS, norms)


def test_an_adapter_comes_with_the_hash_of_its_file(file, capsys):
    path = file()
    _, initial, digest = start(path, "flux_kontext", lora_layers="no such layer")  # it has layers of its own
    assert list(initial) == ["transformer"] and digest == files.file_digest(path)
    assert lora_files.by_layer(initial["transformer"]).keys() == {ATTENTION[0]}
    assert "(transformer: 1 layers of rank 2): its layers keep their ranks" in capsys.readouterr().out


def test_norms_come_with_the_adapter(file, capsys):
    _, initial, _ = start(file({NORM: 4}), norms={NORM: (4,)}, train_norm_layers=True)
    np.testing.assert_array_equal(initial["transformer"][NORM], np.full(4, 1.5, np.float32))
    assert "1 layers of rank 2, 1 norms" in capsys.readouterr().out


@pytest.mark.parametrize(
    "system, norms, given, message",
    [
        ("flux_control", {NORM: 4}, {"norms": {NORM: (4,)}}, "has trained norms.* Add --train_norm_layers"),
        ("flux_lora", {NORM: 4}, {}, "has trained norms.* Only examples/flux_control/ trains them"),
        ("flux_kontext", {NORM: 4}, {}, "has trained norms.* Only examples/flux_control/ trains them"),
        (
            "flux_control",
            {NORM: 5},
            {"norms": {NORM: (4,)}, "train_norm_layers": True},
            r"made for another model; this transformer has no transformer_blocks.0.attn.norm_q.weight \(5,\)",
        ),
        ("flux_control", {}, {"adapter": "lokr"}, "is a LoRA, but --adapter is lokr. Give --adapter lora"),
        ("flux_control", {}, {"output_dir": "IN"}, "is in --output_dir, where this run writes. Name another"),
    ],
)
def test_a_file_that_the_run_cannot_start_from(file, tmp_path, system, norms, given, message):
    path = file(norms)
    output_dir = str(tmp_path) if given.pop("output_dir", None) else "out"
    layers = given.pop("norms", None)
    chosen = initial_lora.Settings(system, output_dir, str(path), **given)
    with pytest.raises(UserError, match=f"--lora_model_name_or_path .*lora.safetensors: {message}"):
        find_adapters(chosen, lora_settings.Settings(), LAYERS, layers)


def test_an_adapter_of_clip_needs_clip(file):
    path = file(layer="text_model.encoder.layers.0.self_attn.q_proj", widths=(4, 4), prefix="text_encoder")
    layers = {**LAYERS, "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (4, 4)}}
    given = settings("flux_lora", lora_model_name_or_path=str(path))
    with pytest.raises(UserError, match="has a LoRA of CLIP, which would be lost. Add --train_text_encoder"):
        find_adapters(given, lora_settings.Settings(), layers)
    with pytest.raises(UserError, match="made for another model; it adapts text_encoder, not transformer"):
        find_adapters(
            given._replace(system="flux_kontext"), lora_settings.Settings(), {"transformer": LAYERS["transformer"]}
        )
