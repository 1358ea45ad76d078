"""`batch_size_train: auto`: finds the largest batch that fits into memory, by measured steps on real samples.

Gradients and optimizer state have a fixed size. Two small batches give the activation memory per sample, and the free
memory then determines the batch. On CUDA the result is tried, and reduced until it fits. On the CPU, where exhausted
memory kills the process, the measurement alone decides.

accelerate's find_executable_batch_size halves the batch after each out-of-memory error. It finds no larger batch than
it is given, and a CPU raises no such error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from upop.distillation import distill
from upop.errors import OutOfMemoryError, SettingError
from upop.runs.bad_images import without_notes
from upop.runs.devices import autocast, to_device
from upop.runs.loaders import SeededDataset
from upop.runs.memory import format_bytes, free_bytes, is_out_of_memory, peak_bytes
from upop.runs.task import Task
from upop.settings import RunSettings

_PROBES = ((8, 16), (4, 8), (2, 4), (1, 2))
"""Pairs of batch sizes to measure; the first pair that fits is used."""
_USED = 0.8
"""Share of the free memory to fill: other batches may have longer texts, and memory fragments."""
_DISTINCT = 16
_ROUND = 8


class BatchSize(NamedTuple):
    """The batch that fits.

    Attributes:
        size: samples per forward pass and process.
        accumulate: forward passes per step.
        fixed: bytes of a step for any batch: gradients, optimizer state, copies of the model.
        per_sample: bytes per sample.
        free: free bytes.
    """

    size: int
    accumulate: int
    fixed: int
    per_sample: int
    free: int

    def described(self) -> str:
        """Return the result in words."""
        passes = f", {self.accumulate} of them per step" if self.accumulate > 1 else ""
        return f"batches of {self.size} samples{passes}: {_described(self.fixed, self.per_sample, self.free)}"


def find_batch_size(
    accelerator: Accelerator,
    task: Task[Any],
    settings: RunSettings,
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    distilled: bool = False,
) -> BatchSize:
    """Return the largest batch that fits; the model's weights are restored, and it stays on the accelerator's device.

    If the settings give a `batch_size_train`, the samples per step stay the same: the batch is the largest divisor of
    batch_size_train x accumulate that fits. All processes use the smallest of their results. `distilled` says whether
    the dense model is a teacher, whose memory then counts.

    Raises:
        OutOfMemoryError: not even the smallest batch fits.
        SettingError: the model is sharded over processes.
    """
    if settings.sharding != "none":
        raise SettingError(
            "batch_size_train=auto measures steps of the whole model on one device, and sharding distributes it over "
            "several. Give a number."
        )
    device = accelerator.device
    samples = len(cast(SeededDataset, loader.dataset))
    state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    training = model.training
    model.to(device).train()
    free = _smallest(accelerator, free_bytes(device))
    probe = _Probe(accelerator, task, settings, model, loader, distilled)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            start, per_sample = probe.growth()
            fixed = start + probe.kept() + _copies(accelerator, settings, model, distilled)
            most = int((_USED * free - fixed) // per_sample)
            size = _choice(task, settings, samples, most, accelerator.num_processes)
            while size and device.type == "cuda" and not _smallest(accelerator, int(probe.bytes_of(size) is not None)):
                size = _choice(task, settings, samples, size * 4 // 5, accelerator.num_processes)
    finally:
        if probe.distillation is not None:
            probe.distillation.remove()
        del probe
        model.zero_grad(set_to_none=True)
        model.load_state_dict(state)
        model.train(training)
    if not size:
        raise OutOfMemoryError(_too_large(_described(fixed, per_sample, free)))
    return BatchSize(size, _step_samples(settings, size) // size, fixed, per_sample, free)


class _Probe:
    """Takes steps on real samples, and measures their memory."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task[Any],
        settings: RunSettings,
        model: nn.Module,
        loader: Any,
        distilled: bool,
    ) -> None:
        self._accelerator, self._task, self._settings = accelerator, task, settings
        self._model, self._loader = model, loader
        self._optimizer = task.optimizer(model, settings)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        # Memory does not depend on the teacher's weights.
        self.distillation = distill(model, copy.deepcopy(model)) if distilled else None
        self._items: list[Any] = []

    def growth(self) -> tuple[int, int]:
        """Return the fixed bytes of forward and backward, and the bytes per sample.

        Raises:
            OutOfMemoryError: not even one sample fits.
        """
        for few, more in _PROBES:
            if few % 2 and self._task.takes_pairs(self._settings):
                continue
            # The first step allocates gradients and optimizer state, which `kept` counts.
            if self.bytes_of(few, step=True) is None:
                continue
            sizes = self.bytes_of(few), self.bytes_of(more)
            if sizes[0] is not None and sizes[1] is not None:
                per_sample = max(1, (sizes[1] - sizes[0]) // (more - few))
                return max(0, sizes[1] - more * per_sample), per_sample
        raise OutOfMemoryError(_too_large("a step on the smallest batch does not fit"))

    def kept(self) -> int:
        """Return the bytes of gradients and of the optimizer's state."""
        kept = [each.grad for each in self._model.parameters() if each.grad is not None]
        kept += [value for state in self._optimizer.state.values() for value in state.values()]
        return sum(int(value.nbytes) for value in kept if isinstance(value, Tensor))

    def bytes_of(self, size: int, *, step: bool = False) -> int | None:
        """Return the bytes that a step on `size` samples adds; None if it does not fit."""
        device = self._accelerator.device
        try:
            batch = self._batch(size)
            if device.type != "cuda":
                return peak_bytes(lambda: self._train(batch, step))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self._train(batch, step)
            return torch.cuda.max_memory_allocated(device) - before
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _train(self, batch: Mapping[str, Any], step: bool) -> None:
        with autocast(self._accelerator, self._settings):
            loss: Tensor = self._task.loss(self._model, to_device(batch, self._accelerator.device), self._settings, 0.0)
            if self.distillation is not None:
                loss = loss + self.distillation.loss()
        loss.backward()
        if step:
            self._optimizer.step()

    def _batch(self, size: int) -> dict[str, Any]:
        samples = cast(SeededDataset, self._loader.dataset)
        distinct = min(_DISTINCT, len(samples))
        while len(self._items) < min(size, distinct):
            # Evenly spaced: neighbours may share an image.
            self._items.append(samples[len(self._items) * len(samples) // distinct])
        items = [self._items[number % len(self._items)] for number in range(size)]
        return without_notes(cast(dict[str, Any], self._loader.collate_fn(items)))


def _copies(accelerator: Accelerator, settings: RunSettings, model: nn.Module, distilled: bool) -> int:
    """Return the bytes of everything beside the model: moving average, teacher, gradient buckets."""
    weights = sum(int(parameter.nbytes) for parameter in model.parameters())
    dense = accelerator.device.type == "cpu" or distilled
    there = (settings.ema_decay is not None, dense, accelerator.num_processes > 1)
    return weights * sum(map(bool, there))


def _step_samples(settings: RunSettings, size: int) -> int:
    """Return the samples per step and process according to the settings."""
    named = "batch_size_train" in settings.model_fields_set
    return settings.batch_size_train * settings.accumulate if named else size * settings.accumulate


def _choice(task: Task[Any], settings: RunSettings, samples: int, most: int, processes: int) -> int:
    """Return the largest batch of at most `most` samples that the settings and the data allow; 0 if there is none."""
    queue = getattr(settings, "queue_size", None)
    most = min([most, samples, *([] if queue is None else [int(queue) // processes])])
    even = task.takes_pairs(settings)
    if "batch_size_train" in settings.model_fields_set:
        total = _step_samples(settings, 1)
        return max(
            (size for size in range(1, min(most, total) + 1) if total % size == 0 and not (even and size % 2)),
            default=0,
        )
    step = _ROUND if most >= _ROUND else 2 if even else 1
    return max(0, most // step * step)


def _smallest(accelerator: Accelerator, value: int) -> int:
    """Return the smallest value over all processes."""
    everyone = accelerator.gather(torch.tensor([value], device=accelerator.device))
    least: int = min(cast(Tensor, everyone).tolist())
    return least


def _described(fixed: int, per_sample: int, free: int) -> str:
    return (
        f"a step takes {format_bytes(fixed)} plus {format_bytes(per_sample)} per sample, and {format_bytes(free)} are "
        "free"
    )


def _too_large(why: str) -> str:
    return (
        f"batch_size_train=auto finds no batch that fits: {why}. Use amp (--amp), grad_checkpointing "
        "(--grad-checkpointing), smaller images (image_size), or a device with more memory."
    )
