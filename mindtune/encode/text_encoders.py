"""What the cache stores of each text encoder's output for one caption."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn


def _pooled_entry(encoder: nn.Cell, tokenizer: Any, caption: str, length: int) -> dict[str, np.ndarray]:
    """CLIP's pooled output [P]: FLUX's first encoder."""
    return {"pooled_prompt_embeds": clip_pooled(encoder, tokenizer, caption)}


def t5_entry(encoder: nn.Cell, tokenizer: Any, caption: str, length: int) -> dict[str, np.ndarray]:
    """T5's last hidden states [length, D], float32: FLUX's second encoder."""
    states = encoder(ms.Tensor(token_ids(tokenizer, caption, length)[None]))[0][0]
    return {"prompt_embeds": states.to(ms.float32).asnumpy()}


def _last_entry(encoder: nn.Cell, tokenizer: Any, caption: str, length: int) -> dict[str, np.ndarray]:
    """CLIP's last hidden states [77, D], normalised: what Stable Diffusion 1 and 2 were trained with."""
    return {"prompt_embeds": _clip(encoder, tokenizer, caption)[0][0].to(ms.float32).asnumpy()}


def _penultimate_entry(encoder: nn.Cell, tokenizer: Any, caption: str, length: int) -> dict[str, np.ndarray]:
    """CLIP's states before its last layer [77, D], not normalised (Podell et al., arXiv 2307.01952, section 2.1)."""
    states = _clip(encoder, tokenizer, caption, output_hidden_states=True)[2]
    return {"prompt_embeds": states[-2][0].to(ms.float32).asnumpy()}


def _projected_entry(encoder: nn.Cell, tokenizer: Any, caption: str, length: int) -> dict[str, np.ndarray]:
    """CLIP's penultimate hidden states [77, D], and the pooled output [P] after its projection."""
    pooled, _, states = _clip(encoder, tokenizer, caption, output_hidden_states=True)[:3]
    return {
        "prompt_embeds": states[-2][0].to(ms.float32).asnumpy(),
        "pooled_prompt_embeds": pooled[0].to(ms.float32).asnumpy(),
    }


# System -> its text encoders, each with the function that makes a cache entry of a caption.
ENCODERS = {
    "flux": {"text_encoder": _pooled_entry, "text_encoder_2": t5_entry},
    "sd": {"text_encoder": _last_entry},
    "sdxl": {"text_encoder": _penultimate_entry, "text_encoder_2": _projected_entry},
}


def clip_pooled(encoder: nn.Cell, tokenizer: Any, caption: str) -> np.ndarray:
    """CLIP's pooled output [P] for one caption, float32."""
    return _clip(encoder, tokenizer, caption)[1][0].to(ms.float32).asnumpy()


def _clip(encoder: nn.Cell, tokenizer: Any, caption: str, **options: Any) -> tuple:
    """The outputs of a CLIP text encoder for one caption, padded to the length that it was trained with."""
    ids = token_ids(tokenizer, caption, tokenizer.model_max_length)
    return encoder(ms.Tensor(ids[None], ms.int32), **options)


def token_ids(tokenizer: Any, caption: str, length: int) -> np.ndarray:
    """Token ids int64 [length], padded or truncated."""
    ids = tokenizer(caption, padding="max_length", max_length=length, truncation=True).input_ids
    return np.asarray(ids, dtype=np.int64)


def long_captions_message(lengths: Iterable[int], limit: int, encoder: str, flag: Optional[str] = None) -> list[str]:
    """One message if any of `lengths`, in tokens, is above `limit`, else [].

    `flag` is the flag that raises the limit.
    """
    too_long = [length for length in lengths if length > limit]
    if not too_long:
        return []
    count = f"{len(too_long)} captions are" if len(too_long) > 1 else "1 caption is"
    advice = f"Raise {flag}, or shorten them." if flag else "Put what matters first, or shorten them."
    return [
        f"{count} longer than {encoder} reads: {limit} tokens, the longest has {max(too_long)}. The rest is cut off. "
        f"{advice}"
    ]
