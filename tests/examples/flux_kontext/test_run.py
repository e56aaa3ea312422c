"""Whole runs of the Kontext script on the tiny pipeline: the files, the models, the data, and what flags change."""

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

from mindtune.models import lora_settings
from mindtune.models.lora_files import LORA_FILE
from mindtune.run import checkpoint, validation

SQUARES = ["--resolution", 32, "--aspect_ratio_buckets", "32,32"]
COLUMNS = ["--image_column", "target", "--conditioning_image_column", "source", "--caption_column", "instruction"]


def logged(out, key="loss"):
    return [line[key] for line in metrics(out) if key in line]


# ---- what a run writes and loads -----------------------------------------------------------------


def test_a_run_writes_adapter_checkpoints_curves_images_and_a_record(kontext, edits, tmp_path, monkeypatch):
    """Images of the flags and of a file: edits in the size of their source, one without a source."""
    grids, image_grid = [], validation.image_grid
    monkeypatch.setattr(validation, "image_grid", lambda *given: grids.append(given) or image_grid(*given))
    source = edits / "conditioning" / "1.png"
    rows = [{"prompt": "draw", "width": 48, "height": 32}, {"prompt": "edit", "image": str(source), "steps": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "draw a square"}])))
    more = ["--validation_prompt", "edit 0", "--validation_image", source, "--num_validation_images", 2]
    more += ["--validation_file", tmp_path / "rows.jsonl", "--validation_split", 0.2, "--validation_steps", 2]
    more += ["--report_to", "tensorboard", "--checkpointing_steps", 2, "--lora_rank", 2]
    out = kontext(tmp_path / "run", "--cache_latents", *more)
    folders = checkpoint.checkpoints(out)
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3"]
    assert all(checkpoint.damage(folder) is None for folder in folders)
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3]
    curve = list(csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines()))
    assert [row["step"] for row in curve] == ["0"] * 8 + ["2"] * 8 + ["3"] * 8
    assert list((out / "logs").glob("events.out.tfevents*")) and (out / "report.html").is_file()

    # At the end a row of the grid without the adapter, and one with it; each starts with the source.
    (cells, labels) = grids[-1]
    assert labels == ["edit 0 (base)", "edit 0 (adapter)"] and [len(row) for row in cells] == [3, 3]
    shown = Image.open(source).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(cells[0][0]), np.asarray(shown))
    assert [image.size for row in cells for image in row] == [(32, 32)] * 6
    pictures = {path.name: Image.open(path).size for path in (out / "samples" / "final").glob("*.png")}
    first = (48, 32)  # the first bucket's, for a row that names no size
    assert pictures == {
        **{f"row-01{end}.png": (48, 32) for end in ("", "-base")},
        **{f"row-02{end}.png": (32, 32) for end in ("", "-base", "-condition")},
        **{f"row-03{end}.png": first for end in ("", "-base")},
    }
    record = json.loads((out / "run.json").read_text())
    assert record["system"] == "flux_kontext" and record["finished"] and record["updates"] == 3
    assert record["data"]["samples"] == 5 and len(record["data"]["held_out"]) == 1
    final = load_file(out / LORA_FILE)
    assert record["trainable"]["transformer"] == sum(value.size for value in final.values())
    layers = lora_settings.DEFAULT_TARGETS["flux_kontext"]
    assert all(any(f".{layer}." in name for layer in layers) and value.any() for name, value in final.items())


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--cache_latents"], ["transformer"]),
        (["--cache_latents", "--validation_prompt", "x", "--num_validation_images", 1], ["transformer", "vae"]),
        ([], ["transformer", "vae"]),
    ],
)
def test_the_training_process_loads_only_what_it_needs(kontext, loaded, tmp_path, more, expected):
    kontext(tmp_path, *more, "--max_train_steps", 1)
    assert loaded == expected


@pytest.mark.parametrize("kind, upcast, stored", [("fp16", [], "F16"), ("bf16", ["--upcast_before_saving"], "F32")])
def test_the_final_adapter_has_the_dtype_of_the_weights_unless_upcast(
    kontext, finished_kontext, tmp_path, kind, upcast, stored
):
    out = kontext(tmp_path, "--mixed_precision", kind, "--cache_latents", *upcast)
    with safe_open(out / LORA_FILE, framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}
    np.testing.assert_allclose(logged(out), logged(finished_kontext("--cache_latents")), rtol=0.03)


def test_an_int8_base_trains_as_float32_does_within_a_hundredth(kontext, finished_kontext, tmp_path):
    out = kontext(tmp_path, "--base_precision", "int8", "--cache_latents")
    exact = logged(finished_kontext("--cache_latents"))
    assert logged(out) != exact
    np.testing.assert_allclose(logged(out), exact, rtol=0.01)


def test_the_adapter_goes_to_the_hub_with_a_card(kontext, edits, fake_hub, tmp_path):
    hub = ["--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "club/editor"]
    more = ["--validation_prompt", "make it red", "--validation_image", edits / "conditioning" / "0.png"]
    more += ["--num_validation_images", 1, "--num_inference_steps", 1]
    kontext(tmp_path, *hub, *more, "--cache_latents", "--max_train_steps", 1)
    samples = {"samples/final.png", "samples/final-1.png"}
    assert set(fake_hub.files) == {"README.md", LORA_FILE, "run.json", "report.html", *samples}
    card = fake_hub.files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["widget"] == [{"text": "make it red", "output": {"url": "samples/final-1.png"}}]
    assert metadata["pipeline_tag"] == "image-to-image" and "flux-kontext" in metadata["tags"]
    assert "FluxKontextPipeline.from_pretrained" in card and "examples/flux_kontext/infer_flux_kontext.py" in card


# ---- data ----------------------------------------------------------------------------------------


def test_cached_latents_and_pixels_give_the_same_run_with_center_crops(finished_kontext):
    """Of targets and sources alike, sources of other shapes too: the same numbers up to rounding."""
    more = ["--max_train_steps", 6, "--resolution", 16, "--aspect_ratio_buckets", "16,32;32,16"]
    cached, in_step = (finished_kontext(*more, crop) for crop in ("--cache_latents", "--center_crop"))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(logged(cached, key), logged(in_step, key), rtol=1e-4)


def test_what_is_encoded_when_and_by_how_many_threads_changes_nothing(kontext, finished_kontext, tmp_path):
    """Windows of one update, a cache that holds nothing, and three threads; flipped sources of their own size."""
    more = ["--cache_latents", "--random_flip", "--max_train_steps", 6]
    whole = finished_kontext(*more)
    windows = ["--encode_window", 1, "--cache_dir", tmp_path / "cache", "--dataloader_num_workers", 3]
    out = kontext(tmp_path / "windows", *more, *windows)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_stream_of_edits(kontext, shapes, tmp_path):
    """Every source has the size of its target. Cached or in the step: every crop is the central one."""
    more = [
        "--train_data_dir",
        shapes,
        *SQUARES[:2],
        "--streaming",
        "--shuffle_buffer_size",
        3,
        "--train_batch_size",
        2,
    ]
    unset = ["--aspect_ratio_buckets", ""]
    cached, in_step = (
        kontext(tmp_path / str(kind), *more, *COLUMNS, *unset, *kind)
        for kind in (["--cache_latents"], ["--center_crop"])
    )
    np.testing.assert_allclose(logged(cached), logged(in_step), rtol=1e-4)


def test_a_data_set_without_sources_trains_text_to_image(kontext, edits, tmp_path, capsys):
    for number in range(2):
        (tmp_path / "plain").mkdir(exist_ok=True)
        Image.open(edits / "images" / f"{number}.png").save(tmp_path / "plain" / f"{number}.png")
    rows = [json.dumps({"file_name": f"{number}.png", "text": "a picture"}) for number in range(2)]
    (tmp_path / "plain" / "metadata.jsonl").write_text("\n".join(rows))
    out = kontext(tmp_path / "out", "--train_data_dir", tmp_path / "plain", "--cache_latents", "--max_train_steps", 2)
    assert "so no pair has one. Name one with --conditioning_image_column" in capsys.readouterr().out
    assert len(logged(out)) == 2


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_run_goes_on_from_the_adapter_of_another(kontext, finished_kontext, tmp_path, kind):
    """At rate 0 it ends with the tensors that it started from, and its losses are the adapter's, not the base model's.

    With an alpha, which is multiplied into the file, and without.
    """
    more = ["--adapter", kind, "--cache_latents", "--learning_rate", 1e-2, "--lora_alpha", 12, "--upcast_before_saving"]
    first = kontext(tmp_path / "first", *more)
    still = [
        "--adapter",
        kind,
        "--cache_latents",
        "--learning_rate",
        0,
        "--upcast_before_saving",
        "--max_train_steps",
        1,
    ]
    again = kontext(tmp_path / "again", *still, "--lora_model_name_or_path", first, "--lora_rank", 2)
    before, after = load_file(first / LORA_FILE), load_file(again / LORA_FILE)
    assert before.keys() == after.keys() and any(name.endswith("proj_mlp.lora_A.weight") for name in before) == (
        kind != "lokr"
    )
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    base = logged(finished_kontext(*still))
    assert abs(logged(again)[0] / base[0] - 1) > 1e-3
