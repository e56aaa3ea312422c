"""The random draws of one use of a sample, in training and in held-out evaluation."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from mindtune import rng


class TrainingDraws:
    """Draws of use number `use` of a sample.

    They are functions of (seed, purpose, sample, use) alone, so a resumed run repeats them.

    `group` separates the draws of instance images, class images and pairs.
    """

    def __init__(self, seed: int, group: str, sample_id: int, use: int) -> None:
        self.seed, self.group, self.key = seed, group, (sample_id, use)
        self._crop_and_flip = rng.generator(seed, f"{group} crop and flip", *self.key).random(3)

    def crop(self, centered: bool) -> Optional[tuple[float, float]]:
        """Where to crop, as fractions (x, y) of the free space in [0, 1), or None for the center."""
        return None if centered else (self._crop_and_flip[0], self._crop_and_flip[1])

    def flip(self, enabled: bool) -> bool:
        """Whether to flip this use horizontally: half of the uses if `enabled`."""
        return bool(enabled and self._crop_and_flip[2] < 0.5)

    def timestep(self, draw: Callable[[np.random.Generator], int]) -> int:
        """The timestep that `draw` takes from the generator of this use."""
        return draw(rng.generator(self.seed, f"{self.group} timestep", *self.key))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 of `shape`; `purpose` is posterior, condition posterior or noise."""
        purpose = purpose if purpose == "condition posterior" else f"{self.group} {purpose}"
        return rng.normal(self.seed, purpose, *self.key, shape=shape)

    def caption(self, caption: str, proportion_empty: float) -> str:
        """The caption, or an empty one for a `proportion_empty` of the uses."""
        empty = rng.generator(self.seed, "empty prompt", *self.key).random() < proportion_empty
        return "" if empty else caption


class HeldOutDraws:
    """Draws for the loss of a held-out sample at a timestep, the same at every evaluation.

    Held-out samples are center-cropped, not flipped, and keep their caption.
    """

    def __init__(self, seed: int, sample_id: int, timestep: int) -> None:
        self.seed, self.sample_id, self._timestep = seed, sample_id, timestep

    def crop(self, centered: bool) -> None:
        """The center."""
        return None

    def flip(self, enabled: bool) -> bool:
        """No."""
        return False

    def timestep(self, draw: Callable[[np.random.Generator], int]) -> int:
        """The timestep that is evaluated."""
        return self._timestep

    def normal(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 of `shape`; the noise depends on the timestep, the posteriors do not."""
        key = (self.sample_id, self._timestep) if purpose == "noise" else (self.sample_id,)
        return rng.normal(self.seed, f"held-out {purpose}", *key, shape=shape)

    def caption(self, caption: str, proportion_empty: float) -> str:
        """The caption."""
        return caption
