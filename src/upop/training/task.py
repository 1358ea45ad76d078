"""What a task gives the loop: data sets, a model, a loss and metrics. All else is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from upop.settings import RunSettings

SettingsT = TypeVar("SettingsT", bound=RunSettings)
Batch = Mapping[str, Any]


class Task(ABC, Generic[SettingsT]):
    """One task; subclasses live in one file each and are registered in `upop.tasks`."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """The metric, higher is better, that decides which checkpoint is the best one."""
    splits: ClassVar[Mapping[str, str]]
    """What a split is for ("train", "val", "test") -> its published name."""
    settings: ClassVar[type[RunSettings]]

    @abstractmethod
    def build(self, settings: SettingsT) -> nn.Module:
        """Return the dense model with fresh weights."""

    @abstractmethod
    def load(self, path: Path, settings: SettingsT) -> nn.Module:
        """Return the model in a checkpoint of this task, dense or compressed, ours or published."""

    @abstractmethod
    def start(self, path: Path, settings: SettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return a dense model started from a pre-trained checkpoint, and the keys that this lacks."""

    @abstractmethod
    def dataset(self, settings: SettingsT, split: str) -> Dataset[Any]:
        """Return the records of a split ("train", "val" or "test"); it is checked here, before any long work."""

    @abstractmethod
    def collate(self, settings: SettingsT) -> Callable[[list[Any]], Batch]:
        """Return what makes a batch of records; it must be picklable."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return one row per record, [B, ...] each: what `score` needs of the model's answers."""

    @abstractmethod
    def score(self, predictions: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics of a whole split, in percent."""

    @abstractmethod
    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return inputs of the published size for counting GMACs and measuring latency."""
