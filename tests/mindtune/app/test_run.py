"""The run of the form: command lines, the process with its start, stop and errors, and what it has written."""

import json
import os
import shlex
import signal
import time

import pytest

from mindtune.app import run as run_module
from mindtune.app.run import Command, Run, last_error, make_command, memory_plan, read_metrics, read_tail
from mindtune.cli import UserError

LORA, CONTROLNET = "FLUX LoRA", "FLUX ControlNet"
# A stand-in for a training script, which ends as --how says. It stops after an update, as the real ones do.
SCRIPT = """
import sys, time
from mindtune.cli import StopRequest, UserError, run_script

def main():
    how = sys.argv[1]
    if "--dry_run" in sys.argv:
        print("transformer  1 GB")
    if how == "refuse":
        raise UserError("--resolution 100: must be divisible by 16.\\nThe nearest is 96.")
    if how == "crash":
        raise KeyError("sizes")
    if how == "train":
        request = StopRequest()
        print("training", flush=True)
        while not request.exit_code:
            time.sleep(0.02)
        time.sleep(0.5)
        print("saved checkpoint-7 after update 7")
        return 130

run_script(main)
"""


# ---- command lines -------------------------------------------------------------------------------


@pytest.fixture
def make(scripts, folders):
    """make(fields, more, name): a command line with the data set, model and output directory of the folders."""

    def make(fields=None, more="", name=LORA, **settings):
        path, parser = scripts[name]
        data = "instance_data_dir" if name == LORA else "train_data_dir"
        given = {"pretrained_model_name_or_path": "flux", data: "cats", "output_dir": "run", **(fields or {})}
        return make_command(path, parser, folders, given, more, **settings)

    return make


def test_the_command_line_has_absolute_paths_and_no_defaults(make, scripts, folders):
    fields = {"resolution": "64", "mixed_precision": "no", "seed": "", "cache_latents": True, "use_8bit_adam": False}
    command = make(fields, "--rank 8 --logit_mean -0.5")
    assert command.words == [
        *(str(scripts[LORA][0]), "--pretrained_model_name_or_path", str(folders.models / "flux")),
        *("--instance_data_dir", str(folders.data / "cats"), "--resolution", "64", "--cache_latents"),
        *("--lora_rank", "8", "--logit_mean=-0.5", "--output_dir", str(folders.outputs / "run")),
    ]
    assert shlex.split(str(command)) == ["python", *command.words]
    assert command.output_dir == folders.outputs / "run"


def test_prompts_are_lines_and_keep_every_character(make, scripts):
    prompts = ["a 'sks' cat", 'the "cat" $HOME `id` ; rm -rf *', "une forêt \\ 猫", "it's --output_dir=/etc"]
    command = make({"validation_prompt": "\n".join(["", *prompts, "  "]), "instance_prompt": "--fast"})
    assert command.values["validation_prompt"] == prompts
    parsed = scripts[LORA][1].parse_args(shlex.split(str(command))[2:])
    assert parsed.validation_prompt == prompts and parsed.instance_prompt == "--fast"


def test_resume_adds_its_flag_to_the_same_command_line(make):
    words = make({"resolution": "64"}).words
    assert set(make({"resolution": "64"}, resume=True).words) - set(words) == {"--resume_from_checkpoint", "latest"}


@pytest.mark.parametrize(
    "more",
    [
        "--output_dir {out}",
        "--output_dir={out}",
        "--output_dir ok --output_dir {out}",
        "--cache_dir '{out}'",
        "--cache_dir ../../..",
        "--class_data_dir {data}/cats",  # the data are only read
        "--lora_model_name_or_path {out}/lora.safetensors",
        "--pretrained_model_name_or_path {data}",
        "--resume_from_checkpoint {out}/checkpoint-1",
        "--resume_from_checkpoint ../../secret",
        "--logging_dir {out}",
        "--logging_dir ../../secret",
    ],
)
def test_paths_in_more_flags_stay_in_the_folders(make, folders, tmp_path, more):
    with pytest.raises(UserError, match="is outside of --"):
        make(more=more.format(out=tmp_path / "secret", data=folders.data))


def test_every_path_of_a_list_is_checked(make, folders):
    name = next(iter(sorted(path.name for path in (folders.data / "cats").glob("*.png"))))
    fields = {"validation_prompt": "a\nb", "validation_image": f"cats/{name}\n/etc/passwd"}
    with pytest.raises(UserError, match="--validation_image /etc/passwd: is outside of --data"):
        make(fields, name=CONTROLNET)
    with pytest.raises(UserError, match="--validation_image /etc/passwd: is outside of --data"):
        make(more=f"--validation_prompt a b --validation_image cats/{name} /etc/passwd", name=CONTROLNET)
    fields["validation_image"] = f"cats/{name}"
    assert make(fields, name=CONTROLNET).values["validation_image"] == [str(folders.data / "cats" / name)]


@pytest.mark.parametrize(
    "more, message",
    [
        ("--dataset_config data.toml", "--dataset_config: is not allowed in the form"),
        ("--hub_token hf_x", "--hub_token: is not allowed in the form"),
        ("--variant ../../fp16", "--variant ../../fp16: has a /"),
        ("--dry_run", "--dry_run: leave it out"),
        ("--validation_prompt -- --output_dir=/etc", "--validation_prompt|unrecognized"),
        ("--validation_prompt a -- --output_dir=/etc", "unrecognized arguments"),
        ("--output /etc", "unrecognized arguments: --output /etc"),
        ("512", "unrecognized arguments: 512"),
        ("--resolution 100", "--resolution 100: must be divisible by 16"),
        ("--instance_prompt 'a cat", "more flags: No closing quotation"),
        ("--output_dir .", "--output_dir: name a folder in --outputs"),
        ("--output_dir ''", "--output_dir: name a folder in --outputs"),
    ],
)
def test_other_ways_out_are_refused(make, more, message):
    with pytest.raises(UserError, match=message):
        make({"validation_prompt": "a cat"}, more)


def test_a_jsonl_file_with_paths_of_its_own_is_refused(make):
    with pytest.raises(UserError, match="--jsonl_for_train: is not allowed in the form"):
        make({"train_data_dir": ""}, "--jsonl_for_train pairs.jsonl", name=CONTROLNET)


def test_places_inside_are_allowed(make, folders):
    out = folders.outputs
    command = make(more="--cache_dir cache --logging_dir tb --resume_from_checkpoint checkpoint-1 --variant fp16")
    assert command.values["cache_dir"] == str(out / "cache")
    assert command.values["logging_dir"] == str(out / "run" / "tb")
    assert command.values["resume_from_checkpoint"] == str(out / "run" / "checkpoint-1")
    with_classes = make(more="--with_prior_preservation --class_data_dir classes --class_prompt 'a cat'")
    assert with_classes.values["class_data_dir"] == str(out / "classes")


@pytest.mark.parametrize(
    "name, flag",
    [
        ("data/cats", "instance_data_dir"),
        ("models/flux", "pretrained_model_name_or_path"),
        ("outputs/run", "output_dir"),
        ("outputs/cache", "cache_dir"),
        ("outputs/lora", "lora_model_name_or_path"),
    ],
)
def test_links_in_the_chosen_folders_may_not_lead_out(make, folders, tmp_path, name, flag):
    (tmp_path / name).mkdir(exist_ok=True)
    values = make(more="--cache_dir cache --lora_model_name_or_path lora").values
    folders.check_links(values)
    (tmp_path / name / "x.png").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"^--{flag} .*x.png leads out"):
        folders.check_links(values)


# ---- the process ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """command(how): the stand-in's command line."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    return lambda how: Command([str(script), how], {"output_dir": str(tmp_path / "out")})


@pytest.fixture
def run():
    run = Run()
    yield run
    if run.is_running():
        run.process.kill()
        run.process.wait()


def wait_for(text, log, seconds=60):
    deadline = time.monotonic() + seconds
    while text not in read_tail(log):
        assert time.monotonic() < deadline, read_tail(log)
        time.sleep(0.02)


def test_a_run_is_started_once_and_stopped_by_one_ctrl_c(run, command, tmp_path, monkeypatch):
    log = tmp_path / "new" / "out.log"
    assert run.status() == "nothing started yet"
    run.stop()  # nothing to stop
    run.start(command("train"), log)
    wait_for("training", log)
    assert run.is_running() and run.status().startswith("running, since ") and str(tmp_path / "out") in run.status()
    assert os.getsid(run.process.pid) == run.process.pid != os.getsid(0)
    with pytest.raises(UserError, match="a run is going on in .*out. Stop it"):
        run.start(command("train"), tmp_path / "other.log")
    assert not (tmp_path / "other.log").exists()

    sent = []
    send = run.process.send_signal
    monkeypatch.setattr(run.process, "send_signal", lambda number: (sent.append(number), send(number)))
    for _ in range(3):  # an impatient user; a second SIGINT would end the script without a checkpoint
        run.stop()
        assert run.status().startswith("stopping after this update")
        time.sleep(0.1)
    assert run.process.wait(60) == 130 and sent == [signal.SIGINT]
    assert run.status() == "stopped: saved checkpoint-7 after update 7"

    run.start(command("finish"), log)  # after the end, and with the log of the first run kept
    assert run.process.wait(60) == 0 and run.status() == f"finished: {tmp_path / 'out'}"
    assert read_tail(log).count("$ python ") == 2


def test_two_forms_do_not_start_runs_in_one_directory(run, command, tmp_path):
    run.start(command("train"), tmp_path / "out.log")
    wait_for("training", tmp_path / "out.log")
    with pytest.raises(UserError, match="out.log: another run still writes here"):
        Run().start(command("train"), tmp_path / "out.log")
    run.stop()
    run.process.wait(60)
    other = Run()
    other.start(command("finish"), tmp_path / "out.log")
    assert other.process.wait(60) == 0


def test_errors_of_the_script_are_the_status(run, command, tmp_path):
    log = tmp_path / "out.log"
    log.write_text("error: of an earlier run\n")
    run.start(command("refuse"), log)
    assert run.process.wait(60) == 2
    error = "error: --resolution 100: must be divisible by 16.\nThe nearest is 96."
    assert run.status() == f"failed with exit code 2\n{error}"
    run.start(command("crash"), log)
    assert run.process.wait(60) == 1
    assert run.status().endswith("KeyError: 'sizes'") and "Traceback" in run.status() and error not in run.status()
    run.start(command("train"), log)
    run.process.kill()
    run.process.wait()
    assert run.status().startswith("failed with signal 9")


def test_a_stop_before_the_script_handles_it_is_no_failure(run, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    run.start(Command([str(script)], {"output_dir": str(tmp_path / "out")}), tmp_path / "log")
    wait_for("importing", tmp_path / "log")
    run.stop()
    assert run.process.wait(60) == -signal.SIGINT
    assert run.status() == "stopped without a checkpoint"


def test_the_memory_plan_is_what_the_script_prints(command):
    assert memory_plan(command("plan")) == "transformer  1 GB"
    with pytest.raises(UserError, match=r"^error: --resolution 100: must be divisible by 16\.\nThe nearest is 96\.$"):
        memory_plan(command("refuse"))


# ---- what it has written -------------------------------------------------------------------------


def test_of_a_progress_bar_only_the_last_state_is_read(tmp_path):
    log = tmp_path / "log"
    assert read_tail(log) == ""
    log.write_bytes(b"first\n\r 10%|#\r 20%|##\nnext\r\n\r 30%|### \r 40%|#### caf\xe9\r")
    assert read_tail(log) == "first\n 20%|##\nnext\n 40%|#### caf\ufffd"
    assert read_tail(log, start=6) == " 20%|##\nnext\n 40%|#### caf\ufffd"


def test_of_a_long_log_only_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "TAIL", 20)
    (tmp_path / "log").write_text("x" * 1000 + "\nlast line\n")
    assert read_tail(tmp_path / "log").splitlines()[-1] == "last line"
    assert len(read_tail(tmp_path / "log")) < 20


def test_the_last_error_has_all_of_its_lines():
    assert last_error("a\nerror: one\nb\nerror: two\nmore") == "error: two\nmore"
    assert last_error("\n".join(map(str, range(100))), limit=2) == "98\n99"


def test_a_line_of_metrics_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines)[:-8])
    assert read_metrics(path) == lines[:2]
