"""The model and optimizer of a phase: wrapped by Accelerate, or a sharded copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from upop.compression import Compression
from upop.runs.sharding import (
    GatheredState,
    Sharding,
    load_whole_optimizer_state,
    split_groups,
    whole_optimizer_state,
)
from upop.runs.task import Task
from upop.settings import RunSettings


class Trained:
    """The model and optimizer of a phase, prepared for training; with FSDP, of a sharded copy.

    Args:
        accelerator: prepares the two.
        task: makes the optimizer.
        settings: of the run.
        model: the model; with FSDP, it stays on the CPU between uses of `whole`.
        compression: of the model, if any.
        average: its moving average, if any.

    Attributes:
        model: the module to call.
        optimizer: the optimizer to step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task[Any],
        settings: RunSettings,
        model: nn.Module,
        compression: Compression | None,
        average: ModelEmaV3 | None,
    ) -> None:
        self._accelerator, self._task, self._settings = accelerator, task, settings
        self._whole, self._compression, self._average = model, compression, average
        self._sharding: Sharding | None = None
        self.model: nn.Module = model
        if settings.sharding == "fsdp":
            self._own = self._shard()
            self.optimizer: Any = accelerator.prepare(self._own)
            return
        self._own = task.optimizer(model, settings)
        split_groups(self._own)
        self.model, self.optimizer = accelerator.prepare(model, self._own)

    def _shard(self) -> torch.optim.Optimizer:
        """Shard a copy of the model over the processes; return an optimizer of it."""
        self._sharding = Sharding(self._whole, self._accelerator.device, self._compression, self._average)
        self.model = self._sharding.module
        own = self._task.optimizer(self.model, self._settings)
        split_groups(own)
        return own

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer from a result of `optimizer_state`."""
        load_whole_optimizer_state(self._own, state)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state; tensors of sharded parameters are gathered on the main process alone."""
        return whole_optimizer_state(self._own, keep=self._accelerator.is_main_process)

    def whole(self, device: torch.device | None = None) -> AbstractContextManager[None]:
        """Within the block, the model and its average have the current weights, unsharded; all processes enter it."""
        return nullcontext() if self._sharding is None else self._sharding.whole(device)

    def end_step(self, compression: Compression, after_cut: Callable[[], None]) -> None:
        """End a step of a compression; for the cut, sharded weights are gathered, and sharded again.

        Args:
            compression: after its `before_step` or `skip_step`.
            after_cut: called right after the cut, while the weights are gathered.
        """
        due, sharding = compression.is_due, self._sharding
        if not due or sharding is None:
            compression.after_step([self.optimizer])
            if due:
                after_cut()
            return
        held = GatheredState(self._own, sharding.module, self._whole)
        sharding.finish()
        compression.after_step([held])
        after_cut()
        self._own = self.optimizer.optimizer = self._shard()
        self.load_optimizer(held.content())
        self.model.train()

    def finish(self) -> None:
        """Copy the weights back to the model and its average."""
        if self._sharding is not None:
            self._sharding.finish()
        self._accelerator.free_memory()
