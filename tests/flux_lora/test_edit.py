"""edit_flux_lora.py: LoRAs that are merged, extracted, resized and described, against products in float64."""

import json
import re
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, load_script, run_here, shard
from PIL import Image
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import loading, lora_files, lora_layouts, pipelines
from mindtune.models.loading import linear_layers
from mindtune.models.precision import DTYPES, NUMPY_DTYPES
from mindtune.models.weights import weight_files

sys.path.insert(0, str(ROOT / "tests" / "mindtune" / "models"))
from lora_cases import weight_changes

DTYPE_NAMES = ("fp32", "fp16", "bf16")
EPSILON = {"fp32": 2**-23, "fp16": 2**-10, "bf16": 2**-7}
CLIP = "text_encoder.text_model.encoder.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def script():
    return load_script("flux_lora/edit_flux_lora.py")


@pytest.fixture
def run(script):
    """run(command, *flags): runs the script; it must end well."""

    def call(*words):
        assert script.main([str(word) for word in words]) == 0

    return call


@pytest.fixture
def make_lora(tiny_flux, tmp_path):
    """make_lora(name, ends, rank, ...): writes a LoRA of the layers whose names end in `ends`; returns its path."""

    def make(name, ends, rank, alpha=None, layout="diffusers", dtype="fp32", seed=0):
        rng, tensors, alphas = np.random.default_rng(seed), {}, {}
        for prefix in ("transformer", "text_encoder"):
            for layer, (inputs, outputs) in linear_layers(tiny_flux, prefix).items():
                if layer.endswith(ends):
                    layer = f"{prefix}.{layer}"
                    tensors[f"{layer}.lora_A.weight"] = 0.2 * rng.standard_normal((rank, inputs)).astype(np.float32)
                    tensors[f"{layer}.lora_B.weight"] = 0.2 * rng.standard_normal((outputs, rank)).astype(np.float32)
                    alphas[layer] = float(alpha or rank)
        path = tmp_path / f"{name}.safetensors"
        lora_files.write_lora(path, tensors, alphas, layout, DTYPES[dtype])
        return path

    return make


@pytest.fixture
def two_loras(make_lora):
    """With CLIP, in diffusers' layout; and in kohya's with alphas, other layers, another rank, and bf16."""
    first = make_lora("first", ("to_q", "proj_out", "v_proj"), rank=4, alpha=6, seed=1)
    second = make_lora("second", ("to_q", "to_k", "norm_out.linear"), 6, alpha=2, layout="kohya", dtype="bf16", seed=2)
    return first, second


def summed(loras, factors):
    """Layer -> the weighted sum of the weight changes of several files, float64."""
    total = {}
    for path, factor in zip(loras, factors):
        for layer, change in weight_changes(path).items():
            total[layer] = total.get(layer, 0) + factor * change
    return total


def ranks(path):
    return lora_layouts.ranks(lora_files.read_lora(path, "--lora")[0])


def component_tensors(root, name, variant=None):
    return {key: value for path in weight_files(root, name, variant) for key, value in load_file(path).items()}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- merge into a LoRA ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", lora_layouts.KINDS["lora"][1])
def test_a_merged_lora_changes_weights_by_the_weighted_sum(run, two_loras, tmp_path, layout):
    out = tmp_path / "out.safetensors"
    run("merge", "--lora", *two_loras, "--weight", 0.7, -1.5, "--layout", layout, "--output", out)
    expected, found = summed(two_loras, (0.7, -1.5)), weight_changes(out)
    assert found.keys() == expected.keys() and CLIP in found and "transformer.norm_out.linear" in found
    for layer, change in expected.items():
        np.testing.assert_allclose(found[layer], change, atol=2e-6 * np.abs(change).max(), err_msg=layer)
    assert ranks(out)["transformer.transformer_blocks.0.attn.to_q"] == 10 and ranks(out)[CLIP] == 4


def test_a_single_lora_is_scaled(run, make_lora, tmp_path):
    first, out = make_lora("first", ("to_q",), rank=4, alpha=6), tmp_path / "out.safetensors"
    run("merge", "--lora", first, "--weight", 0.5, "--output", out)
    for layer, change in weight_changes(first).items():
        np.testing.assert_allclose(weight_changes(out)[layer], 0.5 * change, atol=1e-6)


def test_a_merged_lora_of_lower_rank_is_the_best_of_this_rank(run, two_loras, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run("merge", "--lora", *two_loras, "--rank", 5, "--output", out)
    expected, found = summed(two_loras, (1, 1)), weight_changes(out)
    assert max(ranks(out).values()) == 5
    kept = total = 0
    for layer, change in expected.items():
        squares = np.linalg.svd(change, compute_uv=False) ** 2
        error = np.sum((found[layer] - change) ** 2)
        assert error == pytest.approx(squares[5:].sum(), rel=1e-3, abs=1e-6 * squares.sum()), layer
        kept, total = kept + squares[:5].sum(), total + squares.sum()
    assert re.search(rf"^all +\d+ +4, 5 +{kept / total:.2%}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "dtypes, flags, expected",
    [
        (("bf16", "bf16"), (), "bf16"),
        (("fp16", "fp16"), (), "fp16"),
        (("fp16", "bf16"), (), "fp32"),
        (("fp32", "fp32"), ("--dtype", "bf16"), "bf16"),
    ],
)
def test_the_dtype_is_that_of_the_inputs_or_the_one_that_is_named(run, make_lora, tmp_path, dtypes, flags, expected):
    loras = [make_lora(f"{n}", ("to_q",), rank=4, dtype=dtype, seed=n) for n, dtype in enumerate(dtypes)]
    out = tmp_path / "out.safetensors"
    run("merge", "--lora", *loras, "--output", out, *flags)
    assert {value.dtype for value in load_file(out).values()} == {np.dtype(NUMPY_DTYPES[DTYPES[expected]])}
    for layer, change in summed(loras, (1, 1)).items():
        error = np.abs(weight_changes(out)[layer] - change).max()
        assert error <= 2 * EPSILON[expected] * np.abs(change).max()


# ---- merge into a pipeline -----------------------------------------------------------------------


def cast(root, name, dtype):
    (path,) = weight_files(root, name)
    floating = {key: value for key, value in load_file(path).items() if value.dtype == np.float32}
    converted = {key: value.astype(NUMPY_DTYPES[DTYPES[dtype]]) for key, value in floating.items()}
    save_file({**load_file(path), **converted}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("target", [None, "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_merged_weights_are_w_plus_s_b_a(run, two_loras, pipeline, tmp_path, dtype, target):
    """Computed in float32 and rounded once. All other tensors are those of the base, and so are the shards."""
    for name in ("transformer", "text_encoder"):
        cast(pipeline, name, dtype)
    shard(pipeline / "transformer")
    before = names(pipeline)
    out = tmp_path / "merged"
    flags = ["--dtype", target] if target else []
    run("merge", "--lora", *two_loras, "--weight", 0.7, -1.5, *base(pipeline), "--output", out, *flags)
    changes = summed(two_loras, (0.7, -1.5))
    for name in ("transformer", "text_encoder"):
        found, expected = component_tensors(out, name), component_tensors(pipeline, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            wanted = NUMPY_DTYPES[DTYPES[target or dtype]]
            change = changes.pop(f"{name}.{key[: -len('.weight')]}", None)
            if change is None:
                np.testing.assert_array_equal(found[key], value.astype(wanted))
            else:
                exact = value.astype(np.float64) + change
                ulp = EPSILON[target or dtype] * np.maximum(np.abs(exact), 2**-14) + 1e-6
                assert found[key].dtype == wanted and np.all(np.abs(found[key].astype(np.float64) - exact) <= ulp)
                assert np.abs(change).max() > 0.05
    assert not changes and names(out) == before == names(pipeline)
    index = json.loads((out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    size = sum(value.nbytes for value in component_tensors(out, "transformer").values())
    assert index["metadata"]["total_size"] == size
    for key, file in index["weight_map"].items():
        assert key in load_file(out / "transformer" / file)


def base(root):
    return ["--pretrained_model_name_or_path", root]


def test_the_rest_of_the_pipeline_is_linked_or_copied(run, make_lora, pipeline, tmp_path, capsys):
    """The result is complete. Weights share the disk with the base; small files are copies that may be changed."""
    (pipeline / "LICENSE.md").write_text("terms")
    (pipeline / "flux1-dev.safetensors").write_text("another layout")
    cast(shutil.copytree(pipeline, tmp_path / "half"), "transformer", "fp16")
    half = tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(half, pipeline / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    out = tmp_path / "merged"
    run("merge", "--lora", make_lora("lora", ("to_q",), 4), *base(pipeline), "--output", out)
    printed = capsys.readouterr().out
    assert "flux1-dev.safetensors\n  transformer/diffusion_pytorch_model.fp16.safetensors\n" in printed
    assert f"{out}: a pipeline with merged weights (transformer: 4 layers), dtype unchanged" in printed
    root = pipelines.resolve_pipeline(str(out), None, None, None, pipelines.FLUX_COMPONENTS)
    loading.check_files(root, pipelines.FLUX_COMPONENTS)
    for path in (path for path in out.rglob("*") if path.is_file() and path.parent.name != "transformer"):
        source = pipeline / path.relative_to(out)
        assert path.read_bytes() == source.read_bytes()
        assert path.samefile(source) == (path.suffix == ".safetensors")
    assert (out / "LICENSE.md").exists() and not list(tmp_path.glob(".*"))


def test_a_variant_keeps_its_names(run, make_lora, pipeline, tmp_path):
    cast(pipeline, "transformer", "fp16")
    weights = pipeline / "transformer" / "diffusion_pytorch_model"
    weights.with_suffix(".safetensors").rename(weights.with_suffix(".fp16.safetensors"))
    lora, out = make_lora("lora", ("to_q",), 4), tmp_path / "merged"
    run("merge", "--lora", lora, *base(pipeline), "--variant", "fp16", "--output", out)
    found = component_tensors(out, "transformer", "fp16")
    key = "transformer_blocks.0.attn.to_q"
    exact = component_tensors(pipeline, "transformer", "fp16")[f"{key}.weight"].astype(float)
    exact += weight_changes(lora)[f"transformer.{key}"]
    np.testing.assert_allclose(found[f"{key}.weight"].astype(float), exact, rtol=1e-3, atol=1e-6)


def test_without_links_files_are_copied(run, make_lora, tiny_flux, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", no_links)
    run("merge", "--lora", make_lora("lora", ("to_q",), 4), *base(tiny_flux), "--output", tmp_path / "merged")
    copy = tmp_path / "merged" / "vae" / "diffusion_pytorch_model.safetensors"
    source = tiny_flux / "vae" / copy.name
    assert copy.read_bytes() == source.read_bytes() and not copy.samefile(source)


def test_images_of_the_merged_pipeline_are_those_with_the_lora(run, make_lora, tiny_flux, encoder_cache, tmp_path):
    lora = make_lora("lora", ("to_q", "to_out.0", "proj_out", "v_proj"), rank=4, alpha=6)
    run("merge", "--lora", lora, *base(tiny_flux), "--output", tmp_path / "merged")
    infer, images = load_script("flux_lora/infer_flux_lora.py"), []
    for flags in ([tmp_path / "merged"], [tiny_flux, "--lora", lora], [tiny_flux]):
        words = ["--cache_dir", encoder_cache, "--prompt", "a cat", "--height", 32, "--width", 32]
        words += ["--num_inference_steps", 2, "--max_sequence_length", 16, "--overwrite"]
        run_here(infer, [*base(flags[0]), *flags[1:], *words, "--output", tmp_path / "image.png"])
        images.append(np.asarray(Image.open(tmp_path / "image.png")).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1 < np.abs(images[0] - images[2]).mean()


# ---- extract -------------------------------------------------------------------------------------


def change_tensors(root, name, changes):
    """Adds arrays to tensors of a component's single file."""
    (path,) = weight_files(root, name)
    tensors = load_file(path)
    for key, change in changes.items():
        tensors[key] = (tensors[key].astype(np.float64) + change).astype(tensors[key].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def tuned(pipeline, make_lora):
    """The pipeline with a LoRA of rank 4 in its weights, also in CLIP's; and the LoRA."""
    lora = make_lora("lora", ("to_q", "ff.net.2", "x_embedder", "v_proj"), rank=4, alpha=6)
    for name in ("transformer", "text_encoder"):
        changes = {
            f"{layer.partition('.')[2]}.weight": change
            for layer, change in weight_changes(lora).items()
            if layer.startswith(f"{name}.")
        }
        change_tensors(pipeline, name, changes)
    return pipeline, lora


@pytest.mark.parametrize("sharded", [False, True])
def test_a_low_rank_difference_is_recovered(run, tiny_flux, tuned, tmp_path, sharded, capsys):
    """Only the layers that differ, at the precision of float32 weights."""
    root, lora = tuned
    if sharded:
        shard(root / "transformer")
    out = tmp_path / "out.safetensors"
    run("extract", *base(tiny_flux), "--finetuned", root, "--rank", 4, "--output", out)
    expected, found = weight_changes(lora), weight_changes(out)
    assert found.keys() == expected.keys() and set(ranks(out).values()) == {4}
    for layer, change in expected.items():
        np.testing.assert_allclose(found[layer], change, atol=1e-5 * np.abs(change).max(), err_msg=layer)
    printed = capsys.readouterr().out
    assert f"{len(expected)} linear layers differ" in printed and "cannot hold" not in printed
    assert re.search(r"^transformer.transformer_blocks.\*.ff.net.2 +2 +4 +100.00%$", printed, re.MULTILINE)


def test_the_transformer_alone_is_compared(run, tiny_flux, tuned, tmp_path):
    root, lora = tuned
    out = tmp_path / "out.safetensors"
    run("extract", *base(tiny_flux), "--finetuned", root / "transformer", "--rank", 4, "--output", out)
    assert weight_changes(out).keys() == {layer for layer in weight_changes(lora) if layer.startswith("transformer.")}


def test_what_a_lora_cannot_hold_is_named(run, tiny_flux, tuned, tmp_path, capsys):
    root, lora = tuned
    biases = {f"transformer_blocks.{n}.attn.to_q.bias": 0.1 for n in (0, 1)}
    change_tensors(root, "transformer", {"single_transformer_blocks.0.attn.norm_q.weight": 0.1, **biases})
    change_tensors(root, "text_encoder", {"text_model.embeddings.token_embedding.weight": 0.1})
    out = tmp_path / "out.safetensors"
    run("extract", *base(tiny_flux), "--finetuned", root, "--rank", 4, "--output", out)
    printed = capsys.readouterr().out
    assert "these tensors differ too, and a LoRA cannot hold them:\n" in printed
    for name in (
        "transformer.single_transformer_blocks.*.attn.norm_q.weight",
        "transformer.transformer_blocks.*.attn.to_q.bias (2)",
        "text_encoder.text_model.embeddings.token_embedding.weight",
    ):
        assert f"  {name}\n" in printed
    assert weight_changes(out).keys() == weight_changes(lora).keys()


def test_the_kept_energy_of_a_difference_of_full_rank(run, tiny_flux, pipeline, tmp_path, capsys):
    rng = np.random.default_rng(0)
    keys = [f"transformer_blocks.{n}.attn.to_k.weight" for n in (0, 1)]
    change_tensors(pipeline, "transformer", {key: rng.standard_normal((32, 32)) for key in keys})
    before, after = (component_tensors(root, "transformer") for root in (tiny_flux, pipeline))
    squares = [np.linalg.svd(after[key].astype(float) - before[key], compute_uv=False) ** 2 for key in keys]
    kept = sum(values[:7].sum() for values in squares) / sum(values.sum() for values in squares)
    run("extract", *base(tiny_flux), "--finetuned", pipeline, "--rank", 7, "--output", tmp_path / "out.safetensors")
    assert re.search(rf"to_k +2 +7 +{kept:.2%}$", capsys.readouterr().out, re.MULTILINE)
    for key, values in zip(keys, squares):
        found = weight_changes(tmp_path / "out.safetensors")[f"transformer.{key[: -len('.weight')]}"]
        error = np.sum((found - (after[key].astype(float) - before[key])) ** 2)
        assert error == pytest.approx(values[7:].sum(), rel=1e-4)


def test_rounding_to_the_tuned_models_dtype_is_no_difference(run, tiny_flux, pipeline, tmp_path):
    """The tuned model is stored in bf16, the base in fp32. The LoRA gets the tuned model's dtype."""
    change_tensors(pipeline, "transformer", {"proj_out.weight": 0.5})
    cast(pipeline, "transformer", "bf16")
    out = tmp_path / "out.safetensors"
    run("extract", *base(tiny_flux), "--finetuned", pipeline / "transformer", "--rank", 2, "--output", out)
    assert ranks(out) == {"transformer.proj_out": 2}
    assert {value.dtype for value in load_file(out).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_merging_an_extracted_lora_gives_the_tuned_model(run, tiny_flux, tuned, tmp_path):
    root, _ = tuned
    run("extract", *base(tiny_flux), "--finetuned", root, "--rank", 4, "--output", tmp_path / "out.safetensors")
    run("merge", "--lora", tmp_path / "out.safetensors", *base(tiny_flux), "--output", tmp_path / "merged")
    for name in ("transformer", "text_encoder"):
        found, expected = component_tensors(tmp_path / "merged", name), component_tensors(root, name)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)


# ---- resize --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, most", [(("--rank", 3), 3), (("--energy", 0.8), 5)])
def test_a_resized_lora_loses_the_smallest_singular_values(run, two_loras, tmp_path, flags, most, capsys):
    out = tmp_path / "out.safetensors"
    run("resize", "--lora", two_loras[1], *flags, "--dtype", "fp32", "--output", out)
    expected, found, kept = weight_changes(two_loras[1]), weight_changes(out), []
    assert found.keys() == expected.keys() and max(ranks(out).values()) <= most
    for layer, change in expected.items():
        squares = np.linalg.svd(change, compute_uv=False) ** 2
        rank = ranks(out)[layer]
        error = np.sum((found[layer] - change) ** 2)
        assert error == pytest.approx(squares[rank:].sum(), rel=1e-3, abs=1e-6 * squares.sum()), layer
        if flags[0] == "--energy":
            assert squares[:rank].sum() >= 0.8 * squares.sum() > squares[: rank - 1].sum()
        kept.append((squares[:rank].sum(), squares.sum()))
    share = sum(each[0] for each in kept) / sum(each[1] for each in kept)
    assert re.search(rf"^all .* {share:.2%}$", capsys.readouterr().out, re.MULTILINE)


# ---- info ----------------------------------------------------------------------------------------


def test_info_prints_ranks_alphas_and_norms(run, two_loras, tmp_path, capsys):
    """Norms are those of alpha / rank * B A over all layers of a block."""
    for path, title in zip(two_loras, ("diffusers layout, float32", "kohya layout, bfloat16")):
        run("info", "--lora", path)
        printed = capsys.readouterr().out
        assert printed.startswith(f"{path.name}: {title}, ")
        rows = {
            line.split()[0]: line.split()[1:]
            for line in printed.splitlines()[3:]
            if not line.startswith(("other", " "))
        }
        squares, counts = {}, {}
        for layer, change in weight_changes(path).items():
            block = re.sub(r"^\w+\.(.*?(?:blocks|layers)\.\d+)\..*", r"\1", layer)
            squares[block] = squares.get(block, 0) + np.sum(change**2)
            counts[block] = counts.get(block, 0) + 1
        blocks = [block for block in squares if block[-1].isdigit()]
        assert len(blocks) >= 4
        for block in blocks:
            layers, rank, alpha, norm = rows[block]
            assert int(layers) == counts[block] and float(norm) == pytest.approx(squares[block] ** 0.5, rel=1e-3)
            assert (rank, alpha) == (("4", "4") if path == two_loras[0] else ("6", "2"))
        total = sum(value for block, value in squares.items() if not block.startswith("text"))
        assert re.search(rf"^transformer, all .* {total**0.5:.4g}$", printed, re.MULTILINE)


def test_info_draws_a_png(run, two_loras, tmp_path):
    run("info", "--lora", two_loras[0], "--plot", tmp_path / "plot.png")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
    # The bars of both kinds of blocks, of the layers outside of them, and of CLIP.
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)} <= colours


# ---- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def refused(script, tmp_path):
    """refused(message, *words): the script ends with this UserError and leaves no file behind."""

    def check(message, *words):
        before = names(tmp_path)
        with pytest.raises(UserError, match=message):
            script.main([str(word) for word in words])
        assert names(tmp_path) == before

    return check


@pytest.mark.parametrize(
    "flags, message",
    [
        (["merge", "--lora", "LORA", "--weight", 1, 2], "--weight has 2 and --lora 1: give one factor for each LoRA"),
        (["merge", "--lora", "LORA", "--weight", 0], "--weight 0: must be a number other than 0"),
        (["merge", "--lora", "LORA", "--weight", "nan"], "--weight nan: must be a number other than 0"),
        (["merge", "--lora", "LORA", "--rank", 0], "--rank 0: must be at least 1"),
        (["merge", "--lora", "none.safetensors"], "--lora none.safetensors: no such file"),
        (["merge", "--lora", "LORA", "--weight", "1e6", "--dtype", "fp16"], "--output .*beyond the range of float16"),
        (["resize", "--lora", "LORA"], "resize needs --rank or --energy, and not both"),
        (["resize", "--lora", "LORA", "--rank", 4, "--energy", 0.5], "resize needs --rank or --energy, and not both"),
        (["resize", "--lora", "LORA", "--energy", 0], "--energy 0: must be above 0 and at most 1, such as 0.95"),
        (["resize", "--lora", "LORA", "--energy", 1.5], "--energy 1.5: must be above 0 and at most 1, such as 0.95"),
        (["extract", *base("BASE"), "--finetuned", "BASE", "--rank", 0], "--rank 0: must be at least 1"),
        (["extract", *base("BASE"), "--finetuned", "BASE", "--rank", 4], "no linear layer differs from the base model"),
        (["extract", *base("BASE"), "--finetuned", "none", "--rank", 4], "--finetuned none: no such directory"),
        (["merge", "--lora", "LORA", *base("none")], "--pretrained_model_name_or_path none: no such directory"),
    ],
)
def test_bad_flags(refused, make_lora, tiny_flux, tmp_path, flags, message):
    given = {"LORA": make_lora("lora", ("to_q",), 4), "BASE": tiny_flux}
    output = tmp_path / ("out" if flags[-1] == "none" else "out.safetensors")
    refused(message, *(given.get(flag, flag) for flag in flags), "--output", output)


@pytest.mark.parametrize("flags, name", [(["--rank", 4], "--rank"), (["--layout", "kohya"], "--layout")])
def test_a_pipeline_has_no_rank_and_no_layout(refused, make_lora, tiny_flux, tmp_path, flags, name):
    words = ["merge", "--lora", make_lora("lora", ("to_q",), 4), *base(tiny_flux), "--output", tmp_path / "out"]
    refused(f"{name} is for a LoRA file; a merged pipeline has none", *words, *flags)


def test_an_existing_file_is_replaced_only_with_overwrite(run, refused, make_lora, tmp_path):
    out = make_lora("out", ("to_k",), 2)
    words = ["merge", "--lora", make_lora("lora", ("to_q",), 4), "--output", out]
    refused("--output .*out.safetensors: is already there. Name another file or add --overwrite", *words)
    run(*words, "--overwrite")
    assert set(ranks(out).values()) == {4}
    plot = tmp_path / "plot.png"
    plot.write_text("existing")
    refused("--plot .*plot.png: is already there", "info", "--lora", out, "--plot", plot)
    refused("--plot .*plot.jpg: does not end with .png", "info", "--lora", out, "--plot", tmp_path / "plot.jpg")


def test_an_existing_directory_is_never_replaced(refused, make_lora, tiny_flux, tmp_path):
    (tmp_path / "out").mkdir()
    words = ["merge", "--lora", make_lora("lora", ("to_q",), 4), *base(tiny_flux), "--output", tmp_path / "out"]
    refused("--output .*out: is already there, and a pipeline is never replaced", *words, "--overwrite")
    refused("--output .*: the directory .*no does not exist", *words[:-1], tmp_path / "no" / "where")


def test_loras_for_different_models_are_refused(refused, make_lora, tmp_path):
    first, second = (make_lora(name, ("to_q",), 4) for name in ("first", "second"))
    save_file(
        {key: np.repeat(value, 2, axis=1 if "lora_A" in key else 0) for key, value in load_file(second).items()}, second
    )
    message = r"--lora .*: made for different models: transformer\..* has 32 inputs .*64 .*Give LoRAs of one model"
    refused(message, "merge", "--lora", first, second, "--output", tmp_path / "out.safetensors")


def test_a_base_without_the_layers_is_refused(refused, make_lora, small_flux, tmp_path):
    """The LoRA adapts a second block, the base has one."""
    words = ["merge", "--lora", make_lora("lora", ("to_q",), 4), *base(small_flux), "--output", tmp_path / "out"]
    refused("made for another model; this transformer has no layer .*transformer_blocks.1.attn.to_q", *words)


def test_a_base_of_another_width_is_refused(refused, make_lora, tiny_flux, tmp_path):
    lora = make_lora("lora", ("to_q",), 4)
    save_file(
        {key: np.repeat(value, 2, axis=1 if "lora_A" in key else 0) for key, value in load_file(lora).items()}, lora
    )
    words = ["merge", "--lora", lora, *base(tiny_flux), "--output", tmp_path / "out"]
    refused(r"A and B of .*to_q are \(4, 64\) and \(64, 4\), but the layer .* has 32 inputs and 32 outputs", *words)


def test_another_model_is_no_fine_tuned_version(refused, tiny_flux, small_flux, tmp_path):
    words = [
        "extract",
        *base(tiny_flux),
        "--finetuned",
        small_flux,
        "--rank",
        4,
        "--output",
        tmp_path / "o.safetensors",
    ]
    refused("--finetuned .*: not a fine-tuned version of the base model:\n.*is missing", *words)


def test_weights_that_are_not_finite_are_refused(refused, tiny_flux, pipeline, tmp_path):
    change_tensors(pipeline, "transformer", {"proj_out.weight": np.nan})
    words = ["extract", *base(tiny_flux), "--finetuned", pipeline, "--rank", 4, "--output", tmp_path / "o.safetensors"]
    refused("proj_out.weight holds NaN or infinity", *words)


def test_merged_weights_beyond_the_range_are_refused(refused, make_lora, pipeline, tmp_path):
    cast(pipeline, "transformer", "fp16")
    words = ["merge", "--lora", make_lora("lora", ("to_q",), 4), "--weight", 1e6, *base(pipeline)]
    refused("to_q.weight has values beyond the range of F16 after merging", *words, "--output", tmp_path / "out")


def test_a_full_disk_is_refused_before_anything_is_written(refused, make_lora, tiny_flux, tmp_path, monkeypatch):
    monkeypatch.setattr("mindtune.files.free_bytes", lambda folder: 1000)
    words = ["merge", "--lora", make_lora("lora", ("to_q",), 4), *base(tiny_flux), "--output", tmp_path / "out"]
    refused("--output .*out: needs 0.5 MB, and 0.0 MB are free", *words)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_damaged_files_are_refused(refused, make_lora, pipeline, tiny_flux, tmp_path):
    lora, out = make_lora("lora", ("to_q",), 4), tmp_path / "out.safetensors"
    truncate(weight_files(pipeline, "transformer")[0])
    message = "diffusion_pytorch_model.safetensors has .* bytes, its header says"
    refused(message, "merge", "--lora", lora, *base(pipeline), "--output", tmp_path / "out")
    refused(message, "extract", *base(tiny_flux), "--finetuned", pipeline, "--rank", 4, "--output", out)
    truncate(lora)
    for command in (["merge"], ["resize", "--rank", 2]):
        refused("--lora .*lora.safetensors: cannot be read as safetensors", *command, "--lora", lora, "--output", out)
    refused("--lora .*lora.safetensors: cannot be read as safetensors", "info", "--lora", lora)


def test_norms_of_a_control_lora_are_described_and_not_edited(run, refused, make_lora, tmp_path, capsys):
    """A sum or a lower rank of norms has no meaning, and nothing is lost silently."""
    path, out = make_lora("lora", ("to_q",), 4), tmp_path / "out.safetensors"
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": np.ones(16, np.float32)}
    save_file({**load_file(path), **norm}, path)
    run("info", "--lora", path)
    printed = capsys.readouterr().out
    assert "transformer: 4 layers of rank 4, 1 norms" in printed and "transformer, all" in printed
    for command in (["merge"], ["resize", "--rank", 2]):
        message = (
            r"holds transformer.transformer_blocks.0.attn.norm_q.weight. Only plain LoRA \(A and B\) can be edited"
        )
        refused(message, *command, "--lora", path, "--output", out)


def test_the_adapters_of_a_run_are_found(run, make_lora, tmp_path):
    """--lora takes the directory of a run, as in the other scripts."""
    (tmp_path / "run").mkdir()
    make_lora("lora", ("to_q",), 4).rename(tmp_path / "run" / lora_files.LORA_FILE)
    run("resize", "--lora", tmp_path / "run", "--rank", 2, "--output", tmp_path / "out.safetensors")
    assert set(ranks(tmp_path / "out.safetensors").values()) == {2}
