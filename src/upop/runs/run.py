"""One run of a task: its accelerator, directory, data and console. All verbs start and end here."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from matplotlib.figure import Figure
from torch import nn

from upop.checkpoints import WEIGHTS, load, read_weights
from upop.checkpoints.files.hub import local_path
from upop.checkpoints.saving.card import write_card
from upop.errors import CheckpointError, DataError, SettingError
from upop.files import make_folder
from upop.libraries import is_pretrained
from upop.machine import machine
from upop.models.checkpointing import checkpoint_blocks
from upop.pruning import Plan, find_groups
from upop.pruning.beforehand import lost_parameters
from upop.report.figures import history_figure, kept_share_figure, save_figure
from upop.report.latency import measure_latency
from upop.report.results import ModelResult, Results, results_table
from upop.report.shares import GroupShare
from upop.runs.adapters import Adapters
from upop.runs.bad_images import BadImage, BadImages, scored_indices
from upop.runs.batch import find_batch_size
from upop.runs.devices import agreed, make_accelerator
from upop.runs.evaluation import evaluate, samples_of
from upop.runs.evaluations import evaluation_folder, is_evaluation_folder, write_summary
from upop.runs.examples import write_examples
from upop.runs.folder import RunFolder
from upop.runs.identity import changes, content_digest, identity_of
from upop.runs.inputs import resolved, sample
from upop.runs.limits import explained_limit
from upop.runs.loaders import SeededDataset, end_workers, make_loader
from upop.runs.loop import Loop
from upop.runs.lost import lost_process
from upop.runs.memory import explained_memory
from upop.runs.preemption import Preemption
from upop.runs.progress import RunProgress
from upop.runs.schedules import first_rate
from upop.runs.story import story_of
from upop.runs.task import Task
from upop.runs.tokens import merge_by_settings
from upop.runs.trackers import Trackers, check_trackers
from upop.runs.words import FOLDER, FewerWords, without_words
from upop.settings import RunSettings

Metrics = dict[str, dict[str, float]]
"""Split (its published name) -> metric -> value in percent."""


def _check_output_dir(settings: RunSettings) -> None:
    """Refuse an `output_dir` inside a data folder: every file and folder there is read as data."""
    place = Path(os.path.realpath(settings.output_dir))
    for folder in settings.listed_folders:
        if place.is_relative_to(os.path.realpath(folder)):
            raise SettingError(
                f"output_dir={settings.output_dir} lies in {folder}, where every image and folder is read as data. "
                "Nothing was written. Choose another --output-dir."
            )


class Run:
    """One run: its accelerator, directory, data and console. All verbs start and end here.

    A context manager: leaving it ends the worker processes and releases the directory.

    Args:
        task: data, model, loss and metrics.
        settings: of the run.
        verb: "train", "compress" or "evaluate".

    Raises:
        UPopError: settings, data, checkpoint, device or run directory are not usable.
    """

    def __init__(self, task: Task[Any], settings: RunSettings, verb: str) -> None:
        self.task, self.settings, self._verb = task, settings, verb
        self._given = settings
        self._words: FewerWords | None = None
        self.accelerator = make_accelerator(settings)
        self._main = self.accelerator.is_main_process
        self._progress = RunProgress(0, self._main)
        if verb == "evaluate":
            self.settings = settings = self._evaluation_settings(settings)
        self._prepared: dict[str, Any] = {}
        self.adapters: Adapters | None = None
        check_trackers(settings.trackers)
        _check_output_dir(settings)
        self.folder = RunFolder(settings.output_dir, self._main, settings.keep_checkpoints, notify=self.notify)
        try:
            self._begin(settings)
        except BaseException as error:
            self._end(error)
            raise

    def _begin(self, settings: RunSettings) -> None:
        task, verb = self.task, self._verb
        self._trackers = Trackers(self.accelerator, settings.trackers, settings.output_dir / "trackers")
        self.folder.listeners.append(self._trackers.log)
        self._resumed = self._checkpoint_to_resume()
        if self._resumed is None:
            self.folder.check()
        if settings.vocabulary is not None and verb == "compress":
            place = settings.output_dir / FOLDER
            words = agreed(self.accelerator, lambda: without_words(task, self._given, place))
            self._words = words
            self.notify(words.note)
            self.settings = settings = words.applied(settings)
        if settings.pretrained and not task.model_prepares:
            self.settings, notes = resolved(task, settings, self.checkpoint())
            settings = self.settings
            for note in notes:
                self.notify(note)
        self._held_out = task.evaluated(settings)
        if verb == "evaluate" and not self._held_out:
            raise SettingError("The settings leave nothing to evaluate on: no split has a file. Name one.")
        splits = self._held_out if verb == "evaluate" else ("train", *self._held_out)
        self._bad_images = BadImages(settings.skip_bad_images)
        self.loaders = {split: make_loader(task, settings, split, self._bad_images) for split in splits}
        for loader in self.loaders.values():
            for note in getattr(samples_of(loader), "notes", ()):
                self.notify(note)
        prepared = {"task": task.name} if task.model_prepares else sample(task, settings)
        self.folder.preparation, self.folder.tokenizer = prepared, task.tokenizer(settings)
        self._prepared |= {split: self.accelerator.prepare(self.loaders[split]) for split in self._held_out}
        self._rate_reported = False
        self._identity = None if verb == "evaluate" else self._check_identity()
        if self._resumed is None:
            self.folder.start(self._as_given(settings), task.name, verb)
        else:
            self.folder.restore(self._as_given(settings), task.name, verb, self._resumed["notes"].get("changes", []))
            self._bad_images.restore(self.folder.bad_images())
        self._bad_images.report = self._report_bad_image

    def _as_given(self, settings: RunSettings) -> RunSettings:
        """Return settings with the model and the tokenizer that were given, before words were removed."""
        if self._words is None:
            return settings
        names = [name for name in ("pretrained", "tokenizer") if name in type(settings).model_fields]
        return settings.model_copy(update={name: getattr(self._given, name) for name in names})

    def __enter__(self) -> Self:
        """Return the run; it has already started."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers and release the directory; explain errors of the system and of lost processes."""
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        try:
            for loader in self._prepared.values():
                end_workers(loader)
        finally:
            self.folder.close()
        if error is None:
            return
        explained = lost_process(error, self._resume_hint) or explained_limit(error, self._resume_hint)
        if explained is not None:
            raise explained from error

    def _resume_hint(self) -> str:
        if self._verb == "evaluate":
            return ""
        step = self.folder.checkpoints.latest()
        if step is None:
            return "No checkpoint had been written yet: the same command starts the run again."
        return f"What was written before is kept: the same command with --resume goes on from step {step}."

    def _evaluation_settings(self, settings: RunSettings) -> RunSettings:
        """Return the settings of an evaluation, with an `output_dir` outside the evaluated run or model."""
        checkpoint = self.checkpoint()
        place = agreed(
            self.accelerator, lambda: evaluation_folder(self.task.name, settings, lambda: content_digest(checkpoint))
        )
        return settings.model_copy(update={"output_dir": place})

    def _checkpoint_to_resume(self) -> Mapping[str, Any] | None:
        """Return the newest checkpoint if the run resumes, else None."""
        if self.settings.resume == "no" or self._verb == "evaluate":
            return None
        held: dict[str, Any] = {}

        def newest() -> str | None:
            found = self.folder.checkpoints.newest(whole=True)
            if found is None:
                return None
            held.update(found[1])
            return found[0].name

        # Only the main process is sure to see the files that it wrote.
        name = agreed(self.accelerator, newest)
        if name is None and self.settings.resume == "must":
            raise CheckpointError(
                f"--resume was given, but {self.folder.path} holds no checkpoint. Give the output_dir of the run, "
                "or use --resume auto, which starts a new run if there is none."
            )
        if name is None or held:
            return held or None
        try:
            return self.folder.checkpoints.read(name, whole=True)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} The main process can read it; all processes must see the same run directory."
            ) from error

    def _check_identity(self) -> Mapping[str, Any]:
        """Return the inputs besides the settings that decide the result; compare them with those of a resumed run.

        Raises:
            SettingError: they differ, and `allow_changes` is off.
        """
        settings = self.settings
        named = getattr(settings, "tokenizer", None)
        contents = {
            "pretrained": self.checkpoint() if settings.pretrained else None,
            "tokenizer": Path(named) if named and Path(named).exists() else None,
        }
        samples = {
            self.task.splits.get(split, split): cast(SeededDataset, loader.dataset).samples
            for split, loader in self.loaders.items()
        }

        def found() -> dict[str, Any]:
            try:
                return identity_of(contents, samples)
            except OSError as error:
                raise DataError(f"{error.filename} cannot be read: {error.strerror}. Check it.") from error

        now = agreed(self.accelerator, found)
        before = self._resumed.get("identity") if self._resumed is not None else None
        if self._resumed is None or before is None:
            return now
        decisive, minor = changes(before, now)
        if decisive and not settings.allow_changes:
            raise SettingError(
                f"The run in {self.folder.path} cannot be resumed, because its inputs have changed:\n  "
                + "\n  ".join(decisive)
                + "\nRestore the original inputs, or resume anyway with --allow-changes, which records the changes in "
                "versions.json and in the report."
            )
        for change in (*decisive, *minor):
            self.notify(change, "yellow")
        if decisive:
            noted = {"step": self._resumed["place"]["steps"], "changed": decisive}
            earlier = self._resumed["notes"].get("changes", [])
            self._resumed = {**self._resumed, "notes": {**self._resumed["notes"], "changes": [*earlier, noted]}}
        return now

    def notify(self, line: str, style: str = "") -> None:
        """Log a line and print it above the progress bar, on the main process; `style` is one of rich's."""
        self._progress.notify(line, style)

    def _report_bad_image(self, image: BadImage) -> None:
        self.folder.save_bad_images(self._bad_images.rows())
        count, most = len(self._bad_images), self.settings.skip_bad_images
        self.notify(f"unreadable image file {count}, of at most {most}: {image.described()}", "yellow")

    def checkpoint(self) -> Path:
        """Return the local path of `pretrained`; one process per machine downloads it if it is remote."""
        if not self.settings.pretrained:
            raise SettingError("A checkpoint is needed, and none was given. Set pretrained (--pretrained).")
        with self.accelerator.local_main_process_first():
            return local_path(self.settings.pretrained)

    def pretrained(self, *, training: bool) -> nn.Module:
        """Return the model in `pretrained`, adapted to the run's data."""
        model = self.adapted(self.task.load(self.checkpoint(), self.settings), training=training)
        model = model if self._words is None else self._words.marked(model)
        return model if training else merge_by_settings(model, self.settings)

    def adapted(self, model: nn.Module, *, training: bool) -> nn.Module:
        """Return a loaded model adapted to the run's data, and report every change."""
        model, changes = self.task.adapt(model, self.settings, training=training)
        for change in changes:
            self.notify(change)
        return model

    def settle(self, model: nn.Module) -> None:
        """Turn on gradient checkpointing and find the batch size, if the settings ask for it."""
        if self.settings.grad_checkpointing:
            checkpoint_blocks(model)
        if not self.settings.batch_size_auto:
            return
        if self._resumed is not None:  # a resumed run keeps the batch size that it found
            sizes = {name: self._resumed["settings"][name] for name in ("batch_size_train", "accumulate")}
        else:
            found = find_batch_size(
                self.accelerator,
                self.task,
                self.settings,
                model,
                self.loaders["train"],
                distilled=self._verb == "compress" and bool(self.settings.distill_weight),
            )
            self.notify(found.described())
            sizes = {"batch_size_train": found.size, "accumulate": found.accumulate}
        self.settings = self.settings.model_copy(update=sizes)
        self.accelerator.gradient_accumulation_steps = self.settings.accumulate
        self.loaders["train"] = make_loader(self.task, self.settings, "train", self._bad_images)
        if self._resumed is None:
            self.folder.write_settings(self._as_given(self.settings))

    def first_rate(self, loop: Loop) -> float:
        """Return the initial learning rate, and report it once if it is scaled with the batch."""
        rate = first_rate(self.settings, loop.samples_per_step)
        if self.settings.lr_batch is not None and not self._rate_reported:
            self._rate_reported = True
            self.notify(
                f"learning rate {rate:.3g}: init_lr ({self.settings.init_lr:g}) x {loop.samples_per_step} samples per "
                f"step / lr_batch ({self.settings.lr_batch})"
            )
        return rate

    @contextmanager
    def training(self, epochs: int, preemption: Preemption) -> Iterator[Loop]:
        """Yield a loop, resumed if the run is, and show one progress bar over `epochs` epochs."""
        self._prepared["train"] = self.accelerator.prepare(self.loaders["train"])
        loop = Loop(
            self.accelerator,
            self.task,
            self.settings,
            self.folder,
            self._prepared["train"],
            self._prepared.get("val"),
            preemption,
            self._resumed,
            self._identity,
        )
        if self._resumed is not None and (
            lost := self.folder.resume(self._resumed["metrics"], self._resumed["seconds"])
        ):
            warnings.warn(lost, stacklevel=2)
        tracked = self.folder.metrics() if self._main else []
        with (
            explained_memory(self.settings, self.accelerator.device),
            self._trackers.running(tracked),
            RunProgress(epochs * loop.steps_per_epoch, self._main) as self._progress,
        ):
            loop.progress = self._progress
            if self._resumed is not None:
                self.notify(f"resumed after step {loop.steps}")
            yield loop

    def evaluate(self, model: nn.Module) -> Metrics:
        """Return all metrics by split, under its published name, and write the files for evaluation servers."""
        found = {}
        for split in self._held_out:
            loader = self._prepared[split]
            scores, predictions = evaluate(self.accelerator, self.task, self.settings, model, loader)
            found[self.task.splits[split]] = scores
            self.folder.save_files(self.task.files(predictions, samples_of(loader), self.settings, split))
        return found

    def before_retraining(self, model: nn.Module) -> str:
        """Return the validation score of a model before retraining, in words; "" without a validation split."""
        if "val" not in self._held_out:
            return ""
        loader = self._prepared["val"]
        scores = evaluate(self.accelerator, self.task, self.settings, model, loader)[0]
        return f"; before retraining  {self.format_scores({self.task.splits['val']: scores})}"

    def format_scores(self, metrics: Metrics) -> str:
        """Return the deciding metric of each split, in words."""
        named = ((split, self.task.deciding(scores), scores) for split, scores in metrics.items())
        return "  ".join(f"{split} {name} {scores[name]:.2f}" for split, name, scores in named if name in scores)

    def keep_best(self, loop: Loop, model: nn.Module) -> Callable[[nn.Module, dict[str, float]], None]:
        """Return a callback for the end of an epoch: it saves `model` as "last", and the best one so far as "best".

        The model and its moving average compete. On equal scores, which few held-out samples often give, the lowest
        loss decides; without a loss, the first epoch.
        """

        def after_epoch(candidate: nn.Module, scores: dict[str, float]) -> None:
            if candidate is model:
                self._save("last", model)
            value = scores.get(self.task.deciding(scores))
            loss = scores.get("loss", math.inf)
            before = (loop.notes.get("best", -math.inf), -loop.notes.get("best_loss", math.inf))
            if value is None or (value, -loss) > before:
                loop.notes |= {"best": value} | ({"best_loss": loss} if "loss" in scores else {})
                self._save("best", candidate)

        return after_epoch

    def _save(self, name: str, model: nn.Module) -> None:
        with self.adapters.merged() if self.adapters is not None else nullcontext():
            self.folder.save_model(name, model)

    def best(self, model: nn.Module) -> tuple[nn.Module, Metrics]:
        """Return `model` with the weights of the best epoch, and its metrics on all held-out splits."""
        self.accelerator.wait_for_everyone()
        best = self.folder.path / "best"
        # transformers may shard files, and rename tensors as its older versions named them.
        state = load(best).state_dict() if is_pretrained(model) else read_weights(best / WEIGHTS)
        model.load_state_dict(state)
        return model, self.evaluate(model)

    def finish(self, models: Mapping[str, tuple[nn.Module, Metrics]], plan: Plan | None = None) -> Results | None:
        """Measure sizes and latency; write results, figures, model card and examples; print the table."""
        if not self._main:
            return None
        left_out = {self.task.splits[split]: counts for split in self._held_out if (counts := self._left_out(split))}
        measured = measure(self.task, models, self.accelerator.device, self.settings.latency_batch)
        results = measured.model_copy(update={"left_out": left_out})
        path = self.folder.path
        results.write_json(self.folder.claim("results.json"), overwrite=True)
        make_folder(path / "figures")
        if plan is not None:
            dense = next(iter(models.values()))[0]
            self._save_figure(kept_share_figure(GroupShare.of(find_groups(dense), plan)), "kept")
            changed = [change for each in self.folder.changes() for change in each["changed"]]
            write_card(
                path / "best",
                story_of(self.task, self._as_given(self.settings), results, self.folder.command(), changed),
            )
        if rows := self.folder.metrics():
            val = self.task.splits["val"]
            scores = results.dense.metrics.get(val, {})
            name = self.task.deciding(scores)
            baseline = scores.get(name) if plan is not None else None
            self._save_figure(history_figure(rows, metric=name, dense=baseline), "history")
        self._progress.console.print(results_table(results))
        self._keep_examples({name: model for name, (model, _) in models.items()}, results)
        if self._verb == "evaluate" and is_evaluation_folder(path):
            about = {"task": self.task.name, "pretrained": self.settings.pretrained}
            summary = write_summary(path, results.content(), about)
            self.notify(f"Written to {summary} and {path}/; the run is unchanged. As a page: upop report {path}")
        else:
            files = "results.json" if self._verb == "evaluate" else "results.json, metrics.jsonl, figures/, best/"
            self.notify(f"Written to {path}: {files}. As a page: upop report {path}")
        return results

    def _save_figure(self, figure: Figure, name: str) -> None:
        save_figure(figure, self.folder.claim(f"figures/{name}.png"), overwrite=True)

    def _left_out(self, split: str) -> tuple[int, int] | None:
        """Return how many samples of a split were unreadable, and how many there are; None if all were read."""
        samples, kept = self.loaders[split].dataset, scored_indices(self.loaders[split])
        total = len(samples)  # type: ignore[arg-type]
        return None if kept is None else (total - len(kept), total)

    def _keep_examples(self, models: Mapping[str, nn.Module], results: Results) -> None:
        """Write the answers of all models to some samples, of the last split with ground truth if there is one."""
        if not self.settings.examples:
            return
        metrics = results.models[-1].metrics
        splits = [split for split in self._held_out if metrics.get(self.task.splits[split])] or list(self._held_out)
        if splits:
            samples, name = samples_of(self._prepared[splits[-1]]), self.task.splits[splits[-1]]
            write_examples(self.task, models, samples, self.settings, name, self.folder.path / "examples")


def with_lost(counts: dict[str, Any], lost: int) -> dict[str, Any]:
    """Return the counts of a dense model with the parameters of the words that it lost."""
    return {**counts, "parameters": counts["parameters"] + lost}


def measure(
    task: Task[Any], models: Mapping[str, tuple[nn.Module, Metrics]], device: torch.device, batch_size: int
) -> Results:
    """Return parameters, GMACs, latency and metrics of models; the first model is the baseline.

    Args:
        task: gives example inputs and counts parameters.
        models: name -> model and its metrics.
        device: of the measurement; the models move there.
        batch_size: samples per forward pass for latency. GMACs are those of one sample, of the published size.
    """
    built = {name: model.to(device) for name, (model, _) in models.items()}
    first = next(iter(built.values()))
    latency = measure_latency(built, task.example(first, batch_size))
    lost = {name: lost_parameters(model) if model is first else 0 for name, model in built.items()}
    rows = [
        ModelResult(name=name, metrics=metrics, latency_ms=latency[name], **with_lost(task.counts(model), lost[name]))
        for name, (model, metrics) in models.items()
    ]
    return Results(
        models=tuple(rows), shown=task.shown, baseline=rows[0].name, batch_size=batch_size, machine=machine(device)
    )
