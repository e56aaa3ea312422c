"""Training that starts from a LoRA keeps its ranks, layers and weights; a file that does not fit is refused."""

import functools
import shutil

import mindspore as ms
import numpy as np
import pytest
from conftest import metrics
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import lora_files
from mindtune.models.loading import linear_layers
from mindtune.models.lora_files import LORA_FILE
from mindtune.run import checkpoint

# Layers of the small transformer and its CLIP, with ranks that differ, none of them the default 4 alone.
LAYERS = {
    "transformer.transformer_blocks.0.attn.to_q": 2,
    "transformer.transformer_blocks.0.attn.to_k": 6,
    "transformer.transformer_blocks.0.ff.net.0.proj": 6,
    "transformer.single_transformer_blocks.0.proj_out": 6,
    "transformer.proj_out": 3,
}
CLIP = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 5,
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": 5,
}


@pytest.fixture(scope="module")
def saved(small_flux, tmp_path_factory):
    """saved(clip, layout, dtype): the file of a trained LoRA, alpha 3 for every layer. `clip`: no, too or only."""
    widths = {
        f"{model}.{name}": width
        for model in ("transformer", "text_encoder")
        for name, width in linear_layers(small_flux, model).items()
    }

    @functools.cache
    def make(clip="no", layout="diffusers", dtype=None):
        layers = {"no": LAYERS, "too": {**LAYERS, **CLIP}, "only": CLIP}[clip]
        rng, tensors = np.random.default_rng(0), {}
        for layer, rank in layers.items():
            inputs, outputs = widths[layer]
            tensors[f"{layer}.lora_A.weight"] = 0.1 * rng.standard_normal((rank, inputs)).astype(np.float32)
            tensors[f"{layer}.lora_B.weight"] = 0.1 * rng.standard_normal((outputs, rank)).astype(np.float32)
        path = tmp_path_factory.mktemp("saved") / f"{layout}.safetensors"
        lora_files.write_lora(path, tensors, dict.fromkeys(layers, 3.0), layout, dtype)
        return path

    return make


@pytest.fixture
def run(lora, tmp_path):
    """run(*flags, name): a run with cached latents; its output directory."""
    return lambda *more, name="run": lora(tmp_path / name, "--cache_latents", *more)


def changes(path):
    """alpha / rank * B A by layer, float64."""
    found = {}
    for prefix, part in lora_files.read_adapters(path, "").items():
        for name, a in part.items():
            if name.endswith(".lora_A.weight"):
                found[f"{prefix}.{name[: -len('.lora_A.weight')]}"] = (
                    part[name.replace("_A.", "_B.")].astype(np.float64) @ a
                )
    return found


STILL = ["--learning_rate", 0, "--text_encoder_lr", 0, "--upcast_before_saving", "--max_train_steps", 2]


@pytest.mark.parametrize(
    "layout, alpha",
    [("diffusers", []), ("kohya", []), ("comfyui", []), ("diffusers", ["--lora_alpha", 4])],
    ids=["diffusers", "kohya", "comfyui", "alpha 4"],
)
def test_at_rate_zero_it_ends_with_the_weight_changes_it_started_from(run, saved, finished_lora, capsys, layout, alpha):
    """Its loss is the adapter's, not the base model's, and the same from every layout."""
    path = saved(layout=layout)
    out = run("--lora_model_name_or_path", path, *alpha, *STILL)
    before, after = changes(path), changes(out / LORA_FILE)
    assert sorted(after) == sorted(before) == sorted(LAYERS)
    for layer, value in before.items():
        np.testing.assert_allclose(after[layer], value, rtol=1e-5, atol=1e-6 * np.abs(value).max(), err_msg=layer)
    lines = [line for line in capsys.readouterr().out.splitlines() if "starting from" in line]
    ranks = "(transformer: 5 layers of rank 2, 3, 6)"
    kept = "its layers keep their ranks, flags of layers and ranks do not apply"
    assert lines == [f"starting from {path} {ranks}: {kept}"]

    losses = np.array([line["loss"] for line in metrics(out)])
    base = np.array([line["loss"] for line in metrics(finished_lora("--cache_latents", *STILL))])
    assert np.abs(base / losses - 1).min() > 1e-3
    if not alpha:
        first = finished_lora("--cache_latents", "--lora_model_name_or_path", saved(), *STILL)
        np.testing.assert_allclose(losses, [line["loss"] for line in metrics(first)], rtol=1e-5)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16", "bf16"])
def test_every_layer_of_the_file_is_trained_at_its_own_rank(run, saved, mixed_precision):
    path = saved("too", dtype=ms.float16)
    more = ["--train_text_encoder", "--text_encoder_lr", 1e-3, "--learning_rate", 1e-3, "--upcast_before_saving"]
    more += ["--mixed_precision", mixed_precision, "--lora_rank", 16, "--lora_layers", "to_v"]
    out = run("--lora_model_name_or_path", path, *more)
    before, after = load_file(path), load_file(out / LORA_FILE)
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    for name, value in before.items():
        assert 0 < np.abs(after[name] - value.astype(np.float32)).max() < 0.1, name


def test_clip_starts_anew_beside_a_file_of_the_transformer(run, saved):
    out = run("--lora_model_name_or_path", saved(), "--train_text_encoder", "--lora_rank", 2, *STILL)
    tensors = load_file(out / LORA_FILE)
    clip = {name: value for name, value in tensors.items() if name.startswith("text_encoder.")}
    assert len(clip) == 2 * 8 and {value.shape[0] for name, value in clip.items() if ".lora_A." in name} == {2}
    assert not any(value.any() for name, value in clip.items() if ".lora_B." in name)
    assert len(tensors) == len(clip) + 2 * len(LAYERS)


def test_the_transformer_starts_anew_beside_a_file_of_clip(run, saved):
    path = saved("only")
    more = ["--train_text_encoder", "--lora_rank", 2, "--lora_layers", "to_v"]
    out = run("--lora_model_name_or_path", path, *more, *STILL)
    found = lora_files.read_adapters(out / LORA_FILE, "")
    assert len(found["transformer"]) == 2 * 2 and len(found["text_encoder"]) == 2 * len(CLIP)
    for layer, value in changes(path).items():
        np.testing.assert_allclose(changes(out / LORA_FILE)[layer], value, rtol=1e-5, atol=1e-6)


def test_a_run_starts_from_the_directory_of_another(run):
    first = run("--learning_rate", 1e-3, name="first")
    again = run("--lora_model_name_or_path", first, *STILL, name="again")
    for layer, value in changes(first / LORA_FILE).items():
        np.testing.assert_allclose(changes(again / LORA_FILE)[layer], value, rtol=1e-5, atol=1e-9)


def test_a_resumed_run_keeps_its_adapter_and_reports_another_file(run, saved, tmp_path, capsys):
    """A run stopped after update 2 and resumed ends as the one that was not stopped. The LoRA's file may have moved."""
    path = shutil.copy(saved(), tmp_path / "saved.safetensors")
    more = ["--learning_rate", 1e-3, "--lora_alpha", 12, "--checkpointing_steps", 2, "--lora_model_name_or_path"]
    whole = run(*more, path, "--max_train_steps", 4, name="whole")
    out = run(*more, path, "--max_train_steps", 2, name="stopped")
    moved = path.rename(tmp_path / "moved.safetensors")
    run(*more, moved, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", name="stopped")
    assert "not its exact continuation" not in capsys.readouterr().out
    for file in ("metrics.jsonl", LORA_FILE, "checkpoint-4/training_state.safetensors", f"checkpoint-4/{LORA_FILE}"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert checkpoint.damage(out / "checkpoint-4") is None
    other = saved(dtype=ms.float16)
    run(*more, other, "--max_train_steps", 5, "--resume_from_checkpoint", "latest", name="stopped")
    assert "resuming with other values of lora_model than the checkpoint" in capsys.readouterr().out


# ---- files that do not fit -----------------------------------------------------------------------


def foreign(path, layer, inputs, outputs):
    shapes = {"A": (4, inputs), "B": (outputs, 4)}
    save_file({f"{layer}.lora_{x}.weight": np.ones(shape, np.float32) for x, shape in shapes.items()}, path)


def torn(path):
    foreign(path, "transformer.x_embedder", 64, 32)
    path.write_bytes(path.read_bytes()[:-10])


def mkdir(path):
    path.mkdir()


REFUSED = {
    "no such file": (lambda path: None, ["no such file. Give a .safetensors file, or the directory"]),
    "an empty directory": (mkdir, ["in.safetensors/pytorch_lora_weights.safetensors: no such file"]),
    "torn": (torn, ["cannot be read as safetensors"]),
    "no LoRA": (
        lambda path: save_file({"x_embedder.weight": np.ones((4, 4), np.float32)}, path),
        ["holds no lora_A/lora_B"],
    ),
    "a layer beyond the last": (
        lambda path: foreign(path, "transformer.transformer_blocks.18.attn.to_q", 32, 32),
        ["made for another model", "has no layer transformer_blocks.18.attn.to_q"],
    ),
    "the full FLUX's width": (
        lambda path: foreign(path, "transformer.transformer_blocks.0.attn.to_q", 3072, 3072),
        ["made for another model", "(4, 3072)", "has 32 inputs and 32 outputs"],
    ),
    "Stable Diffusion's": (
        lambda path: foreign(path, "unet.mid_block.attentions.0.proj_in", 32, 32),
        ["made for Stable Diffusion", "unet.mid_block.attentions.0.proj_in", "Give a LoRA of FLUX.1"],
    ),
    "Stable Diffusion's in kohya's layout": (
        lambda path: foreign(path, "lora_unet_mid_block_attentions_0_proj_in", 32, 32),
        ["made for Stable Diffusion", "lora_unet_mid_block_attentions_0_proj_in", "Give a LoRA of FLUX.1"],
    ),
    "CLIP's without training CLIP": (
        lambda path: foreign(path, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 32, 32),
        ["has a LoRA of CLIP, which would be lost. Add --train_text_encoder"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused_before_anything_loads(lora_script, flags, tmp_path, monkeypatch, case):
    make, parts = REFUSED[case]
    make(tmp_path / "in.safetensors")
    monkeypatch.setattr("mindtune.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("mindtune.encode.encoder_stage.run_in_child", lambda *_: pytest.fail("something was encoded"))
    with pytest.raises(UserError) as caught:
        lora_script.main(flags(tmp_path / "out", "--lora_model_name_or_path", tmp_path / "in.safetensors"))
    message = str(caught.value)
    assert message.startswith("--lora_model_name_or_path ") and message.endswith("."), message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_the_file_may_not_be_where_the_run_writes(run, lora_script, flags):
    out = run("--max_train_steps", 1)
    with pytest.raises(UserError, match=r"is in --output_dir, where this run writes. Name another output directory"):
        lora_script.main(flags(out, "--lora_model_name_or_path", out, "--overwrite_output_dir"))
    assert (out / LORA_FILE).exists()
