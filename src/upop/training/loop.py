"""The one training loop: dense training, search and retraining differ by their schedule and by a `Pruner`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from upop.errors import TrainingError
from upop.pruning import Pruner
from upop.settings import RunSettings
from upop.training.devices import autocast
from upop.training.evaluation import evaluate
from upop.training.folder import RunFolder
from upop.training.loaders import set_epoch
from upop.training.progress import RunProgress
from upop.training.task import Task

Schedule = Callable[[int], float]
_POWER = 0.9  # of the published polynomial schedule


def first_rate(settings: RunSettings, records: int) -> float:
    """Return `init_lr` for steps over so many records, of all processes together."""
    return settings.init_lr if settings.lr_batch is None else settings.init_lr * records / settings.lr_batch


def constant(settings: RunSettings, highest: float) -> Schedule:
    """Return the search's schedule: the same rate throughout, `search_lr`, or else `highest`."""
    rate = highest if settings.search_lr is None else settings.search_lr
    return lambda _step: rate


def falling(settings: RunSettings, highest: float, epochs: int, steps_per_epoch: int) -> Schedule:
    """Return the schedule from `highest` down to `min_lr` that the settings choose, after a warm-up."""
    by_epoch = settings.schedule == "epoch"
    total = epochs if by_epoch else epochs * steps_per_epoch
    lowest = min(settings.min_lr, highest)
    warmup = settings.warmup_steps + settings.warmup_epochs * steps_per_epoch

    def rate(step: int) -> float:
        place = (step // steps_per_epoch if by_epoch else step) / total
        polynomial = settings.schedule == "polynomial"
        share = (1 - place) ** _POWER if polynomial else (1 + math.cos(math.pi * place)) / 2
        value = lowest + (highest - lowest) * share
        return value * min(1.0, (step + 1) / warmup) if warmup else value

    return rate


@dataclass
class Best:
    """The best value of the deciding metric so far, and whether the last evaluation reached it."""

    value: float = -math.inf

    def improves(self, value: float) -> bool:
        """Take a new value; return whether it is the best one."""
        if value > self.value:
            self.value = value
            return True
        return False


class Loop:
    """Runs phases of training one after the other, counting steps over all of them.

    Args:
        accelerator: where to compute.
        task: data, loss and metrics.
        settings: of the run.
        folder: takes the rows of metrics.jsonl.
        train: batches to train on, as `make_loader` gives them.
        val: prepared batches to evaluate on after every epoch, if any.

    Attributes:
        progress: shows the steps; a silent one at first.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task[Any],
        settings: RunSettings,
        folder: RunFolder,
        train: DataLoader[Any],
        val: Any,
    ) -> None:
        self._accelerator, self._task, self._settings = accelerator, task, settings
        self._folder = folder
        self._train, self._val = accelerator.prepare(train), val
        self.progress = RunProgress(0, main=False)
        self._step = 0
        self._epoch = 0
        self._bad_in_a_row = 0
        self.bad_steps = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(len(self._train) / self._settings.accumulate)

    @property
    def records_per_step(self) -> int:
        """Records per optimizer step, of all processes together."""
        size: int = self._train.total_batch_size
        return size * self._settings.accumulate

    def run(
        self,
        model: nn.Module,
        phase: str,
        epochs: int,
        schedule: Schedule,
        pruner: Pruner | None = None,
        after_epoch: Callable[[nn.Module, dict[str, float]], None] | None = None,
        average: ModelEmaV3 | None = None,
    ) -> None:
        """Train `model` for `epochs`, with evaluation after each.

        Args:
            model: the model, on the CPU or its device; it is moved, and comes back unwrapped and on the device.
            phase: name for logs: "train", "search" or "retrain".
            epochs: how many; 0 does nothing.
            schedule: learning rate by optimizer step of this phase.
            pruner: in the search, steps along with the optimizer.
            after_epoch: is given the model and the metrics of every epoch's evaluation; then the average and its own.
            average: follows the weights, step by step. Outside the search, where it carries no masks, it is evaluated.

        Raises:
            TrainingError: too many steps in a row had a loss or gradients that are not finite.
        """
        if not epochs:
            return
        settings = self._settings
        optimizer = self._task.optimizer(model, settings)
        wrapped, optimizer = self._accelerator.prepare(model, optimizer)
        done = 0
        for epoch in range(epochs):
            set_epoch(self._train, self._epoch)
            self._epoch += 1
            wrapped.train()
            for number, batch in enumerate(self._train):
                with self._accelerator.accumulate(wrapped):
                    for group in optimizer.param_groups:
                        group["lr"] = schedule(done)
                    with autocast(self._accelerator, settings):
                        loss = self._task.loss(wrapped, batch, settings, epoch + number / len(self._train))
                    self._accelerator.backward(loss)
                    if self._accelerator.sync_gradients:
                        self._step_if_finite(wrapped, optimizer, loss.detach(), pruner)
                    optimizer.zero_grad()
                if self._accelerator.sync_gradients:
                    if average is not None:
                        average.update(self._accelerator.unwrap_model(wrapped))
                    done += 1
                    self._step += 1
                    self._log(phase, epoch, loss.detach(), schedule(done - 1), pruner)
                    self.progress.advance(f"{phase} {epoch + 1}/{epochs}")
            if self._val is None:
                if after_epoch is not None:
                    after_epoch(model, {})
                continue
            candidates = (
                {"": model} if average is None or pruner is not None else {"": model, "average": average.module}
            )
            for name, candidate in candidates.items():
                scores = evaluate(self._accelerator, self._task, settings, candidate, self._val)[0]
                split = self._task.splits["val"]
                row = {"phase": phase, "epoch": epoch, "step": self._step, "split": split}
                self._folder.log(row | ({name: scores} if name else scores))
                told = "  ".join([*([name] if name else ()), *(f"{key} {value:.2f}" for key, value in scores.items())])
                ratio = f"  masked {pruner.current_ratio:.3f}" if pruner is not None else ""
                self.progress.say(f"{phase} {epoch + 1}/{epochs}  {split} {told}{ratio}")
                if after_epoch is not None:
                    after_epoch(candidate, scores)
        self._accelerator.free_memory()

    def _step_if_finite(self, model: nn.Module, optimizer: Any, loss: Tensor, pruner: Pruner | None) -> None:
        parameters = list(model.parameters())
        norm = torch.nn.utils.get_total_norm([part.grad for part in parameters if part.grad is not None])
        # All ranks see the same averaged gradients, but each its own loss: they must decide alike.
        finite = torch.isfinite(norm) & torch.isfinite(self._accelerator.reduce(loss, "mean"))
        if bool(finite):
            self._bad_in_a_row = 0
            if pruner is not None:
                pruner.step()
            if self._settings.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._settings.clip_grad, norm)
            optimizer.step()
            return
        self.bad_steps += 1
        self._bad_in_a_row += 1
        if pruner is not None:
            pruner.skip()
        self.progress.say(f"[yellow]step {self._step}: loss or gradients are not finite; the step is skipped[/yellow]")
        if self._bad_in_a_row >= self._settings.max_bad_steps:
            raise TrainingError(
                f"{self._bad_in_a_row} steps in a row (up to step {self._step}) had a loss or gradients that are not "
                f"finite, max_bad_steps is {self._settings.max_bad_steps}. Lower init_lr, set clip_grad, or check the "
                f"data. What was computed before is in {self._folder.path}."
            )

    def _log(self, phase: str, epoch: int, loss: Tensor, rate: float, pruner: Pruner | None) -> None:
        if self._step % self._settings.log_every and self._step != 1:
            return
        row: dict[str, Any] = {
            "phase": phase,
            "epoch": epoch,
            "step": self._step,
            "loss": float(loss),
            "lr": rate,
            "seconds": round(time.monotonic(), 3),
        }
        if pruner is not None:
            row["ratio"] = pruner.current_ratio
            row["kept"] = {
                name: pruner.kept_share(modality=name) for name in {unit.modality: 0 for unit in pruner.units}
            }
            if pruner.cost == "reference":
                attention, mlp = pruner.mask_sum("attention"), pruner.mask_sum("mlp")
                row["loss_sparsity"] = self._settings.w_sp_attn * attention + self._settings.w_sp_mlp * mlp
        self._folder.log(row)
