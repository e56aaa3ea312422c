"""Validation: the loss on held-out samples, and a grid of sampled images."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from mindspore import nn
from PIL import Image
from tqdm import tqdm

from mindtune.cli import matched
from mindtune.data.conditions import condition_image, require_condition
from mindtune.data.grids import image_grid, save_image
from mindtune.distributed import ranks
from mindtune.files import write_files_atomically
from mindtune.models.execution import free_memory
from mindtune.optim.averaging import EMA
from mindtune.run.evaluation import HELD_OUT_INDICES, held_out_loss
from mindtune.run.record import Run

Rows = Sequence[Sequence[Image.Image]]
GALLERY_SIZE = 8  # images of a model card


class Validation:
    """Validates the trained models of a run on the main process. The other ranks wait at the next `all_gather`.

    `make_batch(uses)` makes the inputs of `step.predict`. `places` [N] is the position of every timestep index on the
    x axis of the held-out losses, from 0 (image) to 1 (noise). `sampler.sample(final)` returns rows of images and a
    label per row, for `sampler.prompts`. With `ema` the averaged weights are validated.
    """

    def __init__(
        self,
        run: Run,
        step: nn.Cell,
        models: Sequence[nn.Cell],
        make_batch: Callable[[list], tuple],
        places: Sequence[float],
        sampler: Any,
        ema: Optional[EMA] = None,
    ) -> None:
        self.run = run
        self.step = step
        self.models = models
        self.make_batch = make_batch
        self.places = {index: float(places[index]) for index in HELD_OUT_INDICES}
        self.sampler = sampler
        self.weights = ema.averaged if ema else contextlib.nullcontext

    def __call__(self, final: bool = False) -> Optional[Path]:
        """Logs the held-out loss and, after the first update, images. Returns the path of the image grid, or None."""
        run = self.run
        if not ranks.is_main_process():
            return None
        with self.weights():
            if run.data.held_out and not run.curve.has(run.step):
                losses = held_out_loss(self.step, self.models, self._held_out_batch, len(run.data.held_out))
                self._log_held_out(losses)
            if not self.sampler.prompts or not run.step:
                return None
            began = time.monotonic()
            rows, labels = self.sampler.sample(final)
            images = sum(map(len, rows))
            tqdm.write(f"validation after update {run.step}: {images} images in {time.monotonic() - began:.0f} s")
        free_memory()  # a VAE may have been loaded for the images
        grid = image_grid(rows, labels)
        run.tracker.image(run.step, "validation", grid)
        if final and run.hub_id:
            run.gallery = save_gallery(run.output_dir, self.sampler.prompts, rows)
        name = "final" if final else f"step-{run.step:06d}"
        return save_image(grid, run.output_dir / "samples" / f"{name}.png")

    def write_result(self, write: Callable[[Path], Any]) -> None:
        """Puts the files that `write(folder)` writes into the output directory, from the weights that are validated."""
        if ranks.is_main_process():
            with self.weights():
                write_files_atomically(self.run.output_dir, write)

    def _log_held_out(self, losses: list[float]) -> None:
        """Adds the loss at each timestep to the curve, and logs it under its sigma or timestep index."""
        run = self.run
        run.curve.add(run.step, list(self.places.values()), losses)
        labels = [f"{place:.3f}" if run.axis == "sigma" else str(index) for index, place in self.places.items()]
        by_timestep = {f"held_out__loss_at_{label}": loss for label, loss in zip(labels, losses)}
        run.tracker.log(run.step, held_out__loss=float(np.mean(losses)), **by_timestep)

    def _held_out_batch(self, sample_id: int, timestep: int) -> tuple:
        return self.make_batch([self.run.data.held_out_use(sample_id, timestep)])


def save_gallery(output_dir: Path, prompts: Sequence, rows: Rows) -> list[tuple[str, str]]:
    """Saves an image per prompt for the model card, and returns the prompts with the files, relative to `output_dir`.

    `prompts` are texts, or (text, condition image). A prompt has one row or several; the last image of its last row is
    by the trained model.
    """
    rows = rows[len(rows) // len(prompts) - 1 :: len(rows) // len(prompts)]
    gallery = []
    for number, (prompt, row) in enumerate(zip(prompts, rows[:GALLERY_SIZE]), 1):
        file = f"samples/final-{number}.png"
        save_image(row[-1], output_dir / file)
        gallery.append((prompt if isinstance(prompt, str) else prompt[0], file))
    return gallery


def match_conditions(prompts: list[str], paths: list[str]) -> list[tuple[str, str]]:
    """(prompt, path of a condition image) pairs of --validation_prompt and --validation_image.

    Raises UserError if their numbers do not match, or if an image cannot be read.
    """
    pairs = matched(prompts, paths, "--validation_prompt", "--validation_image")
    for path in paths:
        require_condition(path, "--validation_image")
    return pairs


def load_conditions(
    pairs: list[tuple[str, str]], resolution: int, multiple: int, background: str
) -> list[tuple[str, Image.Image]]:
    """(prompt, condition image) pairs, resized by `condition_image`, on the background of the training data."""
    flag = "--validation_image"
    return [(prompt, condition_image(path, flag, resolution, multiple, background)) for prompt, path in pairs]
