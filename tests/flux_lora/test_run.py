"""Whole runs on the tiny pipeline: the files they write, the models they load, and what flags change."""

import csv
import json
import shutil

import mindspore as ms
import numpy as np
import pytest
import yaml
from conftest import metrics
from fake_hub import TOKEN
from fake_modelscope import TOKEN as MODELSCOPE_TOKEN
from PIL import Image
from safetensors import safe_open

from mindtune.data import crops, folders
from mindtune.encode import encoder_stage
from mindtune.models import lora_files
from mindtune.models.lora_files import LORA_FILE
from mindtune.run import checkpoint


def losses(out, key="loss"):
    return [line[key] for line in metrics(out) if key in line]


def lora_b(out, model):
    """Every B matrix of a model's adapter."""
    tensors = lora_files.read_lora(out / LORA_FILE, "")[0]
    return [value for name, value in tensors.items() if name.startswith(f"{model}.") and ".lora_B." in name]


def prior_preservation(folder, count):
    flags = ["--with_prior_preservation", "--class_data_dir", folder, "--class_prompt", "a cat"]
    return [*flags, "--num_class_images", count]


# ---- what a run writes and loads -----------------------------------------------------------------


def test_a_run_writes_adapter_checkpoints_curves_images_and_a_record(lora, tmp_path):
    validation = ["--validation_prompt", "a cat", "a dog", "--num_validation_images", 2, "--validation_epochs", 1]
    more = ["--validation_split", 0.2, "--report_to", "tensorboard", "--max_train_steps", 5, "--checkpointing_steps", 2]
    out = lora(tmp_path, "--cache_latents", *validation, *more)
    assert [folder.name for folder in checkpoint.checkpoints(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert all(checkpoint.damage(folder) is None for folder in checkpoint.checkpoints(out))
    # Four images are trained on: epoch 1 ends with update 4. Two prompts, at the end without and with the adapter.
    grid, final = (Image.open(out / "samples" / f"{name}.png") for name in ("step-000004", "final"))
    assert grid.width == 2 * 192 and final.height == 2 * grid.height
    rows = list(csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0"] * 8 + ["4"] * 8 + ["5"] * 8
    assert sorted(float(row["sigma"]) for row in rows[:8]) == [float(row["sigma"]) for row in reversed(rows[:8])]
    assert Image.open(out / "loss_by_timestep.png").format == "PNG"
    assert list((out / "logs").glob("events.out.tfevents*"))
    record = json.loads((out / "run.json").read_text())
    assert record["finished"] and record["updates"] == 5 and record["flags"]["lora_rank"] == 4
    assert record["data"]["samples"] == 4 and len(record["data"]["held_out"]) == 1
    assert record["versions"]["mindspore"] == ms.__version__ and record["peak_memory_mb"]["training_process"] > 0
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--cache_latents"], ["transformer"]),
        (["--cache_latents", "--validation_prompt", "a cat", "--num_validation_images", 1], ["transformer", "vae"]),
        (["--cache_latents", "--train_text_encoder"], ["transformer", "text_encoder"]),
        ([], ["transformer", "vae"]),
    ],
)
def test_the_training_process_loads_only_what_it_needs(lora, loaded, tmp_path, more, expected):
    """Never T5; CLIP if it is trained; the VAE for validation images, or to encode crops in the step."""
    lora(tmp_path, *more, "--max_train_steps", 1)
    assert loaded == expected


@pytest.mark.parametrize(
    "mixed_precision, upcast, stored",
    [("bf16", [], "BF16"), ("fp16", [], "F16"), ("fp16", ["--upcast_before_saving"], "F32")],
)
def test_the_final_adapter_has_the_dtype_of_the_weights_unless_upcast(lora, tmp_path, mixed_precision, upcast, stored):
    lora(tmp_path, "--mixed_precision", mixed_precision, "--cache_latents", "--max_train_steps", 1, *upcast)
    with safe_open(tmp_path / LORA_FILE, framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}


def test_the_adapter_goes_to_the_hub_and_the_token_nowhere_else(lora, fake_hub, tmp_path, capfd):
    hub = ["--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "club/cat"]
    lora(tmp_path, *hub, "--cache_latents", "--max_train_steps", 1)
    assert fake_hub.repositories == ["club/cat"]
    assert fake_hub.files[LORA_FILE] == (tmp_path / LORA_FILE).read_bytes()
    assert set(fake_hub.files) == {"README.md", LORA_FILE, "run.json", "report.html"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_run_from_modelscope_to_modelscope(lora, tiny_flux, fake_modelscope, tmp_path, capfd):
    files = {str(path.relative_to(tiny_flux)): path.read_bytes() for path in tiny_flux.rglob("*") if path.is_file()}
    fake_modelscope.models["black-forest-labs/FLUX.1-dev"] = {"master": files}
    model = ["--hub", "modelscope", "--pretrained_model_name_or_path", "black-forest-labs/FLUX.1-dev"]
    hub = ["--push_to_hub", "--hub_token", MODELSCOPE_TOKEN]
    prompts = ["--validation_prompt", 'a cat: "sks"', "一只猫", "--num_validation_images", 1]
    lora(tmp_path / "cat", *model, *hub, *prompts, "--cache_latents", "--max_train_steps", 1)
    assert fake_modelscope.repositories == ["somebody/cat"]
    samples = {"samples/final.png", "samples/final-1.png", "samples/final-2.png"}
    assert set(fake_modelscope.files) == {"README.md", LORA_FILE, "run.json", "report.html", *samples}
    for name, content in fake_modelscope.files.items():
        assert content == (tmp_path / "cat" / name).read_bytes()
    metadata = yaml.safe_load(fake_modelscope.files["README.md"].decode().split("---\n")[1])
    assert metadata["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert [(each["text"], each["output"]["url"]) for each in metadata["widget"]] == [
        ('a cat: "sks"', "samples/final-1.png"),
        ("一只猫", "samples/final-2.png"),
    ]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and MODELSCOPE_TOKEN.encode() in path.read_bytes()
    ]
    printed = "".join(capfd.readouterr())
    assert MODELSCOPE_TOKEN not in printed and "uploaded to http://modelscope.test/models/somebody/cat" in printed


def test_a_run_deletes_only_its_own_files(lora, tmp_path):
    """The user's images beside the samples, and curves of other runs in a shared logging directory, stay."""
    samples = tmp_path / "run" / "samples"
    ours = [samples / name for name in ("step-000001/row-01.png", "step-000001/rows.jsonl", "final/row-02-base.png")]
    kept = [samples / "holiday.png", samples / "final" / "row.txt", tmp_path / "shared" / "events.out.tfevents.1.other"]
    for path in (*kept, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"kept")
    more = ["--cache_latents", "--max_train_steps", 1, "--logging_dir", tmp_path / "shared"]
    lora(tmp_path / "run", *more)
    lora(tmp_path / "run", *more, "--overwrite_output_dir")
    assert [path.read_bytes() for path in kept] == [b"kept"] * 3
    assert not (samples / "step-000001").exists() and [path.name for path in (samples / "final").iterdir()] == [
        "row.txt"
    ]


# ---- data ----------------------------------------------------------------------------------------


def test_every_image_is_trained_under_its_own_caption(lora, lora_script, photos, tmp_path, monkeypatch):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in sorted(photos.glob("*.png"))[:3]:
        shutil.copy(path, folder)
    (folder / "0.txt").write_text("a red cat")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "a blue cat"}) + "\n")
    captions, text = [], lora_script.EncoderStage.text

    def note(stage, caption):
        captions.append(caption)
        return text(stage, caption)

    monkeypatch.setattr(lora_script.EncoderStage, "text", note)
    lora(tmp_path / "run", "--instance_data_dir", folder, "--cache_latents")
    assert sorted(captions) == ["a blue cat", "a photo of sks cat", "a red cat"]


def test_a_data_set_trains_as_its_folder_does(lora, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "imagefolder")
    rows = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) for n in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    source = ["--instance_data_dir", "", "--dataset_name", folder, "--caption_column", "text"]
    from_folder = lora(tmp_path / "folder", "--instance_data_dir", folder, "--cache_latents")
    from_data_set = lora(tmp_path / "data set", *source, "--cache_latents")
    assert (from_folder / LORA_FILE).read_bytes() == (from_data_set / LORA_FILE).read_bytes()


def test_class_images_are_generated_once(lora, tmp_path):
    folder = tmp_path / "class"
    more = [*prior_preservation(folder, 3), "--cache_latents", "--sample_batch_size", 2, "--max_train_steps", 1]
    lora(tmp_path / "first", *more)
    generated = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(generated) == 3 and len(set(generated.values())) == 3
    lora(tmp_path / "second", *more)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == generated


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "with class images"])
def test_clip_and_transformer_are_trained_together_at_batch_size_2(lora, tmp_path, prior):
    more = ["--train_text_encoder", "--text_encoder_lr", 1e-3, "--cache_latents", "--train_batch_size", 2]
    lora(tmp_path / "run", *more, *(prior_preservation(tmp_path / "class", 2) if prior else []))
    for model, layers in (("transformer", 7), ("text_encoder", 8)):
        assert [value.any() for value in lora_b(tmp_path / "run", model)] == [True] * layers
    assert losses(tmp_path / "run", "lr_text_encoder") == [1e-3] * 3


def test_text_and_latents_are_encoded_once_and_again_if_damaged(lora, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    more = ["--cache_latents", "--random_flip", "--cache_dir", cache, "--max_train_steps", 1]
    first = lora(tmp_path / "first", *more)
    entries = list((cache / "mindtune").glob("*.safetensors"))
    assert len(entries) == 12  # five images, two flips each, and a caption for each of two encoders
    with monkeypatch.context() as patch:
        patch.setattr(encoder_stage, "run_in_child", lambda job: pytest.fail("encoded again"))
        lora(tmp_path / "second", *more)
    for path in entries:
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)
    third = lora(tmp_path / "third", *more)
    assert (first / LORA_FILE).read_bytes() == (third / LORA_FILE).read_bytes()


def test_cached_latents_and_pixels_give_the_same_run_with_center_crops(finished_lora):
    """The VAE in the encoder stage or in the step: the same numbers up to rounding."""
    cached, in_step = finished_lora("--cache_latents"), finished_lora("--center_crop")
    np.testing.assert_allclose(losses(cached), losses(in_step), rtol=1e-4)


def test_threads_that_prepare_batches_change_nothing(lora, tmp_path):
    more = ["--random_flip", "--max_train_steps", 8, "--dataloader_num_workers"]
    outs = [lora(tmp_path / f"{threads}", *more, threads) for threads in (0, 3)]
    assert (outs[0] / "metrics.jsonl").read_bytes() == (outs[1] / "metrics.jsonl").read_bytes()


def test_pixels_are_resized_and_cropped_as_by_pillow(photos):
    sample = folders.samples_in_folder(str(photos), "--instance_data_dir")[0]
    pixels = crops.pixel_values(sample.open(), 32, "lanczos")
    image = Image.open(sample.source).convert("RGB")
    side = min(image.size)
    image = image.resize((round(image.width * 32 / side), round(image.height * 32 / side)), Image.Resampling.LANCZOS)
    left = round((image.width - 32) / 2)
    expected = np.asarray(image.crop((left, 0, left + 32, 32)), np.float32) / 127.5 - 1
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))


# ---- updates -------------------------------------------------------------------------------------


def test_batch_size_and_accumulation_make_the_same_update(lora, tmp_path):
    """Batch size 2 and two micro-batches of 1 have the same samples with the same draws."""
    outs = [
        lora(
            tmp_path / f"{size}", "--cache_latents", "--train_batch_size", size, "--gradient_accumulation_steps", steps
        )
        for size, steps in ((2, 1), (1, 2))
    ]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(losses(outs[0], key), losses(outs[1], key), rtol=1e-5)


def test_warmup_and_scaled_rates_are_counted_in_updates(lora, tmp_path):
    schedule = ["--lr_scheduler", "linear", "--lr_warmup_steps", 2, "--scale_lr", "--learning_rate", 1e-3]
    lora(tmp_path, *schedule, "--gradient_accumulation_steps", 2, "--cache_latents", "--max_train_steps", 4)
    np.testing.assert_allclose(losses(tmp_path, "lr"), np.array([0, 0.5, 1, 0.5]) * 2e-3)


def test_an_int8_base_trains_as_float32_does_within_a_hundredth(finished_lora, lora, tmp_path):
    """T5's states with int8 weights are entries of their own: 5 images, CLIP's caption once, T5's twice."""
    more = ["--cache_latents", "--cache_dir", tmp_path / "cache"]
    lora(tmp_path / "float32", *more, "--max_train_steps", 1)
    int8 = np.array(losses(lora(tmp_path / "int8", *more, "--base_precision", "int8")))
    exact = np.array(losses(finished_lora("--cache_latents")))
    assert (int8 != exact).all()
    np.testing.assert_allclose(int8, exact, rtol=0.01)
    assert len(list((tmp_path / "cache" / "mindtune").glob("*.safetensors"))) == 8


def test_held_out_loss_falls_with_training_and_stays_at_learning_rate_0(lora, tmp_path):
    """On random weights, 8 updates at a high rate: by at least a tenth at every timestep."""
    more = ["--cache_latents", "--validation_split", 0.2, "--adam_weight_decay", 0, "--lora_rank", 8]
    before_and_after = {}
    for name, rate, updates in (("trained", 2e-2, 8), ("still", 0, 2)):
        out = lora(tmp_path / name, *more, "--learning_rate", rate, "--max_train_steps", updates)
        rows = [float(row["loss"]) for row in csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines())]
        before_and_after[name] = np.array(rows[:8]), np.array(rows[-8:])
    before, after = before_and_after["trained"]
    assert np.all(after < 0.9 * before)
    assert np.array_equal(*before_and_after["still"])
    assert any(value.any() for value in lora_b(tmp_path / "trained", "transformer"))
    assert not any(value.any() for value in lora_b(tmp_path / "still", "transformer"))
