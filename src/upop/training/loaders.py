"""Batches, the same ones whatever the number of workers and processes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upop.settings import RunSettings
from upop.training.task import Task


class SeededDataset(Dataset[Any]):
    """A data set whose random draws depend on seed, epoch and record alone, not on which worker makes them.

    So two processes see the very augmentations that one process sees, and a run can be repeated. A number beyond the
    last record is another copy of a record, with draws of its own: number = record + copy * records.
    """

    def __init__(self, records: Dataset[Any], seed: int) -> None:
        self.records = records
        self._seed = seed
        # In shared memory, so that workers which live on between epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next draws are for."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """The number of records."""
        return len(self.records)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """The record, as drawn in this epoch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self._seed, int(self._epoch), index)) & 0x7FFF_FFFF_FFFF_FFFF)
            return self.records[index % len(self)]


def make_loader(task: Task[Any], settings: RunSettings, split: str) -> DataLoader[Any]:
    """Return the loader of a split: shuffled and without a last small batch for "train", whole and in order else."""
    training = split == "train"
    records = SeededDataset(task.dataset(settings, split), settings.seed)
    size = settings.batch_size_train if training else settings.batch_size_test
    workers = settings.num_workers
    sampler = task.sampler(records.records, settings) if training else None
    return DataLoader(
        records,
        batch_size=min(size, len(records)) if training else size,
        shuffle=training and sampler is None,
        sampler=sampler,
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        collate_fn=task.collate(settings),
    )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler and the draws of a prepared loader which epoch comes next."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    cast(SeededDataset, loader.dataset).set_epoch(epoch)


def first_records(loader: DataLoader[Any], count: int) -> dict[str, Any]:
    """Return the first `count` records of a loader's data set as one batch, on the CPU."""
    records = cast(SeededDataset, loader.dataset)
    collate = loader.collate_fn
    assert collate is not None
    return cast(dict[str, Any], collate([records[index] for index in range(min(count, len(records)))]))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
