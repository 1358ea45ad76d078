"""Measures the share of training time spent waiting for data."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

WINDOW = 200
_FEWEST = 20
_BEGINNING = 10
_TOO_MUCH = 0.2


class LoaderWatch:
    """Measures the share of time spent waiting for batches, over the last `window` batches.

    The first batches of a phase do not count: workers start up, and kernels are selected.

    Args:
        workers: worker processes per training process.
        processes: training processes on this machine; by default from torchrun's environment.
        cores: that this machine has; by default those that this process may use.
        window: number of batches.
        clock: returns seconds.
    """

    def __init__(
        self,
        workers: int,
        *,
        processes: int | None = None,
        cores: int | None = None,
        window: int = WINDOW,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._workers, self._clock = workers, clock
        self._processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes is None else processes
        self._cores = usable_cores() if cores is None else cores
        self._times: deque[tuple[float, float]] = deque(maxlen=window)  # waited, and the whole, in seconds
        self._phase = ""
        self._seen = 0
        self._warned = False

    def batches(self, batches: Iterable[T], phase: str) -> Iterator[T]:
        """Yield the batches; measure the wait for each, and how long the caller keeps it."""
        if phase != self._phase:
            self._phase, self._seen, self._warned = phase, 0, False
            self._times.clear()
        iterator = iter(batches)
        while True:
            start = self._clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waited = self._clock() - start
            yield batch
            self._seen += 1
            if self._seen > _BEGINNING:
                self._times.append((waited, self._clock() - start))

    @property
    def share(self) -> float | None:
        """The share of time spent waiting for data, 0 to 1; None before enough batches were seen."""
        if len(self._times) < _FEWEST:
            return None
        waited, whole = (sum(column) for column in zip(*self._times, strict=True))
        return waited / whole if whole > 0 else 0.0

    def warning(self) -> str | None:
        """Return advice once per phase, when waiting takes more than a fifth of a full window; else None."""
        share = self.share
        if self._warned or share is None or len(self._times) < (self._times.maxlen or 0) or share <= _TOO_MUCH:
            return None
        self._warned = True
        cores = f"this machine has {self._cores} core{'s' if self._cores != 1 else ''}"
        if self._workers * self._processes < self._cores:
            do = f"raise num_workers (now {self._workers}; {cores}), or use faster storage"
        else:
            do = (
                f"num_workers is {self._workers}{' per process' if self._processes > 1 else ''}, and {cores}: use "
                "faster storage, images that are resized beforehand, or a machine with more cores"
            )
        return f"waiting for data took {100 * share:.0f} % of the time of the last {len(self._times)} batches: {do}"


def usable_cores() -> int:
    """Return how many cores this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
