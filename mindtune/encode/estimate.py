"""Estimates made without loading a model: the tokens of captions, and the size of the encoder cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mindtune.cli import size_text

CLIP_TOKENS = 77
CAPTIONS_TO_MEASURE = 20_000  # tokenizing all captions of a large data set would take minutes
ITEMSIZE = {"no": 4, "fp32": 4, "fp16": 2, "bf16": 2}


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


def read_encoders(name: Optional[str], cache_dir: Optional[str], hub: str) -> Encoders:
    """The encoders of a pipeline, local or from `hub`; those of FLUX.1-dev, without tokenizers, if `name` is None."""
    if name is None:
        return FLUX_DEV
    # These import mindone, which the check of images does not need.
    from mindtune.models import pipelines, tokenization

    components = {"vae": (), "text_encoder": ()}
    root = pipelines.resolve_pipeline(name, None, None, cache_dir, components, weights=False, hub=hub)
    encoders = encoders_of(root)
    folders = {"CLIP": "tokenizer"}
    if encoders.kind != "sd":
        folders["T5" if encoders.kind == "flux" else "the second CLIP"] = "tokenizer_2"
    return encoders._replace(
        tokenizers={
            encoder: tokenization.load_tokenizer(root / folder)
            for encoder, folder in folders.items()
            if (root / folder).is_dir()
        }
    )


def encoders_of(root: Path) -> Encoders:
    """The encoders of the pipeline in a folder, without tokenizers."""
    from mindtune.models import configs

    channels, factor = configs.latent_layout(configs.read_config(root, "vae"))
    clip = configs.read_config(root, "text_encoder")
    if (root / "transformer").is_dir():
        t5 = configs.read_config(root, "text_encoder_2")
        return Encoders("flux", channels, factor, [t5["d_model"], clip["hidden_size"]], {})
    if (root / "text_encoder_2").is_dir():
        second_clip = configs.read_config(root, "text_encoder_2")
        widths = [clip["hidden_size"] + second_clip["hidden_size"], second_clip["projection_dim"]]
        return Encoders("sdxl", channels, factor, widths, {})
    return Encoders("sd", channels, factor, [clip["hidden_size"]], {})


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


def shorter_captions(captions: Iterable[str], tokenizer: Any, length: int, text_bytes: int) -> list[str]:
    """What a shorter --max_sequence_length would save, if all captions fit in it: a line, or none."""
    unique = list(dict.fromkeys(captions))[:CAPTIONS_TO_MEASURE]
    longest = max((len(ids) for ids in tokenizer(unique).input_ids), default=0) if unique else 0
    enough = -(-longest // 16) * 16
    if not 0 < enough < length:
        return []
    return [
        f"  the longest caption has {longest} tokens: with --max_sequence_length {enough} the text takes "
        f"{size_text(text_bytes * enough / length)} instead of {size_text(text_bytes)}"
    ]


class EntrySizes(NamedTuple):
    """Bytes of the cache entries of a caption, and of an image per latent position."""

    text: int
    latent: int
    factor: int  # pixels per latent along a side

    @classmethod
    def of_encoders(
        cls, encoders: Encoders, precision: str, t5_length: int, vae_precision: Optional[str] = None
    ) -> EntrySizes:
        """For a value of --mixed_precision. An image's entry has mean and log-variance.

        `vae_precision` is that of the VAE. Default: SDXL's computes in float32, as it overflows in half precision.
        """
        vae_precision = vae_precision or ("no" if encoders.kind == "sdxl" else precision)
        tokens = t5_length if encoders.kind == "flux" else CLIP_TOKENS
        text = ITEMSIZE[precision] * (tokens * encoders.widths[0] + sum(encoders.widths[1:]))
        return cls(text, ITEMSIZE[vae_precision] * 2 * encoders.channels, encoders.factor)

    @classmethod
    def of(cls, stage: Any) -> EntrySizes:
        """For an `EncoderStage`."""
        encoders = encoders_of(stage.root)
        return cls.of_encoders(encoders, stage.precision, stage.max_sequence_length, stage.vae_precision)

    def image(self, size: tuple[int, int]) -> int:
        """Bytes of an image of (height, width) pixels."""
        return self.latent * (size[0] // self.factor) * (size[1] // self.factor)
