"""Doing without a number of unreadable images: `skip_bad_images`.

In training another sample takes the place of one whose image cannot be read: the next one in the data set that can
be, so that runs can be repeated. In evaluation such samples are left out: neither right nor wrong. Every unreadable
file is told once, and one more than is tolerated ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from upop.errors import BadImageError, DataError

LEFT_OUT = "left_out"
"""What a batch of an evaluation calls the samples that do not count, bool [B]; they hold other samples' images."""
_DRAWN = "drawn"


@dataclass(frozen=True)
class BadImage:
    """An unreadable file: which, what asks for it (file and sample), and why it cannot be read."""

    image: str
    file: str
    sample: int
    reason: str

    @classmethod
    def of(cls, error: BadImageError) -> BadImage:
        """What an error says."""
        return cls(error.image, error.file, error.sample, error.reason)

    def described(self) -> str:
        """All of it in one line."""
        return f"{self.image} ({self.file}, sample {self.sample}): {self.reason}"


class BadImages:
    """The unreadable files that a run has met, each once, in the order in which they were met.

    Args:
        tolerated: how many there may be.
    """

    def __init__(self, tolerated: int) -> None:
        self.tolerated = tolerated
        self.report: Callable[[BadImage], None] = lambda _image: None
        """Is given every file that is new."""
        self._found: dict[str, BadImage] = {}

    def know(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows of a run that is resumed."""
        for row in rows:
            # Earlier versions wrote "record".
            self._found[row["image"]] = BadImage(
                **{"sample" if name == "record" else name: value for name, value in row.items()}
            )

    def __len__(self) -> int:
        """How many there are."""
        return len(self._found)

    def rows(self) -> list[dict[str, Any]]:
        """Return them as JSON values, one row each."""
        return [asdict(each) for each in self._found.values()]

    def take(self, images: Iterable[BadImage]) -> None:
        """Take in what was met.

        Raises:
            DataError: there are more than are tolerated; the message names this one and all before it.
        """
        for image in images:
            if image.image in self._found:
                continue
            before = list(self._found)
            self._found[image.image] = image
            self.report(image)
            if len(self._found) > self.tolerated:
                raise _too_many(image, before, self.tolerated)


class Drawn(NamedTuple):
    """A sample's item, its number, and the unreadable files that were met on the way to it."""

    item: Any
    number: int
    bad: tuple[BadImage, ...]


class Noted:
    """What a data set keeps of its unreadable samples, in the training process itself.

    Attributes:
        bad_images: of the whole run.
        left_out: the numbers of the samples that were found unreadable; `readable` keeps it.
    """

    def __init__(self, bad_images: BadImages, *, training: bool) -> None:
        self.bad_images, self.training = bad_images, training
        self.left_out: set[int] = set()

    def draw(self, read: Callable[[int], Any], index: int, count: int) -> Drawn:
        """Return the sample of that number, or else the next one that can be read.

        Args:
            read: gives a sample's item.
            index: its number, copies counted.
            count: the number of samples.

        Raises:
            DataError: on the way to it are more unreadable files than are tolerated.
        """
        bad: dict[str, BadImage] = {}
        for step in range(count):
            try:
                item = read(index + step)
            except BadImageError as error:
                bad[error.image] = image = BadImage.of(error)
                if len(bad) > self.bad_images.tolerated:
                    raise _too_many(image, list(bad)[:-1], self.bad_images.tolerated) from error
            else:
                return Drawn(item, index % count, tuple(bad.values()))
        raise DataError(f"No image of the data set can be read; the first is {next(iter(bad.values())).described()}.")

    def note(self, batch: dict[str, Any], accelerator: Accelerator) -> None:
        """Take a batch's notes out of it and into the lists; all processes do this together."""
        drawn: Sequence[tuple[int, tuple[BadImage, ...]]] = batch.pop(_DRAWN)
        met = [(number, bad) for number, bad in drawn if bad]
        if accelerator.num_processes > 1:
            count = torch.tensor(len(met), device=accelerator.device)
            met = gather_object(met) if int(accelerator.reduce(count, "sum")) else []
        self.left_out.update(number for number, _ in met)
        self.bad_images.take(image for _, bad in met for image in bad)
        if not self.training:
            marks = [number in self.left_out for number, _ in drawn]
            batch[LEFT_OUT] = torch.tensor(marks, device=accelerator.device)


@dataclass(frozen=True)
class NotingCollator:
    """Makes a batch with the task's own collator, and notes beside it which samples were drawn."""

    collate: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, drawn: list[Drawn]) -> dict[str, Any]:
        """The items as one batch."""
        return {
            **self.collate([each.item for each in drawn]),
            _DRAWN: [(each.number, each.bad) for each in drawn],
        }


def without_notes(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without what `NotingCollator` notes in it."""
    return {name: value for name, value in batch.items() if name != _DRAWN}


def counted(loader: Any) -> Tensor | None:
    """Return the numbers of the samples of an evaluation's loader that count, ascending; None where all do."""
    dataset = loader.dataset
    if not isinstance(dataset, Noted) or not dataset.left_out:
        return None
    return torch.tensor([number for number in range(len(dataset)) if number not in dataset.left_out], dtype=torch.long)  # type: ignore[arg-type]


def readable(accelerator: Accelerator, loader: Any) -> Iterator[Any]:
    """Give the batches of a prepared loader, and take note of unreadable images; all processes go through it alike.

    Raises:
        DataError: there are more than are tolerated.
    """
    dataset = loader.dataset
    for batch in loader:
        if isinstance(dataset, Noted):
            dataset.note(batch, accelerator)
        yield batch


def _too_many(image: BadImage, before: Sequence[str], tolerated: int) -> DataError:
    return DataError(
        f"{image.described()}. It is unreadable file number {len(before) + 1}, and skip_bad_images is {tolerated}; "
        f"those before it: {', '.join(before)}. Fetch them again, or raise skip_bad_images."
    )
