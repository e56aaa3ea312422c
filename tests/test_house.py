"""The rules of the house: no flag without effect, scripts that stand alone, imports that go one way, no machine's paths."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, metrics

SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in ("flux_lora", "flux_controlnet", "examples/controlnet")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "argparse" in path.read_text()
]
MODULES = sorted(path.stem for path in (ROOT / "mindtune").glob("*.py") if path.stem != "__init__")


def source(relative):
    return ast.parse((ROOT / relative).read_text())


@pytest.fixture(scope="module")
def options():
    """options(script): what argparse knows of its flags, without --help."""
    parser_of = load_script("docs/flags.py").parser_of
    return lambda script: [action for action in parser_of(script)._actions if action.dest != "help"]


# ---- flags ---------------------------------------------------------------------------------------


def attributes_of_args(tree):
    """Names read as args.<name> or self.args.<name>."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return {node.attr for node in found if getattr(node.value, "id", getattr(node.value, "attr", None)) == "args"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(options, script):
    """By name outside the declaration; or it is in the table of those that only CUDA needs."""
    names = {option.dest for option in options(script)}
    assert names - attributes_of_args(source(script)) - {*getattr(load_script(script), "ACCEPTED", ())} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_read_that_is_not_declared(options, script):
    assert attributes_of_args(source(script)) - {option.dest for option in options(script)} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_help_string_is_one_line(options, script):
    for option in options(script):
        assert option.help and "\n" not in option.help and len(option.help) <= 120, option.dest
        assert option.help.endswith((".", "...")), f"{option.dest}: {option.help}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_opens_with_the_command_to_run_it(script):
    assert f"    python {Path(script).name} --" in ast.get_docstring(source(script), clean=False)


# ---- scripts and the common module ---------------------------------------------------------------


def test_the_scripts_run_elsewhere_with_only_mindtune_installed(flags, tiny_flux, tmp_path):
    def run_copy(script, *words):
        shutil.copy(ROOT / script, tmp_path / "my_copy.py")
        line = [sys.executable, "my_copy.py", *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    run_copy("flux_lora/train_dreambooth_lora_flux.py", *flags("out", "--max_train_steps", 1))
    small = ["--height", 32, "--width", 32, "--num_inference_steps", 2, "--max_sequence_length", 16]
    run_copy(
        "flux_lora/infer_flux_lora.py",
        "--pretrained_model_name_or_path",
        tiny_flux,
        "--lora",
        "out",
        "--prompt",
        "a cat",
        *small,
    )
    assert (tmp_path / "flux-lora.png").read_bytes()[:4] == b"\x89PNG"
    assert [sorted(line) for line in metrics(tmp_path / "out")] == [["grad_norm", "loss", "lr", "step"]]
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").stat().st_size > 10_000


def imports(tree):
    """Names of the imported modules, with those taken out of a package: mindtune, mindtune.data.image_sample ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_the_common_module_knows_no_script_and_no_command_line(module):
    tree = source(f"mindtune/{module}.py")
    scripts = {Path(script).stem for script in SCRIPTS} | {"flux_lora", "flux_controlnet", "examples"}
    flags = set() if module == "check_data" else {"argparse"}  # which is a command itself
    assert not {name.split(".")[0] for name in imports(tree)} & {*flags, *scripts}
    assert attributes_of_args(tree) == set() and "args" not in {
        node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)
    }


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    """A module imports only those that the package's docstring names before it."""
    order = re.findall(r"`(\w+)`", ast.get_docstring(source("mindtune/__init__.py")).split("Nothing else")[0])
    own = {name.split(".")[1] for name in imports(source(f"mindtune/{module}.py")) if name.startswith("mindtune.")}
    assert module in order and own <= set(order[: order.index(module)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_other_script(script):
    others = {Path(other).stem for other in SCRIPTS}
    assert not {part for name in imports(source(script)) for part in name.split(".")} & others


# ---- the repository ------------------------------------------------------------------------------


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [
        name for name in names if name.endswith((".py", ".md", ".toml", ".txt", ".sh", ".yml", "Makefile", ".ci/run"))
    ]


def test_no_file_names_a_path_or_package_mirror_of_somebodys_machine():
    assert "mindtune/cli.py" in tracked()
    # Put together here, so that this file does not find itself.
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
