"""Every command of README.md runs as printed, with a tiny FLUX in place of FLUX.1-dev; README_zh.md says the same."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script

# Flags appended to a command to make it small, found by a part of the command. Later flags override earlier ones.
SMALL = {
    "flux_lora/launch/train_1_device.sh": "--resolution 32 --max_train_steps 2 --max_sequence_length 16 "
    "--mindspore_mode 1 --num_inference_steps 1 --num_validation_images 1 --gradient_accumulation_steps 1",
    "flux_controlnet/launch/train_1_device.sh": "--resolution 64 --max_train_steps 2 --max_sequence_length 16 "
    "--mindspore_mode 1 --num_double_layers 1 --gradient_accumulation_steps 1",
    "flux_lora/infer_flux_lora.py": "--height 32 --width 32 --num_inference_steps 1 --max_sequence_length 16",
    "flux_controlnet/infer_flux_controlnet.py": "--resolution 64 --num_inference_steps 1 --max_sequence_length 16",
    "mindtune.check_data": "--resolution 64",
}
# The same for the Python example: text of the README and its replacement.
SMALL_PYTHON = {
    "ms.bfloat16": "ms.float32",
    "num_inference_steps=28": "num_inference_steps=1, height=32, width=32, max_sequence_length=16",
}
LEFT = (
    "out/dog/report.html", "out/dog/pytorch_lora_weights.safetensors", "out/dog/logs", "dog.png", "dog.safetensors",
    "out/outlines/diffusion_pytorch_model.safetensors", "circle.png",
)  # fmt: skip
MAKE_TARGETS = [
    *("demo", "demo-controlnet", "demo-kontext", "demo-control-lora"),
    *("venv", "check", "test", "bench", "parity", "contract", "rehearse"),
]
# Commands that are checked without running them: they install or download, or run everything.
NOT_RUN = ("make ", "source ", "pip ", "huggingface-cli ")


def fences(name, language):
    """The contents of a page's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def commands(name):
    """The commands in a page's bash blocks, in order; continued lines are joined, chains with && are taken apart."""
    text = re.sub(r" *\\\n *", " ", "".join(fences(name, "bash")))
    lines = [re.sub(r" {2,}#.*", "", line).strip() for line in text.splitlines() if not line.startswith("#")]
    return [command for line in lines for command in line.split(" && ") if command]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_flux, photos):
    """A directory like a checkout, with FLUX.1-dev, photos and pairs."""
    place = tmp_path_factory.mktemp("checkout")
    names = ("flux_lora", "flux_controlnet", "examples", "mindtune", "Makefile", "requirements-ascend.txt", "setup.py")
    for name in names:
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_flux, place / "FLUX.1-dev")
    shutil.copytree(photos, place / "photos")
    load_script("examples/tiny/shapes.py").make_folder(place / "pairs", 3, 64, seed=0, split="train")
    return place


def run(command, place):
    """Run a shell command in the checkout and return what it prints."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def printed(place):
    """What each command prints. They run in the README's order: later ones need the files of earlier ones."""
    found = [command for command in commands("README.md") if not command.startswith(NOT_RUN)]
    return {
        command: run(f"{command} {next((more for part, more in SMALL.items() if part in command), '')}", place)
        for command in found
    }


def test_the_commands_do_what_the_readme_says(printed, place):
    assert len(printed) == 10
    plans = [text for text in printed.values() if re.search(r"^each of 8\b.* [MG]B$", text, re.MULTILINE)]
    assert len(plans) == 2 and all("Ascend device" in text for text in plans)
    assert sum("a run can start with this data" in text for text in printed.values()) == 2
    assert [name for name in LEFT if not (place / name).exists()] == []


def test_the_python_example_generates_an_image(printed, place):
    (example,) = fences("README.md", "python")
    assert len(example.splitlines()) <= 10
    for text, replacement in SMALL_PYTHON.items():
        assert example.count(text) == 1
        example = example.replace(text, replacement)
    (place / "example.py").write_text(example)
    run("python example.py", place)
    assert (place / "beach.png").read_bytes()[:4] == b"\x89PNG"


def test_the_make_targets_exist():
    found = [shlex.split(command)[1:] for command in commands("README.md") if command.startswith("make ")]
    assert found == [[target] for target in MAKE_TARGETS]
    for target in MAKE_TARGETS:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        scripts = re.findall(r"\S+\.py\b", done.stdout)
        assert all((ROOT / script).is_file() for script in scripts)


def test_make_venv_creates_the_environment_that_is_activated():
    (activate,) = (command for command in commands("README.md") if command.startswith("source "))
    assert activate == "source .venv/bin/activate"
    assert "-m venv .venv\n" in (ROOT / "Makefile").read_text()


def test_the_quoted_output_is_what_the_demos_print():
    """The words of every line, without its numbers."""
    (quoted,) = fences("README.md", "text")
    names = ("lora", "controlnet", "kontext", "control_lora")
    sources = "".join((ROOT / f"examples/demo_flux_{name}.py").read_text() for name in names)
    lines = [re.split(r"[:\d]|  out/|  tensorboard", line)[0].rstrip() for line in quoted.splitlines() if line]
    assert len(lines) == 7 and [line for line in lines if line not in sources] == []


def test_what_is_asked_of_pip_and_of_the_hub():
    """The requirements parse and are pinned, and the hub's command has the flag. Nothing is downloaded."""
    from packaging.requirements import Requirement

    pip = [shlex.split(command) for command in commands("README.md") if command.startswith("pip ")]
    assert [words[2] for words in pip] == ["-r", "-e"]
    lines = [line.split("#")[0].strip() for line in (ROOT / pip[0][3]).read_text().splitlines()]
    assert all(Requirement(line).specifier for line in lines if line)
    assert pip[1][3:] == [".", "--no-deps"] and (ROOT / "setup.py").is_file()
    (download,) = (command for command in commands("README.md") if command.startswith("huggingface-cli "))
    words = shlex.split(download)
    program = Path(sys.executable).with_name(words[0])
    help_text = subprocess.run([program, words[1], "--help"], capture_output=True, text=True).stdout
    assert "--local-dir" in help_text and words[-2] == "--local-dir"


def numbers(text):
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)))


def test_the_chinese_readme_has_the_same_commands_links_and_numbers():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README_zh.md"))
    assert commands("README.md") == commands("README_zh.md")
    assert fences("README.md", "python") == fences("README_zh.md", "python")

    def links(text):
        # Headings are translated, so links within the page differ; tests/test_docs.py checks that they lead to one.
        found = {re.sub("^#.*", "#", link) for link in re.findall(r"\]\(([^)]+)\)", text)}
        return sorted(found - {"README.md", "README_zh.md"})

    assert links(english) == links(chinese)
    assert numbers(english) == numbers(chinese)
    assert "(README_zh.md)" in english and "(README.md)" in chinese
