"""Patterns of layer names."""

import pytest

from mindtune.cli import UserError
from mindtune.models.layer_patterns import check, matches, parse_patterns, parse_values, value_of

NAMES = [
    *(f"transformer_blocks.{n}.attn.{layer}" for n in range(19) for layer in ("to_q", "to_k", "add_q_proj")),
    *(f"transformer_blocks.{n}.ff.net.0.proj" for n in range(19)),
    *(f"single_transformer_blocks.{n}.attn.to_q" for n in range(38)),
    *(f"single_transformer_blocks.{n}.proj_out" for n in range(38)),
    "proj_out",
]


@pytest.mark.parametrize(
    "pattern, count",
    [
        ("transformer_blocks", 19 * 4),  # not those of single_transformer_blocks
        ("transformer_blocks.0-7", 8 * 4),
        ("transformer_blocks.18-", 4),
        ("single_transformer_blocks.20-", 18 * 2),
        ("transformer_blocks.3", 4),
        ("transformer_blocks.*.attn", 19 * 3),
        ("attn.to_q", 19 + 38),
        ("to", 0),
        ("ff.net.0.proj", 19),
        ("proj_out", 39),
        ("proj_out.weight", 0),
        ("transformer_blocks.40-", 0),
        ("0-3.attn", 4 * 4),
    ],
)
def test_which_layers_a_pattern_matches(pattern, count):
    assert sum(matches(pattern, name) for name in NAMES) == count


def test_the_first_pattern_that_matches_counts():
    values = parse_values("attn.to_q=16, transformer_blocks.0-7=8", "--lora_rank_pattern", int)
    assert values == {"attn.to_q": 16, "transformer_blocks.0-7": 8}
    assert value_of("transformer_blocks.0.attn.to_q", values, 4) == 16
    assert value_of("transformer_blocks.0.attn.to_k", values, 4) == 8
    assert value_of("transformer_blocks.8.attn.to_k", values, 4) == 4


@pytest.mark.parametrize("text", ["attn", "attn=", "attn=0", "attn=-1", "attn=x", "=4", "attn=1.5", "attn==4"])
def test_values_that_are_refused(text):
    with pytest.raises(UserError, match=r"--lora_rank_pattern .*: write PATTERN=NUMBER"):
        parse_values(text, "--lora_rank_pattern", int)


@pytest.mark.parametrize("text", ["attn=nan", "attn=inf", "attn=0.0"])
def test_rates_that_are_refused(text):
    with pytest.raises(UserError, match="write PATTERN=NUMBER"):
        parse_values(text, "--learning_rate_pattern", float)


def test_a_pattern_without_a_layer_is_refused():
    check(parse_patterns("attn, single_transformer_blocks.0-"), NAMES, "--lora_blocks")
    with pytest.raises(UserError, match=r"--lora_blocks transformer_block.0-7: .* words: transformer_blocks"):
        check(["attn", "transformer_block.0-7"], NAMES, "--lora_blocks")
    with pytest.raises(UserError, match="single_transformer_blocks.38-"):
        check(["single_transformer_blocks.38-"], NAMES, "--lora_blocks")
