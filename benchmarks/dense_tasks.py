"""The generated tasks that benchmarks share: the folders of data and dense models, and how both are loaded."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from upop.cli.shapes import write_with_progress
from upop.errors import CheckpointError
from upop.runs.devices import make_accelerator
from upop.runs.evaluation import evaluate
from upop.runs.loaders import SeededDataset, make_loader
from upop.runs.task import Task
from upop.settings import read_settings
from upop.tasks import find_task

_ROOT = Path(__file__).parents[1]
FOLDER = Path("output/benchmarks")
"""Of data and run directories."""
DATA = {"retrieval-clip": "retrieval", "retrieval-crossget": "retrieval"}
"""The generated set of a task, where it is not called like the task."""
_CONFIGS = {"retrieval-crossget": "retrieval-clip"}
"""The task whose file in configs/shapes/ holds for another one."""
SAMPLES = {"segmentation": 10_000}
"""Of the generated set that models are compressed on, where it is another number than 20,000."""
_FRESH = {"vqa": 10_000}
"""Size of a second set, of another seed, where the test split has no answers: its validation split is the test."""


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return the type of a command's arguments that are names; argparse's `choices` refuse an empty list of them."""

    def name(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return name


def settings_of(
    name: str, folder: Path, samples: int, *, seed: int = 0, pixels: int = 64, **more: Any
) -> tuple[Task[Any], Any]:
    """Return a task and its settings for the small model on `samples` generated samples, which are written if needed.

    Args:
        name: of the task.
        folder: of data and run directories.
        samples: of the training split.
        seed: of the data.
        pixels: side of the images that are written; the settings say at which size the model sees them.
        more: settings beside those of configs/shapes/.
    """
    task, kind = find_task(name), DATA.get(name, name)
    details = (f"-seed{seed}" if seed else "") + (f"-{pixels}px" if pixels != 64 else "")
    data = write_with_progress(
        kind, folder / "data" / f"{kind}-{samples}{details}", seed=seed, size=samples, image_size=pixels
    )
    config = _ROOT / "configs" / "shapes" / f"{_CONFIGS.get(name, name).replace('-', '_')}.yaml"
    return task, read_settings(task.settings, config, {**data.settings, **more})


def dense_folder(name: str, folder: Path) -> Path:
    """Return the folder of a task's dense model.

    Raises:
        CheckpointError: it was not trained yet.
    """
    place = _ROOT / "assets" / "shapes-nlvr" if name == "nlvr" else folder / name / "dense" / "last"
    if not place.is_dir():
        raise CheckpointError(
            f"The dense model of {name} is looked for in {place}, and there is none. "
            f"Train it with: python benchmarks/shapes_tasks.py {name}"
        )
    return place


def prepare(name: str, folder: Path) -> None:
    """Write the generated data that `DenseTask` reads, so that several processes may read it at once.

    Raises:
        CheckpointError: the dense model was not trained yet.
    """
    dense_folder(name, folder)
    settings_of(name, folder, SAMPLES.get(name, 20_000))
    if name in _FRESH:
        _fresh_settings(name, folder)


def _fresh_settings(name: str, folder: Path) -> Any:
    return settings_of(name, folder, _FRESH[name], seed=1, num_workers=0)[1]


@dataclass
class DenseTask:
    """A task on generated data with its dense model.

    Attributes:
        task: what it is.
        settings: of the small model; data, batch sizes and rates.
        accelerator: of one process.
        model: the dense model, on its device, in training mode.
        folder: of data and run directories.
        most: largest number of evaluated samples of a held-out split; None evaluates all.
    """

    task: Task[Any]
    settings: Any
    accelerator: Accelerator
    model: nn.Module
    folder: Path
    most: int | None = None
    _held_out: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls, name: str, folder: Path = FOLDER, *, device: str = "cpu", most: int | None = None, **more: Any
    ) -> DenseTask:
        """Read a task's settings and dense model; `more` are further settings."""
        samples = SAMPLES.get(name, 20_000)
        given: dict[str, Any] = {"pretrained": str(dense_folder(name, folder)), "num_workers": 0, "device": device}
        task, settings = settings_of(name, folder, samples, **given, **more)
        accelerator = make_accelerator(settings)
        model, _ = task.adapt(task.load(Path(settings.pretrained), settings), settings, training=True)
        return cls(task, settings, accelerator, model.to(accelerator.device).train(), folder, most)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean loss of a batch, after the first epoch (momentum's targets count in full)."""
        return self.task.loss(model, batch, self.settings, 1.0)

    def example(self) -> dict[str, Tensor]:
        """Return inputs of one sample, for counting multiply-adds."""
        return self.task.example(self.model, 1)

    def quality(self, model: nn.Module, split: str) -> float:
        """Return the task's metric of a held-out split, "val" or "test", in percent."""
        if split not in self._held_out:
            self._held_out[split] = self.accelerator.prepare(self._loader(split))
        return evaluate(self.accelerator, self.task, self.settings, model, self._held_out[split])[0][self.task.metric]

    def _loader(self, split: str) -> DataLoader[Any]:
        settings, name = self.settings, self.task.name
        if split == "test" and name in _FRESH:
            loader = make_loader(self.task, _fresh_settings(name, self.folder), "val")
        else:
            loader = make_loader(self.task, settings, split)
        samples: Any = loader.dataset.samples  # type: ignore[attr-defined]
        if self.most is None or len(samples) <= self.most:
            return loader
        fewer = SeededDataset(samples.without(range(self.most, len(samples))), settings.seed)
        return DataLoader(fewer, settings.batch_size_test, collate_fn=loader.collate_fn)
