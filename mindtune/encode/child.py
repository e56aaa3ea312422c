"""The child process of the encoder stage."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import signal
import sys
from collections.abc import Iterable
from typing import Optional

import mindspore as ms
import numpy as np
from tqdm import tqdm

from mindtune.cli import UserError, run
from mindtune.data.crops import pixel_values
from mindtune.data.image_sample import Sample
from mindtune.encode.encoder_stage import ClassImages, Size, Stage
from mindtune.encode.text_encoders import ENCODERS
from mindtune.files import write_atomically
from mindtune.models.configs import read_config
from mindtune.models.execution import set_up_device
from mindtune.models.loading import load_model
from mindtune.models.precision import resolve_precision
from mindtune.models.sampling import decode_latents, sample_latents
from mindtune.models.tokenization import load_tokenizer
from mindtune.rng import normal


def main() -> None:
    try:
        parent, stage, captions, images, order, share = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        return  # the parent was stopped before it had said what to do
    _end_with(parent)
    set_up_device(graph_mode=False)
    _encode_captions(stage, captions)
    _encode_images(stage, images, share)
    if order:
        _generate(stage, order)


def _end_with(parent: int) -> None:
    """Nobody is left to work for when the training process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # gone before that
        sys.exit(1)


def _encode_captions(stage: Stage, captions: Iterable[str]) -> None:
    """One caption at a time, so that an embedding does not depend on its neighbours. CLIP leaves before T5 comes."""
    precision = resolve_precision(stage.precision)
    for name, encode in ENCODERS[stage.kind].items():
        missing = (
            c for c in captions if not stage.cache.valid(stage.text_key(name, c))
        )  # asked one by one: captions repeat
        encoder = tokenizer = None
        for caption in tqdm(missing, desc=name, unit="caption", leave=False):
            if encoder is None:
                tokenizer = load_tokenizer(stage.tokenizer_folder(name))
                encoder = load_model(stage.root, name, precision, stage.variant, stage.in_int8(name))
            entry = encode(encoder, tokenizer, caption, stage.max_sequence_length)
            _require_finite(entry, f"the prompt {caption!r}", stage.precision)
            stage.cache.put(stage.text_key(name, caption), entry)


def _encode_images(stage: Stage, images: Iterable[tuple[Sample, Size, bool]], share: Optional[set[str]] = None) -> None:
    """The pictures that the cache lacks, of those whose keys are in `share` (None: all)."""
    precision, vae = resolve_precision(stage.vae_precision), None
    keyed = ((job, stage.image_key(*job)) for job in images)
    missing = (job for job, key in keyed if (share is None or key in share) and not stage.cache.valid(key))
    for sample, size, flip in tqdm(missing, desc="VAE", unit="image", leave=False):
        if vae is None:
            vae = stage.load_vae()
        pixels = pixel_values(sample.open(), size, stage.interpolation, None, flip)
        moments = vae.encode(ms.Tensor(pixels[None]).to(precision.compute))[0][0]
        entry = {"moments": moments.to(ms.float32).asnumpy()}
        _require_finite(entry, sample.name, stage.vae_precision)
        stage.cache.put(stage.image_key(sample, size, flip), entry)


def _require_finite(entry: dict[str, np.ndarray], what: str, kind: str) -> None:
    if not all(np.isfinite(value).all() for value in entry.values()):
        raise UserError(f"--mixed_precision {kind}: an encoder overflows on {what}. Use bf16 or no.")


def _generate(stage: Stage, order: ClassImages) -> None:
    precision = resolve_precision(stage.precision)
    _encode_captions(stage, [order.prompt])
    text = stage.text(order.prompt)
    transformer = load_model(stage.root, "transformer", precision, stage.variant, stage.int8)
    vae, config = load_model(stage.root, "vae", precision, stage.variant), read_config(stage.root, "vae")
    scheduler = read_config(stage.root, "scheduler")
    height, width = (side // 2 ** (len(config["block_out_channels"]) - 1) for side in order.size)
    numbers = order.numbers or range(order.first, order.count)
    for start in tqdm(range(0, len(numbers), order.batch), desc="class images", unit="batch", leave=False):
        batch = numbers[start : start + order.batch]
        noise = np.stack(
            [normal(order.seed, "class image", n, shape=(config["latent_channels"], height, width)) for n in batch]
        )
        embeds, pooled = (np.stack([text[k]] * len(batch)) for k in ("prompt_embeds", "pooled_prompt_embeds"))
        latents = sample_latents(
            transformer, scheduler, embeds, pooled, noise, order.steps, order.guidance_scale, precision.compute
        )
        for number, image in zip(batch, decode_latents(vae, latents, precision.compute)):
            name = f"{number:05d}-{hashlib.sha1(image.tobytes()).hexdigest()[:12]}.png"
            write_atomically(order.folder / name, lambda path, image=image: image.save(path, format="PNG"))


if __name__ == "__main__":
    run(main)
