"""The work of the encoder stage's child process, and how it is sent there."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, Union

from mindtune.cli import UserError
from mindtune.data.crops import height_width
from mindtune.data.image_sample import Sample
from mindtune.distributed import ranks

Size = Union[int, tuple[int, int]]  # side of a square, or (height, width), in pixels
Image = tuple[Sample, Size, bool]  # and whether it is flipped
# Images are sent in groups: what they share, such as the data set that they are in, is sent once per group.
GROUP = 64


def vae_batch(size: Size) -> int:
    """The number of images that the VAE encodes at a time: up to 512x512 pixels, and up to 8 images.

    Above that, batches are not faster and only take memory.
    """
    height, width = height_width(size)
    return min(8, max(1, 512 * 512 // (height * width)))


@dataclass
class ClassImageRequest:
    """Class images to generate from `prompt` into `folder`: those with index `start` up to, not including, `stop`.

    An image's index determines its noise. `indices`, if given, are the ones to generate instead.
    """

    folder: Path
    prompt: str
    start: int
    stop: int
    batch_size: int
    seed: int
    size: tuple[int, int]  # height and width in pixels
    steps: int = 28
    guidance_scale: float = 3.5
    indices: Optional[range] = None


class EncodeJob(NamedTuple):
    """The work of the child process.

    `stage` is an `EncoderStage`. `images` is read once, while the child encodes what it was sent before; after that
    `captions` is called. `total` is the number of images for the progress bar, if it is known.
    """

    stage: Any
    captions: Callable[[], list[str]] = list
    images: Iterable[Image] = ()
    class_images: Optional[ClassImageRequest] = None
    total: Optional[int] = None


def send(job: EncodeJob, stream: BinaryIO) -> None:
    """Writes a job to a stream, for `receive`."""
    pickle.dump((os.getpid(), ranks.is_main_process(), job._replace(images=(), captions=list)), stream)
    images = iter(job.images)
    while group := list(islice(images, GROUP)):
        pickle.dump(group, stream)
    pickle.dump([], stream)
    pickle.dump(job.captions(), stream)


def receive(stream: BinaryIO) -> tuple[int, bool, EncodeJob]:
    """(process id of the sender, whether it is the main process, its job). The images are read as they arrive.

    Raises EOFError or UnpicklingError, also while the images are read, if the sender was stopped.
    """
    parent, is_main_process, job = pickle.load(stream)
    return parent, is_main_process, job._replace(images=_receive(stream), captions=lambda: pickle.load(stream))


def _receive(stream: BinaryIO) -> Iterator[Image]:
    while group := pickle.load(stream):
        yield from group


def run_in_child(job: EncodeJob) -> None:
    """Runs a job in the child process of the encoder stage. Raises UserError if the process fails."""
    # Without MS_ROLE, because MindSpore would make the child a rank of the job. DEVICE_ID, its device, is inherited.
    environment = {name: value for name, value in os.environ.items() if name != "MS_ROLE"}
    # In a session of its own: a Ctrl-C during training must not end a window, but training after this update.
    process: Any = subprocess.Popen(
        [sys.executable, "-m", "mindtune.encode.child"], stdin=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # broken: the child has ended, its code says why
            send(job, process.stdin)
        code = process.wait()
    except BaseException:  # an image that cannot be read, Ctrl-C
        process.kill()
        process.wait()
        raise
    if code == 2:
        raise UserError("the encoder stage stopped (its message is above)")
    if code != 0:
        reason = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise UserError(
            f"the encoder stage {reason}. Its message is above; if there is none, it probably ran out of memory: T5 "
            "alone needs 10 GB in half precision."
        )
