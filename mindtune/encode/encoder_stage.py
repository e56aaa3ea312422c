"""The encode stage: text encoders, VAE and class images in a child process of their own.

When the child ends, the encoders' memory is gone on every backend; deleting a Cell that a graph has used does not do that. What they
computed is on disk (`mindtune.encode.cache`), one entry a caption or picture.
"""

from __future__ import annotations

import itertools
import os
import pickle
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

from mindtune.cli import UserError
from mindtune.data.image_sample import Sample
from mindtune.distributed import ranks
from mindtune.encode.cache import Cache, encoder_fingerprint, key_of
from mindtune.encode.text_encoders import ENCODERS, t5_entry
from mindtune.models.loading import load_model
from mindtune.models.precision import resolve_precision
from mindtune.models.tokenization import CLIP_LENGTH, load_tokenizer
from mindtune.models.weights import read_json, weight_files

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
            self.fingerprints[encoder] = encoder_fingerprint(
                self.root / encoder, weight_files(self.root, encoder, self.variant)
            )
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
        return self.int8 and ENCODERS[self.kind][encoder] is t5_entry

    def text_key(self, encoder: str, caption: str) -> str:
        length = self.max_sequence_length if encoder == "text_encoder_2" else None
        made_by = self._made_by(self.precision) + ["int8"] * self.in_int8(encoder)
        if ENCODERS[self.kind][encoder] is t5_entry:  # entries of 0.1.0 were made with wrong buckets on the CPU
            made_by.append("exact buckets")
        return key_of(
            kind=f"{self.kind} {encoder}",
            caption=caption,
            length=length,
            encoder=self.fingerprints[encoder],
            made_by=made_by,
        )

    def image_key(self, sample: Sample, size: Size, flip: bool) -> str:
        shape = [size, self.interpolation, "centre crop", flip]
        made_by = self._made_by(self.vae_precision)
        return key_of(
            kind="vae moments", image=sample.digest, shape=shape, encoder=self.fingerprints["vae"], made_by=made_by
        )

    def text(self, caption: str) -> dict[str, np.ndarray]:
        """prompt_embeds [L, D], those of several encoders side by side, and where there are any pooled_prompt_embeds [P]; float32."""
        entries = [_entry(self.cache, self.text_key(encoder, caption)) for encoder in ENCODERS[self.kind]]
        text = {name: value for entry in entries for name, value in entry.items()}
        text["prompt_embeds"] = np.concatenate(
            [entry["prompt_embeds"] for entry in entries if "prompt_embeds" in entry], axis=-1
        )
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
        long = (
            caption
            for caption in dict.fromkeys(itertools.islice(captions, 20_000))
            if len(caption.encode()) + 2 > limit
        )
        lengths = (len(tokenizer(caption, verbose=False).input_ids) for caption in long)
        flag = "--max_sequence_length" if flux and limit < 512 else None
        return on_long_captions(lengths, limit, "T5" if flux else "CLIP", flag)

    def prepare(self, captions: Iterable[str], images: Iterable[tuple[Sample, Size, bool]]) -> int:
        """Encodes in a child process what the cache lacks; returns how many captions and pictures that was, of all workers together.

        Both are gone through twice, here and in the child, which gets them pickled: a list, or an object that makes its items anew
        each time and holds none, so that memory does not grow with a data set. Several workers look first and then encode a share
        each; every one returns when all are done. Raises UserError if the child failed.
        """
        missing_texts = {
            c
            for c in captions
            if not all(self.cache.valid(self.text_key(encoder, c)) for encoder in ENCODERS[self.kind])
        }
        missing_images = {key for job in images if not self.cache.valid(key := self.image_key(*job))}
        ranks.all_gather()  # nobody writes before all have looked: they share out the same list
        texts, keys = ranks.shard(sorted(missing_texts)), ranks.shard(sorted(missing_images))
        if texts or keys:
            share = None if ranks.world_size() == 1 else set(keys)
            _in_child((self, captions if share is None and texts else texts, images if keys else (), None, share))
        ranks.all_gather()
        self._require(missing_texts, missing_images)
        _entry.cache_clear()
        return len(missing_texts) + len(missing_images)

    def _require(self, texts: Iterable[str], keys: Iterable[str]) -> None:
        """What the other workers have made is here too; a file system of several machines may take a moment to show it."""
        wanted = [*keys, *(self.text_key(encoder, caption) for caption in texts for encoder in ENCODERS[self.kind])]
        deadline = time.monotonic() + 60
        for path in map(self.cache.path, wanted if ranks.world_size() > 1 else ()):
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path}: another worker made it and it is not here. Give a --cache_dir that all machines share."
                    )
                time.sleep(1)

    def generate(self, order: ClassImages) -> None:
        """Makes this worker's share of class pictures in a child process; returns when all workers are done."""
        ranks.all_gather()  # all have counted the pictures that are there
        if ranks.world_size() > 1:
            self.prepare([order.prompt], [])  # by one of them; a lone worker's child does both
        numbers = ranks.shard(range(order.first, order.count))
        if numbers:
            _in_child((self, [], [], replace(order, numbers=numbers), None))
        ranks.all_gather()


@lru_cache(maxsize=64)  # of FLUX.1-dev's captions 8 MB each
def _entry(cache: Cache, key: str) -> dict[str, np.ndarray]:
    entry = cache.get(key)
    if entry is None:
        raise UserError(
            f"{cache.path(key)}: the cache entry has gone while training. Start again; it will be encoded anew."
        )
    return entry


def _in_child(job: tuple) -> None:
    # The child is no worker, and MindSpore would take it for one. Its device is the worker's, by DEVICE_ID.
    environment = {name: value for name, value in os.environ.items() if name != "MS_ROLE"}
    done = subprocess.run(
        [sys.executable, "-m", "mindtune.encode.child"], input=pickle.dumps((os.getpid(), *job)), env=environment
    )
    if done.returncode == 2:
        raise UserError("the encode stage stopped (its message is above)")
    if done.returncode != 0:
        how = (
            f"was killed by signal {-done.returncode}"
            if done.returncode < 0
            else f"failed with exit code {done.returncode}"
        )
        raise UserError(
            f"the encode stage {how}. Its message is above; with none, it most often ran out of memory: T5 alone takes 10 GB in half."
        )


def on_long_captions(lengths: Iterable[int], limit: int, reader: str, flag: Optional[str] = None) -> list[str]:
    """A sentence if captions of `lengths` tokens are cut off by a `reader` of at most `limit`, which `flag` raises."""
    if not (cut := [length for length in lengths if length > limit]):
        return []
    what = f"{len(cut)} captions are" if len(cut) > 1 else "1 caption is"
    way = f"Raise {flag}, or shorten them." if flag else "Put what matters first, or shorten them."
    return [
        f"{what} longer than {reader} reads: {limit} tokens, the longest has {max(cut)}. The rest of them is cut off. {way}"
    ]
