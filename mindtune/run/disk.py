"""The disk that a run needs: for the encoder cache and for checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

from mindtune.cli import UserError, size_text
from mindtune.data import buckets
from mindtune.data.captions import variants
from mindtune.encode import estimate, windows
from mindtune.files import encoder_cache, free_bytes
from mindtune.models.tokenization import load_tokenizer
from mindtune.run import checkpoint, memory
from mindtune.run.memory import GB


class Settings(NamedTuple):
    """What determines the disk of a run. The fields have the names of the flags."""

    output_dir: str
    cache_dir: Optional[str] = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: Optional[int] = None
    max_train_steps: Optional[int] = None
    num_train_epochs: int = 1
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    max_sequence_length: int = estimate.CLIP_TOKENS
    resolution: Union[int, list[int]] = 512
    aspect_ratio_buckets: Optional[str] = None
    cache_latents: bool = False
    random_flip: bool = False
    streaming: bool = False
    encode_window: Optional[int] = None
    cache_limit_gb: Optional[float] = None
    repeats: int = 1
    dataset_name: Optional[str] = None
    dataset_config: Optional[str] = None
    instance_prompt: Optional[str] = None
    max_train_samples: Optional[int] = None
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_orders: int = 8
    trigger_word: Optional[str] = None


def checkpoint_bytes(settings: Settings, run: memory.Settings, updates: int) -> int:
    """Bytes of the checkpoints that a run of this many updates keeps, and of the one that it is writing."""
    plan = memory.make_plan(run)
    trained = next(part.size for part in plan.parts if part.name in ("LoRA", "DoRA", "LoKr", "controlnet"))
    count = checkpoint.count_more(updates, settings.checkpointing_steps, settings.checkpoints_total_limit)
    return count * (trained + plan.optimizer + plan.host_optimizer + plan.average)


def describe(settings: Settings, run: memory.Settings, find_samples: Callable[[], Iterable]) -> str:
    """The disk by part, and what is free. `find_samples` returns all samples, with their captions; it reads no image.

    The captions of a stream and of a data set on the hub are not read.
    """
    output_dir = Path(settings.output_dir)
    cache_dir = encoder_cache(settings.cache_dir, output_dir)
    free, free_for_cache = free_bytes(output_dir), free_bytes(cache_dir)
    uses, captions = 0, []
    try:
        uses, captions = _captions(settings, find_samples)
        needed, lines = _cache(settings, run, captions, free_for_cache)
    except UserError as error:
        needed, lines = 0, [f"disk for the encoder cache: not computed, the data cannot be read: {error}"]
    crops = buckets.Settings(settings.resolution, settings.aspect_ratio_buckets)
    samples = (
        settings.num_train_epochs * uses * len(buckets.resolutions(crops))
    )  # at most: small images have fewer crops
    per_update = settings.train_batch_size * settings.gradient_accumulation_steps
    updates = settings.max_train_steps or math.ceil(samples / per_update)
    checkpoints = checkpoint_bytes(settings, run, updates)
    lines.append(f"disk for checkpoints: {size_text(checkpoints)} with {updates:,} updates")
    lines.append(f"free in --output_dir: {size_text(free)}")
    if settings.cache_dir:
        lines.append(f"free in --cache_dir: {size_text(free_for_cache)}")
    needed -= sum(path.stat().st_size for path in cache_dir.rglob("*.safetensors"))  # what is there may be needed
    if needed > free_for_cache or checkpoints > free or (not settings.cache_dir and needed + checkpoints > free):
        lines.append("the disk is too small: see --cache_limit_gb, --cache_dir and --checkpoints_total_limit")
    return "\n".join(lines)


def _captions(settings: Settings, find_samples: Callable[[], Iterable]) -> tuple[int, list[list[str]]]:
    """(uses of samples per epoch, the captions of each sample in all forms)"""
    if settings.streaming:
        return 0, []
    if settings.dataset_name and not Path(settings.dataset_name).expanduser().is_dir():
        raise UserError(f"--dataset_name {settings.dataset_name} is no directory, and a plan downloads nothing")
    samples = list(find_samples())[: settings.max_train_samples]
    repeats = [settings.repeats if not settings.dataset_config else sample.setting("repeats", 1) for sample in samples]
    # A pair has no concept.
    used = [(sample.caption or settings.instance_prompt or "", getattr(sample, "concept", None)) for sample in samples]
    return sum(repeats), [variants(caption, concept or settings, seed=0) for caption, concept in used]


def _cache(settings: Settings, run: memory.Settings, captions: list[list[str]], free: int) -> tuple[float, list[str]]:
    """(bytes, lines that describe them) of the encoder cache."""
    if settings.streaming:
        limit = settings.cache_limit_gb or min(windows.CACHE_LIMIT_GB, free // 2 // GB)
        return limit * GB, [f"disk for the encoder cache: up to {limit:g} GB, --cache_limit_gb of a stream"]
    encoders = estimate.encoders_of(run.root)
    sizes = estimate.EntrySizes.of_encoders(encoders, settings.mixed_precision, settings.max_sequence_length)
    forms = list(dict.fromkeys(itertools.chain(*captions)))
    unique = len(forms)
    text = sizes.text * unique
    crops = buckets.Settings(settings.resolution, settings.aspect_ratio_buckets)
    images = (2 if run.encodes_conditions else 1) * (2 if settings.random_flip else 1) * len(captions)
    sides = buckets.resolutions(crops)
    sizes_of_crops = [crops.largest()] if len(sides) == 1 else [(side, side) for side in sides]
    latents = images * sum(map(sizes.image, sizes_of_crops))
    images *= len(sides)
    of_images = f"{size_text(latents)} for {images:,} images" if settings.cache_latents else "no --cache_latents"
    lines = [f"disk for the encoder cache: {size_text(text)} for {unique:,} different captions, {of_images}"]
    if encoders.kind == "flux":
        tokenizer = load_tokenizer(run.root / "tokenizer_2")
        lines += estimate.shorter_captions(forms, tokenizer, settings.max_sequence_length, text)
    needed = text + (latents if settings.cache_latents else 0)
    if settings.cache_limit_gb and needed > settings.cache_limit_gb * GB:
        needed = settings.cache_limit_gb * GB
        lines.append(f"  encoded in windows: at most {settings.cache_limit_gb:g} GB, --cache_limit_gb")
    return needed, lines
