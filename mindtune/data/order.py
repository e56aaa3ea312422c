"""The split into training and held-out samples, and batches: prepared in advance, and stacked from rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import numpy as np

from mindtune.cli import UserError
from mindtune.rng import generator


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training ids, held-out ids): holds out a seeded choice of a fraction `share` of `count` ids, at least one.

    Raises UserError if none would be left to train on.
    """
    if not share:
        return list(range(count)), []
    held = max(1, round(share * count))
    if held >= count:
        raise UserError(f"--validation_split {share}: would hold out {held} of {count} samples; use a smaller share.")
    out = set(generator(seed, "held out").permutation(count)[:held].tolist())
    return [i for i in range(count) if i not in out], sorted(out)


def prefetch(make: Callable[[Any], Any], positions: Iterable, workers: int) -> Iterator[Any]:
    """make(p) for every position in order. `workers` threads prepare up to workers + 2 results in advance."""
    if workers < 1:
        yield from map(make, positions)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending, ahead = [], iter(positions)
        try:
            for position in ahead:
                pending.append(pool.submit(make, position))
                if len(pending) > workers + 1:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def stack(rows: list[tuple]) -> tuple[np.ndarray, ...]:
    """The inputs of a batch, each [B, ...], from the inputs of its rows."""
    return tuple(np.stack(column) for column in zip(*rows))
