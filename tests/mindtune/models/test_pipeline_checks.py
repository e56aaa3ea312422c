"""Checks of a pipeline before it is loaded: configs and headers alone show every problem, and all are listed."""

import json
import shutil

import pytest
from conftest import edit, shard
from pipeline_cases import broken, error_message, rename_weights, unsupported
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models.loading import load_model
from mindtune.models.pipeline_checks import check_pipeline
from mindtune.models.pipelines import FLUX_COMPONENTS, resolve_pipeline
from mindtune.models.precision import resolve_precision
from mindtune.models.weights import weight_files

# ---- complete pipelines ----------------------------------------------------------------------------------


def test_a_complete_pipeline_passes(tiny_flux):
    check_pipeline(tiny_flux, FLUX_COMPONENTS)
    assert resolve_pipeline(str(tiny_flux), None, None, None, FLUX_COMPONENTS) == tiny_flux


def test_a_sharded_component_passes_and_loads(pipeline):
    shard(pipeline / "transformer")
    check_pipeline(pipeline, FLUX_COMPONENTS)
    assert load_model(pipeline, "transformer", resolve_precision("no")).config["num_layers"] == 2


def test_slow_tokenizer_files_are_enough(pipeline):
    (pipeline / "tokenizer_2" / "tokenizer.json").unlink()
    check_pipeline(pipeline, FLUX_COMPONENTS)


def test_other_folders_are_ignored(pipeline):
    (pipeline / "safety_checker").mkdir()
    shutil.rmtree(pipeline / "vae")
    check_pipeline(pipeline, {name: classes for name, classes in FLUX_COMPONENTS.items() if name != "vae"})


# ---- missing and damaged files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLUX_COMPONENTS)
def test_a_missing_component(pipeline, name):
    shutil.rmtree(pipeline / name)
    assert broken(pipeline) == [f"{name}/ is missing"]


@pytest.mark.parametrize("name", [name for name in FLUX_COMPONENTS if not name.startswith("tokenizer")])
def test_a_missing_config(pipeline, name):
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    (pipeline / name / file).unlink()
    assert broken(pipeline) == [f"{name}/{file} is missing"]


@pytest.mark.parametrize("name, file", [("tokenizer", "vocab.json"), ("tokenizer_2", "spiece.model")])
def test_a_tokenizer_without_vocabulary(pipeline, name, file):
    for path in (file, "tokenizer.json"):
        (pipeline / name / path).unlink(missing_ok=True)
    assert broken(pipeline) == [f"{name}/{file} is missing"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_a_config_that_is_not_an_object(pipeline, content):
    (pipeline / "vae" / "config.json").write_bytes(content.encode("latin-1"))
    (found,) = broken(pipeline)
    assert found.startswith("vae/")


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_weights(pipeline, name):
    (path,) = weight_files(pipeline, name)
    path.unlink()
    assert broken(pipeline) == [f"{name}/{path.name} is missing"]


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1, -1000])
def test_truncated_weights(pipeline, keep):
    """In the length, in the header, or in the data. The message names the file."""
    (path,) = weight_files(pipeline, "vae")
    path.write_bytes(path.read_bytes()[:keep])
    (found,) = broken(pipeline)
    assert found.startswith(f"vae/{path.name} ") and f"{path.stat().st_size:,} bytes" in found


def test_weights_with_trailing_bytes(pipeline):
    (path,) = weight_files(pipeline, "vae")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0" * 10)
    assert broken(pipeline) == [f"vae/{path.name} has {size + 10:,} bytes, its header says {size:,}"]


def test_lfs_pointers_instead_of_files(pipeline):
    """git leaves them when git-lfs is missing."""
    (path,) = weight_files(pipeline, "vae")
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    )
    assert broken(pipeline) == [
        f"vae/{path.name} is a Git LFS pointer: run git lfs pull where the repository was cloned"
    ]
    for name in ("tokenizer/merges.txt", "tokenizer_2/spiece.model", "vae/config.json"):
        path.replace(pipeline / name) if not path.exists() else (pipeline / name).write_bytes(path.read_bytes())
    assert [line.split(" ")[0] for line in broken(pipeline)] == [
        "tokenizer/merges.txt", "tokenizer_2/spiece.model", "vae/config.json",
    ]  # fmt: skip


def test_a_missing_shard(pipeline):
    names = shard(pipeline / "transformer")
    (pipeline / "transformer" / names[1]).unlink()
    assert broken(pipeline) == [f"transformer/{names[1]} is missing"]


def test_a_truncated_shard(pipeline):
    path = pipeline / "text_encoder" / shard(pipeline / "text_encoder", "model")[0]
    path.write_bytes(path.read_bytes()[:-4])
    (found,) = broken(pipeline)
    assert found.startswith(f"text_encoder/{path.name} has ")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": null}'])
def test_an_index_without_shards(pipeline, content):
    shard(pipeline / "transformer")
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    (found,) = broken(pipeline)
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
    assert unsupported(pipeline) == [f"{name}/config.json: the class is {found}, expected {expected}"]


def test_a_scheduler_and_a_tokenizer_of_another_class(pipeline):
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler")
    assert unsupported(pipeline) == [
        "scheduler/scheduler_config.json: the class is DDPMScheduler, expected FlowMatchEulerDiscreteScheduler"
    ]
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    edit(pipeline / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    assert broken(pipeline) == ["model_index.json: tokenizer is a BertTokenizer, expected CLIPTokenizer"]


def test_all_problems_are_listed(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    (pipeline / "text_encoder" / "config.json").unlink()
    (pipeline / "transformer" / "config.json").write_text("{")
    (path,) = weight_files(pipeline, "vae")
    path.unlink()
    assert broken(pipeline) == [
        "text_encoder/config.json is missing",
        f"vae/{path.name} is missing",
        "transformer/config.json is not JSON "
        "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "scheduler/ is missing",
    ]


MODELS = ["text_encoder", "text_encoder_2", "vae", "transformer"]


def test_a_variant_without_files(tiny_flux):
    assert error_message(tiny_flux, variant="fp16").endswith(
        "no component has files of the variant fp16. Remove --variant fp16."
    )


def test_files_of_a_variant_only(pipeline):
    for name in MODELS:
        rename_weights(pipeline, name, "fp16")
    check_pipeline(pipeline, FLUX_COMPONENTS, "fp16")
    for name, line in zip(MODELS, broken(pipeline)):
        assert line.startswith(f"{name}/") and line.endswith(
            "is missing; there are files of the variant fp16: add --variant fp16"
        )


def test_components_without_the_variant_use_other_files(pipeline, capsys):
    rename_weights(pipeline, "transformer", "fp16")
    check_pipeline(pipeline, FLUX_COMPONENTS, "fp16")
    assert (
        "--variant fp16: text_encoder, text_encoder_2, vae has no files of that variant; uses the files"
        in capsys.readouterr().out
    )
    assert [path.name for path in weight_files(pipeline, "vae", "fp16")] == ["diffusion_pytorch_model.safetensors"]
    assert [path.name for path in weight_files(pipeline, "transformer", "fp16")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]


@pytest.mark.parametrize(
    "other, expected",
    [
        ("diffusion_pytorch_model.bin", "is a pickle, which can run code and is not loaded"),
        (
            "diffusion_flax_model.msgpack",
            "holds Flax weights, which are not supported: download the .safetensors files instead",
        ),
        (
            "flux1-dev-Q4_K_S.gguf",
            "holds GGUF weights, which are not supported: download the .safetensors files instead",
        ),
        ("flux1-dev.safetensors", "has another name: rename it if it belongs to this model"),
    ],
)
def test_weights_in_another_format(pipeline, other, expected):
    (path,) = weight_files(pipeline, "transformer")
    path.rename(path.with_name(other))
    (line,) = broken(pipeline)
    assert (
        line.startswith(f"transformer/{path.name} is missing; ")
        and f"transformer/{other}" in line
        and line.endswith(expected)
    )


@pytest.mark.parametrize("dtype, description", [("F8_E4M3", "fp8"), ("U8", "packed 4-bit or 8-bit")])
def test_quantised_weights(pipeline, dtype, description):
    """Only the file shows it, not the config."""
    (path,) = weight_files(pipeline, "transformer")
    tensors = load_file(path)
    key = "transformer_blocks.0.attn.to_q.weight"
    save_file({**tensors, key: tensors[key].astype("uint8")}, path, metadata={"format": "pt"})
    path.write_bytes(
        path.read_bytes().replace(b'"U8"', f'"{dtype}"'.encode(), 1) if dtype == "U8" else with_dtype(path, key, dtype)
    )
    (line,) = unsupported(pipeline)
    expected = "Quantised weights cannot be trained: download the model's original weights in bf16"
    assert f"{key} is {dtype} ({description}). {expected}" in line


def with_dtype(path, key, dtype):
    """The bytes of a safetensors file with another one-byte dtype for a tensor in the header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[key]["dtype"] = dtype
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


# ---- keys that a config lacks --------------------------------------------------------------------


def test_a_directory_above_the_pipeline(pipeline):
    """A hub cache's own folder, or one level too high."""
    with pytest.raises(
        UserError, match=f"model_index.json is missing; there is a pipeline in {pipeline}: give that directory"
    ):
        resolve_pipeline(str(pipeline.parent), None, None, None, FLUX_COMPONENTS)


def test_an_index_and_a_class_of_other_types(pipeline):
    shard(pipeline / "transformer")
    for content in ({"weight_map": ["a"]}, {"weight_map": "a"}):
        (pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
        (line,) = broken(pipeline)
        assert line.endswith("names no files (no weight_map)")
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (line,) = broken(pipeline)
    assert "and so is diffusion_pytorch_model.safetensors.index.json" in line
    edit(pipeline / "model_index.json", _class_name=["FluxPipeline"])
    assert broken(pipeline) == [line]
