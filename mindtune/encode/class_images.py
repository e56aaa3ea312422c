"""Class images of prior preservation: loading them, and generating those that are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np

from mindtune.cli import UserError, printable
from mindtune.data import buckets, checks, folders
from mindtune.data.image_data import ClassImages
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import Sample
from mindtune.encode.encoder_stage import ClassImageRequest, EncoderStage


class Settings(NamedTuple):
    """How class images are loaded and generated. The fields have the names of the flags."""

    class_data_dir: str
    class_prompt: str
    num_class_images: int = 100
    skip_bad_images: bool = False
    dataloader_num_workers: int = 1
    sample_batch_size: int = 4
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    prior_generation_precision: Optional[str] = None


def class_quota(num_class_images: int, bucket_ids: np.ndarray) -> dict[int, int]:
    """The number of class images per bucket, in proportion to the instance images, in the buckets `bucket_ids` [N]."""
    found, counts = np.unique(bucket_ids, return_counts=True)
    return {int(b): max(1, round(num_class_images * n / len(bucket_ids))) for b, n in zip(found, counts)}


def load_or_generate(
    settings: Settings,
    stage: EncoderStage,
    seed: int,
    sizes: list[tuple[int, int]],
    bucket_ids: np.ndarray,
    facts: ImageFacts,
) -> ClassImages:
    """The class images for instance images in the buckets `bucket_ids` [N]. Missing ones are generated first.

    Raises UserError for files that cannot be used.
    """
    quota = class_quota(settings.num_class_images, bucket_ids)
    images = load(settings, sizes, quota, facts)
    if len(images.samples) < sum(quota.values()):
        used = settings.prior_generation_precision or stage.precision
        stage = replace(stage, precision=used, vae=None, vae_precision=None, verify=False)
        generate(settings, stage, seed, sizes, quota, images.bucket_ids)
        images = load(settings, sizes, quota, facts, say=lambda message: None)  # the first call printed its messages
    return images


def of_samples(
    settings: Settings,
    stage: EncoderStage,
    seed: int,
    sizes: list[tuple[int, int]],
    samples: list[Sample],
    bucket_ids: np.ndarray,
    facts: ImageFacts,
) -> ClassImages:
    """The class images for all instance images, in the buckets `bucket_ids` [N]: those of each concept that has some.

    Raises UserError for files that cannot be used, and if no concept has class images.
    """
    with_class = np.array([sample.setting("class_data_dir", settings.class_data_dir) is not None for sample in samples])
    if not with_class.any():
        raise UserError("--with_prior_preservation: no concept has a class_data_dir. Give one, or leave the flag out.")
    if without := set(bucket_ids.tolist()) - set(bucket_ids[with_class].tolist()):
        height, width = sizes[min(without)]
        raise UserError(
            f"--with_prior_preservation: no concept with a class_data_dir has images in the bucket {height},{width}. "
            "Give one that has them a class_data_dir."
        )
    images = ClassImages([], np.array([], int))
    for concept in dict.fromkeys(sample.concept for sample in samples):
        own = np.array([sample.concept == concept for sample in samples])
        if concept is not None:
            fields = ("class_data_dir", "class_prompt", "num_class_images")
            settings = settings._replace(**{name: getattr(concept, name) for name in fields})
        if not settings.class_data_dir:
            continue
        found = load_or_generate(settings, stage, seed, sizes, bucket_ids[own], facts)
        for sample in found.samples:
            sample.concept = concept
        images = ClassImages(images.samples + found.samples, np.concatenate([images.bucket_ids, found.bucket_ids]))
    return images


def load(
    settings: Settings,
    sizes: list[tuple[int, int]],
    quota: dict[int, int],
    facts: ImageFacts,
    say: Callable[[str], None] = print,
) -> ClassImages:
    """The usable images in --class_data_dir, at most `quota[bucket]` of a bucket. There may be none yet."""
    folder, flag = settings.class_data_dir, "--class_data_dir"
    if folders.holds_no_image(Path(folder), flag):
        return ClassImages([], np.array([], int))
    samples = folders.samples_in_folder(folder, flag, say=say)
    for sample in samples:
        sample.caption = sample.caption or settings.class_prompt
        sample.mask = None
    used_sizes = [sizes[bucket] for bucket in quota]
    samples = checks.preflight(
        samples,
        buckets.covering(used_sizes),
        f"{flag} {printable(folder)}",
        settings.skip_bad_images,
        settings.dataloader_num_workers,
        facts,
    )
    ids = np.array(list(quota))[buckets.bucket_ids([sample.size for sample in samples], used_sizes)]
    kept = [i for i, bucket in enumerate(ids) if np.count_nonzero(ids[:i] == bucket) < quota[bucket]]
    return ClassImages([samples[i] for i in kept], ids[kept])


def generate(
    settings: Settings,
    stage: EncoderStage,
    seed: int,
    sizes: list[tuple[int, int]],
    quota: dict[int, int],
    bucket_ids: np.ndarray,
) -> None:
    """Generates the missing images in a child process. An image's number determines its noise and is not reused."""
    folder = Path(settings.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for bucket, count in quota.items():
        size = sizes[bucket]
        missing = count - int(np.count_nonzero(bucket_ids == bucket))
        if missing <= 0:
            continue
        print(f"class images of {size[1]}x{size[0]}: {count - missing} of {count} in {folder}; generating {missing}")
        numbers = [int(path.name[:5]) for path in folder.glob("[0-9]" * 5 + "-*.png")]
        start = max(numbers, default=-1) + 1
        stage.generate(
            ClassImageRequest(
                folder=folder,
                prompt=settings.class_prompt,
                start=start,
                stop=start + missing,
                batch_size=settings.sample_batch_size,
                seed=seed,
                size=size,
                steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
            )
        )
