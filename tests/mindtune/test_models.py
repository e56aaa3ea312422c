"""Looking at a pipeline before loading it: every defect is found, from files' headers alone, and all at once."""

import json
import shutil

import mindone.diffusers
import mindone.transformers
import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import (
    FLUX_COMPONENTS,
    check_pipeline,
    flux_skeleton,
    import_model_class_from_model_name_or_path,
    load_model,
    load_scheduler,
    load_tokenizer,
    read_config,
    resolve_pipeline,
    weight_files,
)
from mindtune.precision import resolve_precision


@pytest.fixture
def pipeline(tiny_flux, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_flux, tmp_path / "flux")


def defects(root, variant=None):
    """The lines of the complaint."""
    with pytest.raises(UserError) as error:
        check_pipeline(root, FLUX_COMPONENTS, variant)
    head, *lines, tail = str(error.value).splitlines()
    assert head == f"--pretrained_model_name_or_path {root}: not a whole pipeline:" and tail.startswith("Copy or download it again")
    return [line.strip() for line in lines]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, stem="diffusion_pytorch_model", index=None, middle=""):
    """Splits a component's weights into two files with an index, as large models come."""
    single = folder / f"{stem}.safetensors"
    tensors = sorted(load_file(single).items())
    names = [f"{stem}{middle}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    halves = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    for name, half in zip(names, halves):
        save_file(dict(half), folder / name, metadata={"format": "pt"})
    single.unlink()
    weight_map = {key: name for name, half in zip(names, halves) for key, _ in half}
    content = json.dumps({"metadata": {"total_size": sum(v.nbytes for _, v in tensors)}, "weight_map": weight_map})
    (folder / (index or f"{stem}.safetensors.index.json")).write_text(content)
    return names


# ---- whole ones --------------------------------------------------------------------------------------------------------------------


def test_a_whole_pipeline_passes(tiny_flux):
    check_pipeline(tiny_flux, FLUX_COMPONENTS)
    assert resolve_pipeline(str(tiny_flux), None, None, None, FLUX_COMPONENTS) == tiny_flux


def test_a_sharded_component_passes_and_loads(pipeline):
    shard(pipeline / "transformer")
    check_pipeline(pipeline, FLUX_COMPONENTS)
    assert load_model(pipeline, "transformer", resolve_precision("no")).config["num_layers"] == 2


def test_slow_tokenizer_files_are_enough(pipeline):
    (pipeline / "tokenizer_2" / "tokenizer.json").unlink()
    check_pipeline(pipeline, FLUX_COMPONENTS)


def test_other_folders_do_not_matter(pipeline):
    (pipeline / "safety_checker").mkdir()
    shutil.rmtree(pipeline / "vae")
    check_pipeline(pipeline, {name: classes for name, classes in FLUX_COMPONENTS.items() if name != "vae"})


# ---- defects -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLUX_COMPONENTS)
def test_a_missing_component(pipeline, name):
    shutil.rmtree(pipeline / name)
    assert defects(pipeline) == [f"{name}/ is missing"]


@pytest.mark.parametrize("name", [name for name in FLUX_COMPONENTS if not name.startswith("tokenizer")])
def test_a_missing_config(pipeline, name):
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    (pipeline / name / file).unlink()
    assert defects(pipeline) == [f"{name}/{file} is missing"]


@pytest.mark.parametrize("name, file", [("tokenizer", "vocab.json"), ("tokenizer_2", "spiece.model")])
def test_a_tokenizer_without_vocabulary(pipeline, name, file):
    for path in (file, "tokenizer.json"):
        (pipeline / name / path).unlink(missing_ok=True)
    assert defects(pipeline) == [f"{name}/{file} is missing"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_a_config_that_is_no_object(pipeline, content):
    (pipeline / "vae" / "config.json").write_bytes(content.encode("latin-1"))
    (found,) = defects(pipeline)
    assert found.startswith("vae/")


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_weights(pipeline, name):
    (path,) = weight_files(pipeline, name)
    path.unlink()
    assert defects(pipeline) == [f"{name}/{path.name} is missing"]


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1, -1000])
def test_weights_cut_short(pipeline, keep):
    """To nothing, inside the length, inside the header, inside the data: always named by file."""
    (path,) = weight_files(pipeline, "vae")
    path.write_bytes(path.read_bytes()[:keep])
    (found,) = defects(pipeline)
    assert found.startswith(f"vae/{path.name} ") and f"{path.stat().st_size:,} bytes" in found


def test_weights_with_something_behind(pipeline):
    (path,) = weight_files(pipeline, "vae")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0" * 10)
    assert defects(pipeline) == [f"vae/{path.name} has {size + 10:,} bytes, its header says {size:,}"]


def test_a_pointer_in_the_place_of_weights(pipeline):
    """What git leaves without git-lfs."""
    (path,) = weight_files(pipeline, "vae")
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    )
    assert defects(pipeline)[0].startswith(f"vae/{path.name} is cut short")


def test_a_missing_shard(pipeline):
    names = shard(pipeline / "transformer")
    (pipeline / "transformer" / names[1]).unlink()
    assert defects(pipeline) == [f"transformer/{names[1]} is missing"]


def test_a_torn_shard(pipeline):
    path = pipeline / "text_encoder" / shard(pipeline / "text_encoder", "model")[0]
    path.write_bytes(path.read_bytes()[:-4])
    (found,) = defects(pipeline)
    assert found.startswith(f"text_encoder/{path.name} has ")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": null}'])
def test_an_index_that_says_nothing(pipeline, content):
    shard(pipeline / "transformer")
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    (found,) = defects(pipeline)
    assert found.startswith("transformer/")


@pytest.mark.parametrize(
    "name, key, value, expected",
    [
        ("transformer", "_class_name", "SD3Transformer2DModel", "FluxTransformer2DModel"),
        ("vae", "_class_name", "AutoencoderTiny", "AutoencoderKL"),
        ("text_encoder", "architectures", ["CLIPTextModelWithProjection"], "CLIPTextModel"),
        ("text_encoder_2", "architectures", ["UMT5EncoderModel"], "T5EncoderModel"),
        ("text_encoder_2", "architectures", [], "T5EncoderModel"),
    ],
)
def test_a_component_of_another_class(pipeline, name, key, value, expected):
    edit(pipeline / name / "config.json", **{key: value})
    found = value if isinstance(value, str) else (value or ["(none named)"])[0]
    assert defects(pipeline) == [f"{name}/config.json: the class is {found}, expected {expected}"]


def test_a_scheduler_and_a_tokenizer_of_another_class(pipeline):
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler")
    edit(pipeline / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    assert defects(pipeline) == [
        "model_index.json: tokenizer is a BertTokenizer, expected CLIPTokenizer",
        "scheduler/scheduler_config.json: the class is DDPMScheduler, expected FlowMatchEulerDiscreteScheduler",
    ]


def test_all_defects_are_listed_at_once(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    (pipeline / "text_encoder" / "config.json").unlink()
    edit(pipeline / "transformer" / "config.json", _class_name="UNet")
    (path,) = weight_files(pipeline, "vae")
    path.unlink()
    assert defects(pipeline) == [
        "text_encoder/config.json is missing",
        f"vae/{path.name} is missing",
        "transformer/config.json: the class is UNet, expected FluxTransformer2DModel",
        "scheduler/ is missing",
    ]


# ---- where weights are -------------------------------------------------------------------------------------------------------------


def test_weight_files_of_one_file_and_of_a_variant(tiny_flux):
    assert weight_files(tiny_flux, "vae") == [tiny_flux / "vae" / "diffusion_pytorch_model.safetensors"]
    assert weight_files(tiny_flux, "text_encoder_2", "fp16") == [tiny_flux / "text_encoder_2" / "model.fp16.safetensors"]


@pytest.mark.parametrize(
    "variant, index, middle",
    [
        (None, "model.safetensors.index.json", ""),
        ("fp16", "model.safetensors.index.fp16.json", ".fp16"),
        ("fp16", "model.fp16.safetensors.index.json", ".fp16"),
    ],
)
def test_weight_files_of_an_index(pipeline, variant, index, middle):
    """Under both names that libraries give a variant's index; an absent shard is named too."""
    folder = pipeline / "text_encoder_2"
    names = shard(folder, "model", index, middle)
    (folder / names[0]).unlink()
    assert weight_files(pipeline, "text_encoder_2", variant) == [folder / name for name in names]
    others = {"fp16" if variant is None else None}
    assert all(weight_files(pipeline, "text_encoder_2", other) != [folder / name for name in names] for other in others)


def test_a_variant_that_is_not_there(tiny_flux):
    assert defects(tiny_flux, "fp16") == [
        "text_encoder/model.fp16.safetensors is missing",
        "text_encoder_2/model.fp16.safetensors is missing",
        "vae/diffusion_pytorch_model.fp16.safetensors is missing",
        "transformer/diffusion_pytorch_model.fp16.safetensors is missing",
    ]


# ---- names -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "~/flux", "flux", "a/b/c"])
def test_a_directory_that_is_not_there(name):
    """What cannot be a hub id is refused without asking the hub."""
    with pytest.raises(UserError, match=f"--pretrained_model_name_or_path {name}: no such directory. Give a local directory or a hub id"):
        resolve_pipeline(name, None, None, None, FLUX_COMPONENTS)


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def refuses(*args, **kwargs):
        raise OSError("401 gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(UserError, match=r"black-forest-labs/FLUX.1-dev: no such directory, and the hub says: 401 gated"):
        resolve_pipeline("black-forest-labs/FLUX.1-dev", None, None, None, FLUX_COMPONENTS)


@pytest.mark.parametrize("variant, weights", [(None, "*.safetensors"), ("fp16", "*.fp16*.safetensors")])
def test_only_the_named_components_are_fetched(tiny_flux, monkeypatch, variant, weights):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: asked.update(kwargs, name=name) or str(tiny_flux))
    monkeypatch.setattr("mindtune.models.check_pipeline", lambda *args: asked.update(checked=args))
    root = resolve_pipeline("some/flux", "v2", variant, "/cache", {"vae": ("AutoencoderKL",)})
    assert root == tiny_flux and asked["checked"] == (tiny_flux, {"vae": ("AutoencoderKL",)}, variant)
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("some/flux", "v2", "/cache")
    assert asked["allow_patterns"] == ["model_index.json", "vae/*.json", "vae/*.txt", "vae/*.model", f"vae/{weights}"]


@pytest.mark.parametrize("name, expected", [("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")])
def test_the_class_of_a_text_encoder(tiny_flux, name, expected):
    assert import_model_class_from_model_name_or_path(tiny_flux, name) is getattr(mindone.transformers, expected)


def test_the_class_of_an_unknown_text_encoder(pipeline):
    edit(pipeline / "text_encoder" / "config.json", architectures=["RobertaModel"])
    with pytest.raises(ValueError, match="text_encoder: RobertaModel is not supported"):
        import_model_class_from_model_name_or_path(pipeline)


# ---- loading -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_loaded_model_has_the_files_numbers(tiny_flux, name):
    """Every tensor of the file arrives in a parameter, bit for bit, under MindSpore's name for it."""
    (path,) = weight_files(tiny_flux, name)
    model = load_model(tiny_flux, name, resolve_precision("no"))
    found = sorted((p.asnumpy() for p in model.get_parameters()), key=lambda a: (a.size, a.tobytes()))
    expected = sorted(load_file(path).values(), key=lambda a: (a.size, a.tobytes()))
    assert len(found) == len(expected) and not model.training
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.ravel(), b.ravel())


@pytest.mark.parametrize("name, dtype", [("fp16", ms.float16), ("bf16", ms.bfloat16)])
def test_a_loaded_model_is_stored_as_asked(tiny_flux, name, dtype):
    assert {p.dtype for p in load_model(tiny_flux, "transformer", resolve_precision(name)).get_parameters()} == {dtype}


def test_tokenizers_and_scheduler(tiny_flux):
    assert type(load_tokenizer(tiny_flux / "tokenizer")).__name__ == "CLIPTokenizer"
    assert type(load_tokenizer(tiny_flux / "tokenizer_2")).__name__ == "T5TokenizerFast"
    scheduler = load_scheduler(tiny_flux)
    assert isinstance(scheduler, mindone.diffusers.FlowMatchEulerDiscreteScheduler)
    sigmas = scheduler.sigmas.asnumpy()  # FLUX trains on unshifted ones: (1000 - index) / 1000
    np.testing.assert_allclose(sigmas, (1000 - np.arange(1000)) / 1000, rtol=1e-6)
    assert read_config(tiny_flux, "scheduler")["max_shift"] == 1.15


def test_the_skeleton_has_the_real_names_at_a_toy_width(tiny_flux):
    def layers(model):
        return {name for name, _ in model.cells_and_names()}

    skeleton = flux_skeleton(tiny_flux)
    assert layers(skeleton) == layers(load_model(tiny_flux, "transformer", resolve_precision("no")))
    assert sum(p.size for p in skeleton.get_parameters()) < 20_000
