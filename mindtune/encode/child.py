"""The child process of the encoder stage: receives an `EncodeJob` on standard input and fills the cache."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Optional

import mindspore as ms
import numpy as np

from mindtune.cli import UserError, progress_bar, run_script
from mindtune.data.crops import pixel_values
from mindtune.data.image_sample import content_digest
from mindtune.data.images import decode, flatten
from mindtune.data.order import prefetch
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.jobs import ClassImageRequest, Image, Size, receive, vae_batch
from mindtune.encode.text_encoders import ENCODERS
from mindtune.files import write_atomically
from mindtune.models.configs import read_config
from mindtune.models.execution import set_up_device
from mindtune.models.loading import load_model
from mindtune.models.precision import resolve_precision
from mindtune.models.sampling import decode_latents, sample_latents
from mindtune.models.tokenization import load_tokenizer
from mindtune.rng import normal

DECODERS = 2  # threads that decode images beside the VAE


def main() -> None:
    try:
        parent, is_main_process, job = receive(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        return  # the parent was stopped before it sent the job
    _end_with_parent(parent)
    set_up_device(graph_mode=False)
    encode_images(job.stage, job.images, job.total, is_main_process)
    encode_captions(job.stage, job.captions(), is_main_process)
    if job.class_images:
        _generate_class_images(job.stage, job.class_images, is_main_process)


def _end_with_parent(parent: int) -> None:
    """Makes this process end when the training process is killed, because nothing would use its results."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        sys.exit(1)


def encode_captions(stage: EncoderStage, captions: list[str], show: bool = True) -> None:
    """Encodes the captions that the cache lacks, with one text encoder after the other, so that only one is in memory.

    Each caption is a batch of its own: its embedding does not depend on other captions. `show`: with a progress bar.
    """
    precision = resolve_precision(stage.precision)
    known = stage.cache.keys()
    for name, encode in ENCODERS[stage.system].items():
        missing = [caption for caption in captions if stage.text_key(name, caption) not in known]
        if not missing:
            continue
        tokenizer = load_tokenizer(stage.tokenizer_folder(name))
        encoder = load_model(stage.root, name, precision, stage.variant, stage.is_int8(name))

        def entries(tokenizer=tokenizer, encoder=encoder, encode=encode, missing=missing):
            for caption in missing:
                yield caption, encode(encoder, tokenizer, caption, stage.max_sequence_length)

        def write(item, name=name):
            caption, entry = item
            _put(stage, stage.text_key(name, caption), entry, stage.precision, f"the prompt {caption!r}")

        with progress_bar(name, "caption", len(missing), show) as bar:
            for _ in prefetch(write, entries(), 1):
                bar.update()


def encode_images(stage: EncoderStage, images: Iterable[Image], total: Optional[int] = None, show: bool = True) -> None:
    """Encodes images with the VAE. They are decoded, and the entries written, in threads beside it.

    `total` is the number of images for the progress bar, which is shown with `show`.
    """
    precision = resolve_precision(stage.vae_precision)
    images = iter(images)
    first = next(images, None)
    if first is None:
        return
    vae = stage.load_vae()

    def load(image: Image) -> tuple[Image, np.ndarray]:
        sample, size, flip = image
        content = sample.read()
        if sample.known_digest not in (None, content_digest(content, sample.background)):
            raise UserError(f"{sample.name}: has changed since it was checked. Start again.")
        opened = flatten(decode(content), sample.background)
        return image, pixel_values(opened, size, stage.interpolation, None, flip)

    def entries() -> Iterator[tuple[Image, dict[str, np.ndarray]]]:
        for batch in _batches(prefetch(load, itertools.chain([first], images), DECODERS)):
            pixels = np.stack([pixels for _, pixels in batch])
            # A batch is always full, so that an image's entry does not depend on how many there are.
            missing = vae_batch(batch[0][0][1]) - len(batch)
            pixels = np.concatenate([pixels, *[pixels[-1:]] * missing])
            moments = vae.encode(ms.Tensor(pixels).to(precision.compute))[0].to(ms.float32).asnumpy()
            for (image, _), entry in zip(batch, moments):
                yield image, {"moments": entry}

    def write(item):
        image, entry = item
        _put(stage, stage.image_key(*image), entry, stage.vae_precision, image[0].name)

    with progress_bar("VAE", "image", total, show) as bar:
        for _ in prefetch(write, entries(), 1):
            bar.update()


def _batches(loaded: Iterable[tuple[Image, np.ndarray]]) -> Iterator[list[tuple[Image, np.ndarray]]]:
    """Images with their pixels in batches of one size, of `vae_batch` images or, for the last of a size, fewer."""
    waiting: dict[Size, list] = {}
    for image, pixels in loaded:
        batch = waiting.setdefault(image[1], [])
        batch.append((image, pixels))
        if len(batch) == vae_batch(image[1]):
            yield waiting.pop(image[1])
    yield from waiting.values()


def _put(stage: EncoderStage, key: str, entry: dict[str, np.ndarray], precision: str, name: str) -> None:
    """Writes an entry in the dtype of `precision`. Raises UserError if a value is not finite."""
    entry = stage.stored(precision, entry)
    if not all(np.isfinite(value).all() for value in entry.values()):
        raise UserError(f"--mixed_precision {precision}: an encoder overflows on {name}. Use bf16 or no.")
    stage.cache.put(key, entry, stage.temporary)


def _generate_class_images(stage: EncoderStage, request: ClassImageRequest, show: bool) -> None:
    """Writes the images of a request as PNG files, named by their index and a hash of their pixels."""
    precision = resolve_precision(stage.precision)
    encode_captions(stage, [request.prompt], show)
    text = stage.text(request.prompt)
    transformer = load_model(stage.root, "transformer", precision, stage.variant, stage.int8)
    vae = load_model(stage.root, "vae", precision, stage.variant)
    config = read_config(stage.root, "vae")
    scheduler = read_config(stage.root, "scheduler")
    height, width = (side // 2 ** (len(config["block_out_channels"]) - 1) for side in request.size)
    shape = (config["latent_channels"], height, width)
    indices = range(request.start, request.stop) if request.indices is None else request.indices
    with progress_bar("class images", "image", len(indices), show) as bar:
        for first in range(0, len(indices), request.batch_size):
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
            bar.update(len(batch))


if __name__ == "__main__":
    run_script(main)
