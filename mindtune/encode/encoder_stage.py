"""The encoder stage: before training, a child process encodes captions and images and generates class images.

When the child process ends, the encoders' memory is free on every backend; deleting a Cell that a graph has used does
not free it. The results are on disk (`mindtune.encode.cache`), one entry per caption or image.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from tqdm import tqdm

from mindtune.cli import UserError
from mindtune.data.crops import pixel_values
from mindtune.data.image_sample import Sample
from mindtune.distributed import ranks
from mindtune.encode.cache import Cache, encoder_fingerprint, key_of
from mindtune.encode.estimate import CAPTIONS_TO_MEASURE
from mindtune.encode.jobs import ClassImageRequest, EncodeJob, Image, Size, run_in_child, vae_batch
from mindtune.encode.text_encoders import ENCODERS, long_captions_message, t5_entry
from mindtune.models.loading import load_model
from mindtune.models.precision import NUMPY_DTYPES, resolve_precision
from mindtune.models.tokenization import CLIP_LENGTH, load_tokenizer
from mindtune.models.weights import read_json, weight_files

MINDONE = version("mindone")  # read once: a call takes 0.5 ms, and every cache key contains it
SHARED_FILES_SECONDS = 60  # how long to wait until a shared file system shows the files of another rank
_encoding_again = threading.Lock()  # threads that prepare batches may find the same bad entry


@dataclass
class EncoderStage:
    """The encoders of a pipeline, the settings that determine their outputs, and the cache of these outputs.

    `system` is flux, sd or sdxl, a key of ENCODERS. `vae` and `tokenizer` are folders that replace the pipeline's VAE
    and first tokenizer; `vae_precision` is the VAE's if it differs from `precision`. With `int8`, FLUX's T5 and the
    transformer that generates class images have int8 weights. With `verify`, entries are checked before they are used.
    With `temporary`, new entries may be removed from the cache when they have been used.
    """

    root: Path
    variant: Optional[str]
    precision: str
    cache_dir: Path
    max_sequence_length: int
    interpolation: str = "lanczos"
    system: str = "flux"
    vae: Optional[Path] = None
    tokenizer: Optional[Path] = None
    vae_precision: Optional[str] = None
    int8: bool = False
    verify: bool = False
    temporary: bool = False
    fingerprints: dict = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.cache_dir)
        self.vae_variant = self.variant if self.vae is None else None
        self.vae = self.vae or self.root / "vae"
        self.vae_precision = self.vae_precision or self.precision
        files = weight_files(self.vae.parent, self.vae.name, self.vae_variant)
        self.fingerprints = {"vae": encoder_fingerprint(self.vae, files)}
        for encoder in ENCODERS[self.system]:
            files = weight_files(self.root, encoder, self.variant)
            tokenizer = self.tokenizer_folder(encoder)
            self.fingerprints[encoder] = encoder_fingerprint(self.root / encoder, files)
            self.fingerprints[encoder] += encoder_fingerprint(tokenizer, list(tokenizer.glob("*.[tm]*")))

    def tokenizer_folder(self, encoder: str) -> Path:
        """The folder of a text encoder's tokenizer."""
        if encoder == "text_encoder":
            return self.tokenizer or self.root / "tokenizer"
        return self.root / "tokenizer_2"

    def load_vae(self) -> nn.Cell:
        """The VAE in `vae_precision`."""
        return load_model(self.vae.parent, self.vae.name, resolve_precision(self.vae_precision), self.vae_variant)

    def is_int8(self, encoder: str) -> bool:
        """Whether a text encoder has int8 weights: only T5, because CLIP is small."""
        return self.int8 and ENCODERS[self.system][encoder] is t5_entry

    # ---- cache entries ---------------------------------------------------------------------------

    def _made_by(self, precision: str) -> list[str]:
        """The part of every key for dtypes, device and mindone's version, which also affect an encoder's output."""
        return [*map(str, resolve_precision(precision)), ms.get_context("device_target"), MINDONE]

    def text_key(self, encoder: str, caption: str) -> str:
        """The cache key of a caption's output of one text encoder."""
        made_by = self._made_by(self.precision) + ["int8"] * self.is_int8(encoder)
        if ENCODERS[self.system][encoder] is t5_entry:
            made_by.append("exact buckets")  # version 0.1.0 computed T5's position buckets wrongly on the CPU
        return key_of(
            kind=f"{self.system} {encoder}",
            caption=caption,
            length=self.max_sequence_length if encoder == "text_encoder_2" else None,
            encoder=self.fingerprints[encoder],
            made_by=made_by,
        )

    def text_keys(self, caption: str) -> set[str]:
        """The cache keys of a caption for all text encoders."""
        return {self.text_key(encoder, caption) for encoder in ENCODERS[self.system]}

    def image_key(self, sample: Sample, size: Size, flip: bool, batch: Optional[int] = None) -> str:
        """The cache key of the VAE's output for the centre crop of an image to `size`.

        `batch` is the number of images that are encoded together. Default: `vae_batch`.
        """
        batch = batch or vae_batch(size)
        return key_of(
            kind="vae moments",
            image=sample.digest,
            shape=[size, self.interpolation, "centre crop", flip],
            encoder=self.fingerprints["vae"],
            # The sums of a convolution may be in another order in a batch: in float32 it changed an output by 6e-7.
            made_by=self._made_by(self.vae_precision) + ([f"batch {batch}"] if batch > 1 else []),
        )

    def stored(self, precision: str, entry: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An encoder's output as the cache stores it: in the dtype of `precision`, so float32 only for "no"."""
        dtype = NUMPY_DTYPES[resolve_precision(precision).storage]
        with np.errstate(over="ignore"):  # infinity, which is refused
            return {name: value.astype(dtype) for name, value in entry.items()}

    def _read(self, key: str, precision: str, job: EncodeJob) -> dict[str, np.ndarray]:
        """The tensors of an entry, float32. If it is bad or was deleted, `job` encodes it again."""
        dtype = resolve_precision(precision).storage
        entry = _read_entry(self.cache, key, dtype)
        if entry is None:
            with _encoding_again:
                if self.cache.get(key) is None:  # no other thread has encoded it meanwhile
                    tqdm.write(f"{self.cache.path(key)}: damaged or deleted, so it is encoded again")
                    self.cache.path(key).unlink(missing_ok=True)  # the child encodes what is not there
                    run_in_child(job)
                _read_entry.cache_clear()
                entry = _read_entry(self.cache, key, dtype)
        if entry is None:
            raise UserError(f"{self.cache.path(key)}: was encoded again and cannot be read. Check that disk.")
        return entry

    def text(self, caption: str) -> dict[str, np.ndarray]:
        """The embeddings of a caption, float32: prompt_embeds [L, D], and for some systems pooled_prompt_embeds [P].

        The hidden states of several encoders are concatenated along D.
        """
        job = EncodeJob(self, lambda: [caption])
        entries = [
            self._read(self.text_key(encoder, caption), self.precision, job) for encoder in ENCODERS[self.system]
        ]
        text = {name: value for entry in entries for name, value in entry.items()}
        states = [entry["prompt_embeds"] for entry in entries if "prompt_embeds" in entry]
        text["prompt_embeds"] = np.concatenate(states, axis=-1)
        return text

    def unconditional(self) -> dict[str, np.ndarray]:
        """Embeddings of the empty prompt: `text("")`, but zeros for SDXL unless model_index.json says otherwise."""
        index = read_json(self.root, self.root / "model_index.json")
        zeros = self.system == "sdxl" and index.get("force_zeros_for_empty_prompt", True)
        return {name: value * 0.0 if zeros else value for name, value in self.text("").items()}

    def moments(self, sample: Sample, size: Size, flip: bool) -> np.ndarray:
        """The VAE's mean and log-variance [2C, H, W] for an image's centre crop to `size`, float32."""
        job = EncodeJob(self, images=[(sample, size, flip)])
        return self._read(self.image_key(sample, size, flip), self.vae_precision, job)["moments"]

    def image(
        self, sample: Sample, size: Size, *, crop: Optional[tuple[float, float]], flip: bool, cached: bool
    ) -> np.ndarray:
        """The input of the training step for an image: `moments` if `cached`, otherwise pixels [3, H, W] in [-1, 1]."""
        if cached:
            return self.moments(sample, size, flip)
        return pixel_values(sample.open(), size, self.interpolation, crop, flip)

    def long_captions(self, captions: Iterable[str]) -> list[str]:
        """A message if captions have more tokens than the text encoder reads: T5 for FLUX, CLIP otherwise.

        Only the first CAPTIONS_TO_MEASURE captions count.
        """
        flux = self.system == "flux"
        limit = self.max_sequence_length if flux else CLIP_LENGTH
        tokenizer = load_tokenizer(self.tokenizer_folder("text_encoder_2" if flux else "text_encoder"))
        unique = dict.fromkeys(itertools.islice(captions, CAPTIONS_TO_MEASURE))
        # A token has at least one byte, and two tokens mark begin and end: shorter captions need not be tokenized.
        candidates = (caption for caption in unique if len(caption.encode()) + 2 > limit)
        lengths = (len(tokenizer(caption, verbose=False).input_ids) for caption in candidates)
        flag = "--max_sequence_length" if flux and limit < 512 else None
        return long_captions_message(lengths, limit, "T5" if flux else "CLIP", flag)

    # ---- encoding --------------------------------------------------------------------------------

    def prepare(
        self,
        captions: Iterable[str],
        images: Iterable[Image],
        total: Optional[int] = None,
        keys: Optional[set[str]] = None,
    ) -> int:
        """Encodes captions and images that are not in the cache, in a child process.

        Returns how many captions and images that was, over all ranks. An entry that is in the cache is not read here,
        but checked when it is used. Each iterable is read once, the images before the captions; images are sent to the
        child one after the other, so an iterable that creates them keeps memory constant. `total` is the number of
        images for the progress bar. `keys` receives the keys of all captions and images. Each rank encodes its shard
        and returns when all ranks are done. Raises UserError if the child process fails.
        """
        if self.verify and ranks.is_main_process():
            self.cache.remove_bad()
        self.verify = False  # once
        ranks.all_gather()
        known = self.cache.keys()
        used = set() if keys is None else keys
        missing_keys: list[str] = []
        missing_captions: list[str] = []
        outdated: list[bool] = []

        def missing_images() -> Iterator[Image]:
            """This rank's shard of the missing images."""
            for image in images:
                key = self.image_key(*image)
                if key not in used:
                    used.add(key)
                    if key not in known:
                        outdated.append(self.image_key(*image, batch=1) in known)
                        missing_keys.append(key)
                        if _is_mine(key):
                            yield image

        def caption_shard() -> list[str]:
            for caption in dict.fromkeys(captions):
                of_caption = self.text_keys(caption)
                used.update(of_caption)
                if not of_caption <= known:
                    missing_captions.append(caption)
            first_encoder = next(iter(ENCODERS[self.system]))
            return [caption for caption in missing_captions if _is_mine(self.text_key(first_encoder, caption))]

        shard = missing_images()
        first = list(itertools.islice(shard, 1))
        if first:
            run_in_child(EncodeJob(self, caption_shard, itertools.chain(first, shard), total=total))
        elif own_captions := caption_shard():
            run_in_child(EncodeJob(self, lambda: own_captions))
        if not self.temporary and ranks.is_main_process():
            self.cache.keep(used)
        ranks.all_gather()
        if any(outdated):
            print(f"{sum(outdated)} images were encoded again, in batches: {self.cache_dir} has old entries of theirs")
        self._wait_for_entries(missing_captions, missing_keys)
        _read_entry.cache_clear()
        return len(missing_captions) + len(missing_keys)

    def _wait_for_entries(self, captions: Iterable[str], image_keys: Iterable[str]) -> None:
        """Waits until this rank sees the entries that other ranks wrote: a shared file system may show them late."""
        if ranks.world_size() == 1:
            return
        text_keys = (self.text_key(encoder, caption) for caption in captions for encoder in ENCODERS[self.system])
        deadline = time.monotonic() + SHARED_FILES_SECONDS
        for path in map(self.cache.path, [*image_keys, *text_keys]):
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path}: another rank wrote it, but it is not visible here. Give a --cache_dir that all "
                        "machines share."
                    )
                time.sleep(1)

    def generate(self, request: ClassImageRequest) -> None:
        """Generates this rank's shard of class images in a child process; returns when all ranks are done."""
        ranks.all_gather()  # nobody writes before all ranks have counted the existing images
        if ranks.world_size() > 1:
            self.prepare([request.prompt], [])  # encoded once for all ranks; a single rank's child does it itself
        indices = ranks.shard(range(request.start, request.stop))
        if indices:
            run_in_child(EncodeJob(self, class_images=replace(request, indices=indices)))
        ranks.all_gather()


def _is_mine(key: str) -> bool:
    """Whether this rank encodes an entry. By its key, as ranks may find the cache in different states."""
    return int(key[:8], 16) % ranks.world_size() == ranks.rank()


@lru_cache(maxsize=64)  # a caption takes 8 MB with FLUX.1-dev
def _read_entry(cache: Cache, key: str, dtype: ms.Type) -> Optional[dict[str, np.ndarray]]:
    """The tensors of an entry as float32, rounded to `dtype`: those of older versions are float32. None if bad."""
    entry = cache.get(key)
    return entry and {name: value.astype(NUMPY_DTYPES[dtype]).astype(np.float32) for name, value in entry.items()}
