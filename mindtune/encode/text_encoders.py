"""What each text encoder makes of a caption."""

from __future__ import annotations

import mindspore as ms
import numpy as np


def _clip_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
    return {"pooled_prompt_embeds": clip_pooled(encoder, tokenizer, caption)}


def t5_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
    states = encoder(ms.Tensor(token_ids(tokenizer, caption, length)[None]))[0][0]
    return {"prompt_embeds": states.to(ms.float32).asnumpy()}


def _last_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
    """CLIP's last hidden states [77, D], normalised: what Stable Diffusion 1 and 2 were trained with."""
    return {"prompt_embeds": _clip(encoder, tokenizer, caption)[0][0].to(ms.float32).asnumpy()}


def _penultimate_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
    """CLIP's hidden states before the last layer [77, D], not normalised (Podell et al., arXiv 2307.01952, section 2.1)."""
    states = _clip(encoder, tokenizer, caption, output_hidden_states=True)[2]
    return {"prompt_embeds": states[-2][0].to(ms.float32).asnumpy()}


def _projected_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
    """Penultimate hidden states [77, D], and the pooled output [P] after its projection."""
    pooled, _, states = _clip(encoder, tokenizer, caption, output_hidden_states=True)[:3]
    return {
        "prompt_embeds": states[-2][0].to(ms.float32).asnumpy(),
        "pooled_prompt_embeds": pooled[0].to(ms.float32).asnumpy(),
    }


# Kind of pipeline -> its text encoders and what is kept of each.
ENCODERS = {
    "flux": {"text_encoder": _clip_entry, "text_encoder_2": t5_entry},
    "sd": {"text_encoder": _last_entry},
    "sdxl": {"text_encoder": _penultimate_entry, "text_encoder_2": _projected_entry},
}


def clip_pooled(encoder, tokenizer, caption: str) -> np.ndarray:
    """CLIP's pooled output [P] of one caption, float32."""
    return _clip(encoder, tokenizer, caption)[1][0].to(ms.float32).asnumpy()


def _clip(encoder, tokenizer, caption: str, **options):
    """What a CLIP text encoder gives for one caption, padded to the length it was trained with."""
    ids = token_ids(tokenizer, caption, tokenizer.model_max_length)
    return encoder(ms.Tensor(ids[None], ms.int32), **options)


def token_ids(tokenizer, caption: str, length: int) -> np.ndarray:
    """int64 [length]: padded, truncated."""
    ids = tokenizer(caption, padding="max_length", max_length=length, truncation=True).input_ids
    return np.asarray(ids, dtype=np.int64)
