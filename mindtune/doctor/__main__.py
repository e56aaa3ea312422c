"""Checks MindTune on this machine, and prints a report to send to its developers.

    python -m mindtune.doctor
    python -m mindtune.doctor --only attention --json report.json

Runs every operator that training uses, forward and backward, in each dtype that the device has, and compares it with
NumPy in float64. Then makes one update with each training script, on tiny random models; these scripts have to be in
the directory above the package, as they are in the repository. Writes no file but that of --json. The exit code is 0 if
all is well, and 1 if not; the last lines name what is not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Optional

from mindtune.cli import run_script
from mindtune.doctor import cases, compare, machine, training
from mindtune.files import require_writable
from mindtune.flags.parser import Parser, Values
from mindtune.models.execution import set_up_device


def parse_args(argv: Optional[list[str]] = None) -> Values:
    parser = Parser(__doc__)
    parser.prog = "python -m mindtune.doctor"
    parser.add("mindspore_mode", type=int, default=0, choices=[0, 1], help="0: graph mode, 1: PyNative.")
    parser.add("only", help="Run only the checks with this text in their name. Default: all.")
    parser.add("json", help="Write the report to this file too. Default: none.")
    return parser.parse_args(argv)


def is_selected(name: str, only: Optional[str]) -> bool:
    return not only or only.lower() in name.lower()


# ---- the checks ----------------------------------------------------------------------------------


def check_operators(graph_mode: bool, on_cpu: bool, only: Optional[str]) -> list[compare.Row]:
    """A row per operator and dtype, printed as it is made."""
    rows = []
    for case in cases.table(graph_mode):
        for dtype in case.dtypes if is_selected(case.name, only) else ():
            if dtype == "bfloat16" and on_cpu:  # MindSpore has no bfloat16 matrix product for the CPU
                continue
            rows.append(compare.check(case, dtype))
            print(format_row(rows[-1]), flush=True)
    return rows


def check_scripts(mindspore_mode: int, only: Optional[str]) -> list[training.Result]:
    """A result per training script, printed as it is made."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in training.SCRIPTS:
            if is_selected(f"{name} update", only):
                results.append(training.run(name, Path(folder), mindspore_mode))
                print(format_result(results[-1]), flush=True)
    return results


def make_report(mindspore_mode: int, only: Optional[str]) -> dict[str, Any]:
    """The report, as --json writes it. Prints it at the same time."""
    graph_mode = mindspore_mode == 0
    set_up_device(graph_mode)
    report: dict[str, Any] = {
        "versions": machine.versions(),
        "device": machine.device(),
        "variables": machine.variables(),
        "mode": "graph" if graph_mode else "PyNative",
    }
    on_cpu = report["device"]["target"] == "CPU"
    report["notes"] = notes(report["versions"], on_cpu)
    print(format_machine(report), flush=True)
    operators = check_operators(graph_mode, on_cpu, only)
    report["memory_mb"] = machine.memory()
    print("memory in MB: " + ", ".join(f"{name} {size:g}" for name, size in report["memory_mb"].items()))
    results = check_scripts(mindspore_mode, only) if training.is_available() else []
    report["operators"] = [row._asdict() for row in operators]
    report["updates"] = [result._asdict() for result in results]
    report["problems"] = [f"{row.name}, {row.dtype}: {row.problem}" for row in operators if row.problem]
    report["problems"] += [f"{result.name} update: {result.problem}" for result in results if result.problem]
    return report


def notes(versions: dict[str, Optional[str]], on_cpu: bool) -> list[str]:
    """What is not checked here, and what is missing but may not be needed."""
    found = []
    if on_cpu:
        found.append("bfloat16: not on this device; on the CPU bf16 weights compute in float32")
    elif not versions["CANN"]:
        found.append("CANN: not found; source its set_env.sh")
    for wheel in () if on_cpu else ("te", "hccl"):
        if not versions[wheel]:
            found.append(f"the wheel {wheel} of CANN is not installed (docs/ascend.md)")
    if not training.is_available():
        found.append("updates: not run, because the training scripts are not beside the package (clone the repository)")
    return found


# ---- the report as text --------------------------------------------------------------------------


def format_machine(report: dict[str, Any]) -> str:
    lines = [f"{name:16} {version or '-'}" for name, version in report["versions"].items()]
    device = report["device"]
    lines.append(f"{'device':16} {device['target']} {device['id']}, {device['name'] or '-'}, {device['memory_mb']} MB")
    lines += [f"{'variable':16} {name}={value}" for name, value in report["variables"].items()]
    lines.append(f"{'mode':16} {report['mode']}")
    lines += [f"{'note':16} {note}" for note in report["notes"]]
    header = f"{'':4}  {'operator':20} {'dtype':9} {'error':>8} {'bound':>8} {'ms':>8}  largest error in"
    return "\n".join([*lines, header])


def format_row(row: compare.Row) -> str:
    start = f"{'BAD' if row.problem else 'ok':4}  {row.name:20} {row.dtype:9}"
    if row.error is None:
        return f"{start} {row.problem}"
    return f"{start} {row.error:8.1e} {row.bound:8.1e} {row.milliseconds:8.1f}  {row.where}"


def format_result(result: training.Result) -> str:
    found = result.problem or f"loss {result.loss:.4f} after {result.seconds:.0f} s"
    return f"{'BAD' if result.problem else 'ok':4}  {result.name + ' update':20} {found}"


def main(argv: Optional[list[str]] = None) -> int:
    flags = parse_args(argv)
    if flags.json:
        require_writable("--json", Path(flags.json).absolute().parent)
    report = make_report(flags.mindspore_mode, flags.only)
    if flags.json:
        Path(flags.json).write_text(json.dumps(report, indent=1) + "\n")
    print(f"checks that found a problem: {len(report['problems'])}")
    for problem in report["problems"]:
        print(f"  {problem}")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    run_script(main)
