"""Batches, the same ones whatever the number of workers and processes."""

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
    """A data set whose random draws depend on seed, epoch and sample alone, not on which worker makes them.

    So two processes see the very augmentations that one process sees, and a run can be repeated. A number beyond the
    last sample is another copy of a sample, with draws of its own: number = sample + copy * samples.
    """

    def __init__(self, samples: Dataset[Any], seed: int) -> None:
        self.samples = samples
        self._seed = seed
        # In shared memory, so that workers which live on between epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next draws are for."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """The sample, as drawn in this epoch."""
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would look at all kinds of devices: a tenth of a millisecond for every sample.
            torch.default_generator.manual_seed(hash((self._seed, int(self._epoch), index)) & 0x7FFF_FFFF_FFFF_FFFF)
            return self.samples[index % len(self)]

    @property
    def scored(self) -> Dataset[Any]:
        """The samples that count in an evaluation."""
        return self.samples


class TolerantDataset(Noted, SeededDataset):
    """A `SeededDataset` that puts the next readable sample in the place of an unreadable one, and says so.

    Raises SettingError for samples to evaluate that cannot be narrowed to those that are readable.
    """

    def __init__(self, samples: Dataset[Any], seed: int, bad_images: BadImages, *, training: bool) -> None:
        SeededDataset.__init__(self, samples, seed)
        Noted.__init__(self, bad_images, training=training)
        if not training and not hasattr(samples, "without"):
            raise SettingError(
                f"skip_bad_images was set, and {type(samples).__name__} has no method `without(numbers)`, which gives "
                "the samples that are scored when some are left out. Write one, or set skip_bad_images to 0."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What worker processes get: they report by what they return."""
        return {**vars(self), "bad_images": BadImages(self.bad_images.tolerated)}

    def __getitem__(self, index: int) -> Drawn:
        """The sample, as drawn in this epoch, or the next one that can be read."""
        return self.draw(super().__getitem__, index, len(self))

    @property
    def scored(self) -> Dataset[Any]:
        """The samples that count in an evaluation: those that can be read."""
        if len(self.left_out) == len(self):
            raise DataError(f"None of the {len(self)} samples can be scored: no image can be read.")
        return self.samples.without(self.left_out) if self.left_out else self.samples  # type: ignore[attr-defined]


def _missing_folders(settings: RunSettings, complaint: str) -> str:
    """Return which settings name the missing folders that a complaint about data is about, and where they were sought.

    Nobody need have chosen them.
    """
    return "".join(
        f" {name} is {folder}{', the default' if settings.is_default(name) else ''}"
        f"{'' if folder.is_absolute() else f', looked for in {Path.cwd()}'}; give another with --set {name}=FOLDER."
        for name, folder in settings.data_folders.items()
        if str(folder) in complaint and not folder.exists()
    )


def make_loader(
    task: Task[Any], settings: RunSettings, split: str, bad_images: BadImages | None = None
) -> DataLoader[Any]:
    """Return the loader of a split: shuffled and without a last small batch for "train", whole and in order else.

    Args:
        task: gives the samples.
        settings: of the run.
        split: "train", "val" or "test".
        bad_images: takes the unreadable files of all splits, where `skip_bad_images` tolerates any; go through such a
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
    """Tell the sampler and the draws of a prepared loader which epoch comes next."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    cast(SeededDataset, loader.dataset).set_epoch(epoch)


def end_workers(loader: Any) -> None:
    """End the processes that make the batches of a loader, prepared or not, and wait for them.

    Left to the garbage collector, the queues that tell them to end may go first; each is then waited for in vain.
    """
    owner = getattr(loader, "base_dataloader", loader)
    iterator = getattr(owner, "_iterator", None)  # of workers that live on between epochs
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
