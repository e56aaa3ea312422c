"""Flags of low-rank adapters."""

from __future__ import annotations

from mindtune.cli import UserError
from mindtune.flags.parser import Parser, Values
from mindtune.models.layer_patterns import parse_values
from mindtune.models.lora_settings import ALL_LINEAR, DEFAULT_TARGETS, Settings, check_settings


def lora(parser: Parser, system: str = "flux_lora") -> None:
    """The layers that a LoRA adapts, and its size. `system` is a key of `lora_settings.DEFAULT_TARGETS`."""
    add = parser.add
    parser.section("LoRA")
    add("adapter", choices=["lora", "dora", "lokr"], default="lora", help="What is trained: a LoRA, DoRA or LoKr.")
    add("lora_rank", "rank", type=int, default=4, minimum=1, help="Rank of the LoRA matrices.")
    add("lora_alpha", type=float, above=0, help="The LoRA is scaled by alpha / rank. Default: the rank, so by 1.")
    add(
        "lora_dropout",
        type=float,
        default=0.0,
        minimum=0,
        below=1,
        help="Dropout probability of the LoRA layers. Above 0, a resumed run is not exact. 0: no dropout.",
    )
    add("lokr_factor", type=int, default=-1, help="LoKr: a factor of every width. -1: the one nearest its square root.")
    targets = ",".join(DEFAULT_TARGETS[system]) if system != "flux_kontext" else "attention and feed-forward layers"
    add("lora_layers", help=f"Ends of the names of the layers to adapt, or {ALL_LINEAR}. Default: {targets}.")
    add(
        "lora_blocks",
        help="Blocks to adapt, such as transformer_blocks.0-7,single_transformer_blocks.20-. Default: all.",
    )
    add(
        "lora_rank_pattern",
        help="Ranks of some layers, such as attn.to_q=16,transformer_blocks.0-7=8. Default: none.",
    )
    add("learning_rate_pattern", help="Learning rates of some layers, such as attn.to_q=5e-5. Default: none.")
    if system != "flux_lora":
        parser.checks.append(_check)
        return
    add("train_text_encoder", default=False, help="Also train a LoRA of the CLIP text encoder. T5 stays frozen.")
    parser.checks.append(_check)


def _check(args: Values) -> None:
    check_settings(args.select(Settings))
    parse_values(args.learning_rate_pattern, "--learning_rate_pattern", float)
    if args.learning_rate_pattern and args.optimizer == "prodigy":
        raise UserError(
            "--learning_rate_pattern with --optimizer prodigy: it has one step size. Leave one of them out."
        )
