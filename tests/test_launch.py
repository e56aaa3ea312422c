"""The launch scripts: syntax, the call of msrun, and runs on the CPU with a tiny model on one or two ranks."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, load_script, metrics
from msrun_job import PATH, free_port

from mindtune.run.checkpoint import checkpoints, damage

LAUNCH = {
    "flux_lora/train_dreambooth_lora_flux.py": "flux_lora/launch/train_devices.sh",
    "flux_controlnet/train_controlnet_flux.py": "flux_controlnet/launch/train_devices.sh",
    "examples/controlnet/train_controlnet.py": "examples/controlnet/launch/train_devices.sh",
}


def environment(**more):
    """The environment for runs with msrun."""
    added = {"PATH": PATH, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added, **more}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *ROOT.glob("**/launch/*.sh")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def printed_by(script, tmp_path, command, **names):
    """The lines that a launch script prints if msrun is a program that runs `command` of bash."""
    stub = tmp_path / "bin" / "msrun"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f"#!/usr/bin/env bash\n{command}\n")
    stub.chmod(0o755)
    names = {**os.environ, "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", **names}
    names.update(PHOTOS="photos", PROMPT="a photo of sks dog", DATA="some/data", OUT=str(tmp_path / "out"))
    line = [ROOT / LAUNCH[script], "--seed", "7"]
    done = subprocess.run(line, env=names, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("script", LAUNCH)
def test_the_environment_of_the_ranks(script, tmp_path, monkeypatch):
    """A time-out that waits for a slow rank, and an equal share of the cores; values of the user's own win."""
    for name in ("HCCL_CONNECT_TIMEOUT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    command = 'printf "%s\\n" "$HCCL_CONNECT_TIMEOUT" "$OMP_NUM_THREADS"'
    cores = len(os.sched_getaffinity(0))
    assert printed_by(script, tmp_path, command, DEVICES="2") == ["1800", str(max(1, cores // 2))]
    assert printed_by(script, tmp_path, command, DEVICES="1000") == ["1800", "1"]
    own = {"HCCL_CONNECT_TIMEOUT": "300", "OMP_NUM_THREADS": "5"}
    assert printed_by(script, tmp_path, command, DEVICES="2", **own) == ["300", "5"]


@pytest.mark.parametrize("script", LAUNCH)
def test_the_call_of_msrun_on_several_machines(script, tmp_path):
    """On the third of four machines with eight devices each; the script accepts its flags."""
    names = {"DEVICES": "8", "NODES": "4", "NODE_RANK": "2", "MASTER": "10.0.0.1"}
    words = printed_by(script, tmp_path, 'printf "%s\\n" "$@"', **names)
    index = words.index(script)
    expected = {"--worker_num=32", "--local_worker_num=8", "--node_rank=2", "--master_addr=10.0.0.1"}
    expected |= {"--join=True", "--bind_core=True", f"--log_dir={tmp_path}/out/workers"}
    assert expected <= set(words[:index])
    args = load_script(script).parse_args(words[index + 1 :])
    assert args.distributed and args.seed == 7 and args.output_dir == str(tmp_path / "out")
    assert args.zero_stage == (0 if "lora" in script else 1)


def start(script, arguments, log, **names):
    """The launch script of a training script with more arguments, and with environment variables `names`."""
    return subprocess.Popen(
        [ROOT / LAUNCH[script], *map(str, arguments)],
        env=environment(BIND="False", PORT=str(free_port()), **names),
        stdout=log,
        stderr=log,
    )


def test_ctrl_c_makes_both_ranks_save_and_stop(flags, photos, tmp_path):
    out = tmp_path / "out"
    more = flags(out, "--max_train_steps", 10_000, "--cache_latents", "--mixed_precision", "no")
    names = {"DEVICES": "2", "OUT": str(out), "PHOTOS": str(photos), "PROMPT": "a photo of sks cat"}
    with open(tmp_path / "log", "w") as log:
        job = start("flux_lora/train_dreambooth_lora_flux.py", more, log, **names)
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").is_file() and metrics(out)):
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) != 0
    (folder,) = checkpoints(out)
    assert damage(folder) is None
    assert f"saved {folder} after update {len(metrics(out))}" in (tmp_path / "log").read_text()


def test_the_controlnets_on_one_rank_each(tmp_path):
    """Both at the same time, with ZeRO 1."""
    load_script("examples/tiny/shapes.py").make_folder(tmp_path / "pairs", 3, 64, seed=0, split="train")
    jobs = {}
    maker = load_script("examples/tiny/make_tiny_pipeline.py")
    unet = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "block_out_channels": [16, 32]}
    unet["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
    maker.make_flux(tmp_path / "flux", seed=0)
    maker.make_sd15(tmp_path / "sd15", unet=unet)
    for script, kind in zip(list(LAUNCH)[1:], ("flux", "sd15")):
        more = ["--mindspore_mode", 1, "--max_train_steps", 1, "--gradient_accumulation_steps", 1]
        more += ["--mixed_precision", "no", "--resolution", 64, "--report_to", "none"]
        if kind == "flux":
            more += ["--num_double_layers", 1, "--max_sequence_length", 16]
        names = {"DEVICES": "1", "MODEL": str(tmp_path / kind), "DATA": str(tmp_path / "pairs")}
        names["OUT"] = str(tmp_path / f"{kind}-out")
        with open(tmp_path / kind / "log", "w") as log:
            jobs[kind] = start(script, more, log, **names)
    for kind, job in jobs.items():
        assert job.wait(timeout=180) == 0, (tmp_path / kind / "log").read_text()
        out = tmp_path / f"{kind}-out"
        assert (out / "diffusion_pytorch_model.safetensors").is_file() and len(checkpoints(out)) == 1
        assert "bytes per device" in (tmp_path / kind / "log").read_text()
