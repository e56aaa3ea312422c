"""One update of each training script, with tiny random models, as child processes.

The scripts and the maker of tiny pipelines are in the repository and not in the package.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from mindtune.cli import printable

REPOSITORY = Path(__file__).resolve().parents[2]
MAKER = "examples/tiny/make_tiny_pipeline.py"
TIMEOUT = 1800  # seconds for one script


class Script(NamedTuple):
    """A training script, the kind of its pipeline, the precision that its launch script uses, and its own flags."""

    path: str
    pipeline: str
    precision: str
    flags: tuple[str, ...]


PAIRS = ("--train_data_dir", "pairs")
SCRIPTS = {
    "FLUX LoRA": Script(
        "flux_lora/train_dreambooth_lora_flux.py",
        "flux",
        "bf16",
        ("--instance_data_dir", "pairs/images", "--instance_prompt", "a photo", "--max_sequence_length", "16"),
    ),
    "FLUX ControlNet": Script(
        "flux_controlnet/train_controlnet_flux.py",
        "flux",
        "bf16",
        (*PAIRS, "--num_double_layers", "1", "--num_single_layers", "1", "--max_sequence_length", "16"),
    ),
    "FLUX Kontext LoRA": Script(
        "examples/flux_kontext/train_lora_flux_kontext.py", "flux", "bf16", (*PAIRS, "--max_sequence_length", "16")
    ),
    "FLUX Control-LoRA": Script(
        "examples/flux_control/train_control_lora_flux.py", "flux", "bf16", (*PAIRS, "--max_sequence_length", "16")
    ),
    "SD ControlNet": Script("examples/controlnet/train_controlnet.py", "sd15", "fp16", PAIRS),
    "SDXL ControlNet": Script("examples/controlnet/train_controlnet_sdxl.py", "sdxl", "fp16", PAIRS),
}


class Result(NamedTuple):
    """The loss of a script's update, the seconds of the whole run, and what is wrong, if anything is."""

    name: str
    loss: Optional[float] = None
    seconds: Optional[float] = None
    problem: Optional[str] = None


def is_available() -> bool:
    """Whether the repository is around the package."""
    return all((REPOSITORY / path).is_file() for path in (MAKER, *(script.path for script in SCRIPTS.values())))


def write_pairs(folder: Path) -> None:
    """Two images of 64 pixels with condition images and captions, in the layout of the `datasets` library."""
    rng, lines = np.random.default_rng(0), []
    for part in ("images", "conditioning"):
        (folder / part).mkdir(parents=True)
    for number in range(2):
        for part in ("images", "conditioning"):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
        names = {"file_name": f"images/{number}.png", "conditioning_image_file_name": f"conditioning/{number}.png"}
        lines.append(json.dumps({**names, "text": "a photo"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def run(name: str, work: Path, mindspore_mode: int) -> Result:
    """Runs one update of a script in the folder `work`, which the runs of all scripts share."""
    script, start = SCRIPTS[name], time.perf_counter()
    out = work / name.replace(" ", "-").lower()
    if not (work / "pairs").exists():
        write_pairs(work / "pairs")
    if not (work / script.pipeline).exists():
        problem = _call(work, MAKER, script.pipeline, script.pipeline)
        if problem:
            return Result(name, problem=f"{MAKER}: {problem}")
    problem = _call(
        work,
        script.path,
        *("--pretrained_model_name_or_path", script.pipeline, "--output_dir", out.name, "--cache_dir", "cache"),
        *("--resolution", "64", "--train_batch_size", "1", "--max_train_steps", "1", "--report_to", "none"),
        *("--mixed_precision", script.precision, "--mindspore_mode", str(mindspore_mode), "--seed", "0"),
        *script.flags,
    )
    seconds = time.perf_counter() - start
    if problem:
        return Result(name, seconds=seconds, problem=problem)
    loss = float(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    # A loss of exactly 0 is that of a device which computes nothing.
    return Result(name, loss, seconds, None if math.isfinite(loss) and loss > 0 else f"the loss is {loss}")


def _call(work: Path, script: str, *flags: str) -> Optional[str]:
    """Runs a script of the repository in `work`. Returns what is wrong: None, or the last line that it printed."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / script), *flags],
            cwd=work,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} seconds"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return None if done.returncode == 0 else f"exit code {done.returncode}: {printable(lines[-1] if lines else '')}"
