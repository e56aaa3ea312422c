"""Loading models: values, names and dtypes of the parameters, and files that do not fit."""

import copy
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import mindone.diffusers
import mindone.transformers
import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from conftest import edit, load_script, shard
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import shared_blocks
from mindtune.models.configs import read_config
from mindtune.models.loading import (
    check_files,
    import_model_class_from_model_name_or_path,
    load_model,
    load_scheduler,
    training_sigmas,
)
from mindtune.models.named_parameters import model_parameters
from mindtune.models.precision import cast_cell, resolve_precision
from mindtune.models.tokenization import load_tokenizer
from mindtune.models.weights import weight_files


@pytest.mark.parametrize("name, expected", [("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")])
def test_the_class_of_a_text_encoder(tiny_flux, name, expected):
    assert import_model_class_from_model_name_or_path(tiny_flux, name) is getattr(mindone.transformers, expected)


def test_the_class_of_an_unknown_text_encoder(pipeline):
    edit(pipeline / "text_encoder" / "config.json", architectures=["RobertaModel"])
    with pytest.raises(ValueError, match="text_encoder: RobertaModel is not supported"):
        import_model_class_from_model_name_or_path(pipeline)


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_loaded_model_has_the_values_of_its_file(tiny_flux, name):
    """Every tensor of the file equals a parameter, bit for bit."""
    (path,) = weight_files(tiny_flux, name)
    model = load_model(tiny_flux, name, resolve_precision("no"))
    found = sorted((p.asnumpy() for p in model.get_parameters()), key=lambda a: (a.size, a.tobytes()))
    expected = sorted(load_file(path).values(), key=lambda a: (a.size, a.tobytes()))
    assert len(found) == len(expected) and not model.training
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.ravel(), b.ravel())


@pytest.mark.parametrize("name, dtype", [("fp16", ms.float16), ("bf16", ms.bfloat16)])
def test_the_storage_dtype(tiny_flux, name, dtype):
    assert {p.dtype for p in load_model(tiny_flux, "transformer", resolve_precision(name)).get_parameters()} == {dtype}


# A component of every class that `load_model` knows.
PARTS = ["flux/transformer", "flux/vae", "flux/text_encoder", "flux/text_encoder_2", "sdxl/unet", "sdxl/text_encoder_2"]
PARTS += ["flux/controlnet", "sdxl/controlnet"]


@pytest.fixture(scope="module")
def roots(tiny_flux, tmp_path_factory):
    """Two folders with PARTS, with random values: each component in one file, and in two."""
    one, two = tmp_path_factory.mktemp("parts") / "1", tmp_path_factory.mktemp("parts") / "2"
    maker = load_script("examples/tiny/make_tiny_pipeline.py")
    shutil.copytree(tiny_flux, one / "flux")
    maker.make_sdxl(one / "sdxl")
    for kind, config in (("FluxControlNetModel", maker.FLUX_TRANSFORMER), ("ControlNetModel", maker.SDXL_UNET)):
        cls, folder = (
            getattr(mindone.diffusers, kind),
            one / ("flux" if kind.startswith("Flux") else "sdxl") / "controlnet",
        )
        known = inspect.signature(cls.__init__).parameters
        maker.save_diffusers(cls, {k: v for k, v in config.items() if k in known}, folder, np.random.default_rng(1))
    shutil.copytree(one, two)
    for part in PARTS:
        shard(two / part, weight_files(two, part)[0].stem if "text" not in part else "model")
    return one, two


def load_part(root, part, name):
    folder = root / part
    return load_model(folder.parent, folder.name, resolve_precision(name))


def by_mindone(folder, name):
    """The model from mindone's own loader."""
    config, precision = json.loads((folder / "config.json").read_text()), resolve_precision(name)
    library = mindone.diffusers if "_class_name" in config else mindone.transformers
    cls = getattr(library, config.get("_class_name") or config["architectures"][0])
    return cast_cell(
        cls.from_pretrained(str(folder), mindspore_dtype=precision.storage, use_safetensors=True), precision
    )


def parameters_of(model):
    """Names, dtype, shape, requires_grad and bytes of every parameter, in order."""
    return [
        (name, p.name, p.dtype, p.shape, p.requires_grad, p.asnumpy().tobytes())
        for name, p in model.parameters_and_names()
    ]


def other_tensors(model):
    """Bytes of all tensors but parameters, without `init_tensor`: the random values that an Embedding keeps."""
    found = {
        f"{name}.{key}": value
        for name, cell in model.cells_and_names()
        for key, value in vars(cell).items()
        if key != "init_tensor"
    }
    found = {
        key: value
        for key, value in found.items()
        if isinstance(value, ms.Tensor) and not isinstance(value, ms.Parameter)
    }
    return {key: (value.dtype, value.shape, value.asnumpy().tobytes()) for key, value in found.items()}


@pytest.mark.parametrize("name", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_models_equal_those_that_mindone_loads(roots, part, name):
    """Equal bit for bit, from one file and from two, with its config, in evaluation mode."""
    expected = by_mindone(roots[0] / part, name)
    for root in roots:
        found = load_part(root, part, name)
        assert shared_blocks._original_class(found) is type(expected) and parameters_of(found) == parameters_of(
            expected
        )
        assert other_tensors(expected).items() <= other_tensors(found).items()  # replaced layers have some
        assert vars(found.config) == {**vars(expected.config), "_name_or_path": str(root / part)}
        assert not any(cell.training for _, cell in found.cells_and_names()) and found.phase == expected.phase


def test_position_ids_are_computed(tiny_flux):
    """Tensors that a model computes in its constructor exist, although its parameters are not initialised."""
    found = other_tensors(load_model(tiny_flux, "text_encoder", resolve_precision("fp16")))
    assert found["text_model.embeddings.position_ids"] == (ms.int64, (1, 77), np.arange(77).tobytes())


def rounded_to_bfloat16(value):
    """float32 rounded to values whose lower 16 bits are zero, ties to even."""
    bits = value.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("name", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_stored_dtype_loads_in_every_precision(pipeline, stored, name):
    (path,) = weight_files(pipeline, "vae")
    file = {key: value.astype(stored) for key, value in load_file(path).items()}
    save_file(file, path, metadata={"format": "pt"})
    storage = resolve_precision(name).storage
    for key, parameter in model_parameters(load_model(pipeline, "vae", resolve_precision(name))).items():
        value = file[key].astype(np.float16 if name == "fp16" else np.float32)
        assert parameter.dtype == storage
        found = parameter.to(ms.float32).asnumpy()
        np.testing.assert_array_equal(found, rounded_to_bfloat16(value) if name == "bf16" else value.astype(np.float32))


def test_t5s_wo_stays_in_float32(tiny_flux):
    """In fp16 it would overflow. All other tensors are float16."""
    (path,) = weight_files(tiny_flux, "text_encoder_2")
    file, found = load_file(path), model_parameters(load_model(tiny_flux, "text_encoder_2", resolve_precision("fp16")))
    for key, parameter in found.items():
        expected = file[key] if ".wo." in key else file[key].astype(np.float16)
        assert parameter.dtype == (ms.float32 if ".wo." in key else ms.float16)
        np.testing.assert_array_equal(parameter.asnumpy(), expected)


def test_values_beyond_float16_become_infinite(pipeline, recwarn):
    (path,) = weight_files(pipeline, "vae")
    file = load_file(path)
    file["encoder.conv_in.bias"][:2] = 7e4, -7e4
    save_file(file, path, metadata={"format": "pt"})
    bias = load_model(pipeline, "vae", resolve_precision("fp16")).encoder.conv_in.bias.asnumpy()
    assert bias[0] == np.inf and bias[1] == -np.inf and np.isfinite(bias[2:]).all()
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]


@pytest.mark.parametrize("sharded", [False, True])
def test_legacy_names(pipeline, sharded):
    """In the VAE of Stable Diffusion 1.5 the attention layers are called query, key, value and proj_attn."""
    (path,) = weight_files(pipeline, "vae")
    new, file = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, load_file(path)
    old = {
        re.sub(r"(attentions\.0)\.(to_[qkv]|to_out\.0)\.", lambda m: f"{m[1]}.{new[m[2]]}.", key): file[key]
        for key in file
    }
    assert len(old.keys() - file.keys()) == 2 * 4 * 2  # encoder and decoder, four layers, weight and bias
    save_file(old, path, metadata={"format": "pt"})
    if sharded:
        shard(pipeline / "vae")
    for key, parameter in model_parameters(load_model(pipeline, "vae", resolve_precision("no"))).items():
        np.testing.assert_array_equal(parameter.asnumpy(), file[key])


def test_known_extra_tensors_are_ignored(pipeline):
    """Position ids of older CLIP files, and the second name of T5's embedding."""
    for name, key in (
        ("text_encoder", "text_model.embeddings.position_ids"),
        ("text_encoder_2", "encoder.embed_tokens.weight"),
    ):
        (path,) = weight_files(pipeline, name)
        file = load_file(path)
        save_file({**file, key: np.arange(77, dtype=np.int64)[None]}, path)
        found = model_parameters(load_model(pipeline, name, resolve_precision("no")))
        assert found.keys() == file.keys()
        assert all(np.array_equal(found[key].asnumpy(), file[key]) for key in file)
    model = load_model(pipeline, "text_encoder_2", resolve_precision("no"))
    assert model.encoder.embed_tokens is model.shared


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]])
def test_both_names_of_t5s_embedding(pipeline, names):
    (path,) = weight_files(pipeline, "text_encoder_2")
    file = load_file(path)
    table = file.pop("shared.weight")
    save_file({**file, **{name: table.copy() for name in names}}, path, metadata={"format": "pt"})
    found = model_parameters(load_model(pipeline, "text_encoder_2", resolve_precision("no")))
    np.testing.assert_array_equal(found["shared.weight"].asnumpy(), table)


@pytest.mark.parametrize("int8", [False, True])
def test_linear_layers_stored_as_1x1_convolutions(pipeline, int8):
    """As in a VAE's attention in single-file checkpoints.

    Stable Diffusion 1's proj_in in newer files is the reverse.
    """
    for part, key in (("vae", "encoder.mid_block.attentions.0.to_q.weight"), ("transformer", "x_embedder.weight")):
        (path,) = weight_files(pipeline, part)
        file = load_file(path)
        expected = model_parameters(load_model(pipeline, part, resolve_precision("no"), int8=int8))[key].asnumpy()
        save_file({**file, key: file[key][:, :, None, None].copy()}, path, metadata={"format": "pt"})
        found = model_parameters(load_model(pipeline, part, resolve_precision("no"), int8=int8))[key].asnumpy()
        np.testing.assert_array_equal(found, expected)


def test_unknown_tensors_are_reported(pipeline, capsys):
    check_files(pipeline, ["transformer", "vae", "tokenizer", "tokenizer_2", "scheduler"])
    assert capsys.readouterr().out == ""
    (path,) = weight_files(pipeline, "transformer")
    more = {f"guidance.{number}": np.zeros(2, np.float32) for number in range(5)}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    (clip,) = weight_files(pipeline, "text_encoder")
    save_file(
        {**load_file(clip), "text_model.embeddings.position_ids": np.arange(77)[None]}, clip, metadata={"format": "pt"}
    )
    check_files(pipeline, ["transformer", "text_encoder"])
    expected = "the model has no tensors guidance.0, guidance.1, guidance.2 and 2 more; they are not used"
    assert capsys.readouterr().out == f"{pipeline / 'transformer'}: {expected}\n"


def test_files_of_another_model_are_rejected_with_their_names(pipeline):
    (path,) = weight_files(pipeline, "transformer")
    save_file({f"module.{key}": value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="They have others, such as module.context_embedder.bias"):
        check_files(pipeline, ["transformer"])


def test_files_that_do_not_fit_are_rejected_before_loading(pipeline):
    edit(pipeline / "vae" / "config.json", layers_per_block=2)
    with pytest.raises(UserError, match="the weight files lack"):
        check_files(pipeline, ["transformer", "vae"])


def test_a_parameter_can_be_copied(tiny_flux):
    """The copy has the loaded value, not the initial value of a new model."""
    parameter = load_model(tiny_flux, "vae", resolve_precision("no")).encoder.conv_in.weight
    for again in (copy.copy(parameter), copy.deepcopy(parameter)):
        np.testing.assert_array_equal(again.asnumpy(), parameter.asnumpy())


def test_a_loaded_model_is_independent_of_its_files(pipeline):
    (path,) = weight_files(pipeline, "vae")
    file, model = load_file(path), load_model(pipeline, "vae", resolve_precision("no"))
    path.write_bytes(bytes(path.stat().st_size))
    for key, parameter in model_parameters(model).items():
        np.testing.assert_array_equal(parameter.asnumpy(), file[key])


# ---- files that do not fit ---------------------------------------------------------------------


def error_message(root, name):
    with pytest.raises(UserError) as error:
        load_model(root, name, resolve_precision("no"))
    return str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "name, missed",
    [
        ("transformer", "proj_out.bias"),
        ("vae", "encoder.conv_in.bias"),
        ("text_encoder_2", "encoder.final_layer_norm.weight"),
    ],
)
def test_a_file_without_a_tensor(pipeline, name, missed, sharded):
    """mindone would initialise it at random and only warn, and not even that for a sharded transformer."""
    (path,) = weight_files(pipeline, name)
    file = load_file(path)
    save_file({key: value for key, value in file.items() if key != missed}, path, metadata={"format": "pt"})
    if sharded:
        shard(pipeline / name, "model" if name.startswith("text") else "diffusion_pytorch_model")
    assert error_message(pipeline, name).splitlines() == [
        f"{pipeline / name}: the weight files lack 1 tensors:", f"  {missed}", "Copy or download them again."
    ]  # fmt: skip


def test_a_tensor_of_another_shape(pipeline):
    edit(pipeline / "vae" / "config.json", latent_channels=8)
    head, *lines, tail = error_message(pipeline, "vae").splitlines()
    assert head == f"{pipeline / 'vae'}: 3 tensors of the weight files do not fit the model that config.json describes:"
    assert (
        "  diffusion_pytorch_model.safetensors: decoder.conv_in.weight is [16, 16, 3, 3] of F32, "
        "the model's is [16, 8, 3, 3]" in lines
    )
    assert tail.startswith("Give the config.json that belongs to the weights")


def test_a_tensor_of_integers(pipeline):
    """Quantised weights."""
    (path,) = weight_files(pipeline, "transformer")
    file = load_file(path)
    save_file({**file, "proj_out.bias": file["proj_out.bias"].astype(np.int8)}, path, metadata={"format": "pt"})
    message = error_message(pipeline, "transformer")
    assert f"{path.name}: proj_out.bias is [64] of I8, the model's is [64]" in message
    assert message.endswith("weights of F64, F32, F16, BF16.")


def test_a_file_truncated_after_the_check(pipeline):
    (path,) = weight_files(pipeline, "vae")
    path.write_bytes(path.read_bytes()[:-10])
    assert error_message(pipeline, "vae").startswith(f"{pipeline}: vae/{path.name} has {path.stat().st_size:,} bytes")


# ---- memory --------------------------------------------------------------------------------------


LOADING = """
import re, sys, threading, time
from pathlib import Path
from mindtune.models.execution import free_memory
from mindtune.models.loading import load_model
from mindtune.models.precision import resolve_precision

def own_memory():  # private, without the pages of mapped files, which the system can reclaim
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not done.is_set():
        readings.append(own_memory())
        time.sleep(0.001)

def load():
    precision = resolve_precision(name.replace("int8", "no"))
    return load_model(Path(root), "transformer", precision, int8=name == "int8")

root, name = sys.argv[1:]
load()  # imports
free_memory()
before, readings, done = own_memory(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load()
done.set()
thread.join()
print(max(readings) - before, sum(parameter.size for parameter in model.get_parameters()))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A FLUX transformer of 26 million parameters."""
    maker, root = load_script("examples/tiny/make_tiny_pipeline.py"), tmp_path_factory.mktemp("wide")
    config = {
        **maker.FLUX_TRANSFORMER,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "axes_dims_rope": [16, 24, 24],
    }
    maker.save_diffusers(
        mindone.diffusers.FluxTransformer2DModel, config, root / "transformer", np.random.default_rng(0)
    )
    return root


@pytest.mark.parametrize("name, size", [("no", 4), ("bf16", 2), ("int8", 1)])
def test_loading_needs_little_more_memory_than_the_weights(wide, name, size):
    """At most 1.2 times the weights. mindone needs 2 times (float32) or 3 times (bf16); see benchmarks/loading.py.

    In a process with glibc's allocator, as users have it: jemalloc, which `make test` preloads, keeps for seconds what
    was freed.
    """
    words = [sys.executable, "-c", LOADING, str(wide), name]
    done = subprocess.run(words, env={**os.environ, "LD_PRELOAD": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed, parameters = map(int, done.stdout.splitlines()[-1].split())
    assert 0.7 * size * parameters < needed < 1.2 * size * parameters


def test_tokenizers_and_scheduler(tiny_flux):
    assert type(load_tokenizer(tiny_flux / "tokenizer")).__name__ == "CLIPTokenizer"
    assert type(load_tokenizer(tiny_flux / "tokenizer_2")).__name__ == "T5TokenizerFast"
    scheduler = load_scheduler(tiny_flux)
    assert isinstance(scheduler, mindone.diffusers.FlowMatchEulerDiscreteScheduler)
    sigmas = scheduler.sigmas.asnumpy()  # FLUX trains on unshifted ones: (1000 - index) / 1000
    np.testing.assert_allclose(sigmas, (1000 - np.arange(1000)) / 1000, rtol=1e-6)
    assert read_config(tiny_flux, "scheduler")["max_shift"] == 1.15


@pytest.mark.parametrize("shift", ["auto", "2.5"])
def test_sigmas_of_several_sizes_are_shifted_for_each(tiny_flux, shift):
    """Of (1000 - index) / 1000; auto: by exp(mu), linear in the tokens from 256 to 4096. Places: the largest size's."""
    sizes = [(512, 256), (1024, 512), (256, 256)]
    sigmas, places = training_sigmas(tiny_flux, sizes, shift)
    plain = (1000 - np.arange(1000)) / 1000
    for found, (height, width) in zip(sigmas, sizes):
        mu = 0.5 + 0.65 * (height * width / 256 - 256) / (4096 - 256)
        factor = np.exp(mu) if shift == "auto" else 2.5
        np.testing.assert_allclose(found, factor * plain / (1 + (factor - 1) * plain), rtol=1e-6)
    np.testing.assert_array_equal(places, sigmas[1])
