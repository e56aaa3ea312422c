"""Finding pipelines and single models in directories and on the hub."""

from fnmatch import fnmatchcase

import pytest
from conftest import edit
from pipeline_cases import rename_weights, tiny_pipeline

from mindtune.cli import UserError
from mindtune.models.pipelines import FLUX_COMPONENTS, resolve_controlnet, resolve_pipeline, resolve_vae


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "~/flux", "flux", "a/b/c"])
def test_a_missing_directory(name):
    """A name that cannot be a hub id is rejected without asking the hub."""
    with pytest.raises(
        UserError,
        match=f"--pretrained_model_name_or_path {name}: no such directory. Give a local directory or a hub id",
    ):
        resolve_pipeline(name, None, None, None, FLUX_COMPONENTS)


def test_the_hubs_error_is_reported(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("401 gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        UserError, match=r"black-forest-labs/FLUX.1-dev: no such directory, and the hub says: 401 gated"
    ):
        resolve_pipeline("black-forest-labs/FLUX.1-dev", None, None, None, FLUX_COMPONENTS)


@pytest.fixture
def hub(monkeypatch, tiny_flux):
    """hub(*weight files): a repository with these files. Returns the arguments of the download."""
    request = {}

    def make(*names):
        monkeypatch.setattr(
            "huggingface_hub.HfApi.list_repo_files", lambda self, name, revision=None: ["model_index.json", *names]
        )
        return request

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kwargs: request.update(kwargs, name=name) or str(tiny_flux)
    )
    monkeypatch.setattr("mindtune.models.pipelines.check_pipeline", lambda *args: None)
    return make


STEM = "vae/diffusion_pytorch_model"


@pytest.mark.parametrize(
    "variant, downloaded, skipped",
    [
        (None, ["", "-00001-of-00002"], [".fp16", ".non_ema", ".fp16-00001-of-00002", "-00001-of-00002.fp16"]),
        ("fp16", [".fp16", ".fp16-00001-of-00002", "-00001-of-00002.fp16"], ["", ".non_ema", "-00001-of-00002"]),
    ],
)
def test_only_the_components_and_one_variant_are_downloaded(hub, variant, downloaded, skipped):
    """Stable Diffusion 1.5 has 5.6 GB of other variants."""
    request = hub(*(f"{STEM}{middle}.safetensors" for middle in downloaded + skipped))
    resolve_pipeline("some/flux", "v2", variant, "/cache", {"vae": ("AutoencoderKL",)})
    assert (request["name"], request["revision"], request["cache_dir"]) == ("some/flux", "v2", "/cache")
    patterns = request["allow_patterns"]
    assert patterns[:4] == ["model_index.json", "vae/*.json", "vae/*.txt", "vae/*.model"]
    for middle in downloaded + skipped:
        file = f"{STEM}{middle}.safetensors"
        assert any(fnmatchcase(file, pattern) for pattern in patterns) == (middle in downloaded), file


def test_a_component_without_the_variant(hub):
    request = hub(f"{STEM}.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors")
    resolve_pipeline("some/flux", None, "fp16", None, {"vae": (), "transformer": ()})
    assert (
        f"{STEM}.safetensors" in request["allow_patterns"]
        and f"{STEM}.fp16.safetensors" not in request["allow_patterns"]
    )
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in request["allow_patterns"]


def test_without_weights_only_configs_are_downloaded(hub):
    request = hub(f"{STEM}.safetensors")
    resolve_pipeline("some/flux", None, None, None, {"vae": ()}, weights=False)
    assert request["allow_patterns"] == ["model_index.json", "vae/*config.json"]


@pytest.mark.parametrize(
    "name, expected", [("flux1-dev-Q8_0.gguf", "quantised weights in GGUF"), ("flux1-dev.safetensors", "a single file")]
)
def test_a_file_instead_of_a_directory(tmp_path, name, expected):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(
        UserError, match=f"{name}: {expected}. Give the directory of the model in the Hugging Face layout"
    ):
        resolve_pipeline(str(tmp_path / name), None, None, None, FLUX_COMPONENTS)


def test_a_vae_with_another_scale_is_reported(tmp_path_factory, capsys):
    """It can be used, but the model was trained with the pipeline's VAE."""
    sd, sdxl = (tiny_pipeline(tmp_path_factory, name) for name in ("sd15", "sdxl"))
    resolve_vae(str(sdxl / "vae"), "--vae", None, sdxl, "unet")
    assert capsys.readouterr().out == ""
    resolve_vae(str(sd / "vae"), "--vae", None, sdxl, "unet")
    assert "its scaling_factor is 0.18215, the pipeline's VAE has 0.13025" in capsys.readouterr().out


def test_a_controlnet_with_only_files_of_a_variant(pipeline):
    rename_weights(pipeline, "transformer", "fp16")
    edit(pipeline / "transformer" / "config.json", _class_name="FluxControlNetModel")
    with pytest.raises(UserError, match="files of the variant fp16: rename them without the variant"):
        resolve_controlnet(
            str(pipeline / "transformer"), "--controlnet", None, {"_class_name": "FluxTransformer2DModel"}
        )
