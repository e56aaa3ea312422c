"""Encodes the data of a run: all of it before training, or a window of updates at a time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

from tqdm import tqdm

from mindtune.cli import UserError, print_lines, size_text
from mindtune.distributed import ranks
from mindtune.encode import estimate
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.jobs import Image
from mindtune.files import free_bytes

GB = 1 << 30
FIRST_WINDOW = 20  # updates
LARGEST_SHARE = 0.05  # of the time that encoding may take before the window is doubled
CACHE_LIMIT_GB = 50  # for windows, but at most half of what is free, if --cache_limit_gb is not given


class Settings(NamedTuple):
    """How the data are encoded. The fields have the names of the flags."""

    streaming: bool = False
    encode_window: Optional[int] = None
    cache_limit_gb: Optional[float] = None
    cache_latents: bool = False
    random_flip: bool = False
    with_prior_preservation: bool = False
    train_batch_size: int = 4
    dataloader_num_workers: int = 1


def encode(
    stage: EncoderStage, data: Any, settings: Settings, batches: tuple[int, int], per_update: int, captions: list[str]
) -> Windows:
    """Encodes what the first update needs; the result encodes the rest. The arguments are those of `Windows`.

    Raises UserError if the child process fails.
    """
    windows = Windows(stage, data, settings, batches, per_update, captions)
    windows.encode_first()
    return windows


class Windows:
    """The encoder outputs of a run's data.

    `batches` are (first, end), the numbers of the batches to train on, of all ranks, and `per_update` is how many of
    them make an update. `captions` are those of validation and of empty prompts, which are encoded in any case, as the
    held-out samples are.

    A set is encoded whole if it fits --cache_limit_gb. A larger one, and every stream, is encoded in windows: before
    the batches of a window are needed, the child process encodes them and ends. Entries that have been used are removed
    when they take more than the limit, the oldest first. A window has --encode_window updates, or at first 20, and
    twice as many as long as encoding takes more than 5 % of the time, up to half of the limit. What an entry contains
    does not depend on the windows, so neither do the results.
    """

    def __init__(
        self,
        stage: EncoderStage,
        data: Any,
        settings: Settings,
        batches: tuple[int, int],
        per_update: int,
        captions: list[str],
    ) -> None:
        self.stage = stage
        self.data = data
        self.settings = settings
        self.first, self.end = batches[0], max(batches)
        self.per_update = per_update
        self.captions = captions
        room = ranks.all_gather(free_bytes(stage.cache_dir) + stage.cache.temporary_bytes())[0]
        self.limit = (
            int(settings.cache_limit_gb * GB) if settings.cache_limit_gb else min(CACHE_LIMIT_GB * GB, room // 2)
        )
        self.sizes = estimate.EntrySizes.of(stage)
        self.image_bytes = self.sizes.image(max(data.sizes, key=math.prod)) if settings.cache_latents else 0
        self.batch_size = settings.train_batch_size * (2 if settings.with_prior_preservation else 1)
        use_bytes = self.sizes.text + data.images_per_sample * self.image_bytes
        self.largest = max(1, self.limit // 2 // (use_bytes * per_update * self.batch_size))
        self.length = min(settings.encode_window or FIRST_WINDOW, self.largest)  # updates
        if settings.encode_window and self.length < settings.encode_window:
            print(
                f"--encode_window {settings.encode_window}: would take more than half of the {self.limit / GB:g} GB of "
                f"--cache_limit_gb, so a window has {self.length} updates"
            )
        # Batches that are prepared in advance need their entries, too.
        self.ahead = (settings.dataloader_num_workers + 3) * ranks.world_size()
        self.encoded = self.first  # the batches before this one are encoded
        self.used: list[tuple[int, set[str]]] = []  # of each window with batches left: its end, and its keys
        self.encode_seconds = 0.0

    @property
    def whole(self) -> bool:
        """Whether all of the data is encoded before training."""
        settings = self.settings
        if settings.streaming or settings.encode_window:
            return False
        return not settings.cache_limit_gb or self._most_bytes() <= self.limit

    def encode_first(self) -> None:
        """Encodes all, or what validation and the first window need."""
        settings, data, stage = self.settings, self.data, self.stage
        self._check_disk()
        if ranks.is_main_process():
            stage.cache.remove_partial()
        if settings.cache_latents:
            print("--cache_latents: every image is center-cropped, and with --random_flip cached twice")
        if not settings.streaming:
            print_lines(stage.long_captions(data.captions()))
        images = data.images(settings.random_flip, held_out=not self.whole) if settings.cache_latents else ()
        captions = itertools.chain(self.captions, data.captions(held_out=not self.whole))
        encoded = stage.prepare(captions, images, total=len(images))
        if self.whole:
            print(f"encoder stage: {encoded} captions and images encoded, all others were in {stage.cache_dir}")
            return
        stage.temporary = True
        self.coming = data.batches(self.first, self.end)
        self._encode_window(self.first)

    def iterate(self, make_batch: Callable[[list], Any]) -> Iterator[Any]:
        """This rank's shard of the batches, prepared in advance by threads; encodes a window when it is needed."""
        batches = self.data.iterate(self.first, self.end, make_batch, self.settings.dataloader_num_workers)
        if self.whole:
            yield from batches
            return
        began = time.monotonic()
        for number in range(self.first, self.end, ranks.world_size()):
            if number + self.ahead > self.encoded and self.encoded < self.end:
                self._adapt(time.monotonic() - began)
                self._encode_window(number)
                began = time.monotonic()
            yield next(batches)

    def _check_disk(self) -> None:
        """Raises UserError if the encoder outputs do not fit on the disk."""
        folder = self.stage.cache_dir
        free = free_bytes(folder)
        if not self.whole:
            if self.limit > free + self.stage.cache.temporary_bytes():
                raise UserError(
                    f"--cache_limit_gb {self.limit / GB:g}: {size_text(free)} are free in {folder}. Give a lower "
                    "limit, or another --cache_dir."
                )
            return
        if self._most_bytes() <= free:  # needs no keys
            return
        needed = self._missing_bytes()
        if needed > free:
            raise UserError(
                f"the encoder cache needs {size_text(needed)}, and {size_text(free)} are free in {folder}. Free some "
                "space, give another --cache_dir, or encode in windows with --cache_limit_gb "
                f"{max(0.1, free / 2 / GB):.1f}."
            )

    def _most_bytes(self) -> int:
        """Bytes of all entries if every sample has a caption of its own, and all images have the largest size."""
        images = len(self.data.images(self.settings.random_flip)) if self.settings.cache_latents else 0
        return images * self.image_bytes + self.data.count * self.data.captions_per_sample * self.sizes.text

    def _missing_bytes(self) -> int:
        """Bytes that encoding all of the data adds to the cache."""
        stage, known = self.stage, self.stage.cache.keys()
        images = self.data.images(self.settings.random_flip) if self.settings.cache_latents else ()
        sizes = {stage.image_key(*image): self.sizes.image(image[1]) for image in images}
        for caption in {*self.captions, *self.data.captions()}:
            if not stage.text_keys(caption) <= known:
                sizes[caption] = self.sizes.text
        return sum(size for key, size in sizes.items() if key not in known)

    def _adapt(self, training_seconds: float) -> None:
        """Doubles the window if the last one took too long to encode, unless --encode_window is given."""
        share = self.encode_seconds / max(1e-9, self.encode_seconds + training_seconds)
        if not self.settings.encode_window and ranks.all_gather(share)[0] > LARGEST_SHARE:
            self.length = min(2 * self.length, self.largest)

    def _encode_window(self, number: int) -> None:
        """Encodes the next window. The batches before `number` have been used."""
        began = time.monotonic()
        start = self.encoded
        # The first window also has the batches that are prepared in advance while its last ones are used.
        count = self.length * self.per_update + (self.ahead if start == self.first else 0)
        self.encoded = min(start + count, self.end)
        # Other ranks may be behind, in the same update.
        self.used = [(end, keys) for end, keys in self.used if end > number - self.per_update]
        if ranks.is_main_process():
            self.stage.cache.evict(self.limit // 2, keep=set().union(*(keys for _, keys in self.used)))
        captions: list[str] = []
        new_keys: set[str] = set()
        total = (self.encoded - start) * self.batch_size * self.data.images_per_sample
        images = self._images(self.encoded - start, captions)
        encoded = self.stage.prepare(captions, images, total=total, keys=new_keys)
        self.used.append((self.encoded, new_keys))
        if ranks.is_main_process():
            self.stage.cache.touch(new_keys)
        self.encode_seconds = time.monotonic() - began
        if encoded and ranks.is_main_process():
            updates = f"updates {start // self.per_update + 1} to {-(-self.encoded // self.per_update)}"
            tqdm.write(f"{updates}: {encoded} captions and images encoded in {self.encode_seconds:.0f} s")

    def _images(self, batches: int, captions: list[str]) -> Iterator[Image]:
        """The images of the coming batches, if they are encoded. Appends the captions to `captions`."""
        settings = self.settings
        for uses in itertools.islice(self.coming, batches):
            for use in uses:
                captions.append(use.caption)
                if settings.cache_latents:
                    yield from self.data.images_of(use, settings.random_flip)
