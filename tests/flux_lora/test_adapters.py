"""Runs with --adapter dora and lokr: going on, inference, export, and what is refused."""

import shlex

import numpy as np
import pytest
from conftest import load_script, run_here
from PIL import Image
from safetensors.numpy import load_file

from mindtune.cli import UserError
from mindtune.data import grids
from mindtune.models import lora_files
from mindtune.models.lora_files import LORA_FILE

MORE = shlex.split("--cache_latents --learning_rate 1e-2 --text_encoder_lr 1e-2 --lora_alpha 6 --upcast_before_saving")
KINDS = ["dora", "lokr"]


@pytest.fixture
def run(finished_lora):
    """run(kind, *flags): a run's output directory."""
    return lambda kind, *more: finished_lora(*MORE, "--adapter", kind, *more)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_starts_where_the_file_ended(run, capsys, kind):
    """At rate 0 the file stays what it was, also with another alpha. Layers and ranks are those of the file."""
    first = run(kind, "--lora_layers", "to_q,ff.net.2,x_embedder")
    before = lora_files.read_adapters(first / LORA_FILE, "")["transformer"]
    still = ["--lora_model_name_or_path", first, "--learning_rate", 0, "--lora_alpha", 3, "--lora_rank", 2]
    again = run(kind, *still)
    assert {"dora": "transformer: DoRA, ", "lokr": "transformer: LoKr, "}[kind] in capsys.readouterr().out
    after = lora_files.read_adapters(again / LORA_FILE, "")["transformer"]
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert sum(np.abs(value).max() > 0 for value in before.values()) == len(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_refused(run, lora_script, flags, tmp_path, kind):
    path = run(kind, "--lora_layers", "to_q,ff.net.2,x_embedder") / LORA_FILE
    with pytest.raises(UserError, match=rf"is a {kind[0].upper()}o.*, but --adapter is lora. Give --adapter {kind}"):
        lora_script.main(flags(tmp_path / "out", "--lora_model_name_or_path", path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_shows_the_adapter_that_was_trained(run, small_flux, encoder_cache, tmp_path, kind):
    """Training's last picture and inference's from the file are the same; --lora_scale 0 is the base."""
    shown = ["--validation_prompt", "a cat", "--num_validation_images", 1, "--num_inference_steps", 2]
    out = run(kind, "--train_text_encoder", "--learning_rate", 5e-2, *shown)
    words = ["--pretrained_model_name_or_path", small_flux, "--cache_dir", encoder_cache, "--prompt", "a cat"]
    words += shlex.split("--height 32 --width 32 --num_inference_steps 2 --max_sequence_length 16 --compare")

    def images(name, *more):
        run_here(load_script("flux_lora/infer_flux_lora.py"), [*words, "--output", tmp_path / f"{name}.png", *more])
        return [Image.open(tmp_path / f"{name}-{number}.png") for number in (1, 2)]

    base, adapted = images("x", "--lora", out)
    assert np.abs(pixels(base) - pixels(adapted)).mean() > 1
    grid = grids.image_grid([[base], [adapted]], ["a cat (base)", "a cat (adapter)"])
    assert np.abs(pixels(grid) - pixels(Image.open(out / "samples" / "final.png"))).max() <= 1
    assert np.abs(pixels(images("y", "--lora", out, "--lora_scale", 0)[1]) - pixels(base)).max() <= 1


def test_export_writes_the_layout_that_holds_the_adapter(run, tmp_path, capsys):
    """lycoris for a LoKr, diffusers for a DoRA; other layouts are refused and nothing is written."""
    script = load_script("flux_lora/export_flux_lora.py")
    for kind, layout, other in (("dora", "diffusers", "kohya"), ("lokr", "lycoris", "diffusers")):
        source = run(kind, "--lora_layers", "to_q,ff.net.2,x_embedder")
        words = ["--lora", source, "--output", tmp_path / f"{kind}.safetensors", "--format"]
        with pytest.raises(UserError, match=f"does not hold. Write it as {layout}"):
            run_here(script, [*words, other])
        assert not (tmp_path / f"{kind}.safetensors").exists()
        run_here(script, [*words, layout])
        assert f"{layout} layout, {kind[0].upper()}o" in capsys.readouterr().out
        before, after = load_file(source / LORA_FILE), load_file(tmp_path / f"{kind}.safetensors")
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
