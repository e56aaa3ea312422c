"""Whole runs on the tiny pipeline: what they leave behind, what they hold in memory, and what every flag changes."""

import csv
import json
import tarfile
from types import SimpleNamespace

import mindone.diffusers
import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from conftest import metrics
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from mindtune.data import crops
from mindtune.encode import child, encoder_stage
from mindtune.models import loading, named_parameters, precision
from mindtune.run import checkpoint

from .conftest import FINAL, marked


@pytest.fixture
def run(control, tmp_path, monkeypatch):
    """run(*flags): a run in this process; gives its output directory and the names of the models that it loaded itself."""

    def go(*more, name="run"):
        loaded, real = [], loading.load_model
        monkeypatch.setattr(
            loading, "load_model", lambda root, part, *rest: loaded.append(part) or real(root, part, *rest)
        )
        control(tmp_path / name, *more)
        monkeypatch.setattr(loading, "load_model", real)
        return tmp_path / name, loaded

    return go


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


# ---- what is left --------------------------------------------------------------------------------


def test_a_run_leaves_controlnet_checkpoints_curves_pictures_and_a_record(run, shapes, small_flux):
    looking = [
        "--validation_prompt",
        "a red circle",
        "--validation_image",
        outline(shapes, 0),
        "--num_validation_images",
        2,
    ]
    looking += ["--validation_steps", 2, "--validation_split", 0.2, "--report_to", "tensorboard"]
    out, _ = run("--cache_latents", *looking, "--max_train_steps", 5, "--checkpointing_steps", 2)
    folders = checkpoint.checkpoints(out)
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert all(checkpoint.damage(folder) is None for folder in folders)
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "final.png",
        "step-000002.png",
        "step-000004.png",
    ]
    assert Image.open(out / "samples" / "final.png").width == 3 * 192  # the condition and two pictures, enlarged
    rows = list(csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0"] * 8 + ["2"] * 8 + ["4"] * 8 + ["5"] * 8
    assert Image.open(out / "loss_by_timestep.png").format == "PNG"
    assert list((out / "logs").glob("events.out.tfevents*"))
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]
    record, final = json.loads((out / "run.json").read_text()), load_file(out / FINAL)
    assert record["finished"] and record["updates"] == 5 and record["flags"]["num_double_layers"] == 1
    assert record["data"]["samples"] == 5 and len(record["data"]["held_out"]) == 1
    assert record["trainable"]["controlnet"] == sum(value.size for value in final.values())
    assert record["versions"]["mindspore"] == ms.__version__ and record["peak_memory_mb"]["training_process"] > 0

    # diffusers' names and layout: in the output directory, and in every checkpoint's flux_controlnet.
    expected = untrained(small_flux)
    assert {name: value.shape for name, value in final.items()} == {
        name: value.shape for name, value in expected.items()
    }
    last = load_file(folders[-1] / "flux_controlnet" / FINAL)
    for folder in (out, folders[-1] / "flux_controlnet"):
        config = json.loads((folder / "config.json").read_text())
        assert (config["_class_name"], config["num_layers"], config["num_single_layers"]) == (
            "FluxControlNetModel",
            1,
            1,
        )
        ours = loading.load_model(folder.parent, folder.name, precision.resolve_precision("no"))
        theirs = mindone.diffusers.FluxControlNetModel.from_pretrained(str(folder))
        for model in (ours, theirs):
            for name, parameter in named_parameters.model_parameters(model).items():
                np.testing.assert_array_equal(parameter.asnumpy(), final[name], err_msg=name)
                np.testing.assert_array_equal(parameter.asnumpy(), last[name], err_msg=name)


def test_on_an_int8_base_a_new_controlnet_is_still_copied_from_the_files(run, small_flux):
    out, _ = run("--cache_latents", "--base_precision", "int8", "--learning_rate", 0, "--max_train_steps", 1)
    final = load_file(out / FINAL)
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
def test_the_final_weights_are_in_the_type_asked_for_and_checkpoints_in_float32(run, more, stored, rounded):
    out, _ = run(*more, "--cache_latents", "--max_train_steps", 1)
    last = out / "checkpoint-1" / "flux_controlnet" / FINAL
    for path, kind in ((out / FINAL, stored), (last, "F32")):
        with safe_open(path, framework="numpy") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {kind}
    exact = load_file(last)
    with safe_open(out / FINAL, framework="numpy") as file:
        for name in file.keys():
            np.testing.assert_array_equal(file.get_tensor(name), exact[name].astype(rounded), err_msg=name)
    loaded = loading.load_model(out.parent, out.name, precision.resolve_precision("no"))
    assert {p.dtype for p in loaded.get_parameters()} == {ms.float32}


def test_with_ema_the_final_weights_are_the_average_by_its_formula(run, small_flux):
    """decay min(0.25, (1 + t) / (10 + t)) after update t: 2/11, then 0.25, on the weights that the checkpoints hold."""
    out, _ = run(
        "--use_ema", "--ema_decay", 0.25, "--cache_latents", "--checkpointing_steps", 1, "--max_train_steps", 4
    )
    average = {name: value.astype(np.float64) for name, value in untrained(small_flux).items()}
    for update in (1, 2, 3, 4):
        live = load_file(out / f"checkpoint-{update}" / "flux_controlnet" / FINAL)
        decay = min(0.25, (1 + update) / (10 + update))
        average = {name: decay * value + (1 - decay) * live[name] for name, value in average.items()}
    final = load_file(out / FINAL)
    for name, value in average.items():
        np.testing.assert_allclose(final[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert np.abs(final["controlnet_blocks.0.weight"] - live["controlnet_blocks.0.weight"]).max() > 1e-4


def test_a_controlnet_that_exists_is_gone_on_from(run):
    """Its own blocks count, not those that a new one would have; at rate 0 it comes out as it went in."""
    first, _ = run("--cache_latents", name="first")
    again = [
        "--controlnet_model_name_or_path",
        first,
        "--num_double_layers",
        4,
        "--num_single_layers",
        4,
        "--cache_latents",
    ]
    still, _ = run(*again, "--learning_rate", 0, "--max_train_steps", 1, name="still")
    assert (still / FINAL).read_bytes() == (first / FINAL).read_bytes()
    assert (still / "config.json").read_bytes() == (first / "config.json").read_bytes()
    moved, loaded = run(*again, "--max_train_steps", 1, name="moved")
    assert loaded == ["transformer", "first"]
    assert (moved / FINAL).read_bytes() != (first / FINAL).read_bytes()


@pytest.mark.parametrize(
    "more, held",
    [
        (["--cache_latents"], ["transformer"]),
        (
            ["--cache_latents", "--num_validation_images", 1, "--validation_prompt", "a red circle"],
            ["transformer", "vae"],
        ),
        ([], ["transformer", "vae"]),
    ],
)
def test_the_training_process_loads_only_what_it_needs(run, shapes, more, held):
    """Text encoders never; the VAE to draw, or to encode fresh crops."""
    more = [*more, *(["--validation_image", outline(shapes, 0)] if "--validation_prompt" in more else [])]
    assert run(*more, "--max_train_steps", 1)[1] == held


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
def test_every_layout_of_the_same_pairs_trains_the_same_controlnet(run, sources, source):
    folder, _ = run("--cache_latents", name="folder")
    other, _ = run("--cache_latents", *sources[source], name="other")
    assert (other / FINAL).read_bytes() == (folder / FINAL).read_bytes()


@pytest.fixture
def batches(control_script, control_flags, tmp_path):
    """batches(*flags): the script's batches, its training pairs, and the list of captions asked for, which are not encoded here."""

    def make(*more):
        captions = []

        def text(caption):
            captions.append(caption)
            return {"prompt_embeds": np.zeros((16, 32), np.float32), "pooled_prompt_embeds": np.zeros(32, np.float32)}

        args = control_script.parse_args(control_flags(tmp_path / "out", *more))
        data = control_script.load_data(args, 0)
        return control_script.Batches(args, 0, SimpleNamespace(text=text), data, (16, 8), 1000), data.train, captions

    return make


@pytest.mark.parametrize("source", ["folder", "jsonl", "shards", "dataset"])
def test_a_stream_gives_every_pair_once_a_pass_whole_and_with_its_caption(batches, sources, shapes, source):
    """Eighteen uses are three passes over the six; the last of a run's twenty begin the fourth. Shuffled, and repeatably so."""
    more = [
        *sources[source],
        "--streaming",
        "--max_train_steps",
        10,
        "--train_batch_size",
        2,
        "--shuffle_buffer_size",
        4,
    ]
    expected = {}
    for row in rows_of(shapes):
        pixels = [
            crops.pixel_values(Image.open(shapes / row[f"{key}_file_name"]), 32, "lanczos")
            for key in ("image", "conditioning_image")
        ]
        expected[pixels[0].tobytes()] = (pixels[1].tobytes(), row["text"])
    orders = []
    for _ in range(2):
        made, _, captions = batches(*more)
        given = [(i.tobytes(), c.tobytes()) for batch in made.iterate(0, 10) for i, c in zip(*batch[:2])]
        assert [(condition, caption) for (_, condition), caption in zip(given, captions)] == [
            expected[image] for image, _ in given
        ]
        orders.append([image for image, _ in given])
    passes = [orders[0][start : start + 6] for start in (0, 6, 12)]
    assert len(orders[0]) == 20 and all(len(set(each)) == 6 for each in passes) and len(set(map(tuple, passes))) > 1
    assert orders[0] == orders[1]

    made, _, _ = batches(*more)
    rest = [image.tobytes() for batch in made.iterate(7, 10) for image in batch[0]]
    assert rest == orders[0][14:]


@pytest.mark.parametrize("more", [[], ["--cache_latents", "--random_flip"]], ids=["fresh", "cached"])
def test_loader_threads_change_nothing(run, more):
    more = [*more, "--proportion_empty_prompts", 0.3, "--max_train_steps", 6]
    outs = [run(*more, "--dataloader_num_workers", n, name=f"threads{n}")[0] for n in (0, 3)]
    assert (outs[0] / "metrics.jsonl").read_bytes() == (outs[1] / "metrics.jsonl").read_bytes()


def test_a_stream_of_shards_trains_the_same_with_threads_and_with_cached_latents(run, sources):
    more = [
        *sources["shards"],
        "--streaming",
        "--shuffle_buffer_size",
        3,
        "--max_train_steps",
        4,
        "--train_batch_size",
        2,
    ]
    kinds = {"plain": [], "threads": ["--dataloader_num_workers", 3], "cached": ["--cache_latents"]}
    plain, threads, cached = (run(*more, *kind, name=name)[0] for name, kind in kinds.items())
    assert (threads / FINAL).read_bytes() == (plain / FINAL).read_bytes() and len(metrics(plain)) == 4
    for key in ("loss", "grad_norm"):  # the shapes are square, so that a fresh crop is the central one
        np.testing.assert_allclose(*([line[key] for line in metrics(out)] for out in (plain, cached)), rtol=1e-4)


def test_empty_captions_are_drawn_afresh_for_every_use(batches):
    """A quarter of 600 uses, of every pair some and not others: 150 by expectation, four standard deviations are 43."""
    made, train, captions = batches("--proportion_empty_prompts", 0.25)
    of_pair = {pair.image.name: [] for pair in train}
    for number in range(600):
        next(made.iterate(number, number + 1))
        ((sample_id, _),) = made.data.order.at(number)[1]
        assert captions[-1] in ("", train[sample_id].caption)
        of_pair[train[sample_id].image.name].append(captions[-1] == "")
    assert 107 <= captions.count("") <= 193
    assert all(len(set(drawn)) == 2 for drawn in of_pair.values())
    assert len(set(map(tuple, of_pair.values()))) == 6

    again, _, repeated = batches("--proportion_empty_prompts", 0.25)
    for number in range(600):
        next(again.iterate(number, number + 1))
    assert repeated == captions


@pytest.mark.parametrize("share", [0, 1])
def test_empty_captions_never_or_always(batches, share):
    made, _, captions = batches("--proportion_empty_prompts", share)
    for number in range(40):
        next(made.iterate(number, number + 1))
    assert captions.count("") == 40 * share


def test_the_empty_caption_is_encoded_once_and_only_if_used(run, tmp_path, monkeypatch):
    jobs = []

    def in_this_process(job):
        jobs.append([list(job[1]), list(job[2])])
        child.encode_captions(*job[:2])
        child.encode_images(job[0], job[2])

    monkeypatch.setattr(encoder_stage, "_in_child", in_this_process)
    more = ["--cache_dir", tmp_path / "cache", "--cache_latents", "--max_train_steps", 1]
    run(*more, name="never")
    assert "" not in jobs[0][0] and len(jobs[0][1]) == 12
    run(*more, "--proportion_empty_prompts", 0.5, name="half")
    assert jobs[1][0].count("") == 1 and not jobs[1][1]
    run(*more, "--proportion_empty_prompts", 0.9, name="nearly always")
    assert len(jobs) == 2


# ---- crops, flips, buckets -----------------------------------------------------------------------


def origin(array):
    """(picture, left, top, flipped) of an array [3, h, w] that shows part of `marked`."""
    rgb = np.round((array.astype(np.float64) + 1) * 127.5).astype(int)
    red = rgb[0, 0]
    return rgb[2, 0, 0] // 40, red.min(), rgb[1, 0, 0], bool(red[0] > red[-1])


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flipped"])
def test_condition_and_target_are_cropped_by_one_box_and_flipped_together(batches, oblong, flip):
    made, _, _ = batches("--train_data_dir", oblong, *(["--random_flip"] if flip else []), "--train_batch_size", 2)
    seen = []
    for number in range(60):
        images, conditions = next(made.iterate(number, number + 1))[:2]
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


def test_a_batch_of_a_bucket_has_its_shape_and_its_own_pictures(batches, oblong):
    more = [
        "--train_data_dir",
        oblong,
        "--aspect_ratio_buckets",
        "32,48;48,32",
        "--train_batch_size",
        2,
        "--random_flip",
    ]
    made, _, _ = batches(*more)
    pictures = []
    for number in range(12):
        images, conditions, *noises, index, _, _, ids = next(made.iterate(number, number + 1))
        wide = images.shape[2:] == (32, 48)
        assert wide or images.shape[2:] == (48, 32)
        np.testing.assert_allclose(conditions, -images, atol=1e-6)
        assert all(noise.shape == (2, 16, *((4, 6) if wide else (6, 4))) for noise in noises)
        assert index.shape == (2,) and ids[:, 1:].max(axis=0).tolist() == ([1, 2] if wide else [2, 1])
        found = [origin(image) for image in images]
        assert all((left, top) == (0, 0) and picture % 2 == (0 if wide else 1) for picture, left, top, _ in found)
        pictures += [picture for picture, *_ in found]
    assert [pictures.count(picture) for picture in range(6)] == [4] * 6  # 24 uses, four passes


def test_two_buckets_train_in_one_run_cached_or_not_and_in_the_graph(run, oblong):
    """Batches of two, of both shapes; the VAE in the child process or in the step; the graph compiled for either shape.

    In between the held-out loss is measured with the average in the weights' place, which must leave them as they were.
    """
    more = [
        "--train_data_dir",
        oblong,
        "--aspect_ratio_buckets",
        "32,48;48,32",
        "--train_batch_size",
        2,
        "--max_train_steps",
        4,
    ]
    more += ["--use_ema", "--validation_split", 0.2, "--validation_steps", 2, "--num_single_layers", 0]
    kinds = {
        "cached": ["--cache_latents"],
        "inside": ["--center_crop"],
        "graph": ["--cache_latents", "--mindspore_mode", 0],
    }
    cached, inside, graph = (run(*more, *kind, name=name)[0] for name, kind in kinds.items())
    for key in ("loss", "grad_norm", "held_out__loss"):
        expected = [line[key] for line in metrics(cached) if key in line]
        assert len(set(expected)) == (3 if key == "held_out__loss" else 4)
        for out in (inside, graph):
            np.testing.assert_allclose(
                [line[key] for line in metrics(out) if key in line], expected, rtol=1e-4, err_msg=key
            )


# ---- updates -------------------------------------------------------------------------------------


def test_batch_and_accumulation_make_the_same_update(run):
    """Batch 2 and two steps of batch 1 see the same pairs under the same draws."""
    more = ["--cache_latents", "--random_flip", "--proportion_empty_prompts", 0.3]
    outs = [
        run(*more, "--train_batch_size", b, "--gradient_accumulation_steps", a, name=f"b{b}")[0]
        for b, a in ((2, 1), (1, 2))
    ]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(*([line[key] for line in metrics(out)] for out in outs), rtol=1e-4)
    weights = [load_file(out / FINAL) for out in outs]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=1e-5, err_msg=name)


def test_learning_rate_zero_leaves_the_weights_and_another_moves_them(run, small_flux):
    """With it the held-out loss, whose draws are the same at every look."""
    before = untrained(small_flux)
    for name, rate in (("still", 0), ("moved", 1e-3)):
        out, _ = run("--learning_rate", rate, "--cache_latents", "--validation_split", 0.2, name=name)
        after = load_file(out / FINAL)
        same = {key: np.array_equal(value, before[key]) for key, value in after.items()}
        losses = [row["loss"] for row in csv.DictReader((out / "loss_by_timestep.csv").read_text().splitlines())]
        assert len(losses) == 16 and (losses[:8] == losses[8:]) == (rate == 0)
        assert all(same.values()) if rate == 0 else not any(same.values())


@pytest.mark.parametrize(
    "optimizer, rate",
    [("adamweightdecay", 1e-3), ("prodigy", 1.0), ("adafactor", 1e-3), ("adamw --use_8bit_adam", 1e-3)],
)
def test_the_other_optimizers_train_it_too(run, small_flux, optimizer, rate):
    out, _ = run("--optimizer", *optimizer.split(), "--learning_rate", rate, "--cache_latents")
    after, before = load_file(out / FINAL), untrained(small_flux)
    assert not np.array_equal(after["controlnet_blocks.0.weight"], before["controlnet_blocks.0.weight"])
    assert all(np.isfinite(value).all() for value in after.values())


def test_gradient_checkpointing_trains_the_same(run):
    """In PyNative; for the graph see test_step.py."""
    outs = [
        run("--cache_latents", *more, name=name)[0]
        for name, more in (("plain", []), ("saving", ["--gradient_checkpointing"]))
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
def test_validation_draws_prompts_and_conditions_together(
    run, control_script, shapes, monkeypatch, prompts, numbers, rows
):
    drawn, real = [], control_script.grids.image_grid
    monkeypatch.setattr(control_script.grids, "image_grid", lambda *given: drawn.append(given) or real(*given))
    images = [outline(shapes, number) for number in numbers]
    more = [
        "--validation_prompt",
        *prompts,
        "--validation_image",
        *images,
        "--num_validation_images",
        2,
        "--num_inference_steps",
        1,
    ]
    out, _ = run("--cache_latents", *more, "--max_train_steps", 1)
    ((grid, labels),) = drawn
    assert labels == [prompt for prompt, _ in rows]
    for row, (_, number) in zip(grid, rows):
        condition = np.asarray(
            Image.open(outline(shapes, number)).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
        )
        np.testing.assert_array_equal(np.asarray(row[0]), condition)
        assert len(row) == 3 and row[1].tobytes() != row[2].tobytes()  # each from its own noise
    assert Image.open(out / "samples" / "final.png").format == "PNG"
