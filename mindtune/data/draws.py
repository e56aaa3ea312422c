"""The random numbers for one use of a sample in a batch, in training and for the held-out loss."""

from __future__ import annotations

from typing import Any, Callable, Optional

import numpy as np

from mindtune import rng
from mindtune.data import captions


class TrainingDraws:
    """The random numbers for one use of a sample in training; `use` counts the earlier uses of that sample.

    They depend only on (seed, purpose, sample, use), so a resumed run repeats them. `group` is instance, class or pair:
    samples of different groups may have the same id.
    """

    def __init__(self, seed: int, group: str, sample_id: int, use: int) -> None:
        self.seed = seed
        self.group = group
        self.key = (sample_id, use)
        self._crop_and_flip = rng.generator(seed, f"{group} crop and flip", *self.key).random(3)

    def crop(self, centered: bool) -> Optional[tuple[float, float]]:
        """The position of the crop: fractions (x, y) in [0, 1) of the space around it, or None for the center."""
        return None if centered else (self._crop_and_flip[0], self._crop_and_flip[1])

    def flip(self, enabled: bool) -> bool:
        """Whether to flip the image horizontally: with probability 0.5 if `enabled`."""
        return bool(enabled and self._crop_and_flip[2] < 0.5)

    def timestep(self, draw: Callable[[np.random.Generator], int]) -> int:
        """The timestep that `draw` returns for the generator of this use."""
        return draw(rng.generator(self.seed, f"{self.group} timestep", *self.key))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 of `shape`; `purpose` is posterior, condition posterior or noise."""
        # Only pairs have conditions, so that key needs no group.
        purpose = purpose if purpose == "condition posterior" else f"{self.group} {purpose}"
        return rng.normal(self.seed, purpose, *self.key, shape=shape)

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator for another purpose, such as a random mask."""
        return rng.generator(self.seed, f"{self.group} {purpose}", *self.key)

    def caption(self, caption: str, settings: Any) -> str:
        """The caption as `settings`, a `captions.Settings` or a `Concept`, say: empty, reordered or unchanged."""
        if rng.generator(self.seed, "empty prompt", *self.key).random() < settings.caption_dropout:
            return ""
        if not settings.shuffle_tags:
            return caption
        order = rng.generator(self.seed, "tag order", *self.key).integers(settings.tag_orders)
        return captions.reorder_tags(caption, settings, self.seed, int(order))


class HeldOutDraws:
    """The random numbers for the loss of a held-out sample at a timestep, the same in every evaluation.

    Has the methods of `TrainingDraws`. Held-out samples are center-cropped, not flipped, and keep their captions.
    """

    def __init__(self, seed: int, sample_id: int, timestep: int) -> None:
        self.seed = seed
        self.sample_id = sample_id
        self._timestep = timestep

    def crop(self, centered: bool) -> None:
        """None, for the center."""
        return None

    def flip(self, enabled: bool) -> bool:
        """False: no flip."""
        return False

    def timestep(self, draw: Callable[[np.random.Generator], int]) -> int:
        """The timestep that is evaluated."""
        return self._timestep

    def normal(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 of `shape`; the noise depends on the timestep, the posteriors do not."""
        key = (self.sample_id, self._timestep) if purpose == "noise" else (self.sample_id,)
        return rng.normal(self.seed, f"held-out {purpose}", *key, shape=shape)

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator for another purpose, such as a random mask: the same at all timesteps."""
        return rng.generator(self.seed, f"held-out {purpose}", self.sample_id)

    def caption(self, caption: str, settings: Any) -> str:
        """The caption, unchanged."""
        return caption
