"""The progress bar of a run and the time of its updates."""

from __future__ import annotations

import statistics
import time
from typing import Optional

from tqdm import tqdm

from mindtune.distributed import ranks


class Progress:
    """A bar over the updates of a run, on the main process, and the seconds of each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bar: Optional[tqdm] = None

    def begin(self, step: int, total: int) -> None:
        """Begins the update after update `step` of `total`. The first call shows the bar."""
        if self.bar is None:
            hidden = not ranks.is_main_process()
            self.bar = tqdm(
                total=total, initial=step, unit="update", dynamic_ncols=True, mininterval=0.5, disable=hidden
            )
        self.began = time.perf_counter()

    def end(self, loss: float, lr: float) -> None:
        """Ends an update. The bar shows the median of the last 20."""
        self.seconds.append(time.perf_counter() - self.began)
        median = statistics.median(self.seconds[-20:])  # np.median takes 0.1 ms
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", s=f"{median:.2f}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Ends the bar, if it is shown."""
        if self.bar is not None:
            self.bar.close()

    def first(self) -> Optional[float]:
        """Seconds of the first update, which compiles in graph mode."""
        return self.seconds[0] if self.seconds else None

    def median(self) -> Optional[float]:
        """Median seconds of an update, without the first two."""
        steady = self.seconds[2:] or self.seconds
        return statistics.median(steady) if steady else None
