"""What a phase trains: a model and its optimizer, as Accelerate wraps them or as copies that are sharded."""

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
    HeldState,
    Sharding,
    load_whole_optimizer_state,
    split_groups,
    whole_optimizer_state,
)
from upop.runs.task import Task
from upop.settings import RunSettings


class Trained:
    """A model and its optimizer in the form in which they are trained.

    Args:
        accelerator: where to compute.
        task: makes the optimizer.
        settings: of the run.
        model: the model; where weights are sharded, a copy of it is trained.
        compression: of the model, if it is compressed.
        average: its moving average, if there is one.

    Attributes:
        model: what is called.
        optimizer: what takes steps.
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
            self._own = self._share_out()
            self.optimizer: Any = accelerator.prepare(self._own)
            return
        self._own = task.optimizer(model, settings)
        split_groups(self._own)
        self.model, self.optimizer = accelerator.prepare(model, self._own)

    def _share_out(self) -> torch.optim.Optimizer:
        """Shard a copy of the model over the processes; return an optimizer of it."""
        self._sharding = Sharding(self._whole, self._accelerator.device, self._compression, self._average)
        self.model = self._sharding.module
        own = self._task.optimizer(self.model, self._settings)
        split_groups(own)
        return own

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Have the optimizer resume from a state of `optimizer_state`."""
        load_whole_optimizer_state(self._own, state)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state, whole; on the main process alone what is sharded."""
        return whole_optimizer_state(self._own, keep=self._accelerator.is_main_process)

    def whole(self, device: torch.device | None = None) -> AbstractContextManager[None]:
        """Within the block the model and its average are up to date, whole and masked; all processes enter it."""
        return nullcontext() if self._sharding is None else self._sharding.whole(device)

    def end_step(self, compression: Compression, after_cut: Callable[[], None]) -> None:
        """Let a compression end a step; weights that are sharded are made whole for the cut, and sharded again.

        Args:
            compression: whose `before_step` or `skip_step` came before.
            after_cut: called where the model was cut, while it is whole.
        """
        due, sharding = compression.is_due, self._sharding
        if not due or sharding is None:
            compression.after_step([self.optimizer])
            if due:
                after_cut()
            return
        held = HeldState(self._own, sharding.module, self._whole)
        sharding.finish()
        compression.after_step([held])
        after_cut()
        self._own = self.optimizer.optimizer = self._share_out()
        self.load_optimizer(held.content())
        self.model.train()

    def finish(self) -> None:
        """Give the weights back to the model and its average."""
        if self._sharding is not None:
            self._sharding.finish()
        self._accelerator.free_memory()
