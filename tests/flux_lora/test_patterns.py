"""--lora_blocks, --lora_rank_pattern and --learning_rate_pattern: which layers train, of which rank, at which rate."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindtune import rng
from mindtune.cli import UserError
from mindtune.models import lora_files
from mindtune.models.lora_files import LORA_FILE


@pytest.fixture
def ranks():
    """ranks(folder): the rank of every layer in the adapter of a run."""

    def read(folder):
        tensors = load_file(folder / LORA_FILE)
        return {name[: -len(".lora_A.weight")]: len(value) for name, value in tensors.items() if ".lora_A." in name}

    return read


def test_only_the_layers_of_the_blocks_are_adapted(lora, tmp_path, ranks):
    """The tiny transformer has two blocks of each kind. CLIP is not one of them, so it is adapted whole."""
    flags = ["--max_train_steps", 1, "--cache_latents", "--train_text_encoder"]
    blocks = "transformer_blocks.1-,single_transformer_blocks.0"
    found = ranks(lora(tmp_path, *flags, "--lora_blocks", blocks))
    prefixes = {".".join(name.split(".")[:3]) for name in found if name.startswith("transformer.")}
    assert prefixes == {"transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"}
    assert sum(name.startswith("text_encoder.") for name in found) > 4


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_layers_have_their_own_rank_and_one_scale(lora, tmp_path, ranks, adapter):
    """The header has them too, and a run that starts from the file keeps them."""
    flags = ["--max_train_steps", 1, "--cache_latents", "--adapter", adapter, "--learning_rate", 0]
    pattern = ["--lora_rank", 4, "--lora_rank_pattern", "attn.to_q=2,single_transformer_blocks=6", "--lora_alpha", 8]
    first = lora(tmp_path / "first", *flags, *pattern)
    found = ranks(first)
    for name, rank in found.items():
        assert rank == (2 if name.endswith("to_q") else 6 if "single" in name else 4), name
    _, header = lora_files.read_safetensors(first / LORA_FILE)
    config = json.loads(header["lora_adapter_metadata"])
    assert config["transformer.rank_pattern"]["transformer_blocks.0.attn.to_q"] == 2
    a = load_file(first / LORA_FILE)["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    drawn = rng.normal(0, "lora/transformer_blocks.0.attn.to_q.lora_A.weight", shape=a.shape)
    np.testing.assert_allclose(a, drawn / 2, rtol=1e-6)
    second = lora(tmp_path / "second", *flags, "--lora_model_name_or_path", first)
    assert ranks(second) == found


@pytest.mark.parametrize("mode", [0, 1], ids=["graph", "pynative"])
def test_layers_have_their_own_learning_rate(lora, small_flux, tmp_path, mode):
    """The first update of AdamW moves every element by about its rate; B starts at 0, and A has no gradient yet."""
    flags = ["--max_train_steps", 1, "--cache_latents", "--mindspore_mode", mode, "--adam_weight_decay", 0]
    flags += ["--pretrained_model_name_or_path", small_flux, "--train_text_encoder", "--text_encoder_lr", 3e-3]
    flags += ["--learning_rate", 1e-3, "--learning_rate_pattern", "attn.to_q=2e-3,layers.0=5e-4", "--max_grad_norm", 0]
    tensors = load_file(lora(tmp_path, *flags) / LORA_FILE)
    for name, value in tensors.items():
        if ".lora_B." in name and np.abs(value).max() > 0:
            rate = 1e-3 if name.startswith("transformer.") else 3e-3
            rate = 2e-3 if ".attn.to_q." in name else 5e-4 if ".layers.0." in name else rate
            assert np.median(np.abs(value)) == pytest.approx(rate, rel=0.02), name


def test_scale_lr_scales_all_rates(lora, tmp_path):
    flags = ["--max_train_steps", 1, "--cache_latents", "--learning_rate_pattern", "attn.to_q=2e-3"]
    flags += ["--learning_rate", 1e-3, "--scale_lr", "--train_batch_size", 2, "--adam_weight_decay", 0]
    tensors = load_file(lora(tmp_path, *flags, "--max_grad_norm", 0) / LORA_FILE)
    to_q = np.abs(tensors["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"])
    assert np.median(to_q) == pytest.approx(4e-3, rel=0.02)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lora_blocks", "double_blocks.0-7"], "--lora_blocks double_blocks.0-7: matches no layer"),
        (["--lora_rank_pattern", "attn.to_q"], "--lora_rank_pattern attn.to_q: write PATTERN=NUMBER"),
        (["--lora_rank_pattern", "ff=8"], "--lora_rank_pattern ff: matches no layer that gets an adapter"),
        (
            ["--lora_blocks", "transformer_blocks.0", "--learning_rate_pattern", "transformer_blocks.1=1e-4"],
            "--learning_rate_pattern transformer_blocks.1: matches no layer",
        ),
        (
            ["--learning_rate_pattern", "attn=1e-4", "--optimizer", "prodigy"],
            "--learning_rate_pattern with --optimizer prodigy",
        ),
    ],
)
def test_patterns_that_are_refused(lora, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        lora(tmp_path / "out", *more)
    assert not (tmp_path / "out" / "run.json").exists()
