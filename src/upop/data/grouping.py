"""Groups samples of similar length into batches, in another order in every epoch, to reduce padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_BATCHES = 32
"""So many batches are drawn at random before they are sorted by length: what is in one differs from epoch to epoch."""


class LengthSampler(Sampler[int]):
    """Yields all sample numbers of an epoch, so that neighbours have similar lengths.

    Args:
        lengths: of the samples.
        batch: number of neighbours with similar lengths.
        seed: random seed.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = list(lengths), batch, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """The numbers of an epoch."""
        drawn = torch.Generator().manual_seed(hash((self._seed, self._epoch)) & 0x7FFF_FFFF_FFFF_FFFF)
        order = torch.randperm(len(self), generator=drawn).tolist()
        size = self._batch * _BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            part = sorted(order[start : start + size], key=self._lengths.__getitem__, reverse=True)
            batches += [part[place : place + self._batch] for place in range(0, len(part), self._batch)]
        whole = [batch for batch in batches if len(batch) == self._batch]
        rest = [number for batch in batches if len(batch) < self._batch for number in batch]
        for place in torch.randperm(len(whole), generator=drawn).tolist():
            yield from whole[place]
        yield from rest
