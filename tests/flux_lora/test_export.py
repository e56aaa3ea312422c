"""export_flux_lora.py: an adapter in the layouts of other tools, and back."""

import json

import ml_dtypes
import numpy as np
import pytest
from conftest import load_script, run_here
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import lora_files
from mindtune.models.loading import linear_layers
from mindtune.models.lora_settings import TEXT_ENCODER_TARGETS, TRANSFORMER_TARGETS

ENDS = {
    "transformer": tuple(TRANSFORMER_TARGETS),
    "text_encoder": tuple(TEXT_ENCODER_TARGETS),
}


@pytest.fixture(scope="module")
def script():
    return load_script("flux_lora/export_flux_lora.py")


@pytest.fixture
def export(script, tmp_path):
    """export(lora, format, *flags): runs the script and returns the file that it wrote."""

    def run(source, layout, *more, name="out"):
        output = tmp_path / f"{name}.safetensors"
        words = ["--lora", source, "--format", layout, "--output", output, *more]
        assert script.main([str(word) for word in words]) == 0
        return output

    return run


@pytest.fixture
def adapter(tiny_flux, tmp_path):
    """A directory with a LoRA of attention and CLIP: rank 4, rank 2 for every q, and alpha 6."""
    rng = np.random.default_rng(0)
    tensors = {}
    alphas = {}
    for prefix, ends in ENDS.items():
        for layer, (inputs, outputs) in linear_layers(tiny_flux, prefix).items():
            if layer.endswith(ends):
                rank = 2 if layer.endswith("to_q") else 4
                a = rng.standard_normal((rank, inputs)).astype(np.float32)
                b = rng.standard_normal((outputs, rank)).astype(np.float32)
                tensors[f"{prefix}.{layer}.lora_A.weight"] = 0.2 * a
                tensors[f"{prefix}.{layer}.lora_B.weight"] = 0.2 * b
                alphas[f"{prefix}.{layer}"] = 6.0
    (tmp_path / "run").mkdir()
    lora_files.write_lora(tmp_path / "run" / lora_files.LORA_FILE, tensors, alphas, "diffusers")
    return tmp_path / "run"


def header(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def assert_same_parts(found, expected):
    found = lora_files.read_adapters(found, "")
    expected = lora_files.read_adapters(expected, "")
    assert found.keys() == expected.keys()
    for prefix, part in expected.items():
        assert sorted(found[prefix]) == sorted(part)
        for name, value in part.items():
            np.testing.assert_array_equal(found[prefix][name], value, err_msg=name)


# ---- written files ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_exporting_and_importing_gives_the_same_adapter(export, adapter, layout):
    """The same tensors and the same settings of peft."""
    exported = export(adapter, layout, name="exported")
    assert_same_parts(exported, adapter / lora_files.LORA_FILE)
    back = export(exported, "diffusers", name="back")
    first = adapter / lora_files.LORA_FILE
    assert load_file(back).keys() == load_file(first).keys()
    assert json.loads(header(back)["lora_adapter_metadata"]) == json.loads(header(first)["lora_adapter_metadata"])
    for name, value in load_file(first).items():
        np.testing.assert_array_equal(load_file(back)[name], value, err_msg=name)


def test_kohyas_file_has_its_names_and_header(export, adapter, capsys):
    path = export(adapter, "kohya")
    names = {name.split(".")[0] for name in load_file(path)}
    assert {"lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_linear1"} <= names
    assert "lora_te1_text_model_encoder_layers_1_self_attn_out_proj" in names and len(names) == 2 * 2 + 2 + 8
    # Fused q, k and v have rank 12, with the MLP of single blocks 16; all other layers have 4.
    assert header(path) == {
        "format": "pt",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
    }
    assert capsys.readouterr().out == f"{path}: kohya layout, 14 layers of rank 4, 12, 16, dtype unchanged\n"


def test_a_common_rank_and_alpha_are_in_kohyas_header(export, tmp_path):
    rng = np.random.default_rng(0)
    name = "transformer.single_transformer_blocks.0.proj_out"
    tensors = {
        f"{name}.lora_A.weight": rng.standard_normal((4, 160)),
        f"{name}.lora_B.weight": rng.standard_normal((32, 4)),
    }
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    save_file({**tensors, f"{name}.alpha": np.array(2.0)}, tmp_path / "f")
    found = header(export(tmp_path / "f", "kohya"))
    assert (found["ss_network_dim"], float(found["ss_network_alpha"])) == ("4", 2.0)


def test_comfyuis_file_has_its_names(export, adapter):
    names = {
        name.rpartition(".lora_A")[0] for name in load_file(export(adapter, "comfyui")) if ".lora_A.weight" in name
    }
    assert "diffusion_model.double_blocks.1.img_attn.proj" in names
    assert "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj" in names and len(names) == 14


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("name, numpy_type", [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_weights_have_the_requested_dtype_and_alphas_are_exact(export, adapter, layout, name, numpy_type):
    tensors = load_file(export(adapter, layout, "--dtype", name))
    weights = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    assert {value.dtype for value in weights.values()} == {np.dtype(numpy_type)}
    assert {value.dtype for key, value in tensors.items() if key not in weights} <= {np.dtype(np.float32)}


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffusers"])
def test_half_precision_is_kept(export, adapter, layout):
    half = export(adapter, "diffusers", "--dtype", "bf16", name="half")
    path = export(half, layout)
    assert {v.dtype for k, v in load_file(path).items() if not k.endswith(".alpha")} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_parts(path, half)


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffusers"])
def test_equal_adapters_give_equal_bytes(export, adapter, layout):
    assert export(adapter, layout, name="one").read_bytes() == export(adapter, layout, name="other").read_bytes()


def test_images_of_kohyas_and_comfyuis_files_are_those_of_ours(export, adapter, tiny_flux, encoder_cache, tmp_path):
    infer = load_script("flux_lora/infer_flux_lora.py")
    images = {}
    for layout in ("diffusers", "kohya", "comfyui", "base"):
        words = ["--pretrained_model_name_or_path", tiny_flux, "--cache_dir", encoder_cache, "--prompt", "a cat"]
        words += ["--height", 32, "--width", 32, "--num_inference_steps", 2, "--max_sequence_length", 16]
        words += ["--output", tmp_path / f"{layout}.png"]
        words += [] if layout == "base" else ["--lora", export(adapter, layout, name=layout)]
        run_here(infer, words)
        images[layout] = np.asarray(Image.open(tmp_path / f"{layout}.png")).astype(int)
    for layout in ("kohya", "comfyui"):
        assert np.abs(images[layout] - images["diffusers"]).max() <= 1
    assert np.abs(images["base"] - images["diffusers"]).mean() > 1


def test_a_control_lora_with_norms_is_written_as_diffusers_alone(export, adapter, tmp_path):
    path, name = adapter / lora_files.LORA_FILE, "transformer.transformer_blocks.0.attn.norm_q.weight"
    save_file({**load_file(path), name: np.linspace(0.5, 1.5, 16, dtype=np.float32)}, path)
    found = load_file(export(adapter, "diffusers", "--dtype", "bf16"))
    np.testing.assert_array_equal(found[name], np.linspace(0.5, 1.5, 16, dtype=np.float32))
    message = "--lora .*: has trained norms .*, which the layout kohya does not hold. Write it as diffusers"
    with pytest.raises(UserError, match=message):
        export(adapter, "kohya", name="other")
    assert not (tmp_path / "other.safetensors").exists()


# ---- bad input -----------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_with_overwrite(export, adapter, tmp_path):
    (tmp_path / "out.safetensors").write_text("existing")
    with pytest.raises(
        UserError, match=r"--output .*out.safetensors: is already there. Name another file or add --overwrite"
    ):
        export(adapter, "kohya")
    assert (tmp_path / "out.safetensors").read_text() == "existing"
    assert load_file(export(adapter, "kohya", "--overwrite"))


def unknown_layer(path):
    save_file({f"transformer.controlnet_x_embedder.lora_{x}.weight": np.ones((4, 4), np.float32) for x in "AB"}, path)


def no_lora(path):
    save_file({"img_in.weight": np.ones((4, 4), np.float32)}, path)


def truncated(path):
    unknown_layer(path)
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    "make, message",
    [
        (unknown_layer, r"--lora .*in.safetensors: FLUX.1 has no layer transformer.controlnet_x_embedder"),
        (
            no_lora,
            r"--lora .*in.safetensors: holds no lora_A/lora_B or lora_down/lora_up weights, "
            r"but full weights .*img_in.weight",
        ),
        (truncated, r"--lora .*in.safetensors: cannot be read as safetensors"),
        (
            lambda path: path.mkdir(),
            r"--lora .*pytorch_lora_weights.safetensors: no such file. Give a .safetensors file, or the directory",
        ),
        (lambda path: None, r"--lora .*in.safetensors: no such file"),
    ],
)
def test_bad_adapters_are_refused_and_nothing_is_written(export, tmp_path, make, message):
    make(tmp_path / "in.safetensors")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "in.safetensors", "kohya")
    assert [path.name for path in tmp_path.iterdir() if path.name != "in.safetensors"] == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("dog.pt", r"--output dog.pt: does not end with .safetensors. Give a name that does"),
        ("no/where.safetensors", r"the directory no does not exist. Create it"),
    ],
)
def test_bad_outputs_are_refused(script, adapter, name, message):
    with pytest.raises(UserError, match=message):
        script.main(["--lora", str(adapter), "--format", "kohya", "--output", name])
