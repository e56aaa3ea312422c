"""The rules of the house: rooms and imports, scripts that fit in a head, flags with an effect, no machine's paths."""

import argparse
import ast
import inspect
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TRAINING_SCRIPTS, load_script, metrics

from mindtune.flags.parser import NO_EFFECT
from mindtune.flags.script_parser import script_parser

FOLDERS = ("flux_lora", "flux_controlnet", "examples/controlnet", "examples/flux_kontext", "examples/flux_control")
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if "def parse_args" in path.read_text()
]
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "mindtune").rglob("*.py") if path.name != "__init__.py")
# A module imports only from its own room and from rooms before it; rooms in one line do not import each other.
ROOMS = [
    ["cli"],
    ["files"],
    ["rng"],
    ["flow"],
    ["diffusion"],
    ["distributed"],
    ["data"],
    ["models"],
    ["encode", "optim"],
    ["run"],
    ["flags"],
    ["plan", "check_data", "doctor"],
    ["app"],
]
SECTIONS = {
    "flags": "yours to change",
    "checks": "machinery",
    "data": "yours to change",
    "the training step": "yours to change",
    "validation": "yours to change",
    "main": "machinery",
}
STAGES = [
    "check",
    "encode",
    "load, freeze, cast",
    "add what is trained",
    "step and optimizer",
    "resume",
    "train",
    "finish",
]


def source(relative):
    return ast.parse((ROOT / relative).read_text())


def imports(tree):
    """Names of the imported modules and of the names taken from them: mindtune.data, mindtune.data.order ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# ---- rooms ---------------------------------------------------------------------------------------


def room_of(module):
    """The room of mindtune/data/order.py is data, that of mindtune/cli.py is cli."""
    return module.parts[1].removesuffix(".py")


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in MODULES} == set(itertools.chain(*ROOMS))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way_between_rooms(module):
    room = room_of(module)
    (place,) = (number for number, rooms in enumerate(ROOMS) if room in rooms)
    allowed = {room, *itertools.chain(*ROOMS[:place])}
    used = {name.split(".")[1] for name in imports(source(module)) if name.startswith("mindtune.")}
    assert used <= allowed, f"{module} imports {sorted(used - allowed)}"


def test_no_modules_import_each_other_in_a_circle():
    names = {".".join(module.with_suffix("").parts): module for module in MODULES}
    graph = {name: {used for used in imports(source(path)) if used in names} for name, path in names.items()}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for used in sorted(graph[name]):
                visit(used, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_room_re_exports_names():
    """A name has one place."""
    found = sorted((ROOT / "mindtune").glob("*/__init__.py"))
    assert len(found) == 9
    assert [path for path in found if path.read_text().strip()] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_at_most_300_lines_and_knows_no_script(module):
    text = (ROOT / module).read_text()
    assert text.count("\n") <= 300
    scripts = {Path(script).stem for script in SCRIPTS} | {folder.split("/")[0] for folder in FOLDERS}
    argparse = set() if room_of(module) == "flags" else {"argparse"}
    assert not {name.split(".")[0] for name in imports(ast.parse(text))} & (scripts | argparse)


# ---- scripts -------------------------------------------------------------------------------------


def main_of(script):
    (main,) = (node for node in source(script).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return main


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_opens_with_its_command_and_imports_no_other_script(script):
    tree = source(script)
    docstring = ast.get_docstring(tree, clean=False)
    assert re.search(rf"^    python {Path(script).name} ([a-z]+ )?--", docstring, re.MULTILINE)
    others = {Path(other).stem for other in SCRIPTS}
    assert not {part for name in imports(tree) for part in name.split(".")} & others


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_training_script_fits_in_a_head(script):
    assert (ROOT / script).read_text().count("\n") <= 500
    main = main_of(script)
    assert main.end_lineno - main.lineno + 1 <= 170
    code = load_script(script).main.__code__
    assert len({*code.co_varnames, *code.co_cellvars}) <= 60


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_training_scripts_have_the_same_sections(script):
    text = (ROOT / script).read_text()
    sections = re.findall(r"^# ---- (.*) \((yours to change|machinery)\) -+$", text, re.MULTILINE)
    assert sections == list(SECTIONS.items())
    assert re.findall(r"^    # ---- (.*) ----$", text, re.MULTILINE) == STAGES


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_no_function_uses_a_variable_that_is_assigned_after_it(script):
    nested = (ast.FunctionDef, ast.Lambda)
    for function in (node for node in ast.walk(source(script)) if isinstance(node, ast.FunctionDef)):
        inner = [node for node in ast.walk(function) if isinstance(node, nested) and node is not function]
        inside = {id(part) for node in inner for part in ast.walk(node)}
        assigned = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inside:
                assigned.setdefault(node.id, []).append(node.lineno)
        for node in inner:
            own = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} - own
            late = [name for name in used & assigned.keys() if min(assigned[name]) >= node.lineno]
            assert not late, f"{script}:{node.lineno} uses {late}"


def comparable_lines(script):
    """(line number, text) of a script's code without imports, comments and brackets alone. The loop is one line."""
    text = (ROOT / script).read_text()
    tree = ast.parse(text)
    left_out = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    loops = [node for node in main_of(script).body if isinstance(node, ast.While)]
    skipped = {number for node in (*left_out, *loops) for number in range(node.lineno, node.end_lineno + 1)}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if number in {loop.lineno for loop in loops}:
            yield number, f"the loop of {script}"
        if number not in skipped and line and not line.startswith("#") and not re.fullmatch(r"[\[\](){},:]+", line):
            yield number, line


@pytest.mark.parametrize("first, second", itertools.combinations(TRAINING_SCRIPTS, 2))
def test_ten_equal_lines_in_two_training_scripts_belong_into_the_package(first, second):
    ours, theirs = list(comparable_lines(first)), list(comparable_lines(second))
    length = [0] * (len(theirs) + 1)  # of the equal run that ends at a pair of lines
    for number, line in ours:
        previous, length = length, [0] * (len(theirs) + 1)
        for place, (other, text) in enumerate(theirs, 1):
            if line == text:
                length[place] = previous[place - 1] + 1
                assert length[place] < 10, f"{first}:{number} and {second}:{other} end ten equal lines"


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_flags_are_never_changed_and_never_passed_to_the_package(script):
    """The package gets values: those of args.select, args.recorded and args.fixed, or single flags."""
    tree = source(script)
    package = {name.split(".")[-1] for name in imports(tree) if name.startswith("mindtune.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "args":
            assert isinstance(node.ctx, ast.Load), f"{script}:{node.lineno} changes args.{node.attr}"
            assert node.attr != "__dict__"
        if isinstance(node, ast.Call):
            callee = node.func
            while isinstance(callee, ast.Attribute):
                callee = callee.value
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            passed = [part for part in given if getattr(part, "id", None) == "args"]
            if passed:
                name = getattr(callee, "id", None)
                assert name not in {*package, "vars", "setattr", "dict"}, (
                    f"{script}:{node.lineno} passes args to {name}"
                )


def test_training_script_and_inference_run_elsewhere_with_only_mindtune_installed(flags, tiny_flux, tmp_path):
    def run_copy(script, *words):
        shutil.copy(ROOT / script, tmp_path / "my_copy.py")
        line = [sys.executable, "my_copy.py", *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    run_copy(
        "flux_lora/train_dreambooth_lora_flux.py",
        *flags("out", "--pretrained_model_name_or_path", tiny_flux, "--max_train_steps", 1),
    )
    model = ["--pretrained_model_name_or_path", tiny_flux, "--lora", "out", "--prompt", "a cat"]
    size = ["--height", 32, "--width", 32, "--num_inference_steps", 2, "--max_sequence_length", 16]
    run_copy("flux_lora/infer_flux_lora.py", *model, *size)
    assert (tmp_path / "flux-lora.png").read_bytes()[:4] == b"\x89PNG"
    assert [sorted(line) for line in metrics(tmp_path / "out")] == [["grad_norm", "loss", "lr", "step"]]
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").stat().st_size > 10_000


# ---- flags ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options():
    """options(script): argparse's declarations of a script's flags, and of its commands', without --help."""

    def declared(parser):
        found = [action for action in parser._actions if action.dest != "help"]
        commands = [action.choices for action in found if isinstance(action, argparse._SubParsersAction)]
        return found + [action for parsers in commands for each in parsers.values() for action in declared(each)]

    return lambda script: declared(script_parser(ROOT / script))


def attributes_of_args(tree):
    """Names read as args.<name> or self.args.<name>."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return {node.attr for node in found if getattr(node.value, "id", getattr(node.value, "attr", None)) == "args"}


def selected(script):
    """The parameters of the classes that a script gives to args.select."""
    module, names = load_script(script), set()
    for node in ast.walk(source(script)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "args.select":
            names |= set(inspect.signature(eval(ast.unparse(node.args[0]), vars(module))).parameters)
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_an_effect_and_every_one_that_is_read_is_declared(options, script):
    """A flag is read by the script, by a class for args.select, or by a check in mindtune/flags."""
    declared = {option.dest for option in options(script)}
    read = attributes_of_args(source(script)) - {"select", "recorded", "fixed", "defaults"}
    assert read <= declared, sorted(read - declared)
    checks = set()
    for module in MODULES:
        if room_of(module) == "flags":
            checks |= attributes_of_args(source(module))
    without_effect = declared - read - selected(script) - checks - NO_EFFECT.keys()
    assert without_effect == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_help_string_is_one_line(options, script):
    for option in options(script):
        assert option.help and "\n" not in option.help and len(option.help) <= 120, option.dest
        assert option.help.endswith((".", "...")), f"{option.dest}: {option.help}"


# ---- the repository ------------------------------------------------------------------------------


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [
        name for name in names if name.endswith((".py", ".md", ".toml", ".txt", ".sh", ".yml", "Makefile", ".ci/run"))
    ]


def test_no_file_names_a_path_or_package_mirror_of_a_machine():
    assert "mindtune/cli.py" in tracked()
    # Joined here, so that this file does not match itself.
    folders = [re.escape("/" + name + "/") for name in ("work", "root", "Users", "opt")] + [r"/home/\w"]
    mirrors = ["index" + "-url", "pypi" + r"\.", "pythonhosted" + r"\.", "tuna" + r"\.", "artifactory", "devpi"]
    pattern = re.compile("|".join([rf"(?<![\w.}}]){folder}" for folder in folders] + mirrors))
    found = [
        f"{name}: {line.strip()}"
        for name in tracked()
        for line in (ROOT / name).read_text().splitlines()
        if pattern.search(line)
    ]
    found = [line for line in found if not line.startswith("tests/test_house.py")]
    assert found == []
