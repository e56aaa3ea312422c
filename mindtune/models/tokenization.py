"""Loads and checks the tokenizers of CLIP and T5."""

from __future__ import annotations

import os
from pathlib import Path

import transformers

from mindtune.cli import UserError
from mindtune.models.configs import convert_errors, read_config

CLIP_LENGTH = 77  # the number of positions of CLIP's text encoder


def load_tokenizer(folder: Path):
    """CLIPTokenizer for a folder with a vocab.json, T5TokenizerFast for any other.

    Raises UserError for unusable files.
    """
    with convert_errors(folder):
        if (folder / "vocab.json").is_file():
            tokenizer = transformers.CLIPTokenizer.from_pretrained(os.fspath(folder))
            # Without model_max_length in tokenizer_config.json there is no limit, but CLIP's positions have one.
            if not 2 < tokenizer.model_max_length <= CLIP_LENGTH:
                tokenizer.model_max_length = CLIP_LENGTH
            return tokenizer
        # With add_prefix_space, which FLUX.1's config has, transformers rebuilds the tokenizer from spiece.model. A
        # tokenizer.json already contains the result.
        options = {} if (folder / "spiece.model").is_file() else {"add_prefix_space": None}
        tokenizer = transformers.T5TokenizerFast.from_pretrained(os.fspath(folder), **options)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):  # transformers returns False for a bad file
            raise ValueError("spiece.model holds no SentencePiece model")
        return tokenizer


def check_tokenizer(root: Path, name: str) -> None:
    """Raises UserError if a tokenizer lacks a special token or has more tokens than its text encoder knows."""
    tokenizer, text_encoder = load_tokenizer(root / name), name.replace("tokenizer", "text_encoder")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if missing := [key for key, value in special.items() if value is None]:
        raise UserError(f"{root / name}: has no {', '.join(missing)}. Copy or download the folder again.")
    has_encoder = (root / text_encoder).is_dir()
    vocab_size = read_config(root, text_encoder)["vocab_size"] if has_encoder else len(tokenizer)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{root / name}: has {len(tokenizer)} tokens, but vocab_size in {text_encoder}/config.json is "
            f"{vocab_size}. Added tokens need embeddings; give the tokenizer that belongs to the text encoder."
        )
