"""--lora_blocks, --lora_rank_pattern and --learning_rate_pattern: which layers train, of which rank, at which rate."""

import json

import mindspore as ms
import numpy as np
import pytest
from conftest import metrics
from safetensors.numpy import load_file

from mindtune import rng
from mindtune.cli import UserError
from mindtune.models import lora as lora_cells
from mindtune.models import lora_files, precision
from mindtune.models.loading import load_model
from mindtune.models.lora_files import LORA_FILE
from mindtune.models.lora_settings import TRANSFORMER_TARGETS, Settings


@pytest.fixture
def ranks():
    """ranks(folder): the rank of every layer in the adapter of a run."""

    def read(folder):
        tensors = load_file(folder / LORA_FILE)
        return {name[: -len(".lora_A.weight")]: len(value) for name, value in tensors.items() if ".lora_A." in name}

    return read


def test_only_the_layers_of_the_blocks_are_adapted(lora, tiny_flux, tmp_path, ranks):
    """The tiny transformer has two blocks of each kind. CLIP is not one of them, so it is adapted whole."""
    flags = ["--max_train_steps", 1, "--cache_latents", "--train_text_encoder"]
    flags += ["--pretrained_model_name_or_path", tiny_flux]
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
def test_layers_have_their_own_learning_rate(lora, tmp_path, mode):
    """The first update of AdamW moves every element by about its rate; B starts at 0, and A has no gradient yet."""
    flags = ["--max_train_steps", 1, "--cache_latents", "--mindspore_mode", mode, "--adam_weight_decay", 0]
    flags += ["--train_text_encoder", "--text_encoder_lr", 3e-3]
    flags += ["--learning_rate", 1e-3, "--learning_rate_pattern", "attn.to_q=2e-3,layers.0=5e-4", "--max_grad_norm", 0]
    tensors = load_file(lora(tmp_path, *flags) / LORA_FILE)
    for name, value in tensors.items():
        if ".lora_B." in name and np.abs(value).max() > 0:
            rate = 1e-3 if name.startswith("transformer.") else 3e-3
            rate = 2e-3 if ".attn.to_q." in name else 5e-4 if ".layers.0." in name else rate
            assert np.median(np.abs(value)) == pytest.approx(rate, rel=0.02), name


def test_a_lokr_has_one_scale_too(tiny_flux):
    """Where w2 is a product of two matrices; w2 as a whole has none."""
    model = load_model(tiny_flux, "transformer", precision.resolve_precision("no"))
    settings = Settings(adapter="lokr", lora_rank=2, lora_alpha=4, lora_rank_pattern="attn.to_q=1")
    lora_cells.add_adapters({"transformer": model}, settings, {"transformer": TRANSFORMER_TARGETS}, {}, ms.float32, 0)
    scales = {name: float(scale) for name, scale in lora_cells.lokr_scales(model).items()}
    assert len(scales) > 8 and set(scales.values()) == {2.0}


def test_the_logged_rates_are_those_of_the_flags(lora, tmp_path):
    flags = ["--max_train_steps", 1, "--cache_latents", "--train_text_encoder", "--lr_scheduler", "constant"]
    out = lora(tmp_path, *flags, "--learning_rate", 1e-3, "--learning_rate_pattern", "attn=5e-5,layers.0=1e-7")
    (logged,) = [line for line in metrics(out) if "lr" in line]
    assert logged["lr"] == pytest.approx(1e-3) and logged["lr_text_encoder"] == pytest.approx(5e-6)


def test_rates_of_the_layers_of_a_file(lora, tmp_path):
    """The layers are those of the file; a pattern without a layer is refused there, too."""
    flags = ["--max_train_steps", 1, "--cache_latents"]
    first = lora(tmp_path / "first", *flags, "--lora_layers", "to_k")
    more = ["--lora_model_name_or_path", first, "--learning_rate_pattern"]
    with pytest.raises(UserError, match="--learning_rate_pattern attn.to_q: matches no layer"):
        lora(tmp_path / "refused", *flags, *more, "attn.to_q=1e-3")
    lora(tmp_path / "second", *flags, *more, "attn.to_k=1e-3")


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
        (["--learning_rate_pattern", "attn.to_q"], "--learning_rate_pattern attn.to_q: write PATTERN=NUMBER"),
        (["--lora_rank_pattern", "attn=8,attn.to_q=16"], "--lora_rank_pattern attn.to_q: its layers match an earlier"),
        (["--lora_rank_pattern", "attn=8,attn=16"], "--lora_rank_pattern attn=16: the pattern is there twice"),
        (["--dry_run", "--lora_blocks", "nosuch.0-7"], "--lora_blocks nosuch.0-7: matches no layer"),
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
