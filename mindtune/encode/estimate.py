"""Estimates made without loading a model: the tokens of captions, and the size of the encoder cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional


class Encoders(NamedTuple):
    """The sizes and tokenizers of a pipeline's encoders.

    kind: "flux", "sdxl" or "sd".
    channels, factor: latent channels, and pixels per latent along a side.
    widths: of the text states per token, then of the states per caption.
    tokenizers: by the name of the encoder; empty without a pipeline.
    """

    kind: str
    channels: int
    factor: int
    widths: list[int]
    tokenizers: dict


FLUX_DEV = Encoders(kind="flux", channels=16, factor=8, widths=[4096, 768], tokenizers={})


def read_encoders(name: Optional[str], cache_dir: Optional[str]) -> Encoders:
    """The encoders of a pipeline; those of FLUX.1-dev, without tokenizers, if `name` is None."""
    if name is None:
        return FLUX_DEV
    # These import mindone, which the check of images does not need.
    from mindtune.models import configs, pipelines, tokenization

    root = pipelines.resolve_pipeline(name, None, None, cache_dir, {"vae": (), "text_encoder": ()}, weights=False)
    channels, factor = configs.latent_layout(configs.read_config(root, "vae"))
    clip = configs.read_config(root, "text_encoder")
    tokenizer_folders = {"CLIP": "tokenizer"}
    if (root / "transformer").is_dir():
        kind = "flux"
        t5 = configs.read_config(root, "text_encoder_2")
        widths = [t5["d_model"], clip["hidden_size"]]
        tokenizer_folders["T5"] = "tokenizer_2"
    elif (root / "text_encoder_2").is_dir():
        kind = "sdxl"
        second_clip = configs.read_config(root, "text_encoder_2")
        widths = [clip["hidden_size"] + second_clip["hidden_size"], second_clip["projection_dim"]]
        tokenizer_folders["the second CLIP"] = "tokenizer_2"
    else:
        kind = "sd"
        widths = [clip["hidden_size"]]
    return Encoders(
        kind=kind,
        channels=channels,
        factor=factor,
        widths=widths,
        tokenizers={
            encoder: tokenization.load_tokenizer(root / folder)
            for encoder, folder in tokenizer_folders.items()
            if (root / folder).is_dir()
        },
    )


def captions_too_long(captions: Iterable[tuple[str, str]], tokenizers: dict, t5_length: int) -> list[dict]:
    """The captions, given as (name, caption), that have more tokens than an encoder reads."""
    captions = list(captions)
    found = []
    for encoder, tokenizer in tokenizers.items():
        limit = t5_length if encoder == "T5" else tokenizer.model_max_length
        for name, caption in captions:
            tokens = len(tokenizer(caption, verbose=False).input_ids)
            if tokens > limit:
                found.append({"name": name, "encoder": encoder, "tokens": tokens, "limit": limit})
    return found


def cache_bytes(
    encoders: Encoders, captions: int, latents: int, images_per_item: int, t5_length: int
) -> dict[str, int]:
    """The bytes of the encoder cache: text states, and with --cache_latents the VAE's moments.

    `captions` is the number of different captions, `latents` is the number of latent positions of one image of every
    item. All values are float32; moments are mean and variance.
    """
    tokens = t5_length if encoders.kind == "flux" else 77
    text = 4 * captions * (tokens * encoders.widths[0] + sum(encoders.widths[1:]))
    return {"text": text, "latents": 4 * images_per_item * 2 * encoders.channels * latents}
