"""Bad input: a message that names the flag or file, what was found and what to do; nothing is written or loaded."""

import hashlib
import json
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import metrics
from killed_runs import start, wait_until
from PIL import Image

from mindtune.cli import UserError
from mindtune.models.lora_files import LORA_FILE
from mindtune.run import checkpoint

SCRIPT = "flux_lora/train_dreambooth_lora_flux.py"


def tree(*folders):
    """Every file with a hash of its content, and every folder; but for what was learnt of images, which stays."""
    paths = sorted(path for folder in folders for path in folder.rglob("*"))
    paths = [path for path in paths if path.name not in ("images.jsonl", "mindtune")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths}


def without(arguments, flag):
    """A command line without `flag` and its value."""
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def write_image(path, size=(48, 40), **options):
    """A small image of noise, in the format of the path's suffix."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def refused(lora_script, flags, tmp_path, small_flux, photos, encoder_cache, monkeypatch):
    """refused(*flags, drop=None): the message of the UserError. No model was loaded and no file changed."""

    def never(*_):
        pytest.fail("a model was loaded before the input was checked")

    def run(*more, drop=None):
        monkeypatch.setattr("mindtune.models.loading.load_model", never)
        monkeypatch.setattr("mindtune.encode.encoder_stage.run_in_child", never)
        arguments = flags(tmp_path / "out", *more)
        before, mode = tree(tmp_path, small_flux, photos, encoder_cache), ms.get_context("mode")
        with pytest.raises(UserError) as caught:
            lora_script.main(without(arguments, drop) if drop else arguments)
        ms.set_context(mode=mode)
        assert tree(tmp_path, small_flux, photos, encoder_cache) == before
        return str(caught.value)

    return run


def says(message, *parts):
    """All of `parts` are in the message, which ends with a full stop."""
    missing = [part for part in parts if part not in message]
    assert not missing and message.endswith("."), message


# ---- flags ---------------------------------------------------------------------------------------

BAD_VALUES = [
    (["--aspect_ratio_buckets", "32x48"], ["--aspect_ratio_buckets", "'32x48'", "height,width"]),
    (["--aspect_ratio_buckets", "32,40"], ["--aspect_ratio_buckets", "32,40", "multiples of 16"]),
    (["--distributed"], ["--distributed", "msrun --worker_num=2", "--join=True"]),
    (["--zero_stage", 1], ["--zero_stage 1", "--distributed"]),
    (["--resolution", 100], ["--resolution 100", "divisible by 16", "nearest is 96"]),
    (["--resolution", 0], ["--resolution 0", "divisible by 16", "nearest is 16"]),
    (["--lora_rank", 0], ["--lora_rank 0", "at least 1"]),
    (["--rank", -4], ["--lora_rank -4", "at least 1"]),
    (["--lora_alpha", 0], ["--lora_alpha 0", "above 0"]),
    (["--lora_dropout", 1], ["--lora_dropout 1", "below 1"]),
    (["--text_encoder_lr", -1], ["--text_encoder_lr -1", "at least 0"]),
    (["--num_class_images", 0], ["--num_class_images 0", "at least 1"]),
    (["--repeats", 0], ["--repeats 0", "at least 1"]),
    (["--validation_split", 0.95], ["--validation_split 0.95", "5 of 5 samples", "smaller share"]),
    (["--lora_layers", "to_qq,to_k"], ["--lora_layers to_qq", "no linear layer", "Similar names: ", "to_q"]),
    (["--lora_layers", "to_out.7"], ["--lora_layers to_out.7", "no linear layer", "Similar names: ", "to_out.0"]),
]
CONFLICTS = [
    (["--class_prompt", "a cat"], ["--class_prompt without --class_data_dir", "name a directory"]),
    (["--with_prior_preservation"], ["--with_prior_preservation needs --class_data_dir and --class_prompt"]),
    (["--with_prior_preservation", "--class_data_dir", "x"], ["--with_prior_preservation needs", "--class_prompt"]),
    (["--dataset_name", "some/images"], ["--instance_data_dir", "--dataset_name", "only one"]),
    (
        ["--resume_from_checkpoint", "checkpoint-9"],
        ["--resume_from_checkpoint checkpoint-9", "no such checkpoint", "none"],
    ),
    (["--instance_data_dir", "no/where"], ["--instance_data_dir no/where", "no such directory", "Give the directory"]),
    (
        ["--pretrained_model_name_or_path", "./flux"],
        ["--pretrained_model_name_or_path ./flux", "no such directory", "hub id"],
    ),
]


def named(cases):
    return [pytest.param(*case, id=" ".join(map(str, case[0]))) for case in cases]


@pytest.mark.parametrize("bad, parts", named(BAD_VALUES + CONFLICTS))
def test_a_bad_flag_is_named_with_its_value_and_the_way_out(refused, bad, parts):
    says(refused(*bad), *parts)


def test_a_line_of_the_validation_file_is_named(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "size": 40}\n')
    found = refused("--validation_file", tmp_path / "rows.jsonl")
    assert "rows.jsonl: 1 of its lines cannot be used:\n  line 2: size is 40, must be a multiple of 16" in found


def test_the_id_of_a_data_set_is_not_looked_for_on_modelscope(refused):
    found = refused("--dataset_name", "some/images", "--hub", "modelscope", drop="--instance_data_dir")
    says(found, "--dataset_name some/images", "modelscope download --dataset some/images --local_dir DIR")


def test_a_hub_token_is_not_repeated_in_the_message(refused, fake_hub):
    found = refused("--push_to_hub", "--hub_token", "hf_secret")
    assert "--push_to_hub: the hub does not accept this token" in found and "hf_secret" not in found


def test_no_source_of_images(refused):
    says(refused(drop="--instance_data_dir"), "--instance_data_dir", "--dataset_name", "only one")


def test_images_without_captions_need_a_prompt(refused):
    says(refused(drop="--instance_prompt"), "5 images have no caption", "0.png", "--instance_prompt", ".txt")


@pytest.mark.parametrize(
    "bad, found",
    [
        (["--prodigy_decouple", "perhaps"], "argument --prodigy_decouple: perhaps is neither true nor false"),
        (["--learn_rate", "1"], "unrecognized arguments: --learn_rate 1"),
    ],
)
def test_what_argparse_refuses_exits_with_2(lora_script, flags, tmp_path, capsys, bad, found):
    with pytest.raises(SystemExit) as caught:
        lora_script.main(flags(tmp_path / "out", *bad))
    assert caught.value.code == 2 and found in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the pipeline --------------------------------------------------------------------------------


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder):
    """Turns the one weights file into the first of two shards, of which the second was not copied."""
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


WEIGHTS = "diffusion_pytorch_model.safetensors"
BROKEN_PIPELINES = {
    "no vae": (lambda p: shutil.rmtree(p / "vae"), ["vae/ is missing"]),
    "no transformer weights": (lambda p: (p / "transformer" / WEIGHTS).unlink(), [f"transformer/{WEIGHTS} is missing"]),
    "half the transformer": (
        lambda p: cut_in_half(p / "transformer" / WEIGHTS),
        [f"transformer/{WEIGHTS} has 276,460 bytes", "552,920"],
    ),
    "empty weights": (lambda p: (p / "vae" / WEIGHTS).write_bytes(b""), [f"vae/{WEIGHTS} is truncated (0 bytes)"]),
    "weights of zeros": (
        lambda p: (p / "vae" / WEIGHTS).write_bytes(bytes(4096)),
        [f"vae/{WEIGHTS}", "not safetensors"],
    ),
    "second shard missing": (lambda p: shard(p / "transformer"), ["transformer/two.safetensors is missing"]),
    "no config": (lambda p: (p / "text_encoder_2/config.json").unlink(), ["text_encoder_2/config.json is missing"]),
    "half a config": (lambda p: cut_in_half(p / "vae/config.json"), ["vae/config.json"]),
    "no merges": (lambda p: (p / "tokenizer/merges.txt").unlink(), ["tokenizer/merges.txt is missing"]),
    "half a vocabulary": (lambda p: cut_in_half(p / "tokenizer/vocab.json"), ["tokenizer/vocab.json"]),
    "no T5 tokenizer": (
        lambda p: [(p / "tokenizer_2" / name).unlink(missing_ok=True) for name in ("spiece.model", "tokenizer.json")],
        ["tokenizer_2/spiece.model is missing"],
    ),
    "another transformer": (
        lambda p: edit_json(p / "transformer/config.json", _class_name="SD3Transformer2DModel"),
        ["transformer/config.json", "SD3Transformer2DModel", "expected FluxTransformer2DModel"],
    ),
    "another T5": (
        lambda p: edit_json(p / "text_encoder_2/config.json", architectures=["UMT5EncoderModel"]),
        ["text_encoder_2/config.json", "UMT5EncoderModel", "expected T5EncoderModel"],
    ),
    "another scheduler": (
        lambda p: edit_json(p / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        ["scheduler/scheduler_config.json", "DDIMScheduler", "expected FlowMatchEulerDiscreteScheduler"],
    ),
    "another tokenizer": (
        lambda p: edit_json(p / "model_index.json", tokenizer=["transformers", "BertTokenizer"]),
        ["model_index.json", "BertTokenizer", "expected CLIPTokenizer"],
    ),
    "two defects at once": (
        lambda p: [shutil.rmtree(p / "vae"), (p / "tokenizer/vocab.json").unlink()],
        ["vae/ is missing", "tokenizer/vocab.json is missing"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_PIPELINES)
def test_a_pipeline_that_is_not_whole_is_refused_naming_the_file(refused, tiny_flux, tmp_path, case):
    break_it, parts = BROKEN_PIPELINES[case]
    folder = shutil.copytree(tiny_flux, tmp_path / "flux")
    break_it(folder)
    another = case in ("another transformer", "another T5", "another scheduler")  # no download would mend it
    advice = "docs/models.md" if another else "Copy or download it again"
    says(
        refused("--pretrained_model_name_or_path", folder), f"--pretrained_model_name_or_path {folder}", advice, *parts
    )


# ---- images and captions -----------------------------------------------------------------------


@pytest.fixture
def bad_photos(photos, tmp_path):
    """Five good images and one of every bad kind."""
    folder = shutil.copytree(photos, tmp_path / "bad photos")
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "empty.png").write_bytes(b"")
    cut_in_half(write_image(folder / "torn.png"))
    cut_in_half(write_image(folder / "torn.jpg"))
    cut_in_half(write_image(folder / "torn.webp", lossless=True))
    write_image(folder / "small.png", size=(31, 200))
    return folder


def test_all_bad_images_are_listed_at_once(refused, bad_photos):
    message = refused("--instance_data_dir", bad_photos)
    says(message, f"--instance_data_dir {bad_photos}: 6 of 11 files cannot be used", "--skip_bad_images")
    says(
        message,
        "page.jpg: not an image",
        "empty.png: not an image",
        "small.png: 31x200 is smaller than --resolution 32",
    )
    assert {line.split(":")[0].strip() for line in message.splitlines() if ": damaged (" in line} == {
        "torn.png",
        "torn.jpg",
        "torn.webp",
    }


def test_an_image_is_measured_after_its_exif_rotation(refused, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "in/turned.jpg", size=(100, 20), exif=exif)
    says(refused("--instance_data_dir", tmp_path / "in"), "turned.jpg: 20x100 is smaller than --resolution 32")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/notes.txt").write_text("nothing here")
    says(
        refused("--instance_data_dir", tmp_path / "in"),
        f"--instance_data_dir {tmp_path / 'in'}",
        "no image",
        "Put 5 to 20 images there",
    )


def test_a_folder_of_folders_offers_them(refused, tmp_path):
    write_image(tmp_path / "in/dog/1.png")
    says(
        refused("--instance_data_dir", tmp_path / "in"),
        "no image",
        "subdirectories (dog with 1 images)",
        "give one of them",
    )


def test_captions_that_are_not_utf8_are_all_listed(refused, tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"in/{name}.png")
    (tmp_path / "in/a.txt").write_bytes("ein süßer Hund".encode("latin-1"))
    (tmp_path / "in/b.txt").write_bytes("ein süßer Hund".encode("utf-16-be"))
    (tmp_path / "in/c.txt").write_bytes("ein süßer Hund".encode())
    message = refused("--instance_data_dir", tmp_path / "in")
    says(
        message + ".",
        "--instance_data_dir: 2 caption files cannot be read; save them as UTF-8",
        "a.txt: byte 5 is not",
        "b.txt: byte 0 is zero, as in UTF-16",
        "save them as UTF-8",
    )
    assert "c.txt" not in message


@pytest.mark.parametrize(
    "line, found",
    [
        (b'{"file_name": "a.png", "text": "h\xe9"}', "not UTF-8 after line 0"),
        (b'{"file_name": "a.png", "text": ', "line 1: not JSON"),
        (b'{"file_name": "a.png", "words": "a cat"}', "--caption_column"),
        (b'{"file_name": "a.png", "text": 7}', "line 1: text is 7"),
    ],
)
def test_captions_in_metadata_jsonl(refused, tmp_path, line, found):
    write_image(tmp_path / "in/a.png")
    (tmp_path / "in/metadata.jsonl").write_bytes(line)
    says(refused("--instance_data_dir", tmp_path / "in"), "metadata.jsonl", found)


def test_bad_class_images_are_refused_as_early_as_the_others(refused, tmp_path):
    write_image(tmp_path / "class/good.png")
    cut_in_half(write_image(tmp_path / "class/torn.png"))
    message = refused("--with_prior_preservation", "--class_prompt", "a cat", "--class_data_dir", tmp_path / "class")
    says(message, f"--class_data_dir {tmp_path / 'class'}: 1 of 2 files", "torn.png: damaged", "--skip_bad_images")


def test_a_validation_split_of_everything_is_refused_before_class_images_are_generated(refused, tmp_path):
    prior = ["--with_prior_preservation", "--class_prompt", "a cat", "--class_data_dir", tmp_path / "class"]
    says(refused(*prior, "--validation_split", 0.95), "--validation_split 0.95", "5 of 5 samples", "smaller share")


def test_a_file_as_class_directory(refused, tmp_path):
    write_image(tmp_path / "class.png")
    message = refused(
        "--with_prior_preservation", "--class_prompt", "a cat", "--class_data_dir", tmp_path / "class.png"
    )
    says(message, f"--class_data_dir {tmp_path / 'class.png'}: {tmp_path / 'class.png'} is not a directory")


def test_a_dataset_column_that_holds_no_text(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_image(tmp_path / "set/a.png")
    (tmp_path / "set/metadata.jsonl").write_text('{"file_name": "a.png", "count": 7}')
    # The library's own copy of the table goes to --cache_dir and is not the run's.
    more = [
        "--dataset_name",
        tmp_path / "set",
        "--cache_dir",
        tmp_path.parent / f"{tmp_path.name}-hub",
        "--caption_column",
        "count",
    ]
    says(refused(*more, drop="--instance_data_dir"), "line 1: count is 7, not text")


# ---- the output directory ------------------------------------------------------------------------


@pytest.fixture
def good_run(finished_lora, tmp_path):
    """A copy of a finished run of two updates with a checkpoint after each."""
    run = finished_lora("--cache_latents", "--checkpointing_steps", 1, "--max_train_steps", 2)
    return shutil.copytree(run, tmp_path / "out")


def test_another_run_in_the_output_directory_is_refused(refused, good_run):
    says(
        refused(),
        f"--output_dir {good_run}",
        "holds another run",
        "run.json",
        "--resume_from_checkpoint latest",
        "--overwrite_output_dir",
    )


@pytest.mark.parametrize(
    "left", ["run.json", "metrics.jsonl", "loss_by_timestep.csv", LORA_FILE, "checkpoint-2/manifest.json"]
)
def test_one_file_of_another_run_is_enough(refused, tmp_path, left):
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    says(refused(), "holds another run", left.split("/")[0])


def test_bad_input_with_overwrite_leaves_the_old_run_as_it_is(refused, good_run, bad_photos):
    says(refused("--overwrite_output_dir", "--instance_data_dir", bad_photos), "6 of 11 files cannot be used")
    cut_in_half(write_image(good_run.parent / "class/torn.png"))
    prior = ["--with_prior_preservation", "--class_prompt", "a cat", "--class_data_dir", good_run.parent / "class"]
    says(refused("--overwrite_output_dir", *prior), "torn.png: damaged")


@pytest.mark.parametrize("where", ["in.png", "in.png/out"])
def test_an_output_directory_that_is_a_file_or_inside_one(refused, tmp_path, where):
    write_image(tmp_path / "in.png")
    says(
        refused("--output_dir", tmp_path / where), f"--output_dir {tmp_path / where}", "not a directory", "Name another"
    )


def test_damaged_checkpoints_are_refused_when_named_and_passed_over_by_latest(refused, good_run, capsys):
    cut_in_half(good_run / "checkpoint-2/training_state.safetensors")
    says(
        refused("--resume_from_checkpoint", "checkpoint-2"),
        "--resume_from_checkpoint checkpoint-2",
        "training_state",
        "is damaged",
    )
    assert checkpoint.find_checkpoint(good_run, "latest") == good_run / "checkpoint-1"
    assert "checkpoint-2: training_state.safetensors is damaged; falling back" in capsys.readouterr().out
    (good_run / "checkpoint-1" / LORA_FILE).unlink()
    says(
        refused("--resume_from_checkpoint", "latest"),
        "every checkpoint in",
        "is damaged",
        "Start a new run in another directory",
    )


def test_a_directory_that_is_no_checkpoint(refused, photos):
    says(
        refused("--resume_from_checkpoint", photos),
        f"--resume_from_checkpoint {photos}",
        "manifest.json cannot be read",
        "latest",
    )


# ---- through the command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, sentence", [(["--resolution", 100], "--resolution 100"), (["--instance_data_dir", "."], "no image")]
)
def test_the_command_prints_the_sentence_and_exits_with_2(train, tmp_path, bad, sentence):
    done = train(tmp_path / "out", *bad, check=2, cwd=tmp_path)
    assert re.search(rf"^error: .*{sentence}", done.stdout, re.MULTILINE), done.stdout
    assert "Traceback" not in done.stdout and not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_and_names_the_update(lora, good_run):
    """Update 3 makes the weights huge and is saved; update 4 shows it. The last good checkpoint is that of update 2."""
    before = tree(good_run / "checkpoint-1", good_run / "checkpoint-2")
    more = ["--cache_latents", "--resume_from_checkpoint", "latest", "--learning_rate", 1e30]
    with pytest.raises(UserError, match=r"^update 4: the loss is (nan|inf)") as caught:
        lora(good_run, *more, "--max_train_steps", 9, "--checkpointing_steps", 1)
    says(str(caught.value), f"the last good checkpoint is {good_run / 'checkpoint-2'}", "--learning_rate")
    assert tree(good_run / "checkpoint-1", good_run / "checkpoint-2") == before
    assert [checkpoint.damage(folder) for folder in checkpoint.checkpoints(good_run)] == [None, None, None]
    logged = [(line["step"], np.isfinite(line["loss"])) for line in metrics(good_run)]
    assert logged == [(1, True), (2, True), (3, True)]
    assert json.loads((good_run / "run.json").read_text())["finished"] is False


def test_a_disk_that_fills_up_leaves_the_checkpoints_before_whole(train, good_run):
    """A limit on file sizes stands for the full disk: the adapter (9 KB) fits, the optimizer state (27) not."""
    before = tree(good_run / "checkpoint-1", good_run / "checkpoint-2")
    before[str(good_run / LORA_FILE)] = tree(good_run)[str(good_run / LORA_FILE)]

    def almost_full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    more = ["--cache_latents", "--resume_from_checkpoint", "latest", "--max_train_steps", 3]
    done = train(good_run, *more, check=2, preexec_fn=almost_full)
    assert "error: the disk is full" in done.stdout and "start again" in done.stdout and "Traceback" not in done.stdout
    assert {path: digest for path, digest in tree(good_run).items() if path in before} == before
    assert [folder.name for folder in checkpoint.checkpoints(good_run)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(good_run.rglob("*.partial*")) and not (good_run / "checkpoint-3").exists()


def test_ctrl_c_saves_and_says_how_to_resume(flags, lora, tmp_path, capfd):
    out, log = tmp_path / "out", tmp_path / "log"
    with open(log, "w") as file:
        process = start(SCRIPT, flags(out, "--cache_latents", "--max_train_steps", 10_000), file)
        wait_until(lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) >= 2, process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    (folder,) = checkpoint.checkpoints(out)
    updates = checkpoint.step_of(folder)
    printed = log.read_text()
    assert f"saved {folder} after update {updates}" in printed and "--resume_from_checkpoint latest" in printed
    assert checkpoint.damage(folder) is None and metrics(out)[-1]["step"] == updates

    lora(out, "--cache_latents", "--resume_from_checkpoint", "latest", "--max_train_steps", updates + 1)
    assert f"resuming from checkpoint-{updates} after update {updates}" in capfd.readouterr().out
    assert [line["step"] for line in metrics(out)] == list(range(1, updates + 2)) and (out / LORA_FILE).is_file()


def command_of(pid):
    """The command line of a process; empty if it has ended."""
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


def test_ctrl_c_before_the_first_update_has_nothing_to_save(flags, tmp_path):
    """The encoder stage's child process ends, too. --lora_layers makes the training process compute before."""
    out, log = tmp_path / "out", tmp_path / "log"
    with open(log, "w") as file:
        process = start(SCRIPT, flags(out, "--cache_dir", tmp_path / "cache", "--lora_layers", "to_q"), file)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def encoding():
            return [pid for pid in children.read_text().split() if b"encode.child" in command_of(pid)]

        wait_until(encoding, process, log)
        child = Path("/proc", encoding()[0], "stat")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    printed = log.read_text()
    assert "nothing to save" in printed and "Traceback" not in printed, printed
    assert not checkpoint.checkpoints(out)
    deadline = time.monotonic() + 30  # it was killed, but may still be giving back its memory
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(stat):
    """Whether the process of a /proc/PID/stat file runs: it has not ended, nor waits only to be reaped."""
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
