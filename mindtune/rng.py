"""Random numbers that depend only on their purpose.

Every draw of a training step is made on the host with the key (seed, purpose, sample id, use count). A step therefore
depends only on its inputs: a resumed run repeats the same draws, and the number of devices or loader threads has no
effect.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """A new counter-based generator for one purpose. The same key gives the same numbers on every machine.

    Source: Philox 4x64, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), keyed by a BLAKE2b
    digest.
    """
    text = "/".join([str(seed), purpose, *(str(int(i)) for i in ids)])
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def normal(seed: int, purpose: str, *ids: int, shape: tuple) -> np.ndarray:
    """Standard normal numbers for one key, float32 of `shape`."""
    return generator(seed, purpose, *ids).standard_normal(shape, dtype=np.float32)


class SampleStream:
    """An endless stream of (sample id, use count).

    Each pass uses every one of `count` samples `repeats` times, shuffled.

    A batch may continue into the next pass, so no sample is dropped or used twice. The samples of update k depend only
    on the number of samples per update, not on how batch size and accumulation divide it.
    """

    def __init__(self, seed: int, purpose: str, count: int, repeats: int = 1) -> None:
        if count < 1 or repeats < 1:
            raise ValueError(f"a stream needs at least one sample and one repeat, got {count} and {repeats}")
        self.seed, self.purpose, self.count, self.repeats = seed, purpose, count, repeats

    def at(self, position: int) -> tuple[int, int]:
        """The sample id in [0, count), and how often that sample was used before `position`. Thread-safe."""
        pass_number, offset = divmod(position, self.count * self.repeats)
        samples, uses = _order(self.seed, self.purpose, pass_number, self.count, self.repeats)
        return int(samples[offset]), pass_number * self.repeats + int(uses[offset])


@lru_cache(maxsize=8)
def _order(seed: int, purpose: str, pass_number: int, count: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples of one pass, and how often each was used earlier in that pass."""
    samples = generator(seed, f"order/{purpose}", pass_number).permutation(count * repeats) % count
    uses = np.empty_like(samples)
    uses[np.argsort(samples, kind="stable")] = np.tile(np.arange(repeats), count)
    return samples, uses
