"""Bad input: a message that names the flag or file, what was found and what to do; nothing is written or loaded."""

import hashlib
import json
import re
import shutil

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.models import controlnets, loading

from .conftest import FINAL, write_pairs


def tree(*folders):
    """Every file with a hash of its content, and every folder; but for what was learnt of images, which stays."""
    paths = sorted(path for folder in folders for path in folder.rglob("*"))
    paths = [path for path in paths if path.name not in ("images.jsonl", "mindtune")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths}


def without(arguments, flag):
    """A command line without `flag` and its value."""
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def refused(control_script, control_flags, tmp_path, small_flux, shapes, monkeypatch):
    """refused(*flags, drop=None): the message of the UserError. No model was loaded and no file changed."""

    def never(*_):
        pytest.fail("a model was loaded before the input was checked")

    def run(*more, drop=None):
        monkeypatch.setattr("mindtune.models.loading.load_model", never)
        monkeypatch.setattr("mindtune.encode.encoder_stage.run_in_child", never)
        arguments = control_flags(tmp_path / "out", *more)
        before, mode = tree(tmp_path, small_flux, shapes), ms.get_context("mode")
        with pytest.raises(UserError) as caught:
            control_script.main(without(arguments, drop) if drop else arguments)
        ms.set_context(mode=mode)
        assert tree(tmp_path, small_flux, shapes) == before
        return str(caught.value)

    return run


def says(message, *parts):
    """All of `parts` are in the message, and it is a sentence."""
    missing = [part for part in parts if part not in message]
    assert not missing and message.endswith("."), message


# ---- flags ---------------------------------------------------------------------------------------

BAD_VALUES = [
    (["--distributed"], ["--distributed", "msrun --worker_num=2", "--join=True"]),
    (["--zero_stage", 1], ["--zero_stage 1", "--distributed"]),
    (["--resolution", 100], ["--resolution 100", "divisible by 16", "nearest is 96"]),
    (["--resolution", 0], ["--resolution 0", "divisible by 16", "nearest is 16"]),
    (
        ["--num_double_layers", 0, "--num_single_layers", 0],
        ["--num_double_layers 0 --num_single_layers 0", "at least one block"],
    ),
    (["--proportion_empty_prompts", 1.5], ["--proportion_empty_prompts 1.5", "between 0 and 1"]),
    (["--proportion_empty_prompts", "nan"], ["--proportion_empty_prompts nan"]),
    (["--aspect_ratio_buckets", "32x48"], ["--aspect_ratio_buckets", "'32x48'", "height,width"]),
    (["--aspect_ratio_buckets", "32,40"], ["--aspect_ratio_buckets", "32,40", "multiples of 16"]),
    (["--aspect_ratio_buckets", "32,48;32,48"], ["--aspect_ratio_buckets", "32,48", "twice"]),
    (["--aspect_ratio_buckets", ";"], ["--aspect_ratio_buckets ';'", "no bucket"]),
    (["--validation_split", 0.95], ["--validation_split 0.95", "6 of 6 samples", "smaller share"]),
]
CONFLICTS = [
    (["--dataset_name", "some/pairs"], ["--dataset_name", "--train_data_dir", "--jsonl_for_train", "give one of"]),
    (["--jsonl_for_train", "x.jsonl"], ["--dataset_name", "--train_data_dir", "--jsonl_for_train", "give one of"]),
    (["--dataset_config_name", "large"], ["--dataset_config_name large", "--dataset_name", "leave it out"]),
    (["--streaming", "--max_train_samples", 3], ["--max_train_samples with --streaming", "leave one of the two out"]),
    (["--streaming", "--validation_split", 0.2], ["--validation_split with --streaming", "leave one of the two out"]),
    (
        ["--streaming", "--aspect_ratio_buckets", "32,48"],
        ["--aspect_ratio_buckets with --streaming", "leave one of the two out"],
    ),
    (["--streaming", "--skip_bad_images"], ["--skip_bad_images with --streaming", "leave one of the two out"]),
    (
        ["--resume_from_checkpoint", "checkpoint-9"],
        ["--resume_from_checkpoint checkpoint-9", "no such checkpoint", "none"],
    ),
    (
        ["--pretrained_model_name_or_path", "./flux"],
        ["--pretrained_model_name_or_path ./flux", "no such directory", "hub id"],
    ),
    (
        ["--controlnet_model_name_or_path", "./none"],
        ["--controlnet_model_name_or_path ./none", "no such directory", "hub id"],
    ),
    (["--train_data_dir", "no/where"], ["--train_data_dir no/where", "no such directory"]),
    (["--image_column", "photo"], ["--image_column photo", "has the columns", "conditioning_image"]),
    (
        ["--conditioning_image_column", "edges"],
        ["--conditioning_image_column edges", "has the columns", "conditioning_image"],
    ),
    (["--caption_column", "words"], ["--caption_column words", "has the columns", "text"]),
    (["--num_double_layers", 2], ["--num_double_layers 2", "the transformer has only 1"]),
    (["--num_single_layers", 2], ["--num_single_layers 2", "the transformer has only 1"]),
]


def named(cases):
    return [pytest.param(*case, id=" ".join(map(str, case[0]))) for case in cases]


@pytest.mark.parametrize("bad, parts", named(BAD_VALUES + CONFLICTS))
def test_a_bad_flag_is_named_with_its_value_and_the_way_out(refused, bad, parts):
    says(refused(*bad), *parts)


def test_the_id_of_a_data_set_is_not_looked_for_on_modelscope(refused):
    found = refused("--train_data_dir", "", "--dataset_name", "some/pairs", "--hub", "modelscope")
    says(found, "--dataset_name some/pairs", "modelscope download --dataset some/pairs --local_dir DIR")


def test_a_hub_token_is_not_repeated_in_the_message(refused, fake_hub):
    found = refused("--push_to_hub", "--hub_token", "hf_secret")
    assert "--push_to_hub: the hub does not accept this token" in found and "hf_secret" not in found


def test_no_source_of_pairs_at_all(refused):
    says(refused(drop="--train_data_dir"), "--dataset_name", "--train_data_dir", "--jsonl_for_train", "not none")


def test_a_stream_has_no_end_of_its_own(refused):
    says(refused("--streaming", drop="--max_train_steps"), "--streaming needs --max_train_steps")


def test_the_default_size_does_not_fit_a_small_transformer(refused):
    says(refused(drop="--num_double_layers"), "--num_double_layers 4", "the transformer has only 1")


@pytest.mark.parametrize(
    "bad, found",
    [
        (["--mixed_precision", "fp8"], "argument --mixed_precision: invalid choice: 'fp8'"),
        (["--max_train_steps", "many"], "argument --max_train_steps: invalid int value: 'many'"),
        (["--validation_prompt"], "argument --validation_prompt: expected at least one argument"),
        (["--learn_rate", "1"], "unrecognized arguments: --learn_rate 1"),
    ],
)
def test_what_argparse_refuses_exits_with_2(control_script, control_flags, tmp_path, capsys, bad, found):
    with pytest.raises(SystemExit) as caught:
        control_script.main(control_flags(tmp_path / "out", *bad))
    assert caught.value.code == 2 and found in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts, images", [(2, 3), (3, 2), (1, 0), (0, 1)])
def test_prompts_and_conditions_that_do_not_match(refused, shapes, prompts, images):
    given = ["--validation_prompt", *["a red circle"] * prompts] if prompts else []
    given += ["--validation_image", *[shapes / "conditioning" / "000000.png"] * images] if images else []
    says(
        refused(*given),
        f"--validation_prompt has {prompts} and --validation_image {images}",
        "same number",
        "one prompt",
    )


@pytest.mark.parametrize(
    "content, found", [(None, "missing"), (b"<html>404</html>", "a web page"), (b"", "the file is empty")]
)
def test_a_condition_to_validate_with_that_is_no_picture(refused, tmp_path, content, found):
    path = tmp_path / "outline.png"
    if content is not None:
        path.write_bytes(content)
    says(
        refused("--validation_prompt", "x", "--validation_image", path),
        f"--validation_image {path}: cannot be read as an image",
        found,
    )


# ---- the ControlNet to go on from ----------------------------------------------------------------


@pytest.fixture(scope="session")
def whole_controlnet(small_flux, tmp_path_factory):
    """A ControlNet of one block of either kind on disk."""
    folder = tmp_path_factory.mktemp("existing") / "controlnet"
    loading.save_model(controlnets.flux_controlnet(small_flux, 1, 1), folder, ms.float32)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config(**changes):
    return lambda controlnet: edit_json(controlnet / "config.json", **changes)


BROKEN_CONTROLNETS = {
    "no config": (lambda c: (c / "config.json").unlink(), ["config.json is missing"]),
    "half a config": (lambda c: cut_in_half(c / "config.json"), ["config.json", "not JSON"]),
    "no weights": (lambda c: (c / FINAL).unlink(), [f"{FINAL} is missing"]),
    "half the weights": (lambda c: cut_in_half(c / FINAL), [FINAL, "its header says"]),
    "another class": (
        config(_class_name="SD3ControlNetModel"),
        ["the class is SD3ControlNetModel, expected FluxControlNetModel"],
    ),
    "another width": (config(attention_head_dim=128), ["attention_head_dim is 128", "the base model's is 16"]),
    "other channels": (config(in_channels=128), ["in_channels is 128", "the base model's is 64"]),
    "another text encoder": (config(joint_attention_dim=4096), ["joint_attention_dim is 4096"]),
    "union": (config(num_mode=10), ["union ControlNet (num_mode 10)", "Give one for a single condition"]),
    "condition as pixels": (
        config(conditioning_embedding_channels=16),
        ["conditioning_embedding_channels", "not supported"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONTROLNETS)
def test_a_controlnet_that_does_not_fit_is_refused(refused, whole_controlnet, tmp_path, case):
    break_it, parts = BROKEN_CONTROLNETS[case]
    folder = shutil.copytree(whole_controlnet, tmp_path / "controlnet")
    break_it(folder)
    says(refused("--controlnet_model_name_or_path", folder), f"--controlnet_model_name_or_path {folder}", *parts)


# ---- pairs ---------------------------------------------------------------------------------------


def gray(width, height):
    return np.full((height, width, 3), 128, np.uint8)


@pytest.fixture
def bad_pairs(tmp_path):
    """Two good pairs and one of every bad kind; a file is there for each."""
    images = [gray(48, 40), gray(48, 40), gray(48, 40), gray(31, 90), gray(48, 40), gray(40, 48)]
    conditions = [gray(48, 40), gray(40, 48), gray(48, 40), gray(31, 90), gray(48, 40), gray(40, 48)]
    folder = write_pairs(tmp_path / "bad pairs", images, conditions, ["x"] * 6)
    (folder / "conditioning/2.png").write_text("<html>404</html>")
    cut_in_half(folder / "images/4.png")
    return folder


def test_all_bad_pairs_are_listed_at_once(refused, bad_pairs):
    message = refused("--train_data_dir", bad_pairs)
    says(message, f"--train_data_dir {bad_pairs}: 4 of 6 pairs cannot be used", "--skip_bad_images")
    says(
        message,
        "1.png: 48x40, its condition 40x48",
        "2.png: its condition: not an image",
        "3.png: 31x90 is smaller than --resolution 32",
    )
    assert re.search(r"images/4.png: (damaged|not an image)", message)
    assert "/0.png" not in message and "/5.png" not in message


def test_pairs_too_small_for_their_own_bucket(refused, bad_pairs):
    message = refused("--train_data_dir", bad_pairs, "--aspect_ratio_buckets", "32,64;64,32")
    says(
        message,
        "6 of 6 pairs",
        "images/0.png: 48x40 is smaller than its bucket 32,64",
        "images/5.png: 40x48 is smaller than its bucket 64,32",
    )


def test_going_on_without_the_bad_pairs_lists_them(load_data, bad_pairs, capsys):
    _, found = load_data("--train_data_dir", bad_pairs, "--skip_bad_images")
    assert [pair.image.name.rsplit("/", 1)[1] for pair in found.train] == ["0.png", "5.png"] and not found.held_out
    assert "continuing without 4 of 6 pairs" in capsys.readouterr().out
    assert len(list(bad_pairs.rglob("*.png"))) == 12  # nothing was moved or deleted


def test_a_pair_with_an_alpha_channel_is_no_bad_pair(load_data, tmp_path):
    """Transparency, gray and palettes are converted, as for the LoRA: only sizes have to agree."""
    folder = write_pairs(tmp_path / "kinds", [gray(40, 40)], [gray(40, 40)], ["x"])
    Image.fromarray(np.dstack([gray(40, 40), np.full((40, 40), 100, np.uint8)])).save(folder / "images/0.png")
    Image.fromarray(gray(40, 40)[..., 0]).save(folder / "conditioning/0.png")
    assert len(load_data("--train_data_dir", folder)[1].train) == 1


def test_unpaired_pictures_are_all_listed(refused, bad_pairs):
    for number in (0, 2, 5):
        (bad_pairs / f"conditioning/{number}.png").unlink()
    message = refused("--train_data_dir", bad_pairs)
    says(
        message,
        "--train_data_dir",
        "3 files named in metadata.jsonl are missing",
        "conditioning/0.png (line 1)",
        "conditioning/2.png",
        "conditioning/5.png (line 6)",
    )


@pytest.mark.parametrize(
    "line, found",
    [
        ('{"image": "images/0.png", "text": "x"}', "--conditioning_image_column"),
        ('{"image": "images/0.png", "conditioning_image": ', "line 1: not JSON"),
        (
            '{"image": "images/0.png", "conditioning_image": 7, "text": "x"}',
            "line 1: conditioning_image is 7, not text",
        ),
        ("", "has no lines"),
    ],
)
def test_a_jsonl_file_that_does_not_say_what_belongs_together(refused, bad_pairs, line, found):
    (bad_pairs / "pairs.jsonl").write_text(line + "\n")
    message = refused("--jsonl_for_train", bad_pairs / "pairs.jsonl", "--train_data_dir", "")
    says(message, f"--jsonl_for_train {bad_pairs / 'pairs.jsonl'}", found)


def test_the_bad_pairs_of_another_run_leave_it_as_it_is(refused, bad_pairs, tmp_path):
    for name in ("run.json", FINAL, "config.json"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    says(refused("--overwrite_output_dir", "--train_data_dir", bad_pairs), "4 of 6 pairs cannot be used")
    says(refused(), "holds another run", "run.json", "--overwrite_output_dir")


STREAMED = {
    "other size": (1, "40x48"),
    "no image": (2, "its condition: not an image"),
    "too small": (3, "smaller than"),
    "cut off": (4, "damaged|not an image"),
}


@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
@pytest.mark.parametrize("case", STREAMED)
def test_a_bad_pair_in_a_stream_stops_it_with_a_sentence(control, bad_pairs, tmp_path, case, cached):
    """A stream is checked pair by pair: a bad one is refused when it is read, before it is trained on."""
    line, found = STREAMED[case]
    lines = (bad_pairs / "metadata.jsonl").read_text().splitlines()
    (bad_pairs / "metadata.jsonl").write_text("\n".join([lines[0], lines[line]]) + "\n")
    more = ["--train_data_dir", bad_pairs, "--streaming", "--max_train_steps", 2, *(["--cache_latents"] * cached)]
    with pytest.raises(UserError, match=found):
        control(tmp_path / "out", *more)
    assert not (tmp_path / "out" / FINAL).exists()


# ---- while training ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_update(control, tmp_path):
    """Update 1 makes the weights huge, update 2 shows it: the checkpoint between the two is not good."""
    more = ["--cache_latents", "--learning_rate", 1e30, "--max_train_steps", 9, "--checkpointing_steps", 1]
    with pytest.raises(UserError, match=r"update 2: the loss is (nan|inf)") as caught:
        control(tmp_path / "out", *more)
    says(str(caught.value), "the last good checkpoint is (none yet)", "--learning_rate")
    assert not (tmp_path / "out" / FINAL).exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is False


# ---- through the command -------------------------------------------------------------------------


def test_the_command_prints_the_sentence_and_exits_with_2(train_control, tmp_path):
    done = train_control(tmp_path / "out", "--num_single_layers", 9, check=2, cwd=tmp_path)
    assert re.search("^error: --num_single_layers 9: the transformer has only 1", done.stdout, re.MULTILINE), (
        done.stdout
    )
    assert "Traceback" not in done.stdout and not list(tmp_path.iterdir())
