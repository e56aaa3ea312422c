"""The child process of the encoder stage: reads an `EncodeJob` from standard input and fills the cache."""

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

from mindtune.cli import UserError, run_script
from mindtune.data.crops import pixel_values
from mindtune.data.image_sample import Sample
from mindtune.encode.encoder_stage import ClassImageRequest, EncodeJob, EncoderStage, Size
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
        parent, *fields = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        return  # the parent was stopped before it sent the job
    job = EncodeJob(*fields)
    _end_with_parent(parent)
    set_up_device(graph_mode=False)
    encode_captions(job.stage, job.captions)
    encode_images(job.stage, job.images, job.image_keys)
    if job.class_images:
        _generate_class_images(job.stage, job.class_images)


def _end_with_parent(parent: int) -> None:
    """Makes this process end when the training process is killed, because nothing would use its results."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        sys.exit(1)


def encode_captions(stage: EncoderStage, captions: Iterable[str]) -> None:
    """Encodes the captions that the cache lacks, with one text encoder after the other, so that only one is in memory.

    Each caption is a batch of its own: its embedding does not depend on other captions.
    """
    precision = resolve_precision(stage.precision)
    for name, encode in ENCODERS[stage.system].items():
        # Lazily, so that a caption that repeats is found in the cache the second time.
        missing = (caption for caption in captions if not stage.cache.valid(stage.text_key(name, caption)))
        encoder = tokenizer = None
        for caption in tqdm(missing, desc=name, unit="caption", leave=False):
            if encoder is None:
                tokenizer = load_tokenizer(stage.tokenizer_folder(name))
                encoder = load_model(stage.root, name, precision, stage.variant, stage.is_int8(name))
            entry = encode(encoder, tokenizer, caption, stage.max_sequence_length)
            _check_finite(entry, f"the prompt {caption!r}", stage.precision)
            stage.cache.put(stage.text_key(name, caption), entry)


def encode_images(
    stage: EncoderStage, images: Iterable[tuple[Sample, Size, bool]], image_keys: Optional[set[str]] = None
) -> None:
    """Encodes the images that the cache lacks with the VAE.

    With `image_keys`, only those with one of these cache keys.
    """
    precision = resolve_precision(stage.vae_precision)
    vae = None
    keyed = ((image, stage.image_key(*image)) for image in images)
    missing = (
        image for image, key in keyed if (image_keys is None or key in image_keys) and not stage.cache.valid(key)
    )
    for sample, size, flip in tqdm(missing, desc="VAE", unit="image", leave=False):
        if vae is None:
            vae = stage.load_vae()
        pixels = pixel_values(sample.open(), size, stage.interpolation, None, flip)
        moments = vae.encode(ms.Tensor(pixels[None]).to(precision.compute))[0][0]
        entry = {"moments": moments.to(ms.float32).asnumpy()}
        _check_finite(entry, sample.name, stage.vae_precision)
        stage.cache.put(stage.image_key(sample, size, flip), entry)


def _check_finite(entry: dict[str, np.ndarray], name: str, precision: str) -> None:
    if not all(np.isfinite(value).all() for value in entry.values()):
        raise UserError(f"--mixed_precision {precision}: an encoder overflows on {name}. Use bf16 or no.")


def _generate_class_images(stage: EncoderStage, request: ClassImageRequest) -> None:
    """Writes the images of a request as PNG files, named by their index and a hash of their pixels."""
    precision = resolve_precision(stage.precision)
    encode_captions(stage, [request.prompt])
    text = stage.text(request.prompt)
    transformer = load_model(stage.root, "transformer", precision, stage.variant, stage.int8)
    vae = load_model(stage.root, "vae", precision, stage.variant)
    config = read_config(stage.root, "vae")
    scheduler = read_config(stage.root, "scheduler")
    height, width = (side // 2 ** (len(config["block_out_channels"]) - 1) for side in request.size)
    shape = (config["latent_channels"], height, width)
    indices = range(request.start, request.stop) if request.indices is None else request.indices
    for first in tqdm(range(0, len(indices), request.batch_size), desc="class images", unit="batch", leave=False):
        batch = indices[first : first + request.batch_size]
        noise = np.stack([normal(request.seed, "class image", index, shape=shape) for index in batch])
        embeds = np.stack([text["prompt_embeds"]] * len(batch))
        pooled = np.stack([text["pooled_prompt_embeds"]] * len(batch))
        latents = sample_latents(
            transformer, scheduler, embeds, pooled, noise, request.steps, request.guidance_scale, precision.compute
        )
        for index, image in zip(batch, decode_latents(vae, latents, precision.compute)):
            name = f"{index:05d}-{hashlib.sha1(image.tobytes()).hexdigest()[:12]}.png"
            write_atomically(request.folder / name, lambda path, image=image: image.save(path, format="PNG"))


if __name__ == "__main__":
    run_script(main)
