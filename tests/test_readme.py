"""Every command of README.md, run as it stands there with a tiny FLUX in the place of FLUX.1-dev; and README_zh.md beside it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script

# What is added to a command, by a word of it, to make it small; flags that come last win.
TABLE = {
    "flux_lora/launch/train_1_device.sh": "--resolution 32 --max_train_steps 2 --max_sequence_length 16 --mindspore_mode 1 "
    "--num_inference_steps 1 --num_validation_images 1 --gradient_accumulation_steps 1",
    "flux_controlnet/launch/train_1_device.sh": "--resolution 64 --max_train_steps 2 --max_sequence_length 16 --mindspore_mode 1 "
    "--num_double_layers 1 --gradient_accumulation_steps 1",
    "flux_lora/infer_flux_lora.py": "--height 32 --width 32 --num_inference_steps 1 --max_sequence_length 16",
    "flux_controlnet/infer_flux_controlnet.py": "--resolution 64 --num_inference_steps 1 --max_sequence_length 16",
    "mindtune.check_data": "--resolution 64",
}


def commands(name):
    """The indented lines of a page that are commands, in order, with those that a backslash goes on with."""
    text = re.sub(r" *\\\n *", " ", (ROOT / name).read_text())
    lines = (line.strip() for line in text.splitlines() if line.startswith("    "))
    first = r"(make|pip|python|huggingface-cli|[A-Z]+=\S+) "
    return [
        re.sub(r" {2,}#.*", "", line)
        for line in lines
        if re.match(first, line) and "   " not in line.split("#")[0].strip()
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_flux, photos):
    """A directory that looks like a checkout, with FLUX.1-dev, photos and pairs."""
    place = tmp_path_factory.mktemp("checkout")
    for name in (
        "flux_lora",
        "flux_controlnet",
        "examples",
        "mindtune",
        "Makefile",
        "requirements-ascend.txt",
        "setup.py",
    ):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_flux, place / "FLUX.1-dev")
    shutil.copytree(photos, place / "photos")
    load_script("examples/tiny/shapes.py").make_folder(place / "pairs", 3, 64, seed=0, split="train")
    return place


def run(line, place):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    added = next((more for word, more in TABLE.items() if word in line), "")
    done = subprocess.run(f"{line} {added}", shell=True, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line} {added}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_commands_of_the_readme_do_what_it_says(place):
    """In its order: later ones need what earlier ones leave."""
    found = [line for line in commands("README.md") if not line.startswith(("make ", "pip ", "huggingface-cli "))]
    assert len(found) == 9
    said = {line: run(line, place) for line in found}
    assert any("each of 8 Ascend devices, ZeRO stage 1" in text for text in said.values())
    assert sum("a run can start with this data" in text for text in said.values()) == 2
    for name in ("out/dog/report.html", "out/dog/pytorch_lora_weights.safetensors", "dog.png", "dog.safetensors", "circle.png",
                 "out/outlines/diffusion_pytorch_model.safetensors", "out/dog/logs"):  # fmt: skip
        assert (place / name).exists(), name


def test_the_make_targets_are_there():
    targets = [shlex.split(line)[1] for line in commands("README.md") if line.startswith("make ")]
    assert targets == ["demo", "demo-controlnet", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        scripts = re.findall(r"\S+\.py", done.stdout)
        assert all((ROOT / script).is_file() for script in scripts)


def test_what_pip_and_the_hub_are_asked_for():
    """The requirements parse and are pinned; the hub's command knows the words. Neither is asked to download here."""
    from packaging.requirements import Requirement

    (pip,) = (line for line in commands("README.md") if line.startswith("pip "))
    name = pip.split("-r ")[1].split()[0]
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert all(Requirement(line).specifier for line in lines if line)
    (download,) = (line for line in commands("README.md") if line.startswith("huggingface-cli "))
    words = shlex.split(download)
    help_text = subprocess.run(
        [Path(sys.executable).with_name(words[0]), words[1], "--help"], capture_output=True, text=True
    ).stdout
    assert "--local-dir" in help_text and words[-2] == "--local-dir"


def numbers(text):
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)))


def test_the_chinese_readme_has_the_same_commands_links_and_numbers():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README_zh.md"))
    assert commands("README.md") == commands("README_zh.md")

    def links(text):
        return sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README_zh.md"})

    assert links(english) == links(chinese)
    assert numbers(english) == numbers(chinese)
    assert "(README_zh.md)" in english and "(README.md)" in chinese


@pytest.mark.parametrize(
    "name", ["README.md", "README_zh.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link
