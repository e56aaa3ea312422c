"""Whole runs on the tiny pipeline: what they leave behind, what they hold in memory, and what every flag changes."""

import csv
import json

import mindspore as ms
import numpy as np
import pytest
from conftest import metrics
from fake_hub import TOKEN
from PIL import Image
from safetensors import safe_open

from mindtune.data import crops, folders
from mindtune.encode import encoder_stage
from mindtune.models import loading, lora_files
from mindtune.run import checkpoint


@pytest.fixture
def run(lora_script, flags, tmp_path, monkeypatch):
    """run(*flags): a run in this process; gives its output directory and the names of the models that it loaded itself."""

    def go(*more, name="run"):
        loaded, real = [], loading.load_model
        monkeypatch.setattr(
            loading, "load_model", lambda root, part, *rest: loaded.append(part) or real(root, part, *rest)
        )
        monkeypatch.setattr(lora_script, "StopRequest", lambda: type("Never", (), {"exit_code": None})())
        assert lora_script.main(flags(tmp_path / name, *more)) == 0
        monkeypatch.setattr(loading, "load_model", real)
        return tmp_path / name, loaded

    return go


def test_a_run_leaves_adapter_checkpoints_curves_pictures_and_a_record(run):
    looking = [
        "--validation_prompt",
        "a cat",
        "a dog",
        "--num_validation_images",
        2,
        "--validation_split",
        0.2,
        "--validation_epochs",
        1,
    ]
    out, _ = run(
        "--cache_latents", *looking, "--report_to", "tensorboard", "--max_train_steps", 5, "--checkpointing_steps", 2
    )
    assert [folder.name for folder in checkpoint.checkpoints(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert all(checkpoint.damage(folder) is None for folder in checkpoint.checkpoints(out))
    # Four pictures are trained on, so epoch 1 ends with update 4; two prompts, each without and with the adapter at the end.
    assert Image.open(out / "samples" / "step-000004.png").size[0] == 2 * 192
    assert (
        Image.open(out / "samples" / "final.png").size[1] == 2 * Image.open(out / "samples" / "step-000004.png").size[1]
    )
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
    "more, held",
    [
        (["--cache_latents"], ["transformer"]),
        (["--cache_latents", "--validation_prompt", "a cat", "--num_validation_images", 1], ["transformer", "vae"]),
        (["--cache_latents", "--train_text_encoder"], ["transformer", "text_encoder"]),
        ([], ["transformer", "vae"]),
    ],
)
def test_the_training_process_loads_only_what_it_needs(run, more, held):
    """T5 never; CLIP if it trains; the VAE to draw, or to encode fresh crops."""
    assert run(*more)[1] == held


def test_every_picture_is_trained_under_its_own_caption(run, photos, tmp_path, monkeypatch, lora_script):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in sorted(photos.glob("*.png"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "0.txt").write_text("a red cat")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "a blue cat"}) + "\n")
    seen, real = [], lora_script.Batches._text
    monkeypatch.setattr(lora_script.Batches, "_text", lambda self, caption: seen.append(caption) or real(self, caption))
    run("--instance_data_dir", folder, "--cache_latents")
    assert sorted(seen) == ["a blue cat", "a photo of sks cat", "a red cat"]


def test_a_dataset_of_the_datasets_library_trains_as_its_folder_does(run, photos, tmp_path):
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    for path in photos.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    rows = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) for n in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    from_folder, _ = run("--instance_data_dir", folder, "--cache_latents", name="folder")
    from_dataset, _ = run(
        "--instance_data_dir",
        "",
        "--dataset_name",
        folder,
        "--caption_column",
        "text",
        "--cache_latents",
        name="dataset",
    )
    assert (from_folder / lora_files.LORA_FILE).read_bytes() == (from_dataset / lora_files.LORA_FILE).read_bytes()


def test_class_pictures_are_made_once_and_used_again(run, tmp_path):
    prior = [
        "--with_prior_preservation",
        "--class_data_dir",
        tmp_path / "class",
        "--class_prompt",
        "a cat",
        "--num_class_images",
        3,
    ]
    prior += ["--cache_latents", "--sample_batch_size", 2, "--max_train_steps", 1]
    run(*prior, name="first")
    made = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert len(made) == 3 and len(set(made.values())) == 3
    run(*prior, name="second")
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()} == made


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "with class pictures"])
def test_clip_and_transformer_train_together_at_batch_two(run, tmp_path, prior):
    more = ["--train_text_encoder", "--text_encoder_lr", 1e-3, "--cache_latents", "--train_batch_size", 2]
    more += ["--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a cat"] * prior
    out, _ = run(*more, "--num_class_images", 2)
    tensors = lora_files.read_lora(out / lora_files.LORA_FILE, "")[0]
    for part, layers in (("transformer", 14), ("text_encoder", 8)):
        moved = [
            np.abs(value).max() > 0
            for name, value in tensors.items()
            if name.startswith(f"{part}.") and ".lora_B." in name
        ]
        assert moved == [True] * layers
    assert [line["lr_text_encoder"] for line in metrics(out)] == [1e-3] * 3


def test_text_and_latents_are_encoded_once(run, monkeypatch, tmp_path):
    more = ["--cache_latents", "--random_flip", "--cache_dir", tmp_path / "cache", "--max_train_steps", 1]
    run(*more, name="first")
    # Five pictures, each twice, and one caption by each of two encoders.
    assert len(list((tmp_path / "cache" / "mindtune").iterdir())) == 12
    monkeypatch.setattr(encoder_stage, "_in_child", lambda job: pytest.fail("encoded again"))
    run(*more, name="second")


def test_a_damaged_cache_entry_is_encoded_again(run, tmp_path):
    more = ["--cache_latents", "--cache_dir", tmp_path / "cache", "--max_train_steps", 1]
    first, _ = run(*more, name="first")
    for path in (tmp_path / "cache" / "mindtune").iterdir():
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)
    second, _ = run(*more, name="second")
    assert (first / lora_files.LORA_FILE).read_bytes() == (second / lora_files.LORA_FILE).read_bytes()


def test_cached_latents_and_pixels_give_the_same_run_with_centre_crops(run):
    """The VAE inside the step or in the child process: the same numbers up to rounding."""
    cached, _ = run("--cache_latents", name="cached")
    inside, _ = run("--center_crop", name="inside")
    np.testing.assert_allclose([m["loss"] for m in metrics(cached)], [m["loss"] for m in metrics(inside)], rtol=1e-4)


def test_loader_threads_change_nothing(run):
    outs = [
        run("--random_flip", "--dataloader_num_workers", n, "--max_train_steps", 8, name=f"threads{n}")[0]
        for n in (0, 3)
    ]
    assert (outs[0] / "metrics.jsonl").read_bytes() == (outs[1] / "metrics.jsonl").read_bytes()


def test_batch_and_accumulation_make_the_same_update(run):
    """Batch 2 and two steps of batch 1 see the same samples under the same draws."""
    outs = [
        run("--train_batch_size", b, "--gradient_accumulation_steps", a, "--cache_latents", name=f"b{b}")[0]
        for b, a in ((2, 1), (1, 2))
    ]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(*([line[key] for line in metrics(out)] for out in outs), rtol=1e-5)


def test_warmup_and_scaled_rates_are_counted_in_updates(run):
    more = [
        "--lr_scheduler",
        "linear",
        "--lr_warmup_steps",
        2,
        "--gradient_accumulation_steps",
        2,
        "--scale_lr",
        "--cache_latents",
    ]
    out, _ = run(*more, "--learning_rate", 1e-3, "--max_train_steps", 4)
    np.testing.assert_allclose([line["lr"] for line in metrics(out)], np.array([0, 0.5, 1, 0.5]) * 2e-3)


@pytest.mark.parametrize(
    "mixed_precision, upcast, stored", [("bf16", False, "BF16"), ("fp16", False, "F16"), ("fp16", True, "F32")]
)
def test_the_final_adapter_is_in_the_type_of_computation_unless_upcast(run, mixed_precision, upcast, stored):
    out, _ = run(
        "--mixed_precision",
        mixed_precision,
        "--cache_latents",
        "--max_train_steps",
        1,
        *(["--upcast_before_saving"] * upcast),
    )
    with safe_open(out / lora_files.LORA_FILE, framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}


def test_an_int8_base_trains_as_float32_does_within_a_hundredth(run, tmp_path):
    """T5's states with int8 weights are entries of their own: five pictures, CLIP's caption once, T5's twice."""
    more = ["--cache_latents", "--cache_dir", tmp_path / "cache"]
    outs = [run(*more, *int8, name=f"run{len(int8)}")[0] for int8 in ([], ["--base_precision", "int8"])]
    exact, found = (np.array([line["loss"] for line in metrics(out)]) for out in outs)
    assert (found != exact).all()
    np.testing.assert_allclose(found, exact, rtol=0.01)
    assert len(list((tmp_path / "cache" / "mindtune").iterdir())) == 8


def test_the_adapter_goes_to_the_hub_and_the_token_nowhere_else(run, fake_hub, capfd):
    out, _ = run(
        "--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "club/cat", "--cache_latents", "--max_train_steps", 1
    )
    assert (
        fake_hub.repositories == ["club/cat"]
        and fake_hub.files[lora_files.LORA_FILE] == (out / lora_files.LORA_FILE).read_bytes()
    )
    assert set(fake_hub.files) == {"README.md", lora_files.LORA_FILE, "run.json", "report.html"}
    assert not [path for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "".join(capfd.readouterr())


def test_learning_rate_zero_learns_nothing_and_another_does(run):
    still, _ = run("--learning_rate", 0, "--adam_weight_decay", 0, "--cache_latents", name="still")
    moved, _ = run("--learning_rate", 1e-3, "--cache_latents", name="moved")
    for out, moves in ((still, False), (moved, True)):
        tensors = lora_files.read_lora(out / lora_files.LORA_FILE, "")[0]
        assert any(np.abs(value).max() > 0 for name, value in tensors.items() if ".lora_B." in name) == moves


def test_held_out_loss_falls_with_training_and_stays_without(run):
    """On the tiny transformer with random weights, 40 updates at a high rate: at least a tenth off, at every timestep."""
    more = ["--cache_latents", "--validation_split", 0.2, "--max_train_steps", 40, "--lora_rank", 8]
    for name, rate in (("learns", 3e-3), ("still", 0)):
        out, _ = run(*more, "--learning_rate", rate, "--adam_weight_decay", 0, name=name)
        rows = [float(row["loss"]) for row in csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines())]
        before, after = np.array(rows[:8]), np.array(rows[-8:])
        assert np.all(after < 0.9 * before) if name == "learns" else np.array_equal(before, after)


def test_pixels_reach_the_step_as_the_preprocessing_made_them(lora_script, flags, photos):
    sample = folders.samples_in_folder(str(photos), "--instance_data_dir")[0]
    pixels = crops.pixel_values(sample.open(), 32, "lanczos")
    image = Image.open(sample.source).convert("RGB")
    side = min(image.size)
    image = image.resize((round(image.width * 32 / side), round(image.height * 32 / side)), Image.Resampling.LANCZOS)
    left = round((image.width - 32) / 2)
    expected = np.asarray(image.crop((left, 0, left + 32, 32)), np.float32) / 127.5 - 1
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh start", "overwriting"])
def test_a_run_deletes_nothing_it_did_not_make(run, tmp_path, overwrite):
    """The user's own pictures beside ours, and other runs' curves in a logging directory that is shared."""
    mine, shared = tmp_path / "run" / "samples" / "holiday.png", tmp_path / "shared" / "events.out.tfevents.1.other"
    for path in (mine, shared):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"mine")
    run(
        "--cache_latents",
        "--max_train_steps",
        1,
        "--logging_dir",
        tmp_path / "shared",
        *(["--overwrite_output_dir"] * overwrite),
    )
    assert mine.read_bytes() == shared.read_bytes() == b"mine"
