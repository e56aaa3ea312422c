"""Random numbers as a function of what they are for.

Every draw of a training step is keyed by (seed, purpose, sample id, use count) and made on the host, so a step depends on nothing
but its inputs: a resumed run repeats its draws, and the number of devices or loader threads changes nothing.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """A fresh counter-based generator for one purpose. The same key gives the same stream on every machine.

    Source: Philox 4x64 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), keyed by a BLAKE2b digest.
    """
    text = "/".join([str(seed), purpose, *(str(int(i)) for i in ids)])
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def normal(seed: int, purpose: str, *ids: int, shape: tuple) -> np.ndarray:
    """Standard normal float32 numbers of `shape` for one key."""
    return generator(seed, purpose, *ids).standard_normal(shape, dtype=np.float32)


class SampleStream:
    """An endless stream of (sample id, use count): passes over `count` samples, `repeats` uses each, shuffled anew every pass.

    Passes follow one another without a gap, so batches may reach across them: nothing is dropped, nothing counted twice, and the
    samples of update k are the same whatever the batch size and accumulation that make up an update.
    """

    def __init__(self, seed: int, purpose: str, count: int, repeats: int = 1) -> None:
        if count < 1 or repeats < 1:
            raise ValueError(f"a stream needs at least one sample and one repeat, got {count} and {repeats}")
        self.seed, self.purpose, self.count, self.repeats = seed, purpose, count, repeats

    def at(self, position: int) -> tuple[int, int]:
        """Sample id in [0, count) and how often that sample was used before `position`. Safe to call from several threads."""
        number, offset = divmod(position, self.count * self.repeats)
        samples, uses = _order(self.seed, self.purpose, number, self.count, self.repeats)
        return int(samples[offset]), number * self.repeats + int(uses[offset])


@lru_cache(maxsize=8)
def _order(seed: int, purpose: str, number: int, count: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples of one pass, and for each how often it came before in that pass."""
    samples = generator(seed, f"order/{purpose}", number).permutation(count * repeats) % count
    uses = np.empty_like(samples)
    uses[np.argsort(samples, kind="stable")] = np.tile(np.arange(repeats), count)
    return samples, uses
