"""Whole runs of the Control-LoRA script on the tiny pipeline: the files, models, data, and what flags change."""

import csv
import json

import numpy as np
import pytest
import yaml
from conftest import metrics
from fake_hub import TOKEN
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from mindtune import rng
from mindtune.models import lora_layouts, sampling
from mindtune.models.control_lora import linear_layers
from mindtune.models.lora_files import LORA_FILE
from mindtune.run import checkpoint, validation

NORMS = ["--train_norm_layers"]


def logged(out, key="loss"):
    return [line[key] for line in metrics(out) if key in line]


def norms_of(out):
    return {name: value for name, value in load_file(out / LORA_FILE).items() if lora_layouts.NORM.search(name)}


@pytest.fixture(scope="module")
def base_norms(small_flux):
    """The norms of the base model, by their names in a file of the adapter."""
    weights = load_file(small_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    return {f"transformer.{name}": value for name, value in weights.items() if lora_layouts.NORM.search(name)}


# ---- what a run writes and loads -----------------------------------------------------------------


def test_a_run_writes_adapter_checkpoints_curves_images_and_a_record(
    control_lora, outlines, small_flux, tmp_path, monkeypatch
):
    grids, image_grid = [], validation.image_grid
    monkeypatch.setattr(validation, "image_grid", lambda *given: grids.append(given) or image_grid(*given))
    condition = outlines / "conditioning" / "0.png"
    row = {"prompt": "another", "image": str(outlines / "conditioning" / "1.png"), "size": 48}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    more = ["--validation_prompt", "picture 0", "--validation_image", condition, "--num_validation_images", 2]
    more += ["--validation_file", tmp_path / "rows.jsonl", "--validation_split", 0.2, "--validation_steps", 2]
    more += ["--report_to", "tensorboard", "--checkpointing_steps", 2, *NORMS]
    out = control_lora(tmp_path / "run", "--cache_latents", *more)
    folders = checkpoint.checkpoints(out)
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3"]
    assert all(checkpoint.damage(folder) is None for folder in folders)
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3]
    curve = list(csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines()))
    assert [line["step"] for line in curve] == ["0"] * 8 + ["2"] * 8 + ["3"] * 8
    assert list((out / "logs").glob("events.out.tfevents*")) and (out / "report.html").is_file()
    (cells, labels) = grids[-1]
    assert labels == ["picture 0"] and len(cells[0]) == 3
    np.testing.assert_array_equal(np.asarray(cells[0][0]), np.asarray(Image.open(condition).convert("RGB")))
    assert cells[0][1].size == (48, 32) and cells[0][1].tobytes() != cells[0][2].tobytes()
    pictures = {path.name: Image.open(path).size for path in (out / "samples" / "final").glob("*.png")}
    assert pictures == {"row-01.png": (48, 48), "row-01-condition.png": (48, 48)}

    record, final = json.loads((out / "run.json").read_text()), load_file(out / LORA_FILE)
    assert record["system"] == "flux_control" and record["finished"] and record["updates"] == 3
    assert record["data"]["samples"] == 5 and len(record["data"]["held_out"]) == 1
    assert record["trainable"]["transformer"] == sum(value.size for value in final.values())
    # Every linear layer, the input layer with the condition's inputs, and the norms of both kinds of blocks.
    layers = linear_layers(small_flux, fill=False)
    adapted = {name[len("transformer.") : -len(".lora_A.weight")] for name in final if ".lora_A." in name}
    assert adapted == set(layers) and final["transformer.x_embedder.lora_A.weight"].shape == (4, 128)
    assert len(norms_of(out)) == 6 and all(value.any() for value in final.values())


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--cache_latents"], ["transformer"]),
        (["--cache_latents", "--validation"], ["transformer", "vae"]),
        ([], ["transformer", "vae"]),
        (["--cache_latents", "--fill"], ["transformer", "vae"]),
    ],
    ids=["cached", "validation", "pixels", "fill"],
)
def test_the_training_process_loads_only_what_it_needs(control_lora, loaded, outlines, tmp_path, more, expected):
    """Never the text encoders; the VAE for validation images, and to encode crops or masked images in the step."""
    if "--validation" in more:
        more = [*more[:-1], "--validation_prompt", "x", "--num_validation_images", 1]
        more += ["--validation_image", outlines / "conditioning" / "0.png"]
    control_lora(tmp_path, *more, "--max_train_steps", 1)
    assert loaded == expected


@pytest.mark.parametrize("kind, upcast, stored", [("bf16", [], "BF16"), ("fp16", ["--upcast_before_saving"], "F32")])
def test_the_final_adapter_has_the_dtype_of_the_weights_unless_upcast(
    control_lora, finished_control_lora, tmp_path, kind, upcast, stored
):
    """Norms are float32: they are near 1, where half precision would lose what training changed."""
    more = ["--cache_latents", *NORMS]
    out = control_lora(tmp_path, "--mixed_precision", kind, *more, *upcast)
    with safe_open(out / LORA_FILE, framework="numpy") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert {dtype for name, dtype in dtypes.items() if not lora_layouts.NORM.search(name)} == {stored}
    assert {dtype for name, dtype in dtypes.items() if lora_layouts.NORM.search(name)} == {"F32"}
    np.testing.assert_allclose(logged(out), logged(finished_control_lora(*more)), rtol=0.03)


def test_an_int8_base_trains_as_float32_does_within_a_hundredth(control_lora, finished_control_lora, tmp_path):
    out = control_lora(tmp_path, "--base_precision", "int8", "--cache_latents", *NORMS)
    exact = logged(finished_control_lora("--cache_latents", *NORMS))
    assert logged(out) != exact
    np.testing.assert_allclose(logged(out), exact, rtol=0.01)


@pytest.mark.parametrize("fill", [False, True], ids=["condition", "fill"])
def test_the_adapter_goes_to_the_hub_with_a_card(control_lora, outlines, fake_hub, tmp_path, fill):
    hub = ["--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "club/outlines"]
    image = outlines / "conditioning" / "0.png"
    more = ["--validation_prompt", "a circle", "--validation_image", image, "--num_validation_images", 1]
    more += ["--fill", "--validation_mask", image] if fill else []
    control_lora(tmp_path, *hub, *more, "--cache_latents", "--num_inference_steps", 1, "--max_train_steps", 1)
    card = fake_hub.files["README.md"].decode()
    assert set(fake_hub.files) >= {"README.md", LORA_FILE, "samples/final-1.png"}
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert "control-lora" in metadata["tags"]
    assert ("FluxFillPipeline" if fill else "FluxControlPipeline") in card and ("--mask_image" in card) == fill
    assert TOKEN not in card


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [[], ["--fill"]], ids=["condition", "fill"])
def test_cached_latents_and_pixels_give_the_same_run_with_center_crops(finished_control_lora, masked, fill):
    """Masked images are encoded in the step in both; random masks do not depend on the cache."""
    more = ["--resolution", 16, "--aspect_ratio_buckets", "16,32;32,16", "--max_train_steps", 6, *fill]
    more += ["--train_data_dir", masked] if fill else []
    cached, in_step = (finished_control_lora(*more, crop) for crop in ("--cache_latents", "--center_crop"))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(logged(cached, key), logged(in_step, key), rtol=1e-4)


@pytest.mark.parametrize("fill", [[], ["--fill"]], ids=["condition", "fill"])
def test_what_is_encoded_when_and_by_how_many_threads_changes_nothing(control_lora, masked, tmp_path, fill):
    """Windows of one update and three threads, with flips and random masks."""
    more = ["--cache_latents", "--random_flip", "--max_train_steps", 6, *fill]
    more += ["--train_data_dir", masked] if fill else []
    whole = control_lora(tmp_path / "whole", *more)
    windows = ["--encode_window", 1, "--cache_dir", tmp_path / "cache", "--dataloader_num_workers", 3]
    out = control_lora(tmp_path / "windows", *more, *windows)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_stream_of_masks(control_lora, masked, tmp_path):
    """With masks of the data set and random ones; a second run draws the same."""
    more = ["--fill", "--train_data_dir", masked, "--streaming", "--shuffle_buffer_size", 3, "--train_batch_size", 2]
    more += ["--cache_latents", "--aspect_ratio_buckets", ""]
    outs = [control_lora(tmp_path / str(number), *more) for number in range(2)]
    assert logged(outs[0]) == logged(outs[1]) and len(logged(outs[0])) == 3


def test_validation_fills_the_masked_part_of_an_image(control_lora, masked, tmp_path, monkeypatch):
    """One mask for all images; the model reads the image without the masked pixels and the mask."""
    seen, encode = [], sampling.encode_condition
    monkeypatch.setattr(sampling, "encode_condition", lambda *given: seen.append(given[1:3]) or encode(*given))
    images, mask = [masked / "images" / f"{number}.png" for number in (0, 1)], masked / "conditioning" / "0.png"
    more = ["--fill", "--train_data_dir", masked, "--validation_prompt", "a", "--validation_image", *images]
    more += ["--validation_mask", mask, "--num_validation_images", 1, "--num_inference_steps", 1, "--cache_latents"]
    out = control_lora(tmp_path, *more, "--max_train_steps", 1)
    sizes = [(image.size, gray.size, gray.mode) for image, gray in seen]
    assert sizes == [((48, 32), (48, 32), "L"), ((32, 48), (32, 48), "L")]
    np.testing.assert_array_equal(np.asarray(seen[0][1]), np.asarray(Image.open(mask)))
    assert (out / "samples" / "final.png").is_file()


# ---- adapters and norms --------------------------------------------------------------------------


def test_norms_start_from_the_base_model_and_train(control_lora, base_norms, tmp_path):
    """At rate 0 they are the base model's, and without the flag they are not in the file."""
    more = ["--cache_latents", "--max_train_steps", 1]
    still = norms_of(control_lora(tmp_path / "still", *more, *NORMS, "--learning_rate", 0))
    assert still.keys() == base_norms.keys()
    for name, value in base_norms.items():
        np.testing.assert_array_equal(still[name], value.astype(np.float32), err_msg=name)
    moved = norms_of(control_lora(tmp_path / "moved", *more, *NORMS, "--adam_weight_decay", 0))
    for name, value in moved.items():  # Adam's first step is the learning rate where the gradient is not tiny
        assert np.abs(value - base_norms[name]).max() == pytest.approx(1e-3, rel=1e-2), name
    assert norms_of(control_lora(tmp_path / "without", *more)) == {}


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_run_goes_on_from_the_adapter_of_another(control_lora, finished_control_lora, tmp_path, kind):
    """At rate 0 it ends with the tensors that it started from, norms too, and its losses are the adapter's."""
    norms = NORMS if kind != "lokr" else []
    more = ["--adapter", kind, *norms, "--cache_latents", "--upcast_before_saving"]
    first = control_lora(tmp_path / "first", *more, "--learning_rate", 1e-2, "--lora_alpha", 12)
    still = [*more, "--learning_rate", 0, "--max_train_steps", 1]
    again = control_lora(tmp_path / "again", *still, "--lora_model_name_or_path", first)
    before, after = load_file(first / LORA_FILE), load_file(again / LORA_FILE)
    assert before.keys() == after.keys() and len(norms_of(again)) == 6 * len(norms)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    base = logged(finished_control_lora(*still))
    assert abs(logged(again)[0] / base[0] - 1) > 1e-3


def test_with_ema_the_result_is_the_average_by_its_formula(control_lora, base_norms, tmp_path):
    """decay min(0.3, (1 + t) / (10 + t)) after update t, of the LoRA and of the norms."""
    more = ["--use_ema", "--ema_decay", 0.3, "--checkpointing_steps", 1, "--learning_rate", 1e-2, *NORMS]
    out = control_lora(tmp_path, *more, "--cache_latents")
    steps = [load_file(out / f"checkpoint-{number}" / LORA_FILE) for number in (1, 2, 3)]
    for name, found in load_file(out / LORA_FILE).items():
        average = np.zeros(found.shape)
        if ".lora_A." in name:
            layer = name.split(".", 1)[1]
            average = (rng.normal(0, f"lora/{layer}", shape=found.shape) / 4).astype(np.float64)
        elif name in base_norms:
            average = base_norms[name].astype(np.float64)
        for step, weights in enumerate(steps, 1):
            decay = min(0.3, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weights[name].astype(np.float64)
        np.testing.assert_allclose(found, average, atol=2e-7, err_msg=name)
    assert any(not np.allclose(value, steps[-1][name], atol=1e-6) for name, value in norms_of(out).items())


def test_other_layers_keep_the_input_layer(control_lora, tmp_path):
    """--lora_layers names further layers; the input layer reads the condition."""
    out = control_lora(tmp_path, "--cache_latents", "--lora_layers", "to_q", "--max_train_steps", 1)
    layers = {name.rsplit(".lora", 1)[0] for name in load_file(out / LORA_FILE)}
    assert layers == {
        "transformer.x_embedder",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.attn.to_q",
    }
