"""Whole runs on the tiny pipeline: the files they write, the models they load, and what flags change."""

import csv
import json
import tarfile

import mindone.diffusers
import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from conftest import encode_here, metrics
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from mindtune.data import crops
from mindtune.encode import encoder_stage
from mindtune.models import loading, named_parameters, precision
from mindtune.run import checkpoint, validation

from .conftest import FINAL, marked


def logged(out, key="loss"):
    return [line[key] for line in metrics(out) if key in line]


def outline(shapes, number):
    return shapes / "conditioning" / f"{number:06d}.png"


def untrained(small_flux):
    """What a new ControlNet of 1+1 blocks holds, from the transformer's file: float32 arrays under diffusers' names."""
    theirs = load_file(small_flux / "transformer" / FINAL)
    blocks = (
        "x_embedder.",
        "context_embedder.",
        "time_text_embed.",
        "transformer_blocks.0.",
        "single_transformer_blocks.0.",
    )
    made = {name: value for name, value in theirs.items() if name.startswith(blocks)}
    inner, tokens = theirs["x_embedder.weight"].shape
    for place, width in (
        ("controlnet_x_embedder", tokens),
        ("controlnet_blocks.0", inner),
        ("controlnet_single_blocks.0", inner),
    ):
        made.update(
            {f"{place}.weight": np.zeros((inner, width), np.float32), f"{place}.bias": np.zeros(inner, np.float32)}
        )
    return made


# ---- what a run writes and loads -----------------------------------------------------------------


def test_a_run_writes_controlnet_checkpoints_curves_images_and_a_record(control, shapes, small_flux, tmp_path):
    more = ["--validation_prompt", "a red circle", "--validation_image", outline(shapes, 0), "--validation_steps", 2]
    more += ["--num_validation_images", 2, "--validation_split", 0.2, "--report_to", "tensorboard"]
    out = control(tmp_path, "--cache_latents", *more, "--max_train_steps", 3, "--checkpointing_steps", 2)
    folders = checkpoint.checkpoints(out)
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3"]
    assert all(checkpoint.damage(folder) is None for folder in folders)
    samples = sorted(path.name for path in (out / "samples").iterdir())
    assert samples == ["final.png", "step-000002.png"]
    assert Image.open(out / "samples" / "final.png").width == 3 * 192  # the condition and two samples, enlarged
    rows = list(csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0"] * 8 + ["2"] * 8 + ["3"] * 8
    assert Image.open(out / "loss_by_timestep.png").format == "PNG"
    assert list((out / "logs").glob("events.out.tfevents*"))
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3]
    record, final = json.loads((out / "run.json").read_text()), load_file(out / FINAL)
    assert record["finished"] and record["updates"] == 3 and record["flags"]["num_double_layers"] == 1
    assert record["data"]["samples"] == 5 and len(record["data"]["held_out"]) == 1
    assert record["trainable"]["controlnet"] == sum(value.size for value in final.values())
    assert record["versions"]["mindspore"] == ms.__version__ and record["peak_memory_mb"]["training_process"] > 0

    # Names and layout of diffusers, in the output directory and in every checkpoint's flux_controlnet.
    expected = {name: value.shape for name, value in untrained(small_flux).items()}
    assert {name: value.shape for name, value in final.items()} == expected
    last = load_file(folders[-1] / "flux_controlnet" / FINAL)
    for folder in (out, folders[-1] / "flux_controlnet"):
        config = json.loads((folder / "config.json").read_text())
        assert config["_class_name"] == "FluxControlNetModel"
        assert (config["num_layers"], config["num_single_layers"]) == (1, 1)
        ours = loading.load_model(folder.parent, folder.name, precision.resolve_precision("no"))
        theirs = mindone.diffusers.FluxControlNetModel.from_pretrained(str(folder))
        for model in (ours, theirs):
            for name, parameter in named_parameters.model_parameters(model).items():
                np.testing.assert_array_equal(parameter.asnumpy(), final[name], err_msg=name)
                np.testing.assert_array_equal(parameter.asnumpy(), last[name], err_msg=name)


def test_on_an_int8_base_a_new_controlnet_is_still_copied_from_the_files(control, small_flux, tmp_path):
    more = ["--base_precision", "int8", "--learning_rate", 0, "--max_train_steps", 1]
    final = load_file(control(tmp_path, "--cache_latents", *more) / FINAL)
    for name, value in untrained(small_flux).items():
        np.testing.assert_array_equal(final[name], value, err_msg=name)


@pytest.mark.parametrize(
    "more, stored, rounded",
    [
        (["--save_weight_dtype", "fp16"], "F16", np.float16),
        (["--save_weight_dtype", "bf16", "--mixed_precision", "bf16"], "BF16", ml_dtypes.bfloat16),
        (["--save_weight_dtype", "fp16", "--upcast_before_saving"], "F32", np.float32),
        (["--mixed_precision", "bf16"], "F32", np.float32),
    ],
)
def test_the_final_weights_have_the_given_dtype_and_checkpoints_float32(control, tmp_path, more, stored, rounded):
    out = control(tmp_path, *more, "--cache_latents", "--max_train_steps", 1)
    last = out / "checkpoint-1" / "flux_controlnet" / FINAL
    for path, dtype in ((out / FINAL, stored), (last, "F32")):
        with safe_open(path, framework="numpy") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}
    exact = load_file(last)
    with safe_open(out / FINAL, framework="numpy") as file:
        for name in file.keys():
            np.testing.assert_array_equal(file.get_tensor(name), exact[name].astype(rounded), err_msg=name)
    loaded = loading.load_model(out.parent, out.name, precision.resolve_precision("no"))
    assert {p.dtype for p in loaded.get_parameters()} == {ms.float32}


def test_with_ema_the_final_weights_are_the_average_by_its_formula(control, small_flux, tmp_path):
    """decay min(0.25, (1 + t) / (10 + t)) after update t: 2/11, then 0.25, on the weights that the checkpoints hold."""
    more = ["--use_ema", "--ema_decay", 0.25, "--checkpointing_steps", 1, "--max_train_steps", 4]
    out = control(tmp_path, "--cache_latents", *more)
    average = {name: value.astype(np.float64) for name, value in untrained(small_flux).items()}
    for update in (1, 2, 3, 4):
        trained = load_file(out / f"checkpoint-{update}" / "flux_controlnet" / FINAL)
        decay = min(0.25, (1 + update) / (10 + update))
        average = {name: decay * value + (1 - decay) * trained[name] for name, value in average.items()}
    final = load_file(out / FINAL)
    for name, value in average.items():
        np.testing.assert_allclose(final[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert np.abs(final["controlnet_blocks.0.weight"] - trained["controlnet_blocks.0.weight"]).max() > 1e-4


def test_training_starts_from_an_existing_controlnet(control, finished_control, loaded, tmp_path):
    """With its number of blocks, not that of a new one. At rate 0 it ends as it started."""
    first = finished_control("--cache_latents")
    loaded.clear()
    more = ["--controlnet_model_name_or_path", first, "--num_double_layers", 4, "--num_single_layers", 4]
    more += ["--cache_latents", "--max_train_steps", 1]
    still = control(tmp_path / "still", *more, "--learning_rate", 0)
    assert loaded == ["transformer", first.name]
    assert (still / FINAL).read_bytes() == (first / FINAL).read_bytes()
    assert (still / "config.json").read_bytes() == (first / "config.json").read_bytes()
    moved = control(tmp_path / "moved", *more)
    assert (moved / FINAL).read_bytes() != (first / FINAL).read_bytes()


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--cache_latents"], ["transformer"]),
        (
            ["--cache_latents", "--num_validation_images", 1, "--validation_prompt", "a red circle"],
            ["transformer", "vae"],
        ),
        ([], ["transformer", "vae"]),
    ],
)
def test_the_training_process_loads_only_what_it_needs(control, loaded, shapes, tmp_path, more, expected):
    """Never the text encoders; the VAE for validation images, or to encode crops in the step."""
    more = [*more, *(["--validation_image", outline(shapes, 0)] if "--validation_prompt" in more else [])]
    control(tmp_path, *more, "--max_train_steps", 1)
    assert loaded == expected


# ---- data ----------------------------------------------------------------------------------------


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def as_jsonl(folder, target):
    """Other keys, absolute paths."""
    lines = []
    for row in rows_of(folder):
        files = {key: str(folder / row[f"{key}_file_name"]) for key in ("image", "conditioning_image")}
        lines.append(json.dumps({**files, "text": row["text"]}))
    (target / "pairs.jsonl").write_text("\n".join(lines))
    return ["--jsonl_for_train", target / "pairs.jsonl"]


def as_shards(folder, target):
    """Two .tar files in WebDataset's layout."""
    target.mkdir()
    for shard in (0, 1):
        with tarfile.open(target / f"{shard:03d}.tar", "w") as tar:
            for number, row in list(enumerate(rows_of(folder)))[3 * shard : 3 * shard + 3]:
                (target / "caption.txt").write_text(row["text"])
                tar.add(folder / row["image_file_name"], f"{number:03d}.image.png")
                tar.add(folder / row["conditioning_image_file_name"], f"{number:03d}.conditioning.png")
                tar.add(target / "caption.txt", f"{number:03d}.txt")
    (target / "caption.txt").unlink()
    return ["--train_data_dir", target]


@pytest.fixture
def sources(shapes, tmp_path):
    """The six shapes in every layout, as flags. A command line that names one of them must not name the folder, too."""
    return {
        "folder": ["--train_data_dir", shapes],
        "jsonl": [*as_jsonl(shapes, tmp_path), "--train_data_dir", ""],
        "shards": as_shards(shapes, tmp_path / "shards"),
        "dataset": ["--dataset_name", shapes, "--train_data_dir", ""],
    }


@pytest.mark.parametrize("source", ["jsonl", "shards", "dataset"])
def test_every_layout_of_the_same_pairs_trains_the_same_controlnet(
    control, finished_control, sources, tmp_path, source
):
    other = control(tmp_path / "other", "--cache_latents", *sources[source])
    assert (other / FINAL).read_bytes() == (finished_control("--cache_latents") / FINAL).read_bytes()


@pytest.mark.parametrize("source", ["folder", "jsonl", "shards", "dataset"])
def test_a_stream_gives_every_pair_once_per_pass_whole_and_with_its_caption(batches, sources, shapes, source):
    """18 uses are three passes over the six pairs; the last of a run's 20 begin the fourth. Shuffled, repeatably."""
    more = [*sources[source], "--streaming", "--max_train_steps", 10, "--train_batch_size", 2]
    more += ["--shuffle_buffer_size", 4]
    expected = {}
    for row in rows_of(shapes):
        image, condition = (
            crops.pixel_values(Image.open(shapes / row[f"{key}_file_name"]), 32, "lanczos").tobytes()
            for key in ("image", "conditioning_image")
        )
        expected[image] = (condition, row["text"])
    orders = []
    for _ in range(2):
        made = batches(*more)
        given = [(i.tobytes(), c.tobytes()) for batch in made.iterate(0, 10) for i, c in zip(*batch[:2])]
        found = [(condition, caption) for (_, condition), caption in zip(given, made.captions)]
        assert found == [expected[image] for image, _ in given]
        orders.append([image for image, _ in given])
    passes = [orders[0][start : start + 6] for start in (0, 6, 12)]
    assert len(orders[0]) == 20 and all(len(set(each)) == 6 for each in passes) and len(set(map(tuple, passes))) > 1
    assert orders[0] == orders[1]

    rest = [image.tobytes() for batch in batches(*more).iterate(7, 10) for image in batch[0]]
    assert rest == orders[0][14:]


@pytest.mark.parametrize("more", [[], ["--cache_latents", "--random_flip"]], ids=["crops", "cached"])
def test_threads_that_prepare_batches_change_nothing(control, tmp_path, more):
    more = [*more, "--proportion_empty_prompts", 0.3, "--max_train_steps", 4, "--dataloader_num_workers"]
    outs = [control(tmp_path / f"{threads}", *more, threads) for threads in (0, 3)]
    assert (outs[0] / "metrics.jsonl").read_bytes() == (outs[1] / "metrics.jsonl").read_bytes()


def test_a_stream_of_shards_trains_the_same_with_threads_and_with_cached_latents(control, sources, tmp_path):
    more = [*sources["shards"], "--streaming", "--shuffle_buffer_size", 3, "--max_train_steps", 3]
    more += ["--train_batch_size", 2]
    kinds = {"plain": [], "threads": ["--dataloader_num_workers", 3], "cached": ["--cache_latents"]}
    plain, threads, cached = (control(tmp_path / name, *more, *kind) for name, kind in kinds.items())
    assert (threads / FINAL).read_bytes() == (plain / FINAL).read_bytes() and len(metrics(plain)) == 3
    for key in ("loss", "grad_norm"):  # the shapes are square: every crop is the central one
        np.testing.assert_allclose(logged(plain, key), logged(cached, key), rtol=1e-4)


def test_empty_captions_are_drawn_anew_for_every_use(batches):
    """A quarter of 600 uses, some of every pair: 150 are expected, four standard deviations are 43."""
    made = batches("--proportion_empty_prompts", 0.25, "--dataloader_num_workers", 0)
    of_pair = {pair.image.name: [] for pair in made.data.train}
    for number, _ in enumerate(made.iterate(0, 600)):
        (use,) = made.data.uses(number)
        assert made.captions[-1] in ("", use.sample.caption)
        of_pair[use.sample.image.name].append(made.captions[-1] == "")
    assert 107 <= made.captions.count("") <= 193
    assert all(len(set(drawn)) == 2 for drawn in of_pair.values())
    assert len(set(map(tuple, of_pair.values()))) == 6

    again = batches("--proportion_empty_prompts", 0.25, "--dataloader_num_workers", 0)
    list(again.iterate(0, 600))
    assert again.captions == made.captions


@pytest.mark.parametrize("share", [0, 1])
def test_empty_captions_never_or_always(batches, share):
    made = batches("--proportion_empty_prompts", share)
    list(made.iterate(0, 40))
    assert made.captions.count("") == 40 * share


def test_the_empty_caption_is_encoded_once_and_only_if_used(control, tmp_path, monkeypatch):
    jobs = []

    def note(job):
        images = list(job.images)
        captions = job.captions()
        jobs.append((captions, images))
        encode_here(job._replace(images=images, captions=lambda: captions))

    monkeypatch.setattr(encoder_stage, "run_in_child", note)
    more = ["--cache_dir", tmp_path / "cache", "--cache_latents", "--max_train_steps", 1]
    control(tmp_path / "never", *more)
    assert "" not in jobs[0][0] and len(jobs[0][1]) == 12
    control(tmp_path / "half", *more, "--proportion_empty_prompts", 0.5)
    assert jobs[1][0].count("") == 1 and not jobs[1][1]
    control(tmp_path / "nearly always", *more, "--proportion_empty_prompts", 0.9)
    assert len(jobs) == 2


# ---- crops, flips, buckets -----------------------------------------------------------------------


def origin(array):
    """(picture, left, top, flipped) of an array [3, h, w] that shows part of `marked`."""
    rgb = np.round((array.astype(np.float64) + 1) * 127.5).astype(int)
    red = rgb[0, 0]
    return rgb[2, 0, 0] // 40, red.min(), rgb[1, 0, 0], bool(red[0] > red[-1])


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flipped"])
def test_condition_and_target_are_cropped_by_one_box_and_flipped_together(batches, oblong, flip):
    more = ["--train_data_dir", oblong, "--train_batch_size", 2, *(["--random_flip"] if flip else [])]
    seen = []
    for images, conditions, *_ in batches(*more).iterate(0, 60):
        for image, condition in zip(images, conditions):
            np.testing.assert_allclose(condition, -image, atol=1e-6)  # the negative of the same pixels
            picture, left, top, flipped = origin(image)
            whole = marked(picture, *((32, 48) if picture % 2 == 0 else (48, 32)))
            expected = whole[top : top + 32, left : left + 32].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(image, expected[:, :, ::-1] if flipped else expected, atol=1e-6)
            seen.append((picture, left, top, flipped))
    assert {picture for picture, *_ in seen} == set(range(6))
    wide, tall = ([place for place in seen if place[0] % 2 == kind] for kind in (0, 1))
    assert len({left for _, left, _, _ in wide}) > 10 and len({top for _, _, top, _ in tall}) > 10
    mirrored = sum(flipped for *_, flipped in seen)
    assert (35 <= mirrored <= 85) if flip else mirrored == 0  # 60 of 120 by expectation


def test_a_batch_of_a_bucket_has_its_shape_and_its_own_images(batches, oblong):
    more = ["--train_data_dir", oblong, "--aspect_ratio_buckets", "32,48;48,32", "--train_batch_size", 2]
    found = []
    for images, conditions, *noises, index, _, _, ids in batches(*more, "--random_flip").iterate(0, 12):
        wide = images.shape[2:] == (32, 48)
        assert wide or images.shape[2:] == (48, 32)
        np.testing.assert_allclose(conditions, -images, atol=1e-6)
        assert all(noise.shape == (2, 16, *((4, 6) if wide else (6, 4))) for noise in noises)
        assert index.shape == (2,) and ids[:, 1:].max(axis=0).tolist() == ([1, 2] if wide else [2, 1])
        for image in images:
            number, left, top, _ = origin(image)
            assert (left, top) == (0, 0) and number % 2 == (0 if wide else 1)
            found.append(number)
    assert [found.count(number) for number in range(6)] == [4] * 6  # 24 uses, four epochs


def assert_logged_alike(out, other, evaluations):
    for key in ("loss", "grad_norm", "held_out__loss"):
        expected = logged(other, key)
        assert len(set(expected)) == (evaluations if key == "held_out__loss" else len(metrics(other)) - evaluations)
        np.testing.assert_allclose(logged(out, key), expected, rtol=1e-4, err_msg=key)


def test_two_buckets_train_in_one_run_cached_or_not(control, oblong, tmp_path):
    """Batches of two, of both shapes; the VAE in the encoder stage or in the step.

    In between the held-out loss is measured with the averaged weights, which must leave the weights as they were.
    """
    more = ["--train_data_dir", oblong, "--aspect_ratio_buckets", "32,48;48,32", "--train_batch_size", 2]
    more += ["--use_ema", "--validation_split", 0.2, "--validation_steps", 2, "--num_single_layers", 0]
    cached = control(tmp_path / "cached", *more, "--cache_latents")
    in_the_step = control(tmp_path / "in the step", *more, "--center_crop")
    assert_logged_alike(in_the_step, cached, evaluations=3)


def test_the_graph_trains_as_pynative_does(control, finished_control, tmp_path):
    """With held-out losses of averaged weights in PyNative in between."""
    more = [
        "--cache_latents",
        "--use_ema",
        "--validation_split",
        0.2,
        "--validation_steps",
        2,
        "--num_single_layers",
        0,
    ]
    graph = control(tmp_path, *more, "--mindspore_mode", 0)
    assert_logged_alike(graph, finished_control(*more), evaluations=3)


# ---- updates -------------------------------------------------------------------------------------


def test_batch_size_and_accumulation_make_the_same_update(control, tmp_path):
    """Batch size 2 and two micro-batches of 1 have the same pairs with the same draws."""
    more = ["--cache_latents", "--random_flip", "--proportion_empty_prompts", 0.3]
    outs = [
        control(tmp_path / f"{size}", *more, "--train_batch_size", size, "--gradient_accumulation_steps", steps)
        for size, steps in ((2, 1), (1, 2))
    ]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(logged(outs[0], key), logged(outs[1], key), rtol=1e-4)
    weights = [load_file(out / FINAL) for out in outs]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=1e-5, err_msg=name)


def test_learning_rate_0_leaves_the_weights_and_another_moves_them(control, small_flux, tmp_path):
    """And the held-out loss, which has the same draws in every evaluation."""
    before = untrained(small_flux)
    for name, rate in (("still", 0), ("moved", 1e-3)):
        more = ["--cache_latents", "--validation_split", 0.2, "--max_train_steps", 2]
        out = control(tmp_path / name, "--learning_rate", rate, *more)
        after = load_file(out / FINAL)
        same = {key: np.array_equal(value, before[key]) for key, value in after.items()}
        losses = [row["loss"] for row in csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines())]
        assert len(losses) == 16 and (losses[:8] == losses[8:]) == (rate == 0)
        assert all(same.values()) if rate == 0 else not any(same.values())


@pytest.mark.parametrize(
    "optimizer, rate",
    [("adamweightdecay", 1e-3), ("prodigy", 1.0), ("adafactor", 1e-3), ("adamw --use_8bit_adam", 1e-3)],
)
def test_the_other_optimizers_train_it_too(control, small_flux, tmp_path, optimizer, rate):
    more = ["--optimizer", *optimizer.split(), "--learning_rate", rate, "--max_train_steps", 2]
    after, before = load_file(control(tmp_path, "--cache_latents", *more) / FINAL), untrained(small_flux)
    assert not np.array_equal(after["controlnet_blocks.0.weight"], before["controlnet_blocks.0.weight"])
    assert all(np.isfinite(value).all() for value in after.values())


def test_gradient_checkpointing_trains_the_same(control, finished_control, tmp_path):
    """In PyNative; for the graph see test_step.py."""
    plain = finished_control("--cache_latents")
    recomputed = control(tmp_path, "--cache_latents", "--gradient_checkpointing")
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(logged(plain, key), logged(recomputed, key), rtol=1e-5)


def test_warmup_and_scaled_rates_are_counted_in_updates(control, tmp_path):
    schedule = ["--lr_scheduler", "linear", "--lr_warmup_steps", 2, "--scale_lr", "--learning_rate", 1e-3]
    out = control(tmp_path, *schedule, "--gradient_accumulation_steps", 2, "--cache_latents", "--max_train_steps", 4)
    np.testing.assert_allclose(logged(out, "lr"), np.array([0, 0.5, 1, 0.5]) * 2e-3)


# ---- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, numbers, rows",
    [
        (["a red circle", "a blue star"], [0], [("a red circle", 0), ("a blue star", 0)]),
        (["a red circle"], [0, 1], [("a red circle", 0), ("a red circle", 1)]),
        (["a red circle", "a blue star"], [1, 0], [("a red circle", 1), ("a blue star", 0)]),
    ],
    ids=["one image", "one prompt", "pairs"],
)
def test_validation_samples_prompts_and_conditions_together(
    control, shapes, monkeypatch, tmp_path, prompts, numbers, rows
):
    grids, image_grid = [], validation.image_grid
    monkeypatch.setattr(validation, "image_grid", lambda *given: grids.append(given) or image_grid(*given))
    images = [outline(shapes, number) for number in numbers]
    more = ["--validation_prompt", *prompts, "--validation_image", *images, "--num_validation_images", 2]
    out = control(tmp_path, "--cache_latents", *more, "--num_inference_steps", 1, "--max_train_steps", 1)
    ((grid, labels),) = grids
    assert labels == [prompt for prompt, _ in rows]
    for row, (_, number) in zip(grid, rows):
        condition = Image.open(outline(shapes, number)).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(row[0]), np.asarray(condition))
        assert len(row) == 3 and row[1].tobytes() != row[2].tobytes()  # each from its own noise
    assert Image.open(out / "samples" / "final.png").format == "PNG"
