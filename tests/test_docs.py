"""The pages say what is so: flags and metrics are the scripts', quoted errors are the sources', and what they tell to do is done."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, load_script, metrics

PAGES = {
    "flux_lora/train_dreambooth_lora_flux.py": "docs/flux_lora.md",
    "flux_controlnet/train_controlnet_flux.py": "docs/flux_controlnet.md",
    "examples/controlnet/train_controlnet.py": "docs/controlnet.md",
    "examples/controlnet/train_controlnet_sdxl.py": "docs/controlnet.md",
}


def text(name):
    return (ROOT / name).read_text()


@pytest.fixture(scope="module")
def flag_tables():
    return load_script("docs/flags.py")


@pytest.mark.parametrize("script", PAGES)
def test_a_page_has_the_flags_of_its_script(flag_tables, script):
    """`python docs/flags.py` writes them."""
    page = ROOT / PAGES[script]
    assert f"<!-- flags of {script} -->" in page.read_text() and page.read_text() == flag_tables.filled(page)


@pytest.mark.parametrize("script", PAGES)
def test_a_page_names_every_number_that_is_logged(script):
    source = text(script)
    named = set(re.findall(r'"(\w+)": ', re.search(r"values = \{([^}]*)\}", source)[1]))
    named |= set(re.findall(r'values\["(\w+)"\] = ', source)) | {"held_out/loss"}
    assert {"loss", "lr", "grad_norm", "loss_scale"} < named and [
        name for name in named if f"`{name}`" not in text(PAGES[script])
    ] == []


def test_quoted_errors_are_those_that_are_printed():
    """Of the first table; the second has MindSpore's."""
    sources = [*(ROOT / "mindtune").glob("*.py"), *(ROOT / script for script in PAGES)]
    printed = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in sources)
    own = text("docs/troubleshooting.md").split("From MindSpore itself")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", own, re.MULTILINE)
    assert len(quoted) > 20 and [words for words in quoted if words not in printed] == []


# ---- write your own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_script(tmp_path_factory):
    """The copy that docs/write_your_own.md makes, with its changes."""
    page, path = text("docs/write_your_own.md"), tmp_path_factory.mktemp("own") / "my_lora.py"
    source = text(re.search(r"    cp (\S+) my_lora\.py", page)[1])
    changes = re.findall(r"```diff\n--- my_lora\.py\n(.*?)```", page, re.DOTALL)
    assert len(changes) == 4
    for change in changes:
        lines = change.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] == " ")
        assert source.count(before) == 1, before
        source = source.replace(before, "\n".join(line[1:] for line in lines))
    path.write_text(source)
    return path


def losses(own_script, flags, out, *more):
    line = [sys.executable, str(own_script), *flags(out, "--cache_latents", "--max_train_steps", 2, *more)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line["loss"] for line in metrics(out)]


@pytest.mark.parametrize("mode", [0, 1], ids=["graph", "pynative"])
def test_the_script_with_another_loss_trains(own_script, flags, tmp_path, mode):
    """A large delta is the squared error; a small one makes the loss near 2 delta |error|."""
    squared, large, small = (
        losses(own_script, flags, tmp_path / name, "--mindspore_mode", mode, *more)
        for name, more in (("squared", []), ("large", ["--huber_delta", 1e3]), ("small", ["--huber_delta", 1e-3]))
    )
    assert large == pytest.approx(squared, rel=1e-5)
    assert 0 < small[0] < 4e-3 * squared[0] ** 0.5


def test_the_script_with_another_loss_refuses_what_cannot_be(own_script, flags, tmp_path):
    line = [sys.executable, str(own_script), *flags(tmp_path / "out", "--huber_delta", 0)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "--huber_delta 0.0: must be above 0" in done.stderr and not (tmp_path / "out").exists()
    )
