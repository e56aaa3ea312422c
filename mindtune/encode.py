"""The encode stage: text encoders, VAE and class images in a child process of their own.

When the child ends, the encoders' memory is gone on every backend; deleting a Cell that a graph has used does not do that. What they
computed is on disk (`mindtune.cache`), one entry a caption or picture.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn
from tqdm import tqdm

from mindtune import devices
from mindtune.advice import on_long_captions
from mindtune.cache import Cache, encoder_fingerprint, key_of
from mindtune.checkpoint import write_atomically
from mindtune.cli import UserError, run
from mindtune.configs import read_config
from mindtune.data import Sample, pixel_values
from mindtune.models import CLIP_LENGTH, load_model, load_tokenizer, set_up_device
from mindtune.pairs import PairData, require_usable
from mindtune.precision import resolve_precision
from mindtune.rng import normal
from mindtune.sampling import decode_latents, sample_latents
from mindtune.weights import read_json, weight_files

Size = Union[int, tuple[int, int]]  # side of a square, or (height, width), in pixels
MINDONE = version("mindone")  # asked once: it takes 0.5 ms, and every key has it


@dataclass
class ClassImages:
    """An order for class pictures from `prompt` into `folder`: numbers `first` to before `count`, or those of `numbers`."""

    folder: Path
    prompt: str
    first: int
    count: int
    batch: int
    seed: int
    size: tuple[int, int]  # height and width in pixels
    steps: int = 28
    guidance_scale: float = 3.5
    numbers: Optional[range] = None


@dataclass
class Stage:
    """One pipeline's encoders with the settings that shape their output, and the cache they fill.

    `kind` names the pipeline's text encoders in ENCODERS. `vae` and `tokenizer` are folders to use in place of the pipeline's VAE and
    first tokenizer, `vae_precision` the VAE's type if it is not `precision`. With `int8` FLUX's T5 and the transformer that draws class
    pictures have int8 weights.
    """

    root: Path
    variant: Optional[str]
    precision: str
    folder: Path
    max_sequence_length: int
    interpolation: str = "lanczos"
    kind: str = "flux"
    vae: Optional[Path] = None
    tokenizer: Optional[Path] = None
    vae_precision: Optional[str] = None
    int8: bool = False
    fingerprints: dict = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.folder)
        self.vae_variant = self.variant if self.vae is None else None
        self.vae, self.vae_precision = self.vae or self.root / "vae", self.vae_precision or self.precision
        files = weight_files(self.vae.parent, self.vae.name, self.vae_variant)
        self.fingerprints = {"vae": encoder_fingerprint(self.vae, files)}
        for encoder in ENCODERS[self.kind]:
            tokenizer = self.tokenizer_folder(encoder)
            self.fingerprints[encoder] = encoder_fingerprint(self.root / encoder, weight_files(self.root, encoder, self.variant))
            self.fingerprints[encoder] += encoder_fingerprint(tokenizer, list(tokenizer.glob("*.[tm]*")))

    def tokenizer_folder(self, encoder: str) -> Path:
        """The tokenizer whose ids an encoder takes."""
        if encoder == "text_encoder":
            return self.tokenizer or self.root / "tokenizer"
        return self.root / "tokenizer_2"

    def load_vae(self) -> nn.Cell:
        """The VAE in its type."""
        return load_model(self.vae.parent, self.vae.name, resolve_precision(self.vae_precision), self.vae_variant)

    def _made_by(self, precision: str) -> list[str]:
        """What else an encoder's output hangs on: the types, the device, and whose code ran."""
        return [*map(str, resolve_precision(precision)), ms.get_context("device_target"), MINDONE]

    def in_int8(self, encoder: str) -> bool:
        """Whether a text encoder has int8 weights: T5 alone, CLIP is small."""
        return self.int8 and ENCODERS[self.kind][encoder] is _t5_entry

    def text_key(self, encoder: str, caption: str) -> str:
        length = self.max_sequence_length if encoder == "text_encoder_2" else None
        made_by = self._made_by(self.precision) + ["int8"] * self.in_int8(encoder)
        if ENCODERS[self.kind][encoder] is _t5_entry:  # entries of 0.1.0 were made with wrong buckets on the CPU
            made_by.append("exact buckets")
        return key_of(kind=f"{self.kind} {encoder}", caption=caption, length=length, encoder=self.fingerprints[encoder], made_by=made_by)

    def image_key(self, sample: Sample, size: Size, flip: bool) -> str:
        shape = [size, self.interpolation, "centre crop", flip]
        made_by = self._made_by(self.vae_precision)
        return key_of(kind="vae moments", image=sample.digest, shape=shape, encoder=self.fingerprints["vae"], made_by=made_by)

    def text(self, caption: str) -> dict[str, np.ndarray]:
        """prompt_embeds [L, D], those of several encoders side by side, and where there are any pooled_prompt_embeds [P]; float32."""
        entries = [_entry(self.cache, self.text_key(encoder, caption)) for encoder in ENCODERS[self.kind]]
        text = {name: value for entry in entries for name, value in entry.items()}
        text["prompt_embeds"] = np.concatenate([entry["prompt_embeds"] for entry in entries if "prompt_embeds" in entry], axis=-1)
        return text

    def unconditional(self) -> dict[str, np.ndarray]:
        """What classifier-free guidance steers away from: `text("")`, or for SDXL zeros unless its model_index.json says otherwise."""
        index = read_json(self.root, self.root / "model_index.json")
        zeros = self.kind == "sdxl" and index.get("force_zeros_for_empty_prompt", True)
        return {name: value * 0.0 if zeros else value for name, value in self.text("").items()}

    def moments(self, sample: Sample, size: Size, flip: bool) -> np.ndarray:
        """The VAE's mean and log-variance [2C, H, W] of a picture's centre crop to `size`, float32."""
        return _entry(self.cache, self.image_key(sample, size, flip))["moments"]

    def long_captions(self, captions: Iterable[str]) -> list[str]:
        """A sentence if the encoder that reads most of a caption does not read all of the first 20,000 (of FLUX that is T5)."""
        flux = self.kind == "flux"
        limit = self.max_sequence_length if flux else CLIP_LENGTH
        tokenizer = load_tokenizer(self.tokenizer_folder("text_encoder_2" if flux else "text_encoder"))
        # Tokens are made of bytes, and begin and end are two more: only what has more bytes need be counted.
        long = (caption for caption in dict.fromkeys(itertools.islice(captions, 20_000)) if len(caption.encode()) + 2 > limit)
        lengths = (len(tokenizer(caption, verbose=False).input_ids) for caption in long)
        flag = "--max_sequence_length" if flux and limit < 512 else None
        return on_long_captions(lengths, limit, "T5" if flux else "CLIP", flag)

    def prepare(self, captions: Iterable[str], images: Iterable[tuple[Sample, Size, bool]]) -> int:
        """Encodes in a child process what the cache lacks; returns how many captions and pictures that was, of all workers together.

        Both are gone through twice, here and in the child, which gets them pickled: a list, or an object that makes its items anew
        each time and holds none, so that memory does not grow with a data set. Several workers look first and then encode a share
        each; every one returns when all are done. Raises UserError if the child failed.
        """
        missing_texts = {c for c in captions if not all(self.cache.valid(self.text_key(encoder, c)) for encoder in ENCODERS[self.kind])}
        missing_images = {key for job in images if not self.cache.valid(key := self.image_key(*job))}
        devices.gather()  # nobody writes before all have looked: they share out the same list
        texts, keys = devices.mine(sorted(missing_texts)), devices.mine(sorted(missing_images))
        if texts or keys:
            share = None if devices.workers() == 1 else set(keys)
            _in_child((self, captions if share is None and texts else texts, images if keys else (), None, share))
        devices.gather()
        self._require(missing_texts, missing_images)
        _entry.cache_clear()
        return len(missing_texts) + len(missing_images)

    def _require(self, texts: Iterable[str], keys: Iterable[str]) -> None:
        """What the other workers have made is here too; a file system of several machines may take a moment to show it."""
        wanted = [*keys, *(self.text_key(encoder, caption) for caption in texts for encoder in ENCODERS[self.kind])]
        deadline = time.monotonic() + 60
        for path in map(self.cache.path, wanted if devices.workers() > 1 else ()):
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise UserError(f"{path}: another worker made it and it is not here. Give a --cache_dir that all machines share.")
                time.sleep(1)

    def generate(self, order: ClassImages) -> None:
        """Makes this worker's share of class pictures in a child process; returns when all workers are done."""
        devices.gather()  # all have counted the pictures that are there
        if devices.workers() > 1:
            self.prepare([order.prompt], [])  # by one of them; a lone worker's child does both
        numbers = devices.mine(range(order.first, order.count))
        if numbers:
            _in_child((self, [], [], replace(order, numbers=numbers), None))
        devices.gather()


@dataclass
class PairCaptions:
    """Every caption that a ControlNet run uses, made anew at each iteration: of its pairs, the held-out ones, and `more`."""

    data: PairData
    more: list[str]

    def __iter__(self):
        yield from self.more
        for group in (self.data.held_out, self.data.train):
            for pair in group:
                yield pair.caption


@dataclass
class PairImages:
    """Every picture (with `conditions`: and condition) of a ControlNet run with its size and flip, made anew at each iteration."""

    data: PairData
    random_flip: bool
    conditions: bool = True

    def __iter__(self):
        data = self.data
        kept_out = data.held_out, data.held_out_numbers, [False]
        train = data.train, itertools.repeat(0) if data.streaming else data.numbers, [False, True] if self.random_flip else [False]
        for group, numbers, flips in (kept_out, train):
            for pair, number in zip(group, numbers):
                if group is data.train and data.streaming:
                    require_usable(pair, data.buckets)
                for flip in flips:
                    for sample in (pair.image, pair.condition) if self.conditions else (pair.image,):
                        yield sample, data.buckets[number], flip


@lru_cache(maxsize=64)  # of FLUX.1-dev's captions 8 MB each
def _entry(cache: Cache, key: str) -> dict[str, np.ndarray]:
    entry = cache.get(key)
    if entry is None:
        raise UserError(f"{cache.path(key)}: the cache entry has gone while training. Start again; it will be encoded anew.")
    return entry


def _in_child(job: tuple) -> None:
    # The child is no worker, and MindSpore would take it for one. Its device is the worker's, by DEVICE_ID.
    environment = {name: value for name, value in os.environ.items() if name != "MS_ROLE"}
    done = subprocess.run([sys.executable, "-m", "mindtune.encode"], input=pickle.dumps((os.getpid(), *job)), env=environment)
    if done.returncode == 2:
        raise UserError("the encode stage stopped (its message is above)")
    if done.returncode != 0:
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"failed with exit code {done.returncode}"
        raise UserError(
            f"the encode stage {how}. Its message is above; with none, it most often ran out of memory: T5 alone takes 10 GB in half."
        )


# ---- in the child ------------------------------------------------------------------------------------------------------------------


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
        missing = (c for c in captions if not stage.cache.valid(stage.text_key(name, c)))  # asked one by one: captions repeat
        encoder = tokenizer = None
        for caption in tqdm(missing, desc=name, unit="caption", leave=False):
            if encoder is None:
                tokenizer = load_tokenizer(stage.tokenizer_folder(name))
                encoder = load_model(stage.root, name, precision, stage.variant, stage.in_int8(name))
            entry = encode(encoder, tokenizer, caption, stage.max_sequence_length)
            _require_finite(entry, f"the prompt {caption!r}", stage.precision)
            stage.cache.put(stage.text_key(name, caption), entry)


def _clip_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
    return {"pooled_prompt_embeds": clip_pooled(encoder, tokenizer, caption)}


def _t5_entry(encoder, tokenizer, caption: str, length: int) -> dict[str, np.ndarray]:
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
    return {"prompt_embeds": states[-2][0].to(ms.float32).asnumpy(), "pooled_prompt_embeds": pooled[0].to(ms.float32).asnumpy()}


# Kind of pipeline -> its text encoders and what is kept of each.
ENCODERS = {
    "flux": {"text_encoder": _clip_entry, "text_encoder_2": _t5_entry},
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
        noise = np.stack([normal(order.seed, "class image", n, shape=(config["latent_channels"], height, width)) for n in batch])
        embeds, pooled = (np.stack([text[k]] * len(batch)) for k in ("prompt_embeds", "pooled_prompt_embeds"))
        latents = sample_latents(transformer, scheduler, embeds, pooled, noise, order.steps, order.guidance_scale, precision.compute)
        for number, image in zip(batch, decode_latents(vae, latents, precision.compute)):
            name = f"{number:05d}-{hashlib.sha1(image.tobytes()).hexdigest()[:12]}.png"
            write_atomically(order.folder / name, lambda path, image=image: image.save(path, format="PNG"))


if __name__ == "__main__":
    run(main)
