"""Looking at a pipeline before loading it: every defect is found, from files' headers alone, and all at once."""

import json
import shutil
from fnmatch import fnmatchcase

import pytest
from conftest import edit, load_script, shard
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models.configs import read_config
from mindtune.models.loading import load_model
from mindtune.models.pipeline_checks import check_pipeline
from mindtune.models.pipelines import (
    FLUX_COMPONENTS,
    SD_COMPONENTS,
    SDXL_COMPONENTS,
    resolve_controlnet,
    resolve_pipeline,
    resolve_vae,
)
from mindtune.models.precision import resolve_precision
from mindtune.models.weights import weight_files


def refusal(root, components=FLUX_COMPONENTS, **options):
    """What `check_pipeline` says."""
    with pytest.raises(UserError) as error:
        check_pipeline(root, components, **options)
    return str(error.value)


def defects(root, variant=None):
    """The lines of the complaint about a pipeline that is not whole."""
    head, *lines, tail = refusal(root, variant=variant).splitlines()
    assert head == f"--pretrained_model_name_or_path {root}: not a complete pipeline:" and tail.startswith(
        "Copy or download it again"
    )
    return [line.strip() for line in lines]


def unsupported(root, components=FLUX_COMPONENTS, **options):
    """The lines of the complaint about one that is whole."""
    head, *lines, tail = refusal(root, components, **options).splitlines()
    assert head == f"--pretrained_model_name_or_path {root}: cannot be trained by this script:"
    assert tail == "docs/models.md lists the published models that can."
    return [line.strip() for line in lines]


# ---- whole ones ----------------------------------------------------------------------------------


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


# ---- defects -------------------------------------------------------------------------------------


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
    assert defects(pipeline) == [
        f"vae/{path.name} is a Git LFS pointer: run git lfs pull where the repository was cloned"
    ]
    for name in ("tokenizer/merges.txt", "tokenizer_2/spiece.model", "vae/config.json"):
        path.replace(pipeline / name) if not path.exists() else (pipeline / name).write_bytes(path.read_bytes())
    assert [line.split(" ")[0] for line in defects(pipeline)] == [
        "tokenizer/merges.txt", "tokenizer_2/spiece.model", "vae/config.json",
    ]  # fmt: skip


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
    assert unsupported(pipeline) == [f"{name}/config.json: the class is {found}, expected {expected}"]


def test_a_scheduler_and_a_tokenizer_of_another_class(pipeline):
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler")
    assert unsupported(pipeline) == [
        "scheduler/scheduler_config.json: the class is DDPMScheduler, expected FlowMatchEulerDiscreteScheduler"
    ]
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    edit(pipeline / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    assert defects(pipeline) == ["model_index.json: tokenizer is a BertTokenizer, expected CLIPTokenizer"]


def test_all_defects_are_listed_at_once(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    (pipeline / "text_encoder" / "config.json").unlink()
    (pipeline / "transformer" / "config.json").write_text("{")
    (path,) = weight_files(pipeline, "vae")
    path.unlink()
    assert defects(pipeline) == [
        "text_encoder/config.json is missing",
        f"vae/{path.name} is missing",
        "transformer/config.json is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "scheduler/ is missing",
    ]


def rename(root, name, middle):
    """A component's weights under the name of a variant."""
    (path,) = weight_files(root, name)
    path.rename(path.with_name(path.name.replace(".safetensors", f".{middle}.safetensors")))


MODELS = ["text_encoder", "text_encoder_2", "vae", "transformer"]


def test_a_variant_that_no_component_has(tiny_flux):
    assert refusal(tiny_flux, variant="fp16").endswith(
        "no component has files of the variant fp16. Remove --variant fp16."
    )


def test_only_files_of_a_variant(pipeline):
    for name in MODELS:
        rename(pipeline, name, "fp16")
    check_pipeline(pipeline, FLUX_COMPONENTS, "fp16")
    for name, line in zip(MODELS, defects(pipeline)):
        assert line.startswith(f"{name}/") and line.endswith(
            "is missing; there are files of the variant fp16: add --variant fp16"
        )


def test_a_component_without_files_of_the_variant_is_read_from_its_plain_ones(pipeline, capsys):
    rename(pipeline, "transformer", "fp16")
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
    "other, said",
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
def test_weights_in_another_format(pipeline, other, said):
    (path,) = weight_files(pipeline, "transformer")
    path.rename(path.with_name(other))
    (line,) = defects(pipeline)
    assert (
        line.startswith(f"transformer/{path.name} is missing; ")
        and f"transformer/{other}" in line
        and line.endswith(said)
    )


# ---- models that the scripts do not train --------------------------------------------------------


@pytest.mark.parametrize(
    "cls, said",
    [
        ("FluxKontextPipeline", "it edits a reference image"),
        ("FluxFillPipeline", "it fills a masked image"),
        ("FluxControlPipeline", "it reads a condition with the latents"),
        (
            "StableDiffusionXLPipeline",
            "Stable Diffusion XL; train it with examples/controlnet/train_controlnet_sdxl.py",
        ),
        ("StableDiffusionPipeline", "Stable Diffusion 1 or 2; train it with examples/controlnet/train_controlnet.py"),
        ("Flux2Pipeline", "FLUX.2; it is not supported"),
        ("FluxPriorReduxPipeline", "it encodes images for another pipeline"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3; it is not supported"),
    ],
)
def test_a_pipeline_of_another_class(pipeline, cls, said):
    edit(pipeline / "model_index.json", _class_name=cls)
    message = refusal(pipeline, weights=False)
    assert message == refusal(pipeline) and f"model_index.json: _class_name is {cls}" in message and said in message


@pytest.mark.parametrize(
    "cls", ["FluxPipeline", "FluxImg2ImgPipeline", "FluxControlNetPipeline", "SomebodysOwnPipeline", None]
)
def test_pipelines_over_the_same_weights(pipeline, cls):
    edit(pipeline / "model_index.json", _class_name=cls)
    check_pipeline(pipeline, FLUX_COMPONENTS)


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd") / "sd"
    load_script("examples/tiny/make_tiny_pipeline.py").make_sd15(root)
    return root


@pytest.fixture
def sd(tiny_sd, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_sd, tmp_path / "sd")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl") / "sdxl"
    load_script("examples/tiny/make_tiny_pipeline.py").make_sdxl(root)
    return root


@pytest.mark.parametrize(
    "part, key, value, said",
    [
        ("transformer", "in_channels", 384, "in_channels is 384, expected 64: a fill model"),
        (
            "transformer",
            "in_channels",
            128,
            "in_channels is 128, expected 64: a model that reads a condition with the latents",
        ),
        ("transformer", "out_channels", 32, "out_channels is 32, expected 64"),
        (
            "transformer",
            "joint_attention_dim",
            48,
            "joint_attention_dim is 48, expected 32, the width of text_encoder_2",
        ),
        (
            "transformer",
            "pooled_projection_dim",
            48,
            "pooled_projection_dim is 48, expected 32, the width of text_encoder",
        ),
        (
            "transformer",
            "quantization_config",
            {"quant_method": "bitsandbytes"},
            "quantization_config says bitsandbytes. Quantised",
        ),
        (
            "text_encoder_2",
            "quantization_config",
            {"quant_method": "quanto"},
            "quantization_config says quanto. Quantised",
        ),
        ("scheduler", "shift_terminal", 0.1, "shift_terminal is 0.1, and only None is supported"),
        ("scheduler", "time_shift_type", "linear", "time_shift_type is linear, and only exponential is supported"),
        ("vae", "latents_mean", [0.0] * 16, "latents_mean is given without the other"),
        ("vae", "scaling_factor", None, "scaling_factor is null, expected such as 0.18215"),
        ("vae", "scaling_factor", 0, "scaling_factor is 0, expected a number above 0"),
        ("vae", "shift_factor", "a", "shift_factor is a, expected a number or null"),
        ("vae", "block_out_channels", None, "block_out_channels is null, expected such as (64,)"),
        (
            "transformer",
            "axes_dims_rope",
            [4, 6, 4],
            "the sum of axes_dims_rope is 14, expected 16, which is attention_head_dim",
        ),
        ("scheduler", "base_shift", None, "base_shift is null, expected such as 0.5"),
        ("scheduler", "num_train_timesteps", "1000", "num_train_timesteps is 1000, expected a number such as 1000"),
        ("scheduler", "max_image_seq_len", 256, "base_image_seq_len is 256, expected less than max_image_seq_len"),
    ],
)
def test_flux_models_of_other_kinds(pipeline, part, key, value, said):
    """From the configs alone, so --dry_run says the same."""
    edit(pipeline / (f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"), **{key: value})
    lines = unsupported(pipeline)
    assert any(line.startswith(f"{part}/") and said in line for line in lines)
    assert unsupported(pipeline, weights=False) == lines


@pytest.mark.parametrize(
    "part, key, value, said",
    [
        ("unet", "in_channels", 9, "in_channels is 9, expected 4: an inpainting model"),
        ("unet", "in_channels", 7, "in_channels is 7, expected 4: an upscaler"),
        ("unet", "addition_embed_type", "text_time", "addition_embed_type is text_time, expected None"),
        ("unet", "mid_block_type", None, "mid_block_type is None, expected UNetMidBlock2DCrossAttn or UNetMidBlock2D"),
        ("unet", "layers_per_block", [1, 1, 1, 1], "layers_per_block is [1, 1, 1, 1], expected one number"),
        ("scheduler", "beta_end", 2.0, "beta_start 0.00085 and beta_end 2.0 give betas outside (0, 1)"),
        ("unet", "num_class_embeds", 1000, "num_class_embeds is 1000, expected None"),
        ("unet", "cross_attention_dim", 64, "cross_attention_dim is 64, expected 32, the width of the text encoders"),
        ("scheduler", "prediction_type", "sample", "prediction_type sample is not supported"),
        ("scheduler", "rescale_betas_zero_snr", True, "rescaled or listed betas are not supported"),
    ],
)
def test_stable_diffusion_models_of_other_kinds(sd, part, key, value, said):
    edit(sd / (f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"), **{key: value})
    lines = unsupported(sd, SD_COMPONENTS)
    assert any(line.startswith(f"{part}/") and said in line for line in lines)
    assert unsupported(sd, SD_COMPONENTS, weights=False) == lines


@pytest.mark.parametrize("dtype, what", [("F8_E4M3", "fp8"), ("U8", "packed 4-bit or 8-bit")])
def test_quantised_weights(pipeline, dtype, what):
    """A file whose header says so, though its config does not."""
    (path,) = weight_files(pipeline, "transformer")
    tensors = load_file(path)
    key = "transformer_blocks.0.attn.to_q.weight"
    save_file({**tensors, key: tensors[key].astype("uint8")}, path, metadata={"format": "pt"})
    path.write_bytes(
        path.read_bytes().replace(b'"U8"', f'"{dtype}"'.encode(), 1) if dtype == "U8" else with_type(path, key, dtype)
    )
    (line,) = unsupported(pipeline)
    assert (
        f"{key} is {dtype} ({what}). Quantised weights cannot be trained: download the model's original weights in bf16"
        in line
    )


def with_type(path, key, dtype):
    """A safetensors file's bytes with another type written in the header for a tensor of one byte an element."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[key]["dtype"] = dtype
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


# ---- schedulers ----------------------------------------------------------------------------------


def test_any_scheduler_with_betas_will_do(sd):
    """One that mindone does not have too, if its config says all; the betas and the prediction type are all that is read."""
    path = sd / "scheduler" / "scheduler_config.json"
    for cls in ("DEISMultistepScheduler", "DDIMScheduler", "TCDScheduler", "NobodysScheduler"):
        edit(path, _class_name=cls)
        check_pipeline(sd, SD_COMPONENTS)
    path.write_text(json.dumps({"_class_name": "NobodysScheduler", "beta_start": 0.001, "beta_end": 0.01}))
    (line,) = unsupported(sd, SD_COMPONENTS)
    assert line.startswith("scheduler/scheduler_config.json: NobodysScheduler has no beta_schedule.")


def test_a_scheduler_without_betas(sd):
    """Playground 2.5's: no other file would mend it, so nobody is told to download again."""
    path = sd / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"})
    )
    (line,) = unsupported(sd, SD_COMPONENTS)
    assert (
        "EDMDPMSolverMultistepScheduler has no beta_start, beta_end, beta_schedule, as in a model trained with EDM noise"
        in line
    )


# ---- keys that a config lacks --------------------------------------------------------------------


def test_absent_keys_mean_the_classes_defaults(sd, pipeline, sdxl):
    """Published configs lack what their class got later."""
    path = sd / "vae" / "config.json"
    config = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("scaling_factor", "latents_mean")
    }
    path.write_text(json.dumps(config))
    found = read_config(sd, "vae")
    assert (found["scaling_factor"], found["shift_factor"], found["latents_mean"]) == (0.18215, None, None)
    assert found["block_out_channels"] == config["block_out_channels"]
    (pipeline / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}'
    )
    scheduler = read_config(pipeline, "scheduler")
    assert (scheduler["use_dynamic_shifting"], scheduler["num_train_timesteps"], scheduler["max_shift"]) == (
        False,
        1000,
        1.15,
    )
    edit(pipeline / "transformer" / "config.json", _diffusers_version="0.30")
    assert read_config(pipeline, "transformer")["out_channels"] is None
    clip = pipeline / "text_encoder" / "config.json"
    clip.write_text(
        json.dumps({key: value for key, value in json.loads(clip.read_text()).items() if key != "projection_dim"})
    )
    assert read_config(pipeline, "text_encoder")["projection_dim"] == 512
    check_pipeline(sdxl, SDXL_COMPONENTS)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "~/flux", "flux", "a/b/c"])
def test_a_directory_that_is_not_there(name):
    """What cannot be a hub id is refused without asking the hub."""
    with pytest.raises(
        UserError,
        match=f"--pretrained_model_name_or_path {name}: no such directory. Give a local directory or a hub id",
    ):
        resolve_pipeline(name, None, None, None, FLUX_COMPONENTS)


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def refuses(*args, **kwargs):
        raise OSError("401 gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(
        UserError, match=r"black-forest-labs/FLUX.1-dev: no such directory, and the hub says: 401 gated"
    ):
        resolve_pipeline("black-forest-labs/FLUX.1-dev", None, None, None, FLUX_COMPONENTS)


@pytest.fixture
def hub(monkeypatch, tiny_flux):
    """hub(*names of weight files): a repository with those; what was asked of it."""
    asked = {}

    def make(*names):
        monkeypatch.setattr(
            "huggingface_hub.HfApi.list_repo_files", lambda self, name, revision=None: ["model_index.json", *names]
        )
        return asked

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kwargs: asked.update(kwargs, name=name) or str(tiny_flux)
    )
    monkeypatch.setattr("mindtune.models.pipelines.check_pipeline", lambda *args: None)
    return make


STEM = "vae/diffusion_pytorch_model"


@pytest.mark.parametrize(
    "variant, fetched, left",
    [
        (None, ["", "-00001-of-00002"], [".fp16", ".non_ema", ".fp16-00001-of-00002", "-00001-of-00002.fp16"]),
        ("fp16", [".fp16", ".fp16-00001-of-00002", "-00001-of-00002.fp16"], ["", ".non_ema", "-00001-of-00002"]),
    ],
)
def test_only_the_named_components_and_one_variant_are_fetched(hub, variant, fetched, left):
    """Stable Diffusion 1.5 has 5.6 GB of other variants."""
    asked = hub(*(f"{STEM}{middle}.safetensors" for middle in fetched + left))
    resolve_pipeline("some/flux", "v2", variant, "/cache", {"vae": ("AutoencoderKL",)})
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("some/flux", "v2", "/cache")
    patterns = asked["allow_patterns"]
    assert patterns[:4] == ["model_index.json", "vae/*.json", "vae/*.txt", "vae/*.model"]
    for middle in fetched + left:
        file = f"{STEM}{middle}.safetensors"
        assert any(fnmatchcase(file, pattern) for pattern in patterns) == (middle in fetched), file


def test_a_component_without_the_variant_is_fetched_plain(hub):
    asked = hub(f"{STEM}.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors")
    resolve_pipeline("some/flux", None, "fp16", None, {"vae": (), "transformer": ()})
    assert (
        f"{STEM}.safetensors" in asked["allow_patterns"] and f"{STEM}.fp16.safetensors" not in asked["allow_patterns"]
    )
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in asked["allow_patterns"]


def test_a_plan_fetches_configs_alone(hub):
    asked = hub(f"{STEM}.safetensors")
    resolve_pipeline("some/flux", None, None, None, {"vae": ()}, weights=False)
    assert asked["allow_patterns"] == ["model_index.json", "vae/*config.json"]


@pytest.mark.parametrize(
    "name, what", [("flux1-dev-Q8_0.gguf", "quantised weights in GGUF"), ("flux1-dev.safetensors", "a single file")]
)
def test_a_file_in_the_place_of_a_directory(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"{name}: {what}. Give the directory of the model in the Hugging Face layout"):
        resolve_pipeline(str(tmp_path / name), None, None, None, FLUX_COMPONENTS)


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
        (line,) = defects(pipeline)
        assert line.endswith("names no files (no weight_map)")
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (line,) = defects(pipeline)
    assert "and so is diffusion_pytorch_model.safetensors.index.json" in line
    edit(pipeline / "model_index.json", _class_name=["FluxPipeline"])
    assert defects(pipeline) == [line]


def test_a_vae_of_another_latent_space_is_told(sdxl, tiny_sd, capsys):
    """It may be trained with; the model was made for the pipeline's."""
    resolve_vae(str(sdxl / "vae"), "--vae", None, sdxl, "unet")
    assert capsys.readouterr().out == ""
    resolve_vae(str(tiny_sd / "vae"), "--vae", None, sdxl, "unet")
    assert "its scaling_factor is 0.18215, the pipeline's VAE has 0.13025" in capsys.readouterr().out


def test_a_controlnet_with_only_files_of_a_variant(pipeline):
    rename(pipeline, "transformer", "fp16")
    edit(pipeline / "transformer" / "config.json", _class_name="FluxControlNetModel")
    with pytest.raises(UserError, match="files of the variant fp16: rename them without the variant"):
        resolve_controlnet(
            str(pipeline / "transformer"), "--controlnet", None, {"_class_name": "FluxTransformer2DModel"}
        )
