"""What a task gives the loop: data sets, a model, a loss and metrics. All else is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate

from upop.checkpoints import load_into
from upop.examples import Album, Example
from upop.pruning import count_macs, count_parameters
from upop.pruning.deprecated import warn_renamed
from upop.runs.bad_images import counted, readable
from upop.runs.devices import autocast, to_device
from upop.settings import RunSettings

SettingsT = TypeVar("SettingsT", bound=RunSettings)
Batch = Mapping[str, Any]


class Task(ABC, Generic[SettingsT]):
    """One task; subclasses live in one file each and are registered in `upop.tasks`."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """The metric, higher is better, that decides which checkpoint is the best one."""
    shown: ClassVar[tuple[str, ...]]
    """The metrics that the final table shows; the results file has all."""
    splits: ClassVar[Mapping[str, str]]
    """What a split is for ("train", "val", "test") -> its published name."""
    settings: ClassVar[type[RunSettings]]
    pipeline: ClassVar[str | None] = None
    """What the Hugging Face hub calls the task, if it has a name for it; model cards say it."""
    model_prepares: ClassVar[bool] = False
    """Whether the model's own processor makes its inputs, which `tokenizer` returns; else settings say how."""
    update_first_step: ClassVar[bool] = True
    """Whether the search moves the masks at its very first step, as published for BLIP and CLIP."""

    @abstractmethod
    def build(self, settings: SettingsT) -> nn.Module:
        """Return the dense model with initial weights."""

    def load(self, path: Path, settings: SettingsT) -> nn.Module:
        """Return the model in a checkpoint of this task, dense or compressed; by default in a folder of ours."""
        return load_into(self.build(settings), path)

    def start(self, path: Path, settings: SettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return a dense model started from a pre-trained checkpoint, and the keys that this lacks."""
        return self.load(path, settings), ()

    def adapt(self, model: nn.Module, settings: SettingsT, *, training: bool) -> tuple[nn.Module, Sequence[str]]:
        """Return a loaded model made fit for the run's data, and what was changed about it, in words.

        Args:
            model: what `load` or `start` returned; it may be changed.
            settings: of the run.
            training: whether it is going to be trained, so that a part of it may start afresh.

        Raises:
            CheckpointError: it does not fit the data.
        """
        return model, ()

    @abstractmethod
    def dataset(self, settings: SettingsT, split: str) -> Dataset[Any]:
        """Return the samples of a split ("train", "val" or "test"); it is checked here, before any long work."""

    def collate(self, settings: SettingsT) -> Callable[[list[Any]], Batch]:
        """Return what makes a batch of samples; it must be picklable. By default it stacks tensors and numbers."""
        return default_collate

    def tokenizer(self, settings: SettingsT) -> Any:
        """Return transformers' tokenizer of the texts, or the processor that makes the model's inputs; None for none.

        Checkpoints keep it: it has a method `save_pretrained(folder)`.
        """
        return None

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, settings: SettingsT, epoch: float) -> Tensor:
        """Return the mean loss of a batch, a scalar; `epoch` is how many epochs of this phase are done (0.25, ...)."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, settings: SettingsT) -> dict[str, Tensor]:
        """Return one row per sample, [batch, ...] each and of the same shape in every batch: what `score` needs."""

    @abstractmethod
    def score(self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SettingsT) -> dict[str, float]:
        """Return the metrics of a whole split, in percent; samples without answers give none.

        Args:
            predictions: the rows of `collect`, in the split's order, on the CPU.
            samples: what `dataset` returned.
            settings: of the run.
        """

    @abstractmethod
    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return inputs of the published size for counting GMACs and measuring latency."""

    def pipeline_for(self, settings: SettingsT) -> str | None:
        """Return what the hub calls the task of the model in the settings: `pipeline`, unless models differ in it."""
        return self.pipeline

    def deciding(self, scores: Mapping[str, float]) -> str:
        """Return the metric that decides, of those that a split has: `metric`, unless a task has kinds of splits."""
        return self.metric

    def distill_options(self, settings: SettingsT) -> dict[str, float]:
        """Return how the dense model is the teacher, as options of `upop.distill`."""
        if (older := getattr(self, "teaching", None)) is not None:
            warn_renamed(f"{type(self).__name__}.teaching", "distill_options")
            options: dict[str, float] = older(settings)
            return options
        return {"features": settings.distill_weight}

    def optimizer(self, model: nn.Module, settings: SettingsT) -> torch.optim.Optimizer:
        """Return the optimizer of a phase; the loop sets its learning rate at every step."""
        return torch.optim.AdamW(model.parameters(), lr=settings.init_lr, weight_decay=settings.weight_decay)

    def sampler(self, samples: Dataset[Any], settings: SettingsT) -> Sampler[int] | None:
        """Return what chooses the training samples of an epoch, in order; None for each of them once, shuffled.

        A number beyond the last sample is another copy of a sample, drawn anew: number = sample + copy * samples.
        """
        return None

    def takes_pairs(self, settings: SettingsT) -> bool:
        """Return whether training batches must have an even number of samples."""
        return False

    def evaluated(self, settings: SettingsT) -> tuple[str, ...]:
        """Return the splits that are held out, of "val" and "test". Without "val" the last checkpoint is the best."""
        return ("val", "test")

    def collect(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, settings: SettingsT
    ) -> dict[str, Tensor]:
        """Return every sample's predictions, in the split's order, on the CPU; unreadable samples have none.

        Args:
            accelerator: gathers over processes; repeated samples that fill the last batch are dropped.
            model: in evaluation mode, on its device, without wrappers; gradients are off.
            loader: a prepared loader of the split.
            settings: of the run.
        """
        parts: list[dict[str, Tensor]] = []
        for batch in readable(accelerator, loader):
            with autocast(accelerator, settings):
                rows = self.predict(model, batch, settings)
            parts.append({name: value.cpu() for name, value in accelerator.gather_for_metrics(rows).items()})
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kept = counted(loader)
        return rows if kept is None else {name: value[kept] for name, value in rows.items()}

    def answers(
        self, model: nn.Module, samples: Dataset[Any], numbers: Sequence[int], settings: SettingsT
    ) -> Mapping[str, Any]:
        """Return what `examples` takes: by default, the predictions of some samples, [len(numbers), ...] each.

        Args:
            model: in evaluation mode, on its device, without wrappers; gradients are off.
            samples: what `dataset` returned for a held-out split.
            numbers: of the samples.
            settings: of the run.
        """
        batch = self.collate(settings)([samples[number] for number in numbers])
        return self.predict(model, to_device(batch, next(model.parameters()).device), settings)

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: SettingsT,
        album: Album,
    ) -> list[Example]:
        """Return some held-out samples with what every model answers, in a form that people read.

        Args:
            found: model's name -> what `answers` returned.
            samples: what `dataset` returned for the split.
            numbers: of the samples.
            settings: of the run.
            album: takes the images.
        """
        return []

    def about_examples(self, samples: Dataset[Any], numbers: Sequence[int], split: str) -> str:
        """Return which samples `examples` shows, in words; `split` is the published name."""
        total = len(samples)  # type: ignore[arg-type]
        return f"{len(numbers)} of the {total:,} samples of the {split} split, taken at even distances."

    def files(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SettingsT, split: str
    ) -> dict[str, Any]:
        """Return what evaluation servers take, file name -> JSON content, for the run folder's `result/`."""
        return {}

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Return "parameters" and "gmacs" of one sample of the published size, of what is deployed.

        A task whose published figures count otherwise adds "published_parameters" and "published_gmacs".
        """
        return {"parameters": count_parameters(model), "gmacs": count_macs(model, self.example(model, 1)) / 1e9}
