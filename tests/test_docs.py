"""The documentation is true: flags, metrics, quoted errors, paths, links and modules are those of the sources.

Also the form of the pages: width, languages of code blocks, and the length of the README.
"""

import re

import numpy as np
import pytest
from conftest import ROOT, command_line, load_script, metrics, run_here
from PIL import Image
from safetensors.numpy import load_file

from mindtune.cli import UserError

PAGES = {
    "flux_lora/train_dreambooth_lora_flux.py": "docs/flux_lora.md",
    "flux_controlnet/train_controlnet_flux.py": "docs/flux_controlnet.md",
    "examples/flux_kontext/train_lora_flux_kontext.py": "docs/flux_kontext.md",
    "examples/flux_control/train_control_lora_flux.py": "docs/flux_control.md",
    "examples/controlnet/train_controlnet.py": "docs/controlnet.md",
    "examples/controlnet/train_controlnet_sdxl.py": "docs/controlnet.md",
}
# Every Markdown page. The log is a record of its time: its lines and the paths in it stay as they were written.
MARKDOWN = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "flux_*/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
WRITTEN = [name for name in MARKDOWN if name != "docs/log.md"]
FOLDERS = ("mindtune", "flux_lora", "flux_controlnet", "examples", "docs", "tests", "benchmarks")
FENCE = re.compile(r"^(```\w*)\n.*?^```$", re.MULTILINE | re.DOTALL)


def text(name):
    return (ROOT / name).read_text()


# ---- form ----------------------------------------------------------------------------------------


def prose(name):
    """The lines of a page with their numbers, without code blocks, tables and lines that are one link."""
    fenced = False
    for number, line in enumerate(text(name).splitlines(), 1):
        is_fence = line.lstrip().startswith("```")
        fenced = fenced != is_fence
        is_link = re.fullmatch(r"\s*(?:[-*] )?!?\[[^\]]*\]\([^)]*\)\.?", line)
        if not (fenced or is_fence or is_link or line.startswith("|")):
            yield number, line


@pytest.mark.parametrize("name", WRITTEN)
def test_prose_is_wrapped(name):
    long = [f"{name}:{number}: {len(line)} columns" for number, line in prose(name) if len(line) > 105]
    assert long == []


@pytest.mark.parametrize("name", WRITTEN)
def test_code_is_in_fenced_blocks_with_a_language(name):
    """Also: no fence is left open, and no command is in an indented block."""
    fences = re.findall(r"^\s*```.*", text(name), re.MULTILINE)
    assert [fence for fence in fences[::2] if not re.fullmatch(r"\s*```\w+", fence)] == []
    assert len(fences) % 2 == 0 and [fence for fence in fences[1::2] if fence.strip() != "```"] == []
    command = re.compile(r" {4}(make|python|pip|msrun|cp|huggingface-cli|[A-Z]+=\S+) ")
    assert [line for _, line in prose(name) if command.match(line)] == []


def test_the_readme_is_short():
    assert len(text("README.md").splitlines()) <= 170


# ---- paths, modules and links --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "CHANGELOG.md"])
def test_paths_that_are_named_exist(name):
    """Paths of files with a suffix in the repository's folders. CHANGELOG.md may name what is gone."""
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./*-]*\.(?:py|sh|md|json|csv|png))\b", text(name))
    assert [path for path in sorted(set(named)) if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("name", MARKDOWN)
def test_modules_that_are_run_exist(name):
    modules = set(re.findall(r"python -m (mindtune[\w.]*)", text(name)))
    modules |= (
        set(re.findall(r"`(mindtune(?:\.\w+)+)`", text(name))) if name not in ("CHANGELOG.md", "docs/log.md") else set()
    )
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    assert [module for module, path in paths.items() if not (path.with_suffix(".py").is_file() or path.is_dir())] == []


def anchors(name):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text(name)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_to_files_and_headings(name):
    folder = (ROOT / name).parent
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", FENCE.sub("", text(name))):
        if "://" in target:
            continue
        path = (folder / target).resolve() if target else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path.relative_to(ROOT))):
            broken.append(f"{target}#{anchor}")
    assert broken == []


def test_the_design_has_every_module():
    """`python docs/modules.py` writes the tables from the docstrings."""
    modules = load_script("docs/modules.py")
    page = text("docs/design.md")
    assert [room for room in modules.rooms() if f"<!-- modules of {room} -->" not in page] == []
    assert page == modules.filled(page)


# ---- flags, metrics, errors ----------------------------------------------------------------------


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
    logged = text("mindtune/run/record.py") + text("mindtune/optim/optimizers.py") + text(script)
    named = set(re.findall(r'logged = \{"(\w+)"', logged)) | set(re.findall(r'values\["(\w+)"\] = ', logged))
    named |= {"lr", "grad_norm", "held_out/loss"}
    assert {"loss", "loss_scale", "d"} < named
    assert [name for name in named if f"`{name}`" not in text(PAGES[script])] == []


def test_quoted_errors_are_those_that_are_printed():
    """Those of the first table; the second table has MindSpore's messages."""
    sources = [*(ROOT / "mindtune").rglob("*.py"), *(ROOT / script for script in PAGES)]
    printed = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in sources)
    own = text("docs/troubleshooting.md").split("From MindSpore itself")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", own, re.MULTILINE)
    assert len(quoted) > 20 and [words for words in quoted if words not in printed] == []


# ---- write your own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_script(tmp_path_factory):
    """own_script(name): the copy that docs/write_your_own.md makes under this name, with its changes, as a module."""
    page, folder = text("docs/write_your_own.md"), tmp_path_factory.mktemp("own")

    def make(name, changes):
        source = text(re.search(rf"^cp (\S+) {name}\.py", page, re.MULTILINE)[1])
        found = re.findall(rf"```diff\n--- {name}\.py\n(.*?)```", page, re.DOTALL)
        assert len(found) == changes
        for change in found:
            lines = change.splitlines()
            before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
            assert source.count(before) == 1, before
            source = source.replace(before, "\n".join(line[1:] for line in lines if not line.startswith("-")))
        (folder / f"{name}.py").write_text(source)
        return load_script(folder / f"{name}.py")

    return make


def test_another_loss(own_script, flags, tmp_path):
    """The edge loss is added with its weight; graph mode agrees."""
    script = own_script("my_lora", 3)

    def losses(name, *more):
        still = ["--learning_rate", 0, "--cache_latents", "--max_train_steps", 2]
        run_here(script, flags(tmp_path / name, *still, *more))
        return np.array([line["loss"] for line in metrics(tmp_path / name)])

    plain, once, thrice = (losses(f"weight {weight}", "--edge_weight", weight) for weight in (0, 0.1, 0.3))
    edges = (once - plain) / 0.1
    # Of errors without a pattern the difference of two neighbours has twice the variance, in each of two directions.
    np.testing.assert_allclose(edges, 4 * plain, rtol=0.5)
    np.testing.assert_allclose(thrice - plain, 0.3 * edges, rtol=1e-3)
    in_graph = losses("graph", "--edge_weight", 0.3, "--mindspore_mode", 0)
    np.testing.assert_allclose(in_graph, thrice, rtol=1e-4)
    with pytest.raises(UserError, match="--edge_weight -1.0: must be at least 0"):
        script.main(flags(tmp_path / "negative", "--edge_weight", -1))
    assert not (tmp_path / "negative").exists()


def test_another_data_set(own_script, flags, tmp_path):
    """Images from arrays train as the same images from files do."""
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    arrays = tmp_path / "images.npz"
    np.savez(arrays, images=images, captions=[f"image {number}" for number in range(3)])
    script = own_script("my_data", 4)
    for name, source in (("files", folder), ("arrays", arrays)):
        run_here(script, flags(tmp_path / name, "--instance_data_dir", source, "--max_train_steps", 2))
    assert metrics(tmp_path / "arrays") == metrics(tmp_path / "files")


def test_another_model(own_script, encoder_cache, tmp_path):
    """The UNet is trained, is saved under the names of the pipeline's, and what is not trained is not saved."""
    root, pairs = tmp_path / "pipeline", tmp_path / "pairs"
    unet = {
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    load_script("examples/tiny/make_tiny_pipeline.py").make_sd15(root, unet=unet)
    load_script("examples/tiny/shapes.py").make_folder(pairs, 4, 64, seed=0, split="train")
    given = {
        "pretrained_model_name_or_path": root,
        "train_data_dir": pairs,
        "output_dir": tmp_path / "out",
        "cache_dir": encoder_cache,
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "mindspore_mode": 1,
        "learning_rate": 1e-3,
        "validation_split": 0.3,
        "report_to": "none",
        "seed": 0,
    }
    run_here(own_script("my_unet", 5), command_line(given))
    start = load_file(root / "unet" / "diffusion_pytorch_model.safetensors")
    trained = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert trained.keys() == start.keys()
    changed = [name for name in start if not np.array_equal(trained[name], start[name].astype(np.float32))]
    assert len(changed) > 0.9 * len(start)
    assert "held_out__loss" in metrics(tmp_path / "out")[-1]
