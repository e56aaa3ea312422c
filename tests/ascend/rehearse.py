"""Rehearses every script on a simulated Ascend 910B and checks what no test on the CPU can see.

    python tests/ascend/rehearse.py [NAME ...] [--write]

`make rehearse` runs this. MindSpore's own Ascend backend compiles, chooses kernels and plans memory; the libraries of
CANN below it are stand-ins that compute nothing (build.py). Prints a line per case and exits with 1 if a check fails.
With NAMEs, only the cases whose names contain one of them. --write puts the tables into docs/ascend.md, and the old
operators that were found into old_operators.txt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "examples" / "tiny")]

import build
from record import Record

PROCESSES = 2  # side by side
STEADY_UPDATES = 60
SETTLED = 10  # updates after which memory must not grow
OLD_OPERATORS = HERE / "old_operators.txt"
LORA, FLUX_CONTROLNET = "flux_lora/train_dreambooth_lora_flux.py", "flux_controlnet/train_controlnet_flux.py"
SD_CONTROLNET = "examples/controlnet/train_controlnet.py"
SDXL_CONTROLNET = "examples/controlnet/train_controlnet_sdxl.py"
SCRIPTS = {"lora": LORA, "flux_cn": FLUX_CONTROLNET, "sd": SD_CONTROLNET, "sdxl": SDXL_CONTROLNET}
INFERENCE = {
    "lora": "flux_lora/infer_flux_lora.py",
    "flux_cn": "flux_controlnet/infer_flux_controlnet.py",
    "sd": "examples/controlnet/infer_controlnet.py",
    "sdxl": "examples/controlnet/infer_controlnet_sdxl.py",
}
MODES = {"graph": 0, "pynative": 1}
# Bytes that may be copied per update beside the step's inputs: learning rates and what is logged.
SCALARS = 64


class Case(NamedTuple):
    """A run of a script. `system` is a key of SCRIPTS; `after` names the case that must have run before."""

    name: str
    system: str
    precision: str
    flags: tuple[str, ...] = ()
    mode: str = "graph"
    updates: int = 3
    rank: Optional[int] = None
    after: Optional[str] = None

    @property
    def infers(self) -> bool:
        return self.after is not None and self.name.startswith("infer")


def training_cases() -> list[Case]:
    cases = [
        Case(f"{system} {precision} {mode}", system, precision, mode=mode,
             updates=STEADY_UPDATES if precision == "bf16" else 3)
        for system in SCRIPTS for precision in ("bf16", "fp16", "no") for mode in MODES
    ]  # fmt: skip
    features = {
        "checkpointing": (("lora", "flux_cn", "sd", "sdxl"), ("--gradient_checkpointing",), MODES),
        "int8": (("lora", "flux_cn"), ("--base_precision", "int8"), MODES),
        "int8 checkpointing": (("lora",), ("--base_precision", "int8", "--gradient_checkpointing"), ("graph",)),
        "8-bit Adam": (("flux_cn",), ("--use_8bit_adam",), MODES),
        "prodigy": (("lora",), ("--optimizer", "prodigy", "--learning_rate", "1"), ("graph",)),
        "adafactor": (("flux_cn",), ("--optimizer", "adafactor"), ("graph",)),
        "offload": (("flux_cn",), ("--offload_optimizer",), ("graph",)),
        "EMA": (("sd", "flux_cn"), ("--use_ema",), MODES),
        "buckets": (("lora",), ("--aspect_ratio_buckets", "32x32,32x48,48x32"), MODES),
        "CLIP trained": (("lora",), ("--train_text_encoder",), MODES),
        "accumulation": (("lora",), ("--gradient_accumulation_steps", "2"), MODES),
    }
    for feature, (systems, flags, modes) in features.items():
        cases += [Case(f"{s} {feature} {mode}", s, "bf16", flags, mode) for s in systems for mode in modes]
    for mode in MODES:
        for zero in ("0", "1"):
            flags = ("--distributed", "--zero_stage", zero)
            cases.append(Case(f"flux_cn rank 1 of 8, ZeRO {zero} {mode}", "flux_cn", "bf16", flags, mode, rank=1))
    return cases


def inference_cases() -> list[Case]:
    return [
        Case(f"infer {system} {precision}", system, precision, after=f"{system} {precision} graph")
        for system in SCRIPTS for precision in ("bf16", "fp16", "no")
    ]  # fmt: skip


# ---- what a run is started with ------------------------------------------------------------------


def make_inputs(work: Path) -> None:
    """Tiny pipelines, photographs and pairs."""
    import make_tiny_pipeline
    import shapes

    for name in ("flux", "sd15", "sdxl"):
        getattr(make_tiny_pipeline, f"make_{name}")(work / name, seed=0)
    shapes.make_folder(work / "pairs", 6, 64, seed=0, split="train")
    shutil.copytree(work / "pairs" / "images", work / "photos")


def training_flags(case: Case, work: Path) -> list[str]:
    pipeline = {"lora": "flux", "flux_cn": "flux", "sd": "sd15", "sdxl": "sdxl"}[case.system]
    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": work / pipeline,
        "output_dir": work / case.name.replace(" ", "-"),
        "cache_dir": work / "cache",
        "mixed_precision": case.precision,
        "mindspore_mode": MODES[case.mode],
        "max_train_steps": case.updates,
        "checkpointing_steps": case.updates - 1,
        "seed": 0,
        "train_batch_size": 1,
        "num_inference_steps": 2,
        "num_validation_images": 1,
        "validation_split": 0.34,
        "validation_prompt": "a red circle",
        "resolution": 64,
    }
    if case.system == "lora":
        flags.update(instance_data_dir=work / "photos", instance_prompt="a sks circle", cache_latents=None)
    else:
        flags.update(train_data_dir=work / "pairs", validation_image=work / "pairs/conditioning/000000.png")
        flags.update(validation_steps=case.updates)
    if case.system == "flux_cn":
        flags.update(num_double_layers=1, num_single_layers=1)
    if case.system in ("lora", "flux_cn"):
        flags.update(max_sequence_length=16)
    words = [word for name, value in flags.items() for word in (f"--{name}", value) if word is not None]
    return [*map(str, words), *case.flags]


def inference_flags(case: Case, work: Path, steps: int) -> list[str]:
    pipeline = {"lora": "flux", "flux_cn": "flux", "sd": "sd15", "sdxl": "sdxl"}[case.system]
    trained = work / case.after.replace(" ", "-")
    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": work / pipeline,
        "cache_dir": work / "cache",
        "mixed_precision": case.precision,
        "prompt": "a red circle",
        "num_inference_steps": steps,
        "output": work / f"{case.name.replace(' ', '-')}-{steps}.png",
    }
    if case.system == "lora":
        flags.update(lora=trained, height=64, width=64)
    else:
        flags.update(controlnet=trained, control_image=work / "pairs/conditioning/000000.png", resolution=64)
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


# ---- running -------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a run left: exit code, output, bytes and memory per update (run_script.py), operators, and seconds."""

    code: int
    printed: str
    updates: list[dict[str, int]]
    record: Record
    seconds: float


def run(name: str, script: str, flags: list[str], work: Path, stand_ins: Path, *options: str) -> Result:
    """Runs a script on the simulated device."""
    record, updates = work / f"{name}.record", work / f"{name}.json"
    command = [sys.executable, str(HERE / "run_script.py"), str(updates), *options, str(ROOT / script), *flags]
    environment = {**os.environ, **build.environment(stand_ins), "ASCEND_RECORD": str(record), "GLOG_v": "2"}
    record.write_text("")
    began = time.time()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=work
    )
    (work / f"{name}.log").write_text(done.stdout)
    costs = json.loads(updates.read_text()) if updates.exists() else []
    return Result(done.returncode, done.stdout, costs, Record(record), time.time() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rehearses every script on a simulated Ascend 910B.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--stand_ins", type=Path, default=ROOT / "build" / "ascend")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    if not (work / "photos").exists():
        make_inputs(work)
    for case in training_cases() + inference_cases():
        if any(name in case.name for name in args.names):
            if args.updates:
                case = case._replace(updates=args.updates)
            if case.infers:
                result = run(case.name, INFERENCE[case.system], inference_flags(case, work, 4), work, args.stand_ins)
            else:
                result = run(case.name, SCRIPTS[case.system], training_flags(case, work), work, args.stand_ins)
            print(case.name, result.code, f"{result.seconds:.0f} s", result.record.old_operators())
            for i in [*range(min(5, len(result.updates))), *range(max(5, len(result.updates) - 2), len(result.updates))]:
                print(result.updates[i], result.record.count(i))


if __name__ == "__main__":
    sys.exit(main())
