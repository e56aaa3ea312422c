"""Builds stand-ins for CANN's libraries, so that MindSpore's Ascend backend runs on a machine without an NPU.

    python tests/ascend/build_stand_ins.py build/ascend

MindSpore's wheel for Linux has the whole Ascend backend; it looks for CANN's libraries when it is imported. This script
reads from MindSpore's libraries which functions they ask for, and makes libraries in which each of them returns 0. The
functions with a behaviour are in stand_ins/: memory and copies (runtime.c), operators (operators.c), the objects that
kernel selection asks (graph_engine.cc), and the name of the chip (chip.cc). No number is computed.

Needs x86-64 Linux, gcc, g++ and binutils (nm, strings, readelf).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "stand_ins"
TOOLS = ("gcc", "g++", "nm", "strings", "readelf")
CANN_VERSION = "8.3.0"
OLD_ABI = "-D_GLIBCXX_USE_CXX11_ABI=0"  # that of MindSpore's libraries

# Names that MindSpore's libraries link to.
LINKED = re.compile(
    r"_ZNK?2ge|_ZN3Adx|_Z1[0-9]CheckLogLevel|_Z9DlogFlush|acl|Hccl|Hcom|hal|mm[A-Z]|Initialize$|Finalize$"
    r"|GetOpsKernelInfoStores$|CheckLogLevel|DlogFlush|DlogRecord"
)
# Names that they look up while they run: strings within them.
LOOKED_UP = re.compile(r"(Hccl|Hcom|rt)[A-Z][A-Za-z0-9]+|acl(rt|op|mdl|tdt|prof)?[A-Z]\w+")
# These must return a pointer that is not null.
RETURNS_POINTER = re.compile(
    r"acl(Create|opCreate|mdlCreate|profCreate|rtAllocatorCreate)|aclGetDataBufferAddr|aclmdlGetDatasetBuffer"
)
RETURNS_TEXT = {"aclrtGetSocName": "Ascend910B3", "aclGetRecentErrMsg": ""}
# CANN's library of operators has these beside the operators; the first group must return a pointer.
OPERATOR_MAKERS = [
    "aclCreateScalar",
    "aclCreateIntArray",
    "aclCreateFloatArray",
    "aclCreateBoolArray",
    "aclCreateScalarList",
    "aclCreateAclOpExecutor",
]
OPERATOR_HELPERS = [
    "InitHugeMemThreadLocal",
    "UnInitHugeMemThreadLocal",
    "ReleaseHugeMem",
    "InitPTACacheThreadLocal",
    "SetPTAHashKey",
    "CanUsePTACache",
    "PTAGetExecCache",
    "PTAFindExecCache",
    "AddTensorAddrToCachedList",
    "aclDestroyTensor",
    "aclDestroyScalar",
    "aclDestroyIntArray",
    "aclDestroyFloatArray",
    "aclDestroyBoolArray",
    "aclDestroyTensorList",
    "aclDestroyScalarList",
    "aclDestroyAclOpExecutor",
    "aclSetAclOpExecutorRepeatable",
    "aclSetTensorAddr",
    "aclSetDynamicTensorAddr",
    "aclSetInputTensorAddr",
    "aclSetOutputTensorAddr",
    "aclSetDynamicInputTensorAddr",
    "aclSetDynamicOutputTensorAddr",
    "aclSetRawTensorAddr",
    "aclGetViewShape",
]
# Libraries that MindSpore looks for beside those that it links to.
MORE_LIBRARIES = {"libacl_op_compiler", "libacl_tdt_channel", "libacl_tdt_queue"}
SYSTEM_LIBRARY = re.compile(r"lib(stdc|m$|gomp|gcc|pthread|c$|dl$|rt$)")

NO_EXECUTABLE_STACK = '.section .note.GNU-stack,"",@progbits\n'
# Hands the arguments of aclnnXGetWorkspaceSize, and the operator's name in rax, to prepare_aclnn.
CALL_PREPARE = """
prepare:
push %r9
push %r8
push %rcx
push %rdx
push %rsi
push %rdi
mov %rsp,%rsi
lea 56(%rsp),%rdx
mov %rax,%rdi
sub $8,%rsp
call prepare_aclnn
add $56,%rsp
xor %eax,%eax
ret
"""


def missing_tools() -> list[str]:
    """The programs that this script needs and does not find; on another processor also "x86-64 Linux"."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return missing if platform.machine() == "x86_64" else [*missing, "x86-64 Linux"]


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def symbols(library: Path, which: str) -> set[str]:
    """The functions that a library defines ("defined") or asks for ("undefined")."""
    lines = [line.split() for line in run("nm", "-D", f"--{which}-only", library).splitlines()]
    return {line[-1].split("@")[0] for line in lines if which == "defined" or line[-2] == "U"}


def returning_zero(names: set[str]) -> str:
    """Assembly with a function per name that returns 0."""
    labels = "".join(f".globl {name}\n.type {name},@function\n{name}:\n" for name in sorted(names))
    return f".text\n{labels}xor %eax,%eax\nret\n"


def returning_pointer(names: list[str]) -> str:
    """C with a function per name that returns the address of zeros."""
    functions = "".join(f"void *{name}(void) {{ return zeros; }}\n" for name in names)
    return f"static char zeros[1 << 16];\n{functions}"


def recording(operators: list[str]) -> str:
    """Assembly with the two functions of every operator aclnnX: aclnnXGetWorkspaceSize and aclnnX."""
    functions = texts = ""
    for i, name in enumerate(operators):
        for symbol, jump in (
            (f"{name}GetWorkspaceSize", f"lea .L{i}(%rip),%rax\njmp prepare"),
            (name, f"lea .L{i}(%rip),%r8\njmp launch_aclnn@PLT"),
        ):
            functions += f".globl {symbol}\n.type {symbol},@function\n{symbol}:\n{jump}\n"
        texts += f'.L{i}: .asciz "{name}"\n'
    return f".text\n{functions}{CALL_PREPARE}.section .rodata\n{texts}"


class Libraries:
    """MindSpore's libraries: what they define, ask for, and mention."""

    def __init__(self, mindspore: Path):
        self.core = mindspore / "lib"
        plugin = self.core / "plugin"
        ascend = [plugin / "libmindspore_ascend.so.2", plugin / "libmindspore_ops_ascend.so"]
        ascend += sorted((plugin / "ascend").glob("*.so"))
        own = [*self.core.glob("*.so*"), *ascend, *(plugin / "ascend").rglob("*.so*")]
        defined = set().union(*(symbols(library, "defined") for library in own))
        asked = set().union(*(symbols(library, "undefined") for library in ascend)) - defined
        words = set().union(*(run("strings", "-a", "-n", "5", library).split() for library in ascend))
        self.needed = set()
        for library in ascend:
            self.needed |= set(re.findall(r"NEEDED.*\[(lib[a-z_]+)\.so\]", run("readelf", "-d", library)))
        for library in self.core.glob("*.so"):
            words |= {word for word in run("strings", "-a", "-n", "6", library).split() if word.startswith("aclnn")}
        self.operators = {word for word in words if re.fullmatch(r"aclnn[A-Za-z0-9_]+", word)}
        looked_up = {word for word in words if LOOKED_UP.fullmatch(word) and not word.startswith("aclnn")}
        self.functions = {name for name in asked if LINKED.match(name)} | looked_up
        self.files = {path.name.split(".")[0] for path in self.core.rglob("*.so*")}


def build(out: Path, mindspore: Path) -> None:
    """Writes the stand-ins to `out`; `environment` says how to use them. `mindspore` is the installed package."""
    home, objects = out / "ascend-toolkit" / "latest", out / "objects"
    libraries = home / "lib64"
    for folder in (libraries, objects, home / "opp/built-in/op_impl/ai_core/tbe", home / "opp_kernel"):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in ("compiler/ccec_compiler/bin", "python/hccl"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "compiler/version.info").write_text(f"Version={CANN_VERSION}\n")
    (home / "python/hccl/__init__.py").write_text("")
    (home / "python/hccl/sys_version.py").write_text(f'__sys_version__ = "{CANN_VERSION}"\n')
    found = Libraries(mindspore)
    _runtime(found, libraries, objects)
    _operators(found, libraries, objects)
    run("g++", "-O1", OLD_ABI, "-shared", "-fPIC", "-o", libraries / "libchip.so", SOURCES / "chip.cc",
        f"-L{found.core}", "-lmindspore_core", f"-Wl,-rpath,{found.core}", "-Wl,--allow-shlib-undefined")  # fmt: skip


def _compile(objects: Path, *names: str) -> list[Path]:
    made = []
    for name in names:
        source, target = SOURCES / name, objects / f"{name}.o"
        compiler = ["g++", "-std=c++17", OLD_ABI] if source.suffix == ".cc" else ["gcc"]
        run(*compiler, "-O1", "-w", "-fPIC", "-c", source, "-o", target)
        made.append(target)
    return made


def _write(path: Path, text: str) -> Path:
    path.write_text(text + (NO_EXECUTABLE_STACK if path.suffix == ".s" else ""))
    return path


def _runtime(found: Libraries, libraries: Path, objects: Path) -> None:
    """libcannstub.so with everything but operators, and libraries of the names that MindSpore loads, which use it."""
    compiled = _compile(objects, "record.c", "runtime.c", "operators.c", "graph_engine.cc")
    written = {line.split()[-1] for each in compiled for line in run("nm", "--defined-only", each).splitlines()}
    rest = found.functions - written
    pointers = sorted(name for name in rest if RETURNS_POINTER.match(name))
    texts = "".join(f'const char *{name}(void) {{ return "{text}"; }}\n' for name, text in RETURNS_TEXT.items())
    zeros = _write(objects / "zeros.s", returning_zero(rest - set(pointers) - set(RETURNS_TEXT)))
    others = _write(objects / "others.c", returning_pointer(pointers) + texts)
    run("gcc", "-shared", "-fPIC", "-o", libraries / "libcannstub.so", zeros, others, *compiled,
        "-Wl,-soname,libcannstub.so", "-lstdc++")  # fmt: skip
    for name in sorted((found.needed | MORE_LIBRARIES) - found.files):
        if not SYSTEM_LIBRARY.match(name):
            run("gcc", "-shared", "-o", libraries / f"{name}.so", f"-Wl,-soname,{name}.so", "-Wl,--no-as-needed",
                f"-L{libraries}", "-lcannstub", "-Wl,-rpath,$ORIGIN")  # fmt: skip


def _operators(found: Libraries, libraries: Path, objects: Path) -> None:
    """libopapi.so, CANN's library of aclnn operators."""
    suffix = "GetWorkspaceSize"
    operators = sorted({name.removesuffix(suffix) for name in found.operators} - {"aclnnInit", "aclnnFinalize"})
    quiet = {*OPERATOR_HELPERS, "aclnnInit", "aclnnFinalize"}
    recorded = _write(objects / "recorded.s", recording(operators) + returning_zero(quiet))
    makers = _write(objects / "makers.c", returning_pointer(OPERATOR_MAKERS))
    run("gcc", "-shared", "-fPIC", "-o", libraries / "libopapi.so", recorded, makers,
        f"-L{libraries}", "-lcannstub", "-Wl,-rpath,$ORIGIN", "-Wl,-soname,libopapi.so")  # fmt: skip


def environment(out: Path) -> dict[str, str]:
    """The variables with which a Python process uses the stand-ins in `out`, to be added to os.environ."""
    home = out / "ascend-toolkit" / "latest"
    here = Path(__file__).resolve().parent
    python_path = [here / "startup", home / "python", home / "opp/built-in/op_impl/ai_core/tbe", here.parents[1]]
    return {
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_TOOLKIT_HOME": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "ASCEND_AICPU_PATH": str(home),
        "LD_LIBRARY_PATH": str(home / "lib64"),
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "PATH": f"{home / 'compiler/ccec_compiler/bin'}{os.pathsep}{os.environ['PATH']}",
        "RANK_SIZE": "1",
        "RANK_ID": "0",
        "DEVICE_ID": "0",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds stand-ins for CANN's libraries.")
    parser.add_argument("out", type=Path, help="directory for them")
    out = parser.parse_args().out.resolve()
    if missing := missing_tools():
        raise SystemExit(f"error: the stand-ins for CANN's libraries need {', '.join(missing)}")
    build(out, Path(importlib.util.find_spec("mindspore").origin).parent)
    print(f"stand-ins for CANN {CANN_VERSION}: {out}")


if __name__ == "__main__":
    main()
