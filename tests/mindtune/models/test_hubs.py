"""Downloads from both hubs: which files, from the cache without a network, and what errors say."""

import importlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from conftest import ROOT, TRAINING_SCRIPTS, load_script
from huggingface_hub import errors
from PIL import Image

from mindtune import check_data
from mindtune.cli import UserError
from mindtune.models import hubs, resolve
from mindtune.models.pipelines import FLUX_COMPONENTS

FLAG = "--pretrained_model_name_or_path"
INFERENCE_SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("flux_lora", "flux_controlnet", "examples")
    for path in (ROOT / folder).rglob("infer_*.py")
)


@pytest.fixture
def flux(tiny_flux, fake_modelscope):
    """A complete pipeline on ModelScope, club/FLUX.1, with files that no script needs."""
    files = {str(path.relative_to(tiny_flux)): path.read_bytes() for path in tiny_flux.rglob("*") if path.is_file()}
    more = ["README.md", "flux1-dev.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/model.bin"]
    fake_modelscope.models["club/FLUX.1"] = {"master": {**files, **dict.fromkeys(more, b"large")}}
    fake_modelscope.needed = sorted(files)
    return fake_modelscope


def pipeline(cache, name="club/FLUX.1", revision=None, **more):
    return resolve.pipeline(name, revision, None, cache and str(cache), FLUX_COMPONENTS, hub="modelscope", **more)


# ---- ModelScope ----------------------------------------------------------------------------------


def test_a_pipeline_is_downloaded_once_and_only_what_is_needed(flux, tiny_flux, tmp_path):
    root = pipeline(tmp_path)
    assert flux.downloads() == flux.needed
    for file in flux.needed:
        assert (root / file).read_bytes() == (tiny_flux / file).read_bytes()
    assert tmp_path in root.parents
    assert pipeline(tmp_path) == root and flux.downloads() == flux.needed


def test_a_plan_downloads_configs_only_and_the_run_after_it_the_rest(flux, tmp_path):
    pipeline(tmp_path, weights=False)
    assert flux.downloads() and not [file for file in flux.downloads() if not file.endswith(".json")]
    pipeline(tmp_path)
    assert flux.downloads() == flux.needed


def test_without_cache_dir_the_librarys_cache_is_used(flux, monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    assert tmp_path / "cache" in pipeline(None).parents


@pytest.mark.parametrize("trouble", ["network", "server"])
def test_without_a_network_the_cache_is_used(flux, tmp_path, capsys, trouble):
    root = pipeline(tmp_path)
    if trouble == "network":
        flux.close()
    else:
        flux.trouble["/models/"] = [503] * 99
    assert pipeline(tmp_path) == root
    assert f"ModelScope cannot be reached; the files in {root} are used" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"club/other: no such directory, and ModelScope says: .*Check the network"):
        pipeline(tmp_path, "club/other")


def test_a_plans_files_are_not_enough_for_a_run_without_a_network(flux, tmp_path):
    pipeline(tmp_path, weights=False)
    flux.close()
    with pytest.raises(UserError, match="not a complete"):
        pipeline(tmp_path)


def test_revisions_are_branches_and_tags_and_the_default_is_master(flux, tmp_path):
    files, file = flux.models["club/FLUX.1"]["master"], "vae/config.json"
    flux.models["club/FLUX.1"]["v2"] = {**files, file: b"\n" + files[file]}
    assert (pipeline(tmp_path, revision="v2") / file).read_bytes() == b"\n" + files[file]
    assert (pipeline(tmp_path) / file).read_bytes() == files[file]
    with pytest.raises(UserError, match=r"no revision: 0a1b2c .*v2.*Give a branch or a tag as --revision"):
        pipeline(tmp_path, revision="0a1b2c")


def test_a_file_of_which_a_part_arrived_is_downloaded_again(flux, tmp_path):
    file = "vae/diffusion_pytorch_model.safetensors"
    flux.trouble[file.replace("/", "%2F")] = ["cut", 500]
    assert (pipeline(tmp_path) / file).read_bytes() == flux.models["club/FLUX.1"]["master"][file]
    assert flux.downloads().count(file) == 3


def test_a_missing_a_private_and_a_refused_model(flux, tmp_path):
    with pytest.raises(UserError, match=f"{FLAG} club/none: no such directory, and ModelScope says: 404 Not Found. Ch"):
        pipeline(tmp_path, "club/none")
    flux.refused.add("club/FLUX.1")
    with pytest.raises(UserError, match=r"Apply for access on http://modelscope.test/models/club/FLUX.1, and log in"):
        pipeline(tmp_path)
    flux.refused.clear()
    flux.trouble["FilePath"] = [403] * 999  # the list of the files is public, the files are not
    with pytest.raises(UserError, match=r"failed to download .* after 403 Forbidden, log in first"):
        pipeline(tmp_path)


def test_a_private_model_is_downloaded_with_a_token(flux, tmp_path, monkeypatch):
    from fake_modelscope import TOKEN

    flux.refused.add("club/FLUX.1")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    assert pipeline(tmp_path).is_dir()


def test_single_models_are_downloaded_too(flux, tiny_flux, tmp_path):
    tokenizer = {path.name: path.read_bytes() for path in (tiny_flux / "tokenizer").iterdir()}
    flux.models["club/clip"] = {"master": {**tokenizer, "model.safetensors": b"large"}}
    folder = resolve.tokenizer("club/clip", str(tmp_path), "modelscope")
    assert sorted(tokenizer) == sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_library_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(
        UserError, match="--hub modelscope: the modelscope library is missing. pip install modelscope=="
    ):
        pipeline(None)


def test_the_version_in_the_message_is_the_one_of_the_tests():
    version = importlib.import_module("modelscope.version").__version__
    pinned = f"modelscope=={version}"
    assert pinned == hubs.HUBS["modelscope"].LIBRARY
    for file in ("requirements.txt", "setup.py"):
        assert pinned in (ROOT / file).read_text()


# ---- Hugging Face --------------------------------------------------------------------------------


def hub_error(cls, status):
    response = requests.Response()
    response.status_code = status
    return cls("the text", response=response)


@pytest.mark.parametrize(
    "error, said",
    [
        (
            hub_error(errors.GatedRepoError, 403),
            "the text. Accept its licence on https://huggingface.co/club/model, and",
        ),
        (hub_error(errors.RepositoryNotFoundError, 404), "the text. Check the id"),
        (hub_error(errors.RevisionNotFoundError, 404), "the text. Give a branch, a tag or a commit"),
        (errors.LocalEntryNotFoundError("the text"), "the text. Check the network, name a mirror with HF_ENDPOINT"),
        (OSError("the text"), "the text.$"),
    ],
)
def test_what_to_do_about_an_error_of_hugging_face(monkeypatch, error, said):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=f"--flag club/model: no such directory, and the hub says: {said}"):
        hubs.download("--flag", "club/model", None, None, ["*"], "huggingface")


def test_a_token_in_an_error_is_not_repeated(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    text = hubs.error_text(ValueError("hf_secret\n ms-secret mine"), "mine")
    assert text == "(token) (token) (token)"


# ---- the flag ------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The ids that ModelScope is asked for. It has none of them."""
    names = []

    def fail(name, *_):
        names.append(name)
        raise OSError("asked")

    fake = SimpleNamespace(list_files=fail, download=fail, advice=lambda *_: "", TITLE="M", TOKEN_VARIABLE="T")
    monkeypatch.setitem(hubs.HUBS, "modelscope", fake)
    return names


@pytest.mark.parametrize("by", ["flag", "environment"])
@pytest.mark.parametrize("script", [*TRAINING_SCRIPTS, *INFERENCE_SCRIPTS])
def test_every_script_asks_the_hub_that_is_named(asked, script, by, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "condition.png")
    flags = [FLAG, "club/model"]
    if script in INFERENCE_SCRIPTS:
        flags += ["--prompt", "a cat", "--output", str(tmp_path / "out.png")]
        name = script.rpartition("/")[2]
        flags += ["--controlnet", "club/controlnet"] if "controlnet" in name else []
        flags += ["--control_image", str(tmp_path / "condition.png")] if "control" in name else []
    else:
        data = "--instance_data_dir" if "dreambooth" in script else "--train_data_dir"
        flags += [data, str(tmp_path), "--dry_run"]
    if by == "flag":
        flags += ["--hub", "modelscope"]
    else:
        monkeypatch.setenv("MINDTUNE_HUB", "modelscope")
    with pytest.raises(UserError, match="club/model: no such directory, and M says: asked"):
        load_script(script).main(flags)
    assert set(asked) == {"club/model"}


def test_check_data_asks_the_hub_that_is_named(asked, photos):
    with pytest.raises(UserError, match="M says: asked"):
        check_data.main(["--instance_data_dir", str(photos), FLAG, "club/model", "--hub", "modelscope"])


@pytest.mark.parametrize("model", ["controlnet", "vae", "tokenizer"])
def test_single_models_are_looked_for_on_the_hub_that_is_named(asked, model, tiny_flux):
    calls = {
        "controlnet": lambda: resolve.controlnet(
            "club/x", None, {"_class_name": "UNet2DConditionModel"}, hub="modelscope"
        ),
        "vae": lambda: resolve.vae("club/x", None, tiny_flux, hub="modelscope"),
        "tokenizer": lambda: resolve.tokenizer("club/x", None, "modelscope"),
    }
    with pytest.raises(UserError, match="club/x: no such directory, and M says: asked"):
        calls[model]()


def test_an_unknown_hub_in_the_environment(monkeypatch, lora_script):
    monkeypatch.setenv("MINDTUNE_HUB", "gitee")
    with pytest.raises(UserError, match="MINDTUNE_HUB=gitee: no such hub. There are huggingface and modelscope."):
        lora_script.parse_args([])
    monkeypatch.setenv("MINDTUNE_HUB", "")
    assert hubs.default() == "huggingface"


def test_a_local_directory_needs_no_hub(asked, tiny_flux, tmp_path):
    root = Path(shutil.copytree(tiny_flux, tmp_path / "flux"))
    assert pipeline(None, str(root)) == root and asked == []
