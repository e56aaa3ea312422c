"""The launch scripts: syntax, the call of msrun, and a job of two ranks that is stopped.

flux_controlnet/test_workers.py runs another to its end, and the guide's command starts one on one device.
"""

import os
import shutil
import signal
import subprocess

import pytest
from conftest import ROOT, load_script, metrics

from mindtune.run.checkpoint import checkpoints, damage

LAUNCH = {
    "flux_lora/train_dreambooth_lora_flux.py": "flux_lora/launch/train_devices.sh",
    "flux_controlnet/train_controlnet_flux.py": "flux_controlnet/launch/train_devices.sh",
    "examples/flux_kontext/train_lora_flux_kontext.py": "examples/flux_kontext/launch/train_devices.sh",
    "examples/flux_control/train_control_lora_flux.py": "examples/flux_control/launch/train_devices.sh",
    "examples/controlnet/train_controlnet.py": "examples/controlnet/launch/train_devices.sh",
}


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


def test_ctrl_c_makes_both_ranks_save_and_stop(job, flags, photos, tmp_path):
    out = tmp_path / "out"
    more = flags(out, "--max_train_steps", 10_000, "--cache_latents", "--mixed_precision", "no")
    launch = LAUNCH["flux_lora/train_dreambooth_lora_flux.py"]
    two = job(launch, 2, out, more, PHOTOS=str(photos), PROMPT="a photo of sks cat")
    two.wait_for(lambda: (out / "metrics.jsonl").is_file() and metrics(out))
    two.process.send_signal(signal.SIGINT)
    assert two.wait(timeout=60) != 0
    (folder,) = checkpoints(out)
    assert damage(folder) is None
    assert f"saved {folder} after update {len(metrics(out))}" in two.said()
