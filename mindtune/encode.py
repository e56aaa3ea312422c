"""The encode stage: text encoders, VAE and class images in a child process of their own.

When the child ends, the encoders' memory is gone on every backend; deleting a Cell that a graph has used does not do that. What they
computed is on disk (`mindtune.cache`), one entry a caption or picture.
"""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from tqdm import tqdm

from mindtune.cache import Cache, encoder_fingerprint, key_of
from mindtune.checkpoint import write_atomically
from mindtune.cli import UserError, run
from mindtune.data import Sample, pixel_values
from mindtune.models import load_model, load_tokenizer, read_config, set_up_device, weight_files
from mindtune.precision import resolve_precision
from mindtune.rng import normal
from mindtune.sampling import decode_latents, sample_latents
from mindtune.tracking import package_versions


@dataclass
class ClassImages:
    """An order for class pictures: fill `folder` up to `count` files from `prompt`."""

    folder: Path
    prompt: str
    first: int
    count: int
    batch: int
    seed: int
    steps: int = 28
    guidance_scale: float = 3.5


@dataclass
class Stage:
    """One pipeline's encoders with the settings that shape their output, and the cache they fill."""

    root: Path
    variant: Optional[str]
    precision: str
    folder: Path
    max_sequence_length: int
    resolution: int
    interpolation: str
    fingerprints: dict = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.folder)
        self.fingerprints = {
            name: encoder_fingerprint(self.root / name, weight_files(self.root, name, self.variant))
            for name in ("text_encoder", "text_encoder_2", "vae")
        }
        for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            self.fingerprints[encoder] += encoder_fingerprint(self.root / tokenizer, list((self.root / tokenizer).glob("*.[tm]*")))
        # What else an encoder's output hangs on: the types, the device, and whose code ran.
        self.made_by = [*map(str, resolve_precision(self.precision)), ms.get_context("device_target"), package_versions()["mindone"]]

    def text_key(self, caption: str) -> str:
        encoders = [self.fingerprints["text_encoder"], self.fingerprints["text_encoder_2"]]
        return key_of(kind="flux text", caption=caption, length=self.max_sequence_length, encoders=encoders, made_by=self.made_by)

    def image_key(self, sample: Sample, flip: bool) -> str:
        shape = [self.resolution, self.interpolation, "centre crop", flip]
        return key_of(kind="vae moments", image=sample.digest, shape=shape, encoder=self.fingerprints["vae"], made_by=self.made_by)

    def text(self, caption: str) -> dict[str, np.ndarray]:
        """prompt_embeds [L, D] and pooled_prompt_embeds [P] of a caption, float32."""
        return _entry(self.cache, self.text_key(caption))

    def moments(self, sample: Sample, flip: bool) -> np.ndarray:
        """The VAE's mean and log-variance [2C, H, W] of a picture's centre crop, float32."""
        return _entry(self.cache, self.image_key(sample, flip))["moments"]

    def prepare(self, captions: list[str], images: list[tuple[Sample, bool]]) -> int:
        """Encodes in a child process what the cache lacks. Returns how many entries were made; raises UserError if the child failed."""
        captions = [c for c in dict.fromkeys(captions) if not self.cache.valid(self.text_key(c))]
        images = [(s, f) for s, f in images if not self.cache.valid(self.image_key(s, f))]
        if captions or images:
            _in_child((self, captions, images, None))
        _entry.cache_clear()
        return len(captions) + len(images)

    def generate(self, order: ClassImages) -> None:
        """Makes class pictures in a child process."""
        _in_child((self, [], [], order))


@lru_cache(maxsize=64)  # of FLUX.1-dev's captions 8 MB each
def _entry(cache: Cache, key: str) -> dict[str, np.ndarray]:
    entry = cache.get(key)
    if entry is None:
        raise UserError(f"{cache.path(key)}: the cache entry has gone while training. Start again; it will be encoded anew.")
    return entry


def _in_child(job: tuple) -> None:
    done = subprocess.run([sys.executable, "-m", "mindtune.encode"], input=pickle.dumps(job))
    if done.returncode == 2:
        raise UserError("the encode stage stopped (its message is above)")
    if done.returncode != 0:
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"failed with exit code {done.returncode}"
        raise UserError(
            f"the encode stage {how}. Its message is above; with none, it most often ran out of memory: T5 alone takes 10 GB in half."
        )


# ---- in the child ------------------------------------------------------------------------------------------------------------------


def main() -> None:
    stage, captions, images, order = pickle.load(sys.stdin.buffer)
    set_up_device(graph_mode=False)
    if captions:
        _encode_captions(stage, captions, store=True)
    if images:
        _encode_images(stage, images)
    if order:
        _generate(stage, order)


def _encode_captions(stage: Stage, captions: list[str], store: bool) -> list[dict[str, np.ndarray]]:
    """One caption at a time, so that an embedding does not depend on its neighbours. CLIP leaves before T5 comes."""
    precision = resolve_precision(stage.precision)
    tokenizer, encoder = load_tokenizer(stage.root, "tokenizer"), load_model(stage.root, "text_encoder", precision, stage.variant)
    pooled = [clip_pooled(encoder, tokenizer, caption) for caption in tqdm(captions, desc="CLIP", unit="caption", leave=False)]
    del encoder
    tokenizer = load_tokenizer(stage.root, "tokenizer_2")
    encoder = load_model(stage.root, "text_encoder_2", precision, stage.variant)
    entries = []
    for caption, vector in tqdm(list(zip(captions, pooled)), desc="T5", unit="caption", leave=False):
        states = encoder(ms.Tensor(token_ids(tokenizer, caption, stage.max_sequence_length)[None]))[0][0]
        entry = {"prompt_embeds": states.to(ms.float32).asnumpy(), "pooled_prompt_embeds": vector}
        _require_finite(entry, f"the prompt {caption!r}", stage.precision)
        if store:
            stage.cache.put(stage.text_key(caption), entry)
        entries.append(entry)
    return entries


def clip_pooled(encoder, tokenizer, caption: str) -> np.ndarray:
    """CLIP's pooled output [P] of one caption, float32."""
    ids = token_ids(tokenizer, caption, tokenizer.model_max_length)
    return encoder(ms.Tensor(ids[None], ms.int32))[1][0].to(ms.float32).asnumpy()


def token_ids(tokenizer, caption: str, length: int) -> np.ndarray:
    """int64 [length]: padded, truncated."""
    ids = tokenizer(caption, padding="max_length", max_length=length, truncation=True).input_ids
    return np.asarray(ids, dtype=np.int64)


def _encode_images(stage: Stage, images: list[tuple[Sample, bool]]) -> None:
    precision = resolve_precision(stage.precision)
    vae = load_model(stage.root, "vae", precision, stage.variant)
    for sample, flip in tqdm(images, desc="VAE", unit="image", leave=False):
        pixels = pixel_values(sample.open(), stage.resolution, stage.interpolation, None, flip)
        moments = vae.encode(ms.Tensor(pixels[None]).to(precision.compute))[0][0]
        entry = {"moments": moments.to(ms.float32).asnumpy()}
        _require_finite(entry, sample.name, stage.precision)
        stage.cache.put(stage.image_key(sample, flip), entry)


def _require_finite(entry: dict[str, np.ndarray], what: str, kind: str) -> None:
    if not all(np.isfinite(value).all() for value in entry.values()):
        raise UserError(f"--mixed_precision {kind}: an encoder overflows on {what}. Use bf16 or no.")


def _generate(stage: Stage, order: ClassImages) -> None:
    precision = resolve_precision(stage.precision)
    text = _encode_captions(stage, [order.prompt], store=False)[0]
    transformer = load_model(stage.root, "transformer", precision, stage.variant)
    vae, config = load_model(stage.root, "vae", precision, stage.variant), read_config(stage.root, "vae")
    scheduler = read_config(stage.root, "scheduler")
    side = stage.resolution // 2 ** (len(config["block_out_channels"]) - 1)
    numbers = list(range(order.first, order.count))
    for start in tqdm(range(0, len(numbers), order.batch), desc="class images", unit="batch", leave=False):
        batch = numbers[start : start + order.batch]
        noise = np.stack([normal(order.seed, "class image", n, shape=(config["latent_channels"], side, side)) for n in batch])
        embeds, pooled = (np.stack([text[k]] * len(batch)) for k in ("prompt_embeds", "pooled_prompt_embeds"))
        latents = sample_latents(transformer, scheduler, embeds, pooled, noise, order.steps, order.guidance_scale, precision.compute)
        for number, image in zip(batch, decode_latents(vae, latents, precision.compute)):
            name = f"{number:05d}-{hashlib.sha1(image.tobytes()).hexdigest()[:12]}.png"
            write_atomically(order.folder / name, lambda path, image=image: image.save(path, format="PNG"))


if __name__ == "__main__":
    run(main)
