"""Loaders whose batches do not depend on the number of workers and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from upop.errors import DataError, SettingError
from upop.runs.bad_images import BadImages, Drawn, Noted, NotingCollator, without_notes
from upop.runs.devices import to_device as to_device
from upop.runs.preemption import prepare_worker
from upop.runs.task import Task
from upop.settings import RunSettings


class SeededDataset(Dataset[Any]):
    """A data set whose random draws depend on seed, epoch and index alone, so that runs are repeatable.

    An index beyond the last sample draws another augmentation of one: index = sample + copy * samples.
    """

    def __init__(self, samples: Dataset[Any], seed: int) -> None:
        self.samples = samples
        self._seed = seed
        # In shared memory, so that persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next draws."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """The sample with this epoch's augmentation."""
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed queries all device types, which takes 0.1 ms per sample.
            torch.default_generator.manual_seed(hash((self._seed, int(self._epoch), index)) & 0x7FFF_FFFF_FFFF_FFFF)
            return self.samples[index % len(self)]

    @property
    def scored(self) -> Dataset[Any]:
        """The samples that count in an evaluation."""
        return self.samples


class TolerantDataset(Noted, SeededDataset):
    """A `SeededDataset` that replaces an unreadable sample by the next readable one, and reports it.

    Raises:
        SettingError: the samples of an evaluation have no method `without`, which leaves out unreadable ones.
    """

    def __init__(self, samples: Dataset[Any], seed: int, bad_images: BadImages, *, training: bool) -> None:
        SeededDataset.__init__(self, samples, seed)
        Noted.__init__(self, bad_images, training=training)
        if not training and not hasattr(samples, "without"):
            raise SettingError(
                f"skip_bad_images was set, but {type(samples).__name__} has no method `without(numbers)`, which gives "
                "the data set without some samples. Write one, or set skip_bad_images to 0."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Workers get an empty list of bad images: they report in what they return."""
        return {**vars(self), "bad_images": BadImages(self.bad_images.tolerated)}

    def __getitem__(self, index: int) -> Drawn:
        """The sample with this epoch's augmentation, or the next readable one."""
        return self.draw(super().__getitem__, index, len(self))

    @property
    def scored(self) -> Dataset[Any]:
        """The samples that count in an evaluation: the readable ones."""
        if len(self.left_out) == len(self):
            raise DataError(f"None of the {len(self)} samples can be scored: no image can be read.")
        return self.samples.without(self.left_out) if self.left_out else self.samples  # type: ignore[attr-defined]


def _missing_folders(settings: RunSettings, complaint: str) -> str:
    """Return sentences about the settings whose missing folders an error message names, with defaults marked.

    A user may not know such a setting, if nobody set it.
    """
    return "".join(
        f" {name} is {folder}{', the default' if settings.is_default(name) else ''}"
        f"{'' if folder.is_absolute() else f', relative to {Path.cwd()}'}; choose another with --set {name}=FOLDER."
        for name, folder in settings.data_folders.items()
        if str(folder) in complaint and not folder.exists()
    )


def make_loader(
    task: Task[Any], settings: RunSettings, split: str, bad_images: BadImages | None = None
) -> DataLoader[Any]:
    """Return the loader of a split: "train" is shuffled and drops the last partial batch, others are complete.

    Args:
        task: makes the samples.
        settings: of the run.
        split: "train", "val" or "test".
        bad_images: collects the unreadable files of all splits, if `skip_bad_images` tolerates any; iterate over such a
            loader with `upop.runs.bad_images.readable`.
    """
    training = split == "train"
    try:
        read = task.dataset(settings, split)
    except DataError as error:
        error.args = (f"{error}{_missing_folders(settings, str(error))}",)
        raise
    seed, tolerated = settings.seed, settings.skip_bad_images
    samples = (
        TolerantDataset(read, seed, BadImages(tolerated) if bad_images is None else bad_images, training=training)
        if tolerated
        else SeededDataset(read, seed)
    )
    collate = task.collate(settings)
    size = settings.batch_size_train if training else settings.batch_size_test
    workers = settings.num_workers
    sampler = task.sampler(samples.samples, settings) if training else None
    return DataLoader(
        samples,
        batch_size=min(size, len(samples)) if training else size,
        shuffle=training and sampler is None,
        sampler=sampler,
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=prepare_worker,
        pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        collate_fn=NotingCollator(collate) if tolerated else collate,
    )


def set_epoch(loader: Any, epoch: int) -> None:
    """Set the next epoch for the sampler and the augmentations of a prepared loader."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    cast(SeededDataset, loader.dataset).set_epoch(epoch)


def end_workers(loader: Any) -> None:
    """End the worker processes of a loader, prepared or not, and wait for them.

    The garbage collector may destroy their queues first, and then waits until a timeout for each worker.
    """
    owner = getattr(loader, "base_dataloader", loader)
    iterator = getattr(owner, "_iterator", None)  # of persistent workers
    if iterator is not None:
        iterator._shutdown_workers()
        owner._iterator = None


def first_samples(loader: DataLoader[Any], count: int) -> dict[str, Any]:
    """Return the first `count` samples of a loader's data set as one batch, on the CPU."""
    samples = cast(SeededDataset, loader.dataset)
    collate = loader.collate_fn
    assert collate is not None
    batch = cast(dict[str, Any], collate([samples[index] for index in range(min(count, len(samples)))]))
    return without_notes(batch)
