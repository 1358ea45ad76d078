"""`Compression`: the one object that a training loop needs, from the dense model to the compressed one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from upop.distillation import Distillation, distill
from upop.errors import LayoutError, SettingError, StepError
from upop.pruning import Plan, Pruner, shrink
from upop.pruning.carried import plan_of, set_plan
from upop.pruning.choice import check_whole
from upop.pruning.deprecated import renamed_arguments
from upop.pruning.goal import Goal
from upop.pruning.groups import tensor_of
from upop.pruning.known import know_as, sized
from upop.pruning.masks import unwrapped
from upop.pruning.optimizers import copies_following, cut_optimizer, rotate_optimizer
from upop.pruning.replicas import rebuild_replicas
from upop.pruning.seen import FirstCall
from upop.pruning.sharded import reshard
from upop.pruning.slicing import slicings
from upop.pruning.slips import check_model
from upop.pruning.targets import Target
from upop.pruning.whole import dense_copy

SHARE = 0.1
"""Of all steps that the search takes, by default."""
_FEWEST = 16
"""Steps of a search; with fewer, the scores say too little. Short runs give it a third of all steps instead."""


def steps_of_search(steps: int, share: float = SHARE) -> int:
    """Return the number of search steps in a training."""
    return min(steps, max(round(share * steps), min(_FEWEST, steps // 3), 1))


class Compression:
    """Compresses a model while it is trained: searches, cuts, and distils the dense model into the smaller one.

        compression = upop.Compression(model, ratio=0.5, steps=total_steps)
        for batch in loader:
            loss = compression.loss(criterion(model, batch))
            loss.backward()
            compression.step(optimizer)
            scheduler.step()
            optimizer.zero_grad()

    The model, the optimizer, the scheduler, and wrappers of DDP, Accelerate and torch.compile stay the same objects:
    the cut shrinks parameters in place, and the optimizer state with them. As a context manager, it ends with its
    block: the model is cut to the progress reached; after an exception, masks and hooks are removed.

    Args:
        model: the dense model, trained on the task; it may be wrapped, and must be called as a module.
        ratio: share of the prunable parameters to remove, in (0, 1).
        steps: optimizer steps of the whole training.
        target: instead of a ratio, limits for the whole model: {"params": 0.5}, {"params": "40MB@float16"},
            {"params": 0.5, "macs": "2x"}; see `upop.Pruner`.
        teacher: the dense model, for distillation. By default a copy of the present `model`, if it has norms to
            compare. False trains without a teacher, with faster steps.
        search_share: share of search steps; at least 16 steps, or a third of a shorter training.
        search_steps: number of search steps, instead of `search_share`.
        averages: moving averages of the model, cut along with it: modules, or objects with a `module`
            (`AveragedModel`, timm's `ModelEmaV3`).
        verify: inputs on which the masked and the cut model are compared, as for `upop.Pruner.shrink`; by default a few
            samples of the first batch. False cuts without proof.
        distill: options of `upop.distill`: features, logits, temperature.
        resume: a state of `state_dict` to resume from, as with `load_state_dict`. For a state after the cut, the model
            may already be cut; then pass the dense model as `teacher`, or False.
        settings: further arguments of `upop.Pruner`: round_to, cost, importance, include, exclude, example, groups,
            ...

    Attributes:
        model: the given model.
        pruner: of the search; None in a training that was resumed after the cut.
        distillation: the distillation in use, or None.

    Raises:
        SettingError: a setting is out of range.
        LayoutError: the model has no prunable group.
    """

    @renamed_arguments(share="search_share", search="search_steps")
    def __init__(
        self,
        model: nn.Module,
        ratio: float | None = None,
        steps: int | None = None,
        *,
        target: Target | None = None,
        teacher: nn.Module | bool | None = None,
        search_share: float = SHARE,
        search_steps: int | None = None,
        averages: Any = (),
        verify: Any = True,
        distill: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        check_model(model, "Compression")
        Goal(ratio, target)  # refused before the model is copied
        steps = check_whole("steps", steps)
        if not 0 < search_share <= 1:
            raise SettingError(f"search_share is a share of all steps, in (0, 1]; found {search_share!r}.")
        searched = steps_of_search(steps, search_share) if search_steps is None else search_steps
        if not 0 < searched <= steps:
            raise SettingError(f"search_steps is a number from 1 to steps={steps}; found {search_steps!r}.")
        self.model, self.steps = model, steps
        self._verify, self._options, self._insists = verify, dict(distill or {}), teacher is not None
        self._averages = [_averaged(each) for each in (averages if isinstance(averages, Sequence) else [averages])]
        self._done, self._passed, self._closed = 0, False, False
        self._stepping: list[weakref.ref[Any]] = []  # the optimizers of the last step
        self._teacher = teacher if isinstance(teacher, nn.Module) else None
        self.distillation: Distillation | None = None
        self._first: FirstCall | None = None
        self._plan = _cut_by(unwrapped(model), resume)
        if self._plan is not None and self._teacher is None and teacher is not False:
            raise SettingError(
                f"This {type(unwrapped(model)).__name__} is cut already, and cannot teach itself. Give the dense "
                "model, Compression(..., teacher=dense_model), or teacher=False."
            )
        if self._teacher is None and teacher is not False:
            self._teacher = dense_copy(unwrapped(model))
        self.pruner = None if self._plan else Pruner(model, ratio, searched, target=target, **settings)
        if self.pruner is not None:
            self.pruner.follow(self._averages)
        try:
            if self._teacher is not None and (self.pruner is None or self.pruner.is_read):
                self._teach()
            elif self._teacher is not None:  # as soon as the groups are read, which the Pruner's own look does first
                self._first = FirstCall(unwrapped(model), lambda *_: self._teach(now=True))
            if resume is not None and self._plan is None:
                self.load_state_dict(resume)
            elif resume is not None:
                self._done = int(resume["steps_done"])
        except BaseException:
            self.close()
            raise

    @property
    def searching(self) -> bool:
        """Whether the model is not cut yet."""
        return self._plan is None and not self._closed

    @property
    def is_due(self) -> bool:
        """Whether the search has taken its last step, so that `after_step` cuts the model."""
        return self.searching and self.pruner is not None and self.pruner.finished

    @property
    def steps_done(self) -> int:
        """The number of steps taken, in the search and after it."""
        return self._done

    def loss(self, loss: Tensor) -> Tensor:
        """Return the task loss plus the distillation loss of the forward passes since the last call.

        Call it before `backward()`; with gradient accumulation, for every part of a batch.

        Args:
            loss: the task loss, a scalar.

        Raises:
            StepError: no forward pass was observed, or `finish` or `close` was called.
        """
        self._check_open("loss()")
        self._passed = True
        return loss if self.distillation is None else loss + self.distillation.loss()

    def step(self, optimizer: Any, *, scaler: Any = None) -> None:
        """Take an optimizer step together with a step of the compression.

        During the search, it adds the scores of this step, and updates masks when due; the last step of the search cuts
        the model and the optimizer state. Within `accelerator.accumulate`, nothing happens until the gradients are
        complete. Gradients may be clipped before.

        Args:
            optimizer: of the model's parameters, created before or after this object; a list or tuple for several.
            scaler: the GradScaler that scaled the loss; it takes the step, and is updated.

        Raises:
            StepError: there are no gradients, `loss` was not called, or `finish` or `close` was.
            VerificationError: the cut model does not compute what the masked one did; it is left masked.
        """
        optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        if not all(_has_whole_gradients(each) for each in optimizers):
            return
        self.before_step(optimizers, scaler)
        for each in optimizers:
            if scaler is None:
                each.step()
            else:
                scaler.step(each)
        if scaler is not None:
            scaler.update()
        self.after_step(optimizers)

    def before_step(self, optimizers: Iterable[Any] = (), scaler: Any = None) -> None:
        """Do the part of `step` before the optimizer step, for loops that take the step themselves."""
        self._check_open("step()")
        if self.distillation is not None and not self._passed:
            raise StepError(
                "step() found no distillation loss: loss() was not called for this step. Call "
                "compression.loss(task_loss).backward(), or use Compression(..., teacher=False). If a Trainer computes "
                "the loss itself (label smoothing), give it a compute_loss_func."
            )
        self._passed = False
        if self.searching and self.pruner is not None:
            optimizers = list(optimizers)
            scale = max((_unscaled(each, scaler) for each in optimizers), default=1.0)
            with copies_following(optimizers if self.pruner.changes_weights else ()):
                self.pruner.step(scale=scale)
            rotations, self.pruner.rotations = self.pruner.rotations, []
            turns = [turn for each in rotations for turn in each.turns(self.pruner.model)]
            for each in optimizers if turns else ():
                rotate_optimizer(each, turns)

    def after_step(self, optimizers: Iterable[Any]) -> None:
        """Do the part of `step` after the optimizer step, for loops that take the step themselves."""
        self._done += 1
        optimizers = list(optimizers)
        self._stepping = [weakref.ref(each) for each in optimizers]
        if self.is_due and self.pruner is not None:
            self._cut(self.pruner, optimizers)

    def skip_step(self) -> None:
        """Replace `before_step` for a step whose gradients the loop discards; they are not scored."""
        self._check_open("skip_step()")
        self._passed = False
        if self.searching and self.pruner is not None:
            self.pruner.skip()

    def move_to(self, model: nn.Module) -> None:
        """Continue with another copy of the model, which may be sharded until the cut.

        Args:
            model: a copy without masks, to train from now on; see `upop.Pruner.move_to`.

        Raises:
            LayoutError: it has other groups, or belongs to another search.
        """
        self._check_open("move_to()")
        if self.searching and self.pruner is not None:
            self.pruner.move_to(model)
        self.model = model
        if self.distillation is not None:
            self.distillation.remove()
            self._teach()

    def finish(self, *optimizers: torch.optim.Optimizer) -> nn.Module:
        """Cut the model to the progress reached, unless it is already cut, and release the teacher.

        Args:
            optimizers: to cut too, if training continues, besides those of the last step.

        Returns:
            The given model.

        Raises:
            VerificationError: the cut model does not compute what the masked one did; it is left masked.
        """
        if self.searching and self.pruner is not None and self.pruner.steps_done:
            known = [each for reference in self._stepping if (each := reference()) is not None]
            self._cut(self.pruner, [*optimizers, *known])
        elif self.searching:
            warnings.warn(
                "The search took no step: the model stays dense. Call compression.step(optimizer) after backward().",
                stacklevel=2,
            )
        self.close()
        return self.model

    def close(self) -> None:
        """Remove all hooks, masks and the teacher; a model that is not cut yet is dense again."""
        if self.searching and self.pruner is not None:
            self.pruner.remove()
        self._closed = True
        if self._first is not None:
            self._first.forget()
        if self.distillation is not None:
            self.distillation.remove()
        self.distillation = self._teacher = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it with `finish`, or with `close` if the block raised."""
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def plan(self) -> Plan:
        """Return the kept channels of every group; before the cut, those kept so far.

        Raises:
            StepError: the masks of a "soft" search are not binary yet.
        """
        if self._plan is not None:
            return self._plan
        assert self.pruner is not None
        return self.pruner.plan()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming, besides the weights and the optimizer state."""
        plan = None if self._plan is None else self._plan.to_json()
        search = self.pruner.state_dict() if self.searching and self.pruner is not None else None
        return {"steps_done": self._done, "plan": plan, "pruner": search}

    def load_state_dict(self, state: Mapping[str, Any], *optimizers: torch.optim.Optimizer) -> None:
        """Restore a state of `state_dict`; load the weights and the optimizer state after it.

        For a state after the cut, the model is cut here, so that the weights fit.

        Args:
            state: of a compression of the same dense model, with the same settings.
            optimizers: of the model.

        Raises:
            SettingError: the state belongs to another model or to other settings.
            StepError: the model is already cut, or the training has ended.
        """
        self._check_open("load_state_dict()")
        if not self.searching or self.pruner is None:
            raise StepError(
                "load_state_dict() belongs at the beginning, and the model is cut. Begin with the dense one."
            )
        self._done = int(state["steps_done"])
        if state["plan"] is None:
            self.pruner.load_state_dict(state["pruner"])
            return
        plan = Plan.from_json(state["plan"])
        self.pruner.remove()
        with self._following(plan, optimizers):
            shrink(self.model, plan, verify=False)

    def _teach(self, *, now: bool = False) -> None:
        """Attach the teacher to forward passes from now on, including one that is starting."""
        assert self._teacher is not None
        know_as(self._teacher, unwrapped(self.model))
        try:
            self.distillation = distill(self.model, self._teacher, **self._options)
        except LayoutError as error:
            if self._insists:
                raise
            self._teacher = None
            warnings.warn(f"Training without a teacher: {error} Set teacher=False if this is intended.", stacklevel=4)
            return
        if now:
            self.distillation.begin()

    def _cut(self, pruner: Pruner, optimizers: Iterable[Any]) -> None:
        """Cut the model, and all objects with parameters of the same shapes."""
        plan = pruner.plan()
        with self._following(plan, optimizers):
            pruner.shrink(verify=self._verify)

    @contextmanager
    def _following(self, plan: Plan, optimizers: Iterable[Any]) -> Iterator[None]:
        """Apply the cut within the block to all objects with parameters of the same shapes."""
        model = unwrapped(self.model)
        reshard(model)  # optimizers hold the shards
        left = slicings(model, plan.check(model), plan)
        cuts = {tensor_of(model, name): slicing for name, slicing in left.items()}
        yield
        self._plan = plan
        for each in optimizers:
            cut_optimizer(each, cuts)
        for average in self._averages:
            know_as(average, model)
            shrink(average, plan, verify=False)
        rebuild_replicas(self.model)

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise StepError(f"{what} came after finish() or close(), or outside of the `with` block. Make a new one.")


def _cut_by(model: nn.Module, resume: Mapping[str, Any] | None) -> Plan | None:
    """Return the plan in a state to resume from, if its model was already cut."""
    if resume is None or resume["plan"] is None:
        return None
    plan = Plan.from_json(resume["plan"])
    sizes = {group.name: sized(model, group) for group in plan.groups(model)}
    if any(group is None or group.size != len(plan[name]) for name, group in sizes.items()):
        return None
    if plan_of(model) is None:
        set_plan(model, plan)
    return plan


def _averaged(average: Any) -> nn.Module:
    model = getattr(average, "module", average)
    check_model(model, "averages=")
    return unwrapped(model)


def _has_whole_gradients(optimizer: Any) -> bool:
    """Whether the gradients are complete: Accelerate's optimizers may still accumulate."""
    state = getattr(optimizer, "gradient_state", None)
    return state is None or bool(state.sync_gradients)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    held = getattr(optimizer, "optimizer", None)
    inner: torch.optim.Optimizer = held if isinstance(held, torch.optim.Optimizer) else optimizer
    return inner


def _unscaled(optimizer: Any, scaler: Any) -> float:
    """Unscale the gradients of a GradScaler, given or Accelerate's; return the scale, 1 without one."""
    scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
    if scaler is None:
        return 1.0
    try:
        scaler.unscale_(inner_optimizer(optimizer))
    except RuntimeError as error:
        if "already been called" not in str(error):  # for clipping
            raise
    return float(scaler.get_scale())
