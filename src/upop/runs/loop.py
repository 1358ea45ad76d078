"""The training loop of every task. Dense training, search and retraining differ in schedule and `Compression` only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import gather_object
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from upop.compression import Compression
from upop.errors import CheckpointError, SettingError, TrainingError, VerificationError
from upop.pruning import Pruner
from upop.runs.bad_images import readable
from upop.runs.checkpoints import Position
from upop.runs.devices import autocast
from upop.runs.evaluation import evaluate
from upop.runs.folder import RunFolder
from upop.runs.identity import PLACES
from upop.runs.loaders import set_epoch
from upop.runs.preemption import Preemption
from upop.runs.progress import RunProgress
from upop.runs.randomness import random_state, restore_random_state
from upop.runs.schedules import Schedule
from upop.runs.sharding import average_unsharded, clip, total_norm
from upop.runs.task import Task
from upop.runs.trained import Trained
from upop.runs.watch import LoaderWatch
from upop.settings import RunSettings, current_names

State = Mapping[str, Any]


class _Stepped(NamedTuple):
    """Result of a step: mean loss over processes, whether a checkpoint is due, whether the run was asked to end."""

    loss: float
    due: bool
    asked: bool


class Loop:
    """Runs the phases of a training one after the other, counts steps over all of them, and writes checkpoints.

    Args:
        accelerator: where to compute.
        task: data, loss and metrics.
        settings: of the run.
        folder: gets the rows of metrics.jsonl, and the checkpoints.
        train: prepared loader of the training split, from `make_loader`.
        val: prepared loader that is evaluated after every epoch, if any.
        preemption: knows whether a signal asked the run to end.
        resumed: the content of a checkpoint to resume from.
        identity: the inputs besides the settings that decide the result; stored in the checkpoints.

    Attributes:
        progress: shows the steps; silent at first.
        notes: values of the caller (tensors, numbers, strings, lists and mappings of them) to store in the checkpoints;
            restored from the checkpoint of a resumed run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task[Any],
        settings: RunSettings,
        folder: RunFolder,
        train: Any,
        val: Any,
        preemption: Preemption,
        resumed: State | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self._identity = identity
        self._accelerator, self._task, self._settings = accelerator, task, settings
        self._folder = folder
        self._train, self._val = train, val
        self._preemption = preemption
        self._watch = LoaderWatch(settings.num_workers)
        self.progress = RunProgress(0, main=False)
        self._position = Position()
        self._phases: list[str] = []  # finished ones
        self._resumed = resumed
        self.notes: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        if resumed is not None:
            self._check(resumed)
            _refuse_older(resumed)
            self._phases = list(resumed["phases"])
            self.notes = dict(resumed["notes"])
            self._position = Position(**resumed["place"])
            # The number of processes and the batch size may have changed; the samples per step have not.
            if self._position.batch == resumed["batches"]:
                self._position.batch = len(self._train)
            else:
                samples = self._position.batch * resumed["samples_per_step"] // resumed["accumulate"]
                self._position.batch = samples // self._train.total_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(len(self._train) / self._settings.accumulate)

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, of all processes together."""
        size: int = self._train.total_batch_size
        return size * self._settings.accumulate

    @property
    def compression_state(self) -> State | None:
        """State of the `Compression` in the checkpoint to resume from; None once training has resumed."""
        return None if self._resumed is None else self._resumed.get("compression")

    @property
    def steps(self) -> int:
        """Optimizer steps so far, in all phases."""
        return self._position.steps

    def run(
        self,
        model: nn.Module,
        phase: str,
        epochs: int,
        schedule: Schedule,
        compression: Compression | None = None,
        after_cut: Callable[[], None] = lambda: None,
        after_epoch: Callable[[nn.Module, dict[str, float]], None] | None = None,
        average: ModelEmaV3 | None = None,
    ) -> None:
        """Train `model` for `epochs` and evaluate it after each; a resumed run trains the remaining ones.

        Args:
            model: on any device; it ends up on the accelerator's, without wrappers.
            phase: "train" or "retrain" in logs; steps of a search are logged as "search".
            epochs: how many; 0 does nothing.
            schedule: optimizer step of this phase -> learning rate.
            compression: of the model and its average, new or restored from `compression_state`.
            after_cut: called right after the cut.
            after_epoch: called with the model and its metrics after every evaluation, then with the average and its
                metrics; not before the cut.
            average: moving average of the weights, updated at every step and evaluated outside of a search.

        Raises:
            TrainingError: too many steps in a row had a loss or gradients that are not finite.
            PreemptedError: a signal asked the run to end; a checkpoint was written.
            CheckpointError: the checkpoint to resume from belongs to another model.
        """
        if not epochs or phase in self._phases:
            return
        resumed = self._resumed
        if resumed is not None:
            with explain_misfit():
                model.load_state_dict(resumed["model"])
                if average is not None:
                    average.module.load_state_dict(resumed["average"])
            self.progress.start_at(self._position.steps)
        trained = Trained(self._accelerator, self._task, self._settings, model, compression, average)
        if resumed is not None:
            trained.load_optimizer(resumed["optimizer"])
        else:
            self._position.phase = "search" if compression is not None and compression.searching else phase
            self._position.epoch, self._position.batch, self._position.phase_steps = 0, 0, 0
        at = self._position

        def save() -> None:
            state = trained.optimizer_state()
            with trained.whole(torch.device("cpu")):
                self._save(model, state, compression, average)

        def cut() -> None:
            after_cut()
            at.phase = phase

        if resumed is not None and at.batch in (0, len(self._train)):
            self._restore_randomness()
        while at.epoch < epochs:
            of_epochs = f"{at.epoch + 1}/{epochs}"
            self._train_epoch(trained, of_epochs, schedule, compression, cut, average, save)
            with trained.whole():
                self._evaluate(model, of_epochs, compression, average, after_epoch)
            at.epoch, at.batch = at.epoch + 1, 0
            at.epochs += 1
            save()
        trained.finish()
        self._phases.append(phase)

    def _train_epoch(
        self,
        trained: Trained,
        of_epochs: str,
        schedule: Schedule,
        compression: Compression | None,
        cut: Callable[[], None],
        average: ModelEmaV3 | None,
        save: Callable[[], None],
    ) -> None:
        at, settings = self._position, self._settings
        if at.batch == len(self._train):  # the checkpoint was written right before the evaluation
            return
        trained.model.train()
        losses: list[Tensor] = []  # of the forward passes of a step
        with self._preemption.deferred():
            for batch in self._watch.batches(self._batches(), at.phase):
                stepped: _Stepped | None = None
                phase, searching = at.phase, _search_of(compression)
                with self._accelerator.accumulate(trained.model):
                    rate = schedule(at.phase_steps)
                    for group in trained.optimizer.param_groups:
                        group["lr"] = rate
                    with autocast(self._accelerator, settings):
                        loss = self._task.loss(trained.model, batch, settings, at.epoch + at.batch / len(self._train))
                    if compression is not None:
                        loss = compression.loss(loss)
                    self._accelerator.backward(loss)
                    losses.append(loss.detach())
                    if self._accelerator.sync_gradients:
                        stepped = self._step(trained, torch.stack(losses).mean(), compression, cut)
                        losses.clear()
                    trained.optimizer.zero_grad()
                at.batch += 1
                if stepped is not None:
                    if average is not None:
                        average.update(self._accelerator.unwrap_model(trained.model))
                    at.phase_steps += 1
                    at.steps += 1
                    self._log(phase, stepped.loss, rate, searching)
                    self.progress.advance(f"{phase} {of_epochs}")
                    if waiting := self._watch.warning():
                        self.progress.notify(waiting, "yellow")
                    if stepped.due or stepped.asked or (at.batch == len(self._train) and self._val is not None):
                        save()
                    if stepped.asked:
                        self._preemption.leave(f"A checkpoint was written after step {at.steps}.")

    def _batches(self) -> Iterator[Any]:
        """Yield the remaining batches of the epoch."""
        at = self._position
        set_epoch(self._train, at.epochs)
        if not at.batch:
            yield from readable(self._accelerator, self._train)
            return
        rest = skip_first_batches(self._train, at.batch)
        set_epoch(rest, at.epochs)
        for number, batch in enumerate(readable(self._accelerator, rest)):
            # Making an iterator draws a random number, and the checkpoint was written after that draw.
            if not number:
                self._restore_randomness()
            yield batch

    def _evaluate(
        self,
        model: nn.Module,
        of_epochs: str,
        compression: Compression | None,
        average: ModelEmaV3 | None,
        after_epoch: Callable[[nn.Module, dict[str, float]], None] | None,
    ) -> None:
        at, settings, pruner = self._position, self._settings, _search_of(compression)
        after_epoch = after_epoch if pruner is None else None
        if self._val is None:
            if after_epoch is not None:
                after_epoch(model, {})
            return
        candidates = {"": model}
        if average is not None and at.phase != "search":
            candidates["average"] = average.module
        for name, candidate in candidates.items():
            scores = evaluate(self._accelerator, self._task, settings, candidate, self._val)[0]
            split = self._task.splits["val"]
            row = {"phase": at.phase, "epoch": at.epoch, "step": at.steps, "split": split}
            self._folder.log(row | ({name: scores} if name else scores))
            words = "  ".join([*([name] if name else ()), *(f"{key} {value:.2f}" for key, value in scores.items())])
            ratio = f"  masked {pruner.current_ratio:.3f}" if pruner is not None else ""
            self.progress.notify(f"{at.phase} {of_epochs}  {split} {words}{ratio}")
            if after_epoch is not None:
                after_epoch(candidate, scores)

    def _step(
        self, trained: Trained, loss: Tensor, compression: Compression | None, cut: Callable[[], None]
    ) -> _Stepped:
        """Take an optimizer step if loss and gradients are finite; skip it otherwise."""
        at = self._position
        parameters = list(trained.model.parameters())
        if self._settings.sharding == "fsdp":
            average_unsharded(trained.model)
        norm = total_norm(parameters)
        waited = time.monotonic() - self._saved_at >= 60 * self._settings.checkpoint_minutes
        # All ranks have the same gradients, but their own loss, clock and signals; they must reach the same decision.
        votes = torch.stack([loss.float(), *loss.new_tensor([waited, self._preemption.asked]).float()])
        votes = self._accelerator.reduce(votes, "mean")
        finite = torch.isfinite(norm) & torch.isfinite(votes[0])
        # One transfer: the only synchronisation with the device in a step.
        mean, due, asked, good = torch.cat([votes, finite.to(votes).view(1)]).tolist()
        stepped = _Stepped(mean, due > 0, asked > 0)
        if good:
            at.bad_in_a_row = 0
            if compression is not None:
                compression.before_step()
            if self._settings.clip_grad is not None:
                clip(parameters, self._settings.clip_grad, norm)
            trained.optimizer.step()
        else:
            at.bad_steps += 1
            at.bad_in_a_row += 1
            if compression is not None:
                compression.skip_step()
            self.progress.notify(f"step {at.steps}: loss or gradients are not finite; the step is skipped", "yellow")
            if at.bad_in_a_row >= self._settings.max_bad_steps:
                raise TrainingError(
                    f"{at.bad_in_a_row} steps in a row (up to step {at.steps}) had a loss or gradients that are "
                    f"not finite; max_bad_steps is {self._settings.max_bad_steps}. Lower init_lr, set clip_grad, or "
                    f"check the data. Earlier results are in {self._folder.path}."
                )
        if compression is not None:
            try:
                trained.end_step(compression, cut)
            except VerificationError as error:
                if good:
                    raise
                raise TrainingError(
                    f"The search ended at step {at.steps}, whose loss or gradients are not finite, and the model "
                    "could not be cut. Lower init_lr, set clip_grad, or check the data. "
                    f"Earlier results are in {self._folder.path}."
                ) from error
        return stepped

    def _log(self, phase: str, loss: float, rate: float, pruner: Pruner | None) -> None:
        at = self._position
        if at.steps % self._settings.log_every and at.steps != 1:
            return
        row: dict[str, Any] = {
            "phase": phase,
            "epoch": at.epoch,
            "step": at.steps,
            "loss": loss,
            "lr": rate,
            "seconds": round(self._folder.seconds, 3),
        }
        if self._watch.share is not None:
            row["waiting"] = round(self._watch.share, 4)
        if pruner is not None:
            row["ratio"] = pruner.current_ratio
            row["kept"] = {
                name: pruner.kept_share(modality=name) for name in {group.modality: 0 for group in pruner.groups}
            }
            if pruner.cost == "reference":
                attention, mlp = pruner.mask_sum("attention"), pruner.mask_sum("mlp")
                row["loss_sparsity"] = self._settings.w_sp_attn * attention + self._settings.w_sp_mlp * mlp
        self._folder.log(row)

    def _save(
        self, model: nn.Module, optimizer: State, compression: Compression | None, average: ModelEmaV3 | None
    ) -> None:
        """Write a checkpoint, with the random state of every process."""
        randomness = gather_object([random_state(self._accelerator.device)])
        if self._accelerator.is_main_process:
            self._folder.checkpoints.write(
                self._position.steps,
                {
                    "settings": self._settings.model_dump(mode="json"),
                    "task": self._task.name,
                    "identity": self._identity,
                    "samples_per_step": self.samples_per_step,
                    "accumulate": self._settings.accumulate,
                    "batches": len(self._train),
                    "place": asdict(self._position),
                    "phases": self._phases,
                    "notes": self.notes,
                    "model": model.state_dict(),
                    "optimizer": optimizer,
                    "average": None if average is None else average.module.state_dict(),
                    "compression": None if compression is None else compression.state_dict(),
                    "randomness": randomness,
                    "metrics": self._folder.metrics_size(),
                    "seconds": self._folder.seconds,
                },
            )
        self._saved_at = time.monotonic()

    def _restore_randomness(self) -> None:
        assert self._resumed is not None
        states = self._resumed["randomness"]
        # With another number of processes, dropout draws differently anyway.
        restore_random_state(states[self._accelerator.process_index % len(states)], self._accelerator.device)
        self._resumed = None

    def _check(self, state: State) -> None:
        """Refuse settings that differ from those of the resumed run."""
        before, now = current_names(state["settings"]), self._settings.model_dump(mode="json")
        # Files may have moved: their content is compared instead of their path, if the checkpoint has its digest.
        places = {name for name, value in self._settings if isinstance(value, Path)} | PLACES
        compared = set(now) - self._settings.passing - (places if state.get("identity") else set())
        fields = type(self._settings).model_fields  # checkpoints of earlier versions lack some
        before = {name: field.get_default(call_default_factory=True) for name, field in fields.items()} | before
        differing = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name in compared and before.get(name) != value
        ]
        if state["task"] != self._task.name:
            differing = [f"the task was {state['task']} and is {self._task.name}"]
        elif state["samples_per_step"] != self.samples_per_step:
            differing.append(
                f"a step had {state['samples_per_step']} samples (batch_size_train x accumulate x processes) and "
                f"has {self.samples_per_step}"
            )
        if differing:
            raise SettingError(
                f"The run in {self._folder.path} cannot be resumed with other settings:\n  "
                + "\n  ".join(differing)
                + "\nUse the command that started it, or choose another --output-dir."
            )


def _search_of(compression: Compression | None) -> Pruner | None:
    """Return the pruner while the search runs, else None."""
    return compression.pruner if compression is not None and compression.searching else None


@contextmanager
def explain_misfit() -> Iterator[None]:
    """Turn errors of loading a checkpoint's state into a `CheckpointError`: it may belong to another model."""
    try:
        yield
    except (RuntimeError, SettingError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint to resume from does not fit the model: {error} Check whether the file in pretrained, or "
            "the data that decides the model's sizes, has changed."
        ) from error


def _refuse_older(state: State) -> None:
    """Refuse a compression started by an earlier version, which cut at the end of an epoch and made a new optimizer."""
    if "compression" not in state and (state.get("pruner") is not None or "plan" in state["notes"]):
        raise CheckpointError(
            "The run was started by an earlier version of upop, which cut the model at the end of an epoch. This "
            "version cuts it during training and cannot resume such a run. Finish it with the version that started "
            "it, or start again in another --output-dir."
        )
