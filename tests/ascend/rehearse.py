"""Rehearses every script on a simulated Ascend 910B and checks what no test on the CPU can see.

    python tests/ascend/rehearse.py [NAME ...] [--write]

`make rehearse` runs this. MindSpore's own Ascend backend compiles, chooses kernels and plans memory; the libraries of
CANN below it are stand-ins that compute nothing (build_stand_ins.py). Prints a line per case. Exits with 1 if a check
fails. With NAMEs, only the cases whose names contain one of them. --write puts the tables into docs/ascend.md, and the
old operators that were found into old_operators.txt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "examples" / "tiny")]

import build_stand_ins
from record import FLASH, Record

PROCESSES = 2  # side by side
STEADY_UPDATES = 60
SETTLED = 10  # updates after which memory must not grow
PAGE = ROOT / "docs" / "ascend.md"
BEGIN, END = "<!-- rehearsal: begin -->", "<!-- rehearsal: end -->"
COUNTED = ("kernels", "casts", "transposes", "old", "flash")
OLD_OPERATORS = HERE / "old_operators.txt"
LORA, FLUX_CONTROLNET = "flux_lora/train_dreambooth_lora_flux.py", "flux_controlnet/train_controlnet_flux.py"
KONTEXT, CONTROL_LORA = (
    "examples/flux_kontext/train_lora_flux_kontext.py",
    "examples/flux_control/train_control_lora_flux.py",
)
SD_CONTROLNET = "examples/controlnet/train_controlnet.py"
SDXL_CONTROLNET = "examples/controlnet/train_controlnet_sdxl.py"
SCRIPTS = {
    "lora": LORA,
    "kontext": KONTEXT,
    "control": CONTROL_LORA,
    "flux_cn": FLUX_CONTROLNET,
    "sd": SD_CONTROLNET,
    "sdxl": SDXL_CONTROLNET,
}
FLUX = ("lora", "kontext", "control", "flux_cn")
PIPELINES = {**dict.fromkeys(FLUX, "flux"), "sd": "sd15", "sdxl": "sdxl"}
INFERENCE = {
    "lora": "flux_lora/infer_flux_lora.py",
    "kontext": "examples/flux_kontext/infer_flux_kontext.py",
    "control": "examples/flux_control/infer_control_lora_flux.py",
    "flux_cn": "flux_controlnet/infer_flux_controlnet.py",
    "sd": "examples/controlnet/infer_controlnet.py",
    "sdxl": "examples/controlnet/infer_controlnet_sdxl.py",
}
MODES = {"graph": 0, "pynative": 1}
# Bytes that may be copied per update beside the step's inputs: learning rates, constants, and what is logged. PyNative
# uploads each number that a tensor is multiplied by, and again when the block is recomputed.
SCALARS = {"graph": 256, "pynative": 1024}
STEP_BYTES = 1024  # and per denoising step: its sigma, and constants
INFERENCE_STEPS = (2, 6)
FALLBACKS = ("backoff CPU kernel", "Can't find OpAdapter")  # the first is logged by DEVICE at level 1
# precision -> dtypes that no operator may have
FORBIDDEN = {"no": ("f64", "f16", "bf16"), "fp16": ("f64", "bf16"), "bf16": ("f64", "f16")}
# What run_script.py can break -> words of the problem that must then be found.
BREAKS = {
    "float64": "f64 in",
    "half": "f16 in",
    "fallback": "backoff CPU kernel",
    "copies": "go to the device",
    "back": "come back",
    "memory": "memory grows",
    "old operator": "old operators",
    "attention": "not flash attention",
}


class Case(NamedTuple):
    """A run of a script.

    `system` is a key of SCRIPTS. `after` names the training run whose result an inference run uses, or that is resumed.
    `breaks`, a key of BREAKS, makes it a negative control. Without `validates` there is no held-out loss and no image.
    """

    name: str
    system: str
    precision: str
    flags: tuple[str, ...] = ()
    mode: str = "graph"
    updates: int = 3
    rank: Optional[int] = None
    after: Optional[str] = None
    breaks: Optional[str] = None
    validates: bool = True

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
        "checkpointing": (tuple(SCRIPTS), ("--gradient_checkpointing",), MODES),
        "int8": (FLUX, ("--base_precision", "int8"), MODES),
        "fill": (("control",), ("--fill",), MODES),
        "norms": (("control",), ("--train_norm_layers",), MODES),
        "int8 checkpointing": (("lora",), ("--base_precision", "int8", "--gradient_checkpointing"), ("graph",)),
        "8-bit Adam": (("flux_cn",), ("--use_8bit_adam",), MODES),
        "prodigy": (("lora",), ("--optimizer", "prodigy", "--learning_rate", "1"), ("graph",)),
        "adafactor": (("flux_cn",), ("--optimizer", "adafactor"), ("graph",)),
        "offload": (("flux_cn",), ("--offload_optimizer",), ("graph",)),
        "EMA": (("lora", "sd", "flux_cn"), ("--use_ema",), MODES),
        # In PyNative a DoRA copies constants to the device, 140 bytes per layer and update: docs/ascend.md.
        "DoRA": (("lora",), ("--adapter", "dora"), ("graph",)),
        "LoKr": (("lora",), ("--adapter", "lokr"), MODES),
        "Huber, masks": (("lora",), ("--loss", "huber", "--masked_loss"), MODES),
        "Huber": (("sd",), ("--loss", "smooth_l1", "--huber_schedule", "snr"), MODES),
        "buckets": (("lora",), ("--aspect_ratio_buckets", "32,32;32,48;48,32"), MODES),
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
    cases = [
        Case(f"infer {system} {precision}", system, precision, after=f"{system} {precision} graph")
        for system in SCRIPTS for precision in ("bf16", "fp16", "no")
    ]  # fmt: skip
    return [*cases, Case("infer control fill", "control", "bf16", ("--fill",), after="control fill graph")]


def resumed_cases() -> list[Case]:
    return [
        Case(f"resumed {system} {mode}", system, "bf16", mode=mode, updates=STEADY_UPDATES + 5,
             flags=("--resume_from_checkpoint", "latest"), after=f"{system} bf16 {mode}")
        for system in SCRIPTS for mode in MODES
    ]  # fmt: skip


def negative_controls() -> list[Case]:
    """Runs in which something is broken on purpose, to see that the checks can fail."""
    return [
        Case(f"control: {name}", "lora", "no" if name == "half" else "bf16", mode="pynative", breaks=name,
             updates=SETTLED + 6 if name == "memory" else 4, validates=False)
        for name in BREAKS
    ]  # fmt: skip


def all_cases() -> list[Case]:
    return training_cases() + inference_cases() + resumed_cases() + negative_controls()


# ---- what a run is started with ------------------------------------------------------------------


def make_inputs(work: Path) -> None:
    """Tiny pipelines, photographs and pairs."""
    import make_tiny_pipeline
    import shapes

    for name in ("flux", "sd15", "sdxl"):
        getattr(make_tiny_pipeline, f"make_{name}")(work / name, seed=0)
    shapes.make_folder(work / "pairs", 6, 64, seed=0, split="train")
    shutil.copytree(work / "pairs" / "images", work / "photos")


def folder(name: str) -> str:
    """The name of a case's output directory."""
    return name.replace(" ", "-")


def condition(work: Path) -> Path:
    """A condition image, which is also a source to edit and a mask."""
    return work / "pairs/conditioning/000000.png"


def training_flags(case: Case, work: Path) -> list[str]:
    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": work / PIPELINES[case.system],
        "output_dir": work / folder(case.name),
        "cache_dir": work / "cache",
        "mixed_precision": case.precision,
        "mindspore_mode": MODES[case.mode],
        "max_train_steps": case.updates,
        "checkpointing_steps": case.updates - 1,
        "seed": 0,
        "train_batch_size": 1,
        "resolution": 64,
    }
    if case.validates:
        flags.update(validation_split=0.34, validation_prompt="a red circle")
        flags.update(num_validation_images=1, num_inference_steps=2)
    if case.system == "lora":
        flags.update(instance_data_dir=work / "photos", instance_prompt="a sks circle", cache_latents=None)
    else:
        flags.update(train_data_dir=work / "pairs")
        if case.validates:
            flags.update(validation_image=condition(work), validation_steps=case.updates)
            flags.update({"validation_mask": condition(work)} if "--fill" in case.flags else {})
    if case.system == "sdxl":  # its VAE computes in float32, so that no attention in it is flash attention
        flags.update(cache_latents=None)
    if case.system == "flux_cn":
        flags.update(num_double_layers=1, num_single_layers=1)
    if case.system in FLUX:
        flags.update(max_sequence_length=16)
    words = [word for name, value in flags.items() for word in (f"--{name}", value) if word is not None]
    return [*map(str, words), *([] if case.after else ["--overwrite_output_dir"]), *case.flags]


def inference_flags(case: Case, work: Path, steps: int) -> list[str]:
    trained = work / folder(case.after)
    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": work / PIPELINES[case.system],
        "cache_dir": work / "cache",
        "mixed_precision": case.precision,
        "prompt": "a red circle",
        "num_inference_steps": steps,
        "output": work / f"{folder(case.name)}-{steps}.png",
    }
    if case.system == "lora":
        flags.update(lora=trained, height=64, width=64)
    elif case.system == "kontext":
        flags.update(lora=trained, image=condition(work), resolution=64)
    else:
        kind = "lora" if case.system == "control" else "controlnet"
        flags.update({kind: trained}, control_image=condition(work), resolution=64)
    if "--fill" in case.flags:
        flags.update(mask_image=condition(work))
    return [*(str(word) for name, value in flags.items() for word in (f"--{name}", value)), "--overwrite", *case.flags]


# ---- running -------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a run left: exit code, output, bytes and memory per update (run_script.py), operators, and seconds."""

    code: int
    printed: str
    updates: list[dict[str, int]]
    record: Record
    seconds: float


def use_all_cores() -> None:
    """Tests keep to a core, on which the threads of the simulated device would take twice the time."""
    os.sched_setaffinity(0, range(os.cpu_count()))


def run(name: str, script: str, flags: list[str], work: Path, stand_ins: Path, *options: str) -> Result:
    """Runs a script on the simulated device."""
    record, updates = work / f"{name}.record", work / f"{name}.json"
    command = [sys.executable, str(HERE / "run_script.py"), *options, str(updates), str(ROOT / script), *flags]
    environment = {**os.environ, **build_stand_ins.environment(stand_ins), "ASCEND_RECORD": str(record)}
    environment.update(GLOG_v="2", MS_SUBMODULE_LOG_v="{DEVICE:1}")
    record.write_text("")
    began = time.time()
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=work,
        preexec_fn=use_all_cores,
    )
    (work / f"{name}.log").write_text(done.stdout)
    costs = json.loads(updates.read_text()) if updates.exists() else []
    return Result(done.returncode, done.stdout, costs, Record(record), time.time() - began)


# ---- what must be true of a run ------------------------------------------------------------------


def problems(case: Case, result: Result) -> list[str]:
    """What is wrong with a run, in words; nothing if all is well."""
    if result.code != 0:
        return [f"exit code {result.code}"]
    record = result.record
    found = [f"{word} in the log" for word in FALLBACKS if word in result.printed]
    for dtype in FORBIDDEN[case.precision]:
        if names := record.names_with(dtype):
            found.append(f"{dtype} in {', '.join(names)}")
    if unknown := record.old_operators() - set(OLD_OPERATORS.read_text().split()):
        found.append(f"old operators {', '.join(sorted(unknown))}")
    if not case.infers:
        found += problems_of_updates(case, result)
    return found


def steady_update(result: Result) -> int:
    """The number of the last update before the checkpoint."""
    return len(result.updates) - 3


def problems_of_updates(case: Case, result: Result) -> list[str]:
    """What is wrong with copies, memory and attention in the updates after the first and before the checkpoint."""
    steady, found = result.updates[1:-2], []
    allowed = SCALARS[case.mode]
    if "--offload_optimizer" in case.flags:  # gradients and changes of weights cross the bus
        allowed += steady[0]["trained"]
    if (extra := max(update["to_device"] - update["inputs"] for update in steady)) > allowed:
        found.append(f"{extra:,} bytes more than the batch go to the device at an update")
    if (extra := max(update["to_host"] for update in steady)) > allowed:
        found.append(f"{extra:,} bytes come back at an update")
    settled = [update["memory"] for update in steady[SETTLED:]]
    if settled and max(settled) > min(settled):
        found.append(f"device memory grows by {max(settled) - min(settled):,} bytes in {len(settled)} updates")
    names = {call.name for calls in result.record.updates[1:-2] for call in calls}
    if case.precision == "no" and any(name.startswith(FLASH) for name in names):
        found.append("flash attention in float32")
    softmax = "aclnnSoftmax" in names and "--train_text_encoder" not in case.flags  # CLIP's attention is mindone's
    if case.precision != "no" and (softmax or not any(name.startswith(FLASH) for name in names)):
        found.append("attention that is not flash attention")
    return found


def problems_of_inference(few: Result, many: Result, steps: int) -> list[str]:
    """What is wrong with the copies of a denoising step, from two runs that differ by `steps` steps."""
    extra = (many.updates[-1]["to_device"] - few.updates[-1]["to_device"]) / steps
    return [f"{extra:,.0f} bytes go to the device at a denoising step"] if extra > STEP_BYTES else []


# ---- the rehearsal -------------------------------------------------------------------------------


def rehearse(case: Case, work: Path, stand_ins: Path) -> tuple[Result, list[str]]:
    """Runs a case. Returns its result and what is wrong with it."""
    if case.infers:
        script = INFERENCE[case.system]
        few, many = (
            run(f"{case.name} {steps}", script, inference_flags(case, work, steps), work, stand_ins)
            for steps in INFERENCE_STEPS
        )
        found = problems(case, few) + problems(case, many)
        if few.code == many.code == 0:
            found += problems_of_inference(few, many, INFERENCE_STEPS[1] - INFERENCE_STEPS[0])
        return many, found
    if case.after:
        shutil.copytree(work / folder(case.after), work / folder(case.name), dirs_exist_ok=True)
    options = ["--rank", str(case.rank), "--world_size", "8"] if case.rank is not None else []
    options += ["--break", case.breaks] if case.breaks else []
    result = run(case.name, SCRIPTS[case.system], training_flags(case, work), work, stand_ins, *options)
    return result, problems(case, result)


def judge(case: Case, found: list[str]) -> bool:
    """Whether a case went as it must: without a problem, or for a negative control with the one that was put in."""
    return any(BREAKS[case.breaks] in problem for problem in found) if case.breaks else not found


def describe(case: Case, result: Result, found: list[str]) -> str:
    counts = ""
    if not case.infers and len(result.updates) > 3:
        update = result.record.count(steady_update(result))
        counts = ", ".join(f"{count:,} {name}" for name, count in update.items())
    verdict = "ok" if judge(case, found) else "FAILED"
    return f"{verdict:6} {case.name:45} {result.seconds:4.0f} s  {counts} {'; '.join(found)}"


# ---- docs ----------------------------------------------------------------------------------------


def write(results: dict[Case, tuple[Result, list[str]]], old: set[str]) -> None:
    """Puts the tables between the markers of docs/ascend.md, and the old operators into their list."""
    OLD_OPERATORS.write_text("".join(f"{name}\n" for name in sorted(old)))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mindspore", "mindone"))
    lines = [
        BEGIN,
        "",
        f"Written by `make rehearse` with {versions}, for a simulated Ascend 910B3. {len(results)} cases:",
        "",
        "| run | kernels | casts | transposes | old | flash | to the device, beside the batch | back |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    others = []
    for case, (result, found) in results.items():
        verdict = "" if judge(case, found) else f" **{'; '.join(found)}**"
        if case.infers or case.breaks or len(result.updates) < 4:
            others.append(f"{case.name}{verdict}")
            continue
        number = steady_update(result)
        count, cost = result.record.count(number), result.updates[number]
        cells = [f"{case.name}{verdict}", *(f"{count[name]:,}" for name in COUNTED)]
        cells += [f"{cost['to_device'] - cost['inputs']:,} B", f"{cost['to_host']:,} B"]
        lines.append(f"| {' | '.join(cells)} |")
    paragraphs = [
        f"Without an update to count: {'; '.join(others)}.",
        f"Operators of the older kind (aclop) in all of them: {', '.join(sorted(old))}.",
    ]
    for paragraph in paragraphs:
        lines += ["", textwrap.fill(paragraph, 100, break_on_hyphens=False)]
    lines += ["", END]
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + "\n".join(lines) + after)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rehearses every script on a simulated Ascend 910B.")
    parser.add_argument("names", nargs="*", help="Run only cases whose names contain one of these.")
    parser.add_argument("--write", action="store_true", help="Write docs/ascend.md and old_operators.txt.")
    parser.add_argument("--work", type=Path, help="Keep the runs in this directory.")
    args = parser.parse_args()
    if missing := build_stand_ins.missing_tools():
        print(f"error: the rehearsal needs {', '.join(missing)}", file=sys.stderr)
        return 2
    stand_ins = ROOT / "build" / "ascend"
    build_stand_ins.build(stand_ins, Path(importlib.util.find_spec("mindspore").origin).parent)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not (work / "photos").exists():
            make_inputs(work)
        cases = [case for case in all_cases() if not args.names or any(name in case.name for name in args.names)]
        began = time.time()
        results = {}
        for trained in (False, True):  # inference and resumed runs need what training has left
            group = [case for case in cases if bool(case.after) == trained]
            for case in [case for case in group if trained and not (work / folder(case.after)).exists()]:
                print(f"left out: {case.name}, for which {case.after} must run first")
                group.remove(case)
            with ThreadPoolExecutor(PROCESSES) as pool:
                for case, (result, found) in zip(group, pool.map(lambda c: rehearse(c, work, stand_ins), group)):
                    results[case] = result, found
                    print(describe(case, result, found), flush=True)
    failed = [case.name for case, (_, found) in results.items() if not judge(case, found)]
    old = set().union(*(result.record.old_operators() for case, (result, _) in results.items() if not case.breaks))
    if not args.names and old != set(OLD_OPERATORS.read_text().split()):
        failed.append(f"{OLD_OPERATORS.name} is not the list of old operators that were called")
    print(f"{len(results)} cases in {time.time() - began:.0f} s; {len(failed)} failed: {', '.join(failed) or 'none'}")
    if args.write:
        write(results, old)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
