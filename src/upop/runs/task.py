"""The interface of a task: data sets, a model, a loss and metrics. Everything else is shared."""

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
from upop.runs.bad_images import readable, scored_indices
from upop.runs.devices import autocast, to_device
from upop.settings import RunSettings

SettingsT = TypeVar("SettingsT", bound=RunSettings)
Batch = Mapping[str, Any]


class Task(ABC, Generic[SettingsT]):
    """A task: data, model, loss and metrics. Each subclass is one module, registered in `upop.tasks`."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """The metric that selects the best checkpoint; higher is better."""
    shown: ClassVar[tuple[str, ...]]
    """The metrics in the final table; results.json has all."""
    splits: ClassVar[Mapping[str, str]]
    """Role of a split ("train", "val", "test") -> its published name."""
    settings: ClassVar[type[RunSettings]]
    """The class of the task's settings; its fields become flags of the commands."""
    pipeline: ClassVar[str | None] = None
    """The task's `pipeline_tag` on the Hugging Face hub, for model cards; None if there is none."""
    model_prepares: ClassVar[bool] = False
    """Whether the model's own processor, returned by `tokenizer`, prepares inputs. Otherwise the settings decide."""
    update_first_step: ClassVar[bool] = True
    """Whether the reference search updates masks at its first step, as published for BLIP and CLIP."""

    @abstractmethod
    def build(self, settings: SettingsT) -> nn.Module:
        """Return a dense model with random weights."""

    def load(self, path: Path, settings: SettingsT) -> nn.Module:
        """Return the model in a checkpoint, dense or compressed. The default reads folders written by `upop.save`."""
        return load_into(self.build(settings), path)

    def start(self, path: Path, settings: SettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return a dense model initialised from a pre-trained checkpoint, and the keys that the checkpoint lacks."""
        return self.load(path, settings), ()

    def adapt(self, model: nn.Module, settings: SettingsT, *, training: bool) -> tuple[nn.Module, Sequence[str]]:
        """Return a loaded model adapted to the run's data, such as its number of classes, and the changes in words.

        Args:
            model: from `load` or `start`; it may be changed in place.
            settings: of the run.
            training: whether it will be trained, so that parts of it may be newly initialised.

        Raises:
            CheckpointError: it does not fit the data.
        """
        return model, ()

    @abstractmethod
    def dataset(self, settings: SettingsT, split: str) -> Dataset[Any]:
        """Return the samples of a split ("train", "val" or "test"), and check them before any long work."""

    def collate(self, settings: SettingsT) -> Callable[[list[Any]], Batch]:
        """Return the collate function of the loaders; it must be picklable. The default stacks tensors and numbers."""
        return default_collate

    def tokenizer(self, settings: SettingsT) -> Any:
        """Return a tokenizer or processor of transformers; None if the task has no text.

        Checkpoints store it by its method `save_pretrained(folder)`.
        """
        return None

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, settings: SettingsT, epoch: float) -> Tensor:
        """Return the mean loss of a batch, a scalar; `epoch` is the fractional epoch of the phase, from 0.0."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, settings: SettingsT) -> dict[str, Tensor]:
        """Return what `score` needs, by name: tensors [batch, ...] whose other sizes are equal in all batches."""

    @abstractmethod
    def score(self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SettingsT) -> dict[str, float]:
        """Return the metrics of a whole split, in percent; {} for a split without ground truth.

        Args:
            predictions: from `collect`, [samples, ...] each, in the split's order, on the CPU.
            samples: from `dataset`.
            settings: of the run.
        """

    @abstractmethod
    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return inputs of the published size, to count GMACs and measure latency."""

    def pipeline_for(self, settings: SettingsT) -> str | None:
        """Return the `pipeline_tag` of the model in the settings; the default is `pipeline`."""
        return self.pipeline

    def deciding(self, scores: Mapping[str, float]) -> str:
        """Return the name of the deciding metric among a split's scores; the default is `metric`."""
        return self.metric

    def distill_options(self, settings: SettingsT) -> dict[str, float]:
        """Return the options of `upop.distill` for the dense model as the teacher."""
        if (older := getattr(self, "teaching", None)) is not None:
            warn_renamed(f"{type(self).__name__}.teaching", "distill_options")
            options: dict[str, float] = older(settings)
            return options
        return {"features": settings.distill_weight}

    def optimizer(self, model: nn.Module, settings: SettingsT) -> torch.optim.Optimizer:
        """Return the optimizer of a phase; the loop sets its learning rate at each step."""
        return torch.optim.AdamW(model.parameters(), lr=settings.init_lr, weight_decay=settings.weight_decay)

    def sampler(self, samples: Dataset[Any], settings: SettingsT) -> Sampler[int] | None:
        """Return the sampler of the training split; None shuffles all samples.

        An index beyond the last sample draws another augmentation of one: index = sample + copy * samples.
        """
        return None

    def takes_pairs(self, settings: SettingsT) -> bool:
        """Return whether training batches must have an even number of samples."""
        return False

    def evaluated(self, settings: SettingsT) -> tuple[str, ...]:
        """Return the splits to evaluate, of "val" and "test". Without "val", the last checkpoint is the best."""
        return ("val", "test")

    def collect(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, settings: SettingsT
    ) -> dict[str, Tensor]:
        """Return the predictions for the readable samples of a split, [samples, ...] each, in its order, on the CPU.

        Args:
            accelerator: gathers over processes, and drops the repeated samples that fill the last batch.
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
        kept = scored_indices(loader)
        return rows if kept is None else {name: value[kept] for name, value in rows.items()}

    def answers(
        self, model: nn.Module, samples: Dataset[Any], numbers: Sequence[int], settings: SettingsT
    ) -> Mapping[str, Any]:
        """Return a model's answers to some samples, for `examples`: by default its predictions, [len(numbers), ...].

        Args:
            model: in evaluation mode, on its device, without wrappers; gradients are off.
            samples: from `dataset`, of a held-out split.
            numbers: indices of the samples.
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
        """Return some held-out samples with the answers of every model, readable for people.

        Args:
            found: name of a model -> its `answers`.
            samples: from `dataset`, of the split.
            numbers: indices of the samples.
            settings: of the run.
            album: stores the images.
        """
        return []

    def about_examples(self, samples: Dataset[Any], numbers: Sequence[int], split: str) -> str:
        """Return a sentence about the samples that `examples` shows; `split` is the published name."""
        total = len(samples)  # type: ignore[arg-type]
        return f"{len(numbers)} of the {total:,} samples of the {split} split, evenly spaced."

    def files(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SettingsT, split: str
    ) -> dict[str, Any]:
        """Return the files for evaluation servers, file name -> JSON content; they go to `result/`."""
        return {}

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Return "parameters" and "gmacs" of the deployed model, for one sample of the published size.

        A task whose paper counts differently adds "published_parameters" and "published_gmacs".
        """
        return {"parameters": count_parameters(model), "gmacs": count_macs(model, self.example(model, 1)) / 1e9}
