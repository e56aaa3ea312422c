"""Validation: the loss on held-out samples, and the images of `validation_rows`: a grid, and files of their own."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from mindspore import nn
from PIL import Image
from tqdm import tqdm

from mindtune.data.grids import image_grid, save_image
from mindtune.distributed import ranks
from mindtune.files import write_files_atomically
from mindtune.models.execution import free_memory
from mindtune.optim.averaging import EMA
from mindtune.run.evaluation import HELD_OUT_INDICES, held_out_loss
from mindtune.run.record import Run
from mindtune.run.report_images import ROWS_FILE, picture_name
from mindtune.run.validation_rows import Row

Images = dict[str, list[Image.Image]]  # of all rows, by the name of the model; the trained one is the last
GALLERY_SIZE = 8  # images of a model card


class Validation:
    """Validates the trained models of a run on the main process. The other ranks wait at the next `all_gather`.

    `make_batch(uses)` makes the inputs of `step.predict`. `places` [N] is the position of every timestep index on the
    x axis of the held-out losses, from 0 (image) to 1 (noise). `sampler.sample(final)` returns the `Images` of
    `sampler.rows`. With `ema` the averaged weights are validated.
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
        """Logs the held-out loss and, after the first update, images.

        Returns the path of the image grid, of the folder of images if there is no grid, or None.
        """
        run = self.run
        if not ranks.is_main_process():
            return None
        with self.weights():
            if run.data.held_out and not run.curve.has(run.step):
                losses = held_out_loss(self.step, self.models, self._held_out_batch, len(run.data.held_out))
                self._log_held_out(losses)
            if final:
                _remove_final(run.output_dir / "samples")
            if not self.sampler.rows or not run.step:
                return None
            began = time.monotonic()
            images = self.sampler.sample(final)
            count = sum(map(len, images.values()))
            tqdm.write(f"validation after update {run.step}: {count} images in {time.monotonic() - began:.0f} s")
        free_memory()  # a VAE may have been loaded for the images
        if final and run.hub_id:
            run.gallery = save_gallery(run.output_dir, self.sampler.rows, images)
        return self._save(images, run.output_dir / "samples" / ("final" if final else f"step-{run.step:06d}"))

    def write_result(self, write: Callable[[Path], Any]) -> None:
        """Puts the files that `write(folder)` writes into the output directory, from the weights that are validated."""
        if ranks.is_main_process():
            with self.weights():
                write_files_atomically(self.run.output_dir, write)

    def _save(self, images: Images, path: Path) -> Path:
        """Saves and logs the images of the prompts as the grid `path`.png, and those of a file in the folder `path`."""
        run, rows = self.run, self.sampler.rows
        saved = path
        if any(row.place for row in rows):
            pictures = name_pictures(rows, images)
            write_files_atomically(path, lambda folder: _write_pictures(folder, rows, pictures))
            for row, image in zip(rows, list(images.values())[-1]):
                if row.place:
                    run.tracker.image(run.step, f"validation/row-{row.place:02d}", image)
        cells, labels = grid_cells(rows, images)
        if cells:
            grid = image_grid(cells, labels)
            run.tracker.image(run.step, "validation", grid)
            saved = save_image(grid, path.with_name(f"{path.name}.png"))
        return saved

    def _log_held_out(self, losses: list[float]) -> None:
        """Adds the loss at each timestep to the curve, and logs it under its sigma or timestep index."""
        run = self.run
        run.curve.add(run.step, list(self.places.values()), losses)
        labels = [f"{place:.3f}" if run.axis == "sigma" else str(index) for index, place in self.places.items()]
        by_timestep = {f"held_out__loss_at_{label}": loss for label, loss in zip(labels, losses)}
        run.tracker.log(run.step, held_out__loss=float(np.mean(losses)), **by_timestep)

    def _held_out_batch(self, sample_id: int, timestep: int) -> tuple:
        return self.make_batch([self.run.data.held_out_use(sample_id, timestep)])


def _remove_final(samples: Path) -> None:
    """Removes the last images of an earlier end of this run, which this one replaces: they show other weights."""
    for pattern in ("final.png", "final-[1-9].png", "final/row-[0-9]*.png", f"final/{ROWS_FILE}"):
        for path in samples.glob(pattern):
            path.unlink()


def save_gallery(output_dir: Path, rows: Sequence[Row], images: Images) -> list[tuple[str, str]]:
    """Saves an image per prompt for the model card, and returns the prompts with the files, relative to `output_dir`.

    The images are by the trained model. Those of --validation_file have files already.
    """
    gallery = []
    trained = list(images.values())[-1]
    for row, image in zip(rows, trained):
        if (row.number > 0 and not row.place) or len(gallery) == GALLERY_SIZE:
            continue
        file = f"samples/final/{picture_name(row.place)}" if row.place else f"samples/final-{len(gallery) + 1}.png"
        if not row.place:
            save_image(image, output_dir / file)
        gallery.append((row.prompt, file))
    return gallery


def grid_cells(rows: Sequence[Row], images: Images) -> tuple[list[list[Image.Image]], list[str]]:
    """The grid of the images of the flags, and the label of each of its rows.

    A row of the grid has the condition image, if there is one, and all images of a prompt by one model.
    """
    starts = [index for index, row in enumerate(rows) if row.number == 0 and not row.place]
    end = sum(not row.place for row in rows)
    cells, labels = [], []
    for first, after in zip(starts, [*starts[1:], end]):
        row = rows[first]
        for name, sampled in images.items():
            cells.append([*([row.condition] if row.condition else []), *sampled[first:after]])
            labels.append(f"{row.prompt} ({name})" if len(images) > 1 else row.prompt)
    return cells, labels


def name_pictures(rows: Sequence[Row], images: Images) -> dict[str, Image.Image]:
    """The images of the rows of --validation_file by the names of their files: `report_images.picture_name`."""
    *others, trained = images
    pictures = {}
    for index, row in enumerate(rows):
        if row.place:
            pictures[picture_name(row.place)] = images[trained][index]
            pictures.update({picture_name(row.place, name): images[name][index] for name in others})
            if row.condition:
                pictures[picture_name(row.place, "condition")] = row.condition
    return pictures


def _write_pictures(folder: Path, rows: Sequence[Row], pictures: dict[str, Image.Image]) -> None:
    for name, image in pictures.items():
        save_image(image, folder / name)
    described = [json.dumps(row.describe(), ensure_ascii=False) + "\n" for row in rows if row.place]
    # A path may have bytes that are not UTF-8: JSON can write them as escapes.
    (folder / ROWS_FILE).write_text("".join(described), encoding="utf-8", errors="backslashreplace")
