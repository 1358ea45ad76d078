"""Tolerates a number of unreadable images (`skip_bad_images`).

In training, the next readable sample of the data set replaces one whose image cannot be read, so that runs are
repeatable. In evaluation, such samples are left out. Every unreadable file is reported once; one beyond the tolerated
number ends the run.
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
"""Key of an evaluation batch: which samples do not count, bool [batch]; other samples' images replace theirs."""
_DRAWN = "drawn"


@dataclass(frozen=True)
class BadImage:
    """An unreadable file: its path, the file and sample that refer to it, and the reason."""

    image: str
    file: str
    sample: int
    reason: str

    @classmethod
    def of(cls, error: BadImageError) -> BadImage:
        """Build the record from an error."""
        return cls(error.image, error.file, error.sample, error.reason)

    def described(self) -> str:
        """Return the record in one line."""
        return f"{self.image} ({self.file}, sample {self.sample}): {self.reason}"


class BadImages:
    """The unreadable files of a run, each once, in order of appearance.

    Args:
        tolerated: how many are allowed.
    """

    def __init__(self, tolerated: int) -> None:
        self.tolerated = tolerated
        self.report: Callable[[BadImage], None] = lambda _image: None
        """Called with every new file."""
        self._found: dict[str, BadImage] = {}

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Restore the `rows` of a resumed run."""
        for row in rows:
            # Earlier versions wrote "record".
            self._found[row["image"]] = BadImage(
                **{"sample" if name == "record" else name: value for name, value in row.items()}
            )

    def __len__(self) -> int:
        """The number of files."""
        return len(self._found)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per file, as JSON values."""
        return [asdict(each) for each in self._found.values()]

    def add(self, images: Iterable[BadImage]) -> None:
        """Add newly found files.

        Raises:
            DataError: there are more than tolerated; the message names all of them.
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
    """An item with its sample number, and the unreadable files that were skipped before it."""

    item: Any
    number: int
    bad: tuple[BadImage, ...]


class Noted:
    """Mixin of data sets that skip unreadable samples, and collects them in the training process.

    Attributes:
        bad_images: of the whole run.
        left_out: indices of the unreadable samples; `readable` updates it.
    """

    def __init__(self, bad_images: BadImages, *, training: bool) -> None:
        self.bad_images, self.training = bad_images, training
        self.left_out: set[int] = set()

    def draw(self, read: Callable[[int], Any], index: int, count: int) -> Drawn:
        """Return the sample at an index, or the next readable one.

        Args:
            read: index -> item.
            index: of the sample, copies included.
            count: number of samples.

        Raises:
            DataError: more unreadable files were skipped than tolerated.
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
        """Move the reports of a batch into the lists; all processes call this together."""
        drawn: Sequence[tuple[int, tuple[BadImage, ...]]] = batch.pop(_DRAWN)
        met = [(number, bad) for number, bad in drawn if bad]
        if accelerator.num_processes > 1:
            count = torch.tensor(len(met), device=accelerator.device)
            met = gather_object(met) if int(accelerator.reduce(count, "sum")) else []
        self.left_out.update(number for number, _ in met)
        self.bad_images.add(image for _, bad in met for image in bad)
        if not self.training:
            marks = [number in self.left_out for number, _ in drawn]
            batch[LEFT_OUT] = torch.tensor(marks, device=accelerator.device)


@dataclass(frozen=True)
class NotingCollator:
    """Wraps the collator of a task; adds the drawn sample numbers to each batch."""

    collate: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, drawn: list[Drawn]) -> dict[str, Any]:
        """Collate the items, and add their sample numbers and unreadable files."""
        return {
            **self.collate([each.item for each in drawn]),
            _DRAWN: [(each.number, each.bad) for each in drawn],
        }


def without_notes(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without the notes of `NotingCollator`."""
    return {name: value for name, value in batch.items() if name != _DRAWN}


def scored_indices(loader: Any) -> Tensor | None:
    """Return the sample numbers that count in an evaluation, ascending; None if all do."""
    dataset = loader.dataset
    if not isinstance(dataset, Noted) or not dataset.left_out:
        return None
    return torch.tensor([number for number in range(len(dataset)) if number not in dataset.left_out], dtype=torch.long)  # type: ignore[arg-type]


def readable(accelerator: Accelerator, loader: Any) -> Iterator[Any]:
    """Yield the batches of a prepared loader, and record unreadable images; all processes iterate together.

    Raises:
        DataError: there are more than tolerated.
    """
    dataset = loader.dataset
    for batch in loader:
        if isinstance(dataset, Noted):
            dataset.note(batch, accelerator)
        yield batch


def _too_many(image: BadImage, before: Sequence[str], tolerated: int) -> DataError:
    return DataError(
        f"{image.described()}. It is unreadable file number {len(before) + 1}, and skip_bad_images is {tolerated}; "
        f"those before it: {', '.join(before)}. Download them again, or raise skip_bad_images."
    )
