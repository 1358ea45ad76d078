"""The one training loop: dense training, search and retraining differ by their schedule and by a `Pruner`."""

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
from upop.runs.checkpoints import Place
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
    """What came of a step: the mean loss, whether a checkpoint is due, and whether the run is asked to end."""

    loss: float
    due: bool
    asked: bool


class Loop:
    """Runs phases of training one after the other, counting steps over all of them, and saves where it stands.

    Args:
        accelerator: where to compute.
        task: data, loss and metrics.
        settings: of the run.
        folder: takes the rows of metrics.jsonl, and the checkpoints.
        train: prepared batches to train on, as `make_loader` gives them.
        val: prepared batches to evaluate on after every epoch, if any.
        preemption: tells whether the run was asked to end.
        resumed: the content of a checkpoint to resume from.
        identity: what decides the result besides the settings; it is in the checkpoints.

    Attributes:
        progress: shows the steps; a silent one at first.
        notes: values (tensors, numbers, texts, lists and mappings of them) that the caller wants in the checkpoints;
            those of the checkpoint that the run goes on from.
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
        self._place = Place()
        self._phases: list[str] = []  # that have ended
        self._resumed = resumed
        self.notes: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        if resumed is not None:
            self._check(resumed)
            _refuse_older(resumed)
            self._phases = list(resumed["phases"])
            self.notes = dict(resumed["notes"])
            self._place = Place(**resumed["place"])
            # The samples of a step may come in other portions now: by other processes, in other batches.
            if self._place.batch == resumed["batches"]:
                self._place.batch = len(self._train)
            else:
                samples = self._place.batch * resumed["records_per_step"] // resumed["accumulate"]
                self._place.batch = samples // self._train.total_batch_size

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
        """What the checkpoint that the run goes on from holds of a `Compression`; only until the run goes on."""
        return None if self._resumed is None else self._resumed.get("compression")

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken, in all phases."""
        return self._place.steps

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
        """Train `model` for `epochs`, with evaluation after each; of a resumed run, what is left of that.

        Args:
            model: the model, on the CPU or its device; it is moved, and comes back unwrapped and on the device.
            phase: name for logs: "train" or "retrain"; steps that search a model are called "search".
            epochs: how many; 0 does nothing.
            schedule: learning rate by optimizer step of this phase.
            compression: of the model and its average, made anew or from `compression_state`.
            after_cut: called as soon as the model was cut.
            after_epoch: is given the model and the metrics of every epoch's evaluation; then the average and its own.
                Nothing is told of a model that is still to be cut.
            average: follows the weights, step by step. It is evaluated where nothing is searched.

        Raises:
            TrainingError: too many steps in a row had a loss or gradients that are not finite.
            PreemptedError: the run was asked to end, and a checkpoint was written.
            CheckpointError: the checkpoint to resume from is of another model.
        """
        if not epochs or phase in self._phases:
            return
        resumed = self._resumed
        if resumed is not None:
            with fitting():
                model.load_state_dict(resumed["model"])
                if average is not None:
                    average.module.load_state_dict(resumed["average"])
            self.progress.start_at(self._place.steps)
        trained = Trained(self._accelerator, self._task, self._settings, model, compression, average)
        if resumed is not None:
            trained.load_optimizer(resumed["optimizer"])
        else:
            self._place.phase = "search" if compression is not None and compression.searching else phase
            self._place.epoch, self._place.batch, self._place.phase_steps = 0, 0, 0
        place = self._place

        def save() -> None:
            state = trained.optimizer_state()
            with trained.whole(torch.device("cpu")):
                self._save(model, state, compression, average)

        def cut() -> None:
            after_cut()
            place.phase = phase

        if resumed is not None and place.batch in (0, len(self._train)):
            self._restore_randomness()
        while place.epoch < epochs:
            described = f"{place.epoch + 1}/{epochs}"
            self._train_epoch(trained, described, schedule, compression, cut, average, save)
            with trained.whole():
                self._evaluate(model, described, compression, average, after_epoch)
            place.epoch, place.batch = place.epoch + 1, 0
            place.epochs += 1
            save()
        trained.finish()
        self._phases.append(phase)

    def _train_epoch(
        self,
        trained: Trained,
        described: str,
        schedule: Schedule,
        compression: Compression | None,
        cut: Callable[[], None],
        average: ModelEmaV3 | None,
        save: Callable[[], None],
    ) -> None:
        place, settings = self._place, self._settings
        if place.batch == len(self._train):  # the checkpoint is of the moment before the evaluation
            return
        trained.model.train()
        losses: list[Tensor] = []  # of the forward passes of a step
        with self._preemption.deferred():
            for batch in self._watch.batches(self._batches(), place.phase):
                stepped: _Stepped | None = None
                phase, searching = place.phase, _search_of(compression)
                with self._accelerator.accumulate(trained.model):
                    rate = schedule(place.phase_steps)
                    for group in trained.optimizer.param_groups:
                        group["lr"] = rate
                    with autocast(self._accelerator, settings):
                        loss = self._task.loss(
                            trained.model, batch, settings, place.epoch + place.batch / len(self._train)
                        )
                    if compression is not None:
                        loss = compression.loss(loss)
                    self._accelerator.backward(loss)
                    losses.append(loss.detach())
                    if self._accelerator.sync_gradients:
                        stepped = self._step(trained, torch.stack(losses).mean(), compression, cut)
                        losses.clear()
                    trained.optimizer.zero_grad()
                place.batch += 1
                if stepped is not None:
                    if average is not None:
                        average.update(self._accelerator.unwrap_model(trained.model))
                    place.phase_steps += 1
                    place.steps += 1
                    self._log(phase, stepped.loss, rate, searching)
                    self.progress.advance(f"{phase} {described}")
                    if waiting := self._watch.warning():
                        self.progress.notify(waiting, "yellow")
                    if stepped.due or stepped.asked or (place.batch == len(self._train) and self._val is not None):
                        save()
                    if stepped.asked:
                        self._preemption.leave(f"A checkpoint was written after step {place.steps}.")

    def _batches(self) -> Iterator[Any]:
        """Yield the batches of the epoch that are still to come."""
        place = self._place
        set_epoch(self._train, place.epochs)
        if not place.batch:
            yield from readable(self._accelerator, self._train)
            return
        rest = skip_first_batches(self._train, place.batch)
        set_epoch(rest, place.epochs)
        for number, batch in enumerate(readable(self._accelerator, rest)):
            # Making an iterator draws a number, and the checkpoint is of a moment after that.
            if not number:
                self._restore_randomness()
            yield batch

    def _evaluate(
        self,
        model: nn.Module,
        described: str,
        compression: Compression | None,
        average: ModelEmaV3 | None,
        after_epoch: Callable[[nn.Module, dict[str, float]], None] | None,
    ) -> None:
        place, settings, pruner = self._place, self._settings, _search_of(compression)
        after_epoch = after_epoch if pruner is None else None
        if self._val is None:
            if after_epoch is not None:
                after_epoch(model, {})
            return
        candidates = {"": model}
        if average is not None and place.phase != "search":
            candidates["average"] = average.module
        for name, candidate in candidates.items():
            scores = evaluate(self._accelerator, self._task, settings, candidate, self._val)[0]
            split = self._task.splits["val"]
            row = {"phase": place.phase, "epoch": place.epoch, "step": place.steps, "split": split}
            self._folder.log(row | ({name: scores} if name else scores))
            words = "  ".join([*([name] if name else ()), *(f"{key} {value:.2f}" for key, value in scores.items())])
            ratio = f"  masked {pruner.current_ratio:.3f}" if pruner is not None else ""
            self.progress.notify(f"{place.phase} {described}  {split} {words}{ratio}")
            if after_epoch is not None:
                after_epoch(candidate, scores)

    def _step(
        self, trained: Trained, loss: Tensor, compression: Compression | None, cut: Callable[[], None]
    ) -> _Stepped:
        """Take a step if it is finite."""
        place = self._place
        parameters = list(trained.model.parameters())
        if self._settings.sharding == "fsdp":
            average_unsharded(trained.model)
        norm = total_norm(parameters)
        waited = time.monotonic() - self._saved_at >= 60 * self._settings.checkpoint_minutes
        # All ranks see the same averaged gradients, but each its own loss, clock and signals: they must decide alike.
        votes = torch.stack([loss.float(), *loss.new_tensor([waited, self._preemption.asked]).float()])
        votes = self._accelerator.reduce(votes, "mean")
        finite = torch.isfinite(norm) & torch.isfinite(votes[0])
        # Read at once: it is the one moment of a step at which the device is waited for.
        mean, due, asked, good = torch.cat([votes, finite.to(votes).view(1)]).tolist()
        stepped = _Stepped(mean, due > 0, asked > 0)
        if good:
            place.bad_in_a_row = 0
            if compression is not None:
                compression.before_step()
            if self._settings.clip_grad is not None:
                clip(parameters, self._settings.clip_grad, norm)
            trained.optimizer.step()
        else:
            place.bad_steps += 1
            place.bad_in_a_row += 1
            if compression is not None:
                compression.skip_step()
            self.progress.notify(f"step {place.steps}: loss or gradients are not finite; the step is skipped", "yellow")
            if place.bad_in_a_row >= self._settings.max_bad_steps:
                raise TrainingError(
                    f"{place.bad_in_a_row} steps in a row (up to step {place.steps}) had a loss or gradients that are "
                    f"not finite, max_bad_steps is {self._settings.max_bad_steps}. Lower init_lr, set clip_grad, or "
                    f"check the data. What was computed before is in {self._folder.path}."
                )
        if compression is not None:
            try:
                trained.end_step(compression, cut)
            except VerificationError as error:
                if good:
                    raise
                raise TrainingError(
                    f"The search ended at step {place.steps}, whose loss or gradients are not finite, and the model "
                    "could not be cut. Lower init_lr, set clip_grad, or check the data. "
                    f"What was computed before is in {self._folder.path}."
                ) from error
        return stepped

    def _log(self, phase: str, loss: float, rate: float, pruner: Pruner | None) -> None:
        place = self._place
        if place.steps % self._settings.log_every and place.steps != 1:
            return
        row: dict[str, Any] = {
            "phase": phase,
            "epoch": place.epoch,
            "step": place.steps,
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
        """Write a checkpoint; the random numbers of every process are in it."""
        randomness = gather_object([random_state(self._accelerator.device)])
        if self._accelerator.is_main_process:
            self._folder.checkpoints.write(
                self._place.steps,
                {
                    "settings": self._settings.model_dump(mode="json"),
                    "task": self._task.name,
                    "identity": self._identity,
                    "records_per_step": self.samples_per_step,
                    "accumulate": self._settings.accumulate,
                    "batches": len(self._train),
                    "place": asdict(self._place),
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
        # With another number of processes the draws of dropout differ anyway.
        restore_random_state(states[self._accelerator.process_index % len(states)], self._accelerator.device)
        self._resumed = None

    def _check(self, state: State) -> None:
        """Refuse to go on with other settings than the run began with."""
        before, now = current_names(state["settings"]), self._settings.model_dump(mode="json")
        # Of what is elsewhere by now the content is compared, where the checkpoint knows it.
        places = {name for name, value in self._settings if isinstance(value, Path)} | PLACES
        compared = set(now) - self._settings.passing - (places if state.get("identity") else set())
        fields = type(self._settings).model_fields  # an earlier upop did not know all of them
        before = {name: field.get_default(call_default_factory=True) for name, field in fields.items()} | before
        differing = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name in compared and before.get(name) != value
        ]
        if state["task"] != self._task.name:
            differing = [f"the task was {state['task']} and is {self._task.name}"]
        elif state["records_per_step"] != self.samples_per_step:
            differing.append(
                f"a step took {state['records_per_step']} samples (batch_size_train x accumulate x processes) and "
                f"takes {self.samples_per_step}"
            )
        if differing:
            raise SettingError(
                f"The run in {self._folder.path} cannot be resumed with other settings:\n  "
                + "\n  ".join(differing)
                + "\nGive the command that it was started with, or another --output-dir."
            )


def _search_of(compression: Compression | None) -> Pruner | None:
    """Return what searches the model, until it is cut."""
    return compression.pruner if compression is not None and compression.searching else None


@contextmanager
def fitting() -> Iterator[None]:
    """Explain what fails in the block, where the state of a run is given to a model that it may not be of."""
    try:
        yield
    except (RuntimeError, SettingError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint to resume from does not fit the model: {error} Has the file in pretrained changed, or "
            "the data that decides the model's sizes?"
        ) from error


def _refuse_older(state: State) -> None:
    """Refuse a compression that an earlier upop began: it cut at the end of an epoch, for another optimizer."""
    if "compression" not in state and (state.get("pruner") is not None or "plan" in state["notes"]):
        raise CheckpointError(
            "The run was begun by an earlier upop, which cut a model at the end of an epoch; this one cuts it in the "
            "middle of a training, and cannot go on with that. Let the version that began it end it, or begin it anew "
            "in another --output-dir."
        )
