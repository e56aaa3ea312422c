"""What the report says of the machine: versions, the device, environment variables, memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import mindspore as ms

from mindtune.run.tracking import package_versions, peak_memory_mb

MB = 1 << 20
VARIABLES = re.compile(r"(ASCEND_(HOME_PATH|OPP_PATH|RT_|GLOBAL_)|HCCL_|MS_|GLOG_v|DEVICE_ID|RANK_|OMP_NUM_THREADS)")
# Files below CANN's directory, and the line in them that has a version.
CANN_FILES = {
    f"{platform.machine()}-linux/ascend_toolkit_install.info": "version=",
    "compiler/version.info": "Version=",
    "opp/version.info": "Version=",
}


def versions() -> dict[str, Optional[str]]:
    """Versions of packages, the system, CANN, CANN's wheels and the driver; None for what is not found."""
    found = package_versions()
    found["system"] = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    found["CANN"] = cann_version()
    for wheel in ("te", "hccl"):
        try:
            found[wheel] = version(wheel)
        except PackageNotFoundError:
            found[wheel] = None
    found["driver"] = driver_version()
    return found


def cann_version() -> Optional[str]:
    """The version of the CANN whose set_env.sh was sourced: of the toolkit, or of the first part that has one."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    for name, start in CANN_FILES.items():
        path = Path(home or "", name)
        if home and path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                if line.startswith(start):
                    return f"{line.split('=')[1].strip()} ({name.split('/')[-1]})"
    return None


def driver_version() -> Optional[str]:
    """The version that npu-smi prints, if it is on PATH."""
    if not shutil.which("npu-smi"):
        return None
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"npu-smi info: {error}"
    match = re.search(r"Version:\s*(\S+)", done.stdout)
    return match.group(1) if match else f"npu-smi info: exit code {done.returncode}"


def device() -> dict[str, Any]:
    """The device that MindSpore uses: target, id, name, memory in MB. On the CPU the memory of the machine."""
    target = ms.get_context("device_target")
    found: dict[str, Any] = {"target": target, "id": ms.get_context("device_id"), "name": None, "memory_mb": None}
    if target == "CPU":
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return {**found, "name": platform.machine(), "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") // MB}
    try:
        properties = ms.hal.get_device_properties(found["id"], target)
        return {**found, "name": properties.name, "memory_mb": properties.total_memory // MB}
    except Exception as error:  # mindspore.hal differs between versions; the checks can do without
        return {**found, "name": f"{type(error).__name__}: {error}".splitlines()[0]}


def variables() -> dict[str, str]:
    """The environment variables that MindSpore, CANN and HCCL read."""
    return {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}


def memory() -> dict[str, float]:
    """The memory manager's numbers in MB, and the peak of this process on the host."""
    names = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    found = {name: round(getattr(ms.runtime, name)() / MB, 1) for name in names}
    return {**found, "host_peak": float(peak_memory_mb()["training_process"])}
