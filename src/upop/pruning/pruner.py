"""`Pruner`: the one object that a training loop holds while it searches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from upop.pruning import budget
from upop.pruning.carried import record_cut, refuse_unrecordable
from upop.pruning.choice import check_correct, check_whole
from upop.pruning.correction import Choice, correct_consumers
from upop.pruning.costs import Cost, call
from upop.pruning.deprecated import renamed_arguments, renamed_attributes
from upop.pruning.depth import check_depth
from upop.pruning.errors import SettingError, StepError
from upop.pruning.goal import Goal
from upop.pruning.groups import Group, tensor_of
from upop.pruning.latency import Profile
from upop.pruning.moments import OBSERVATIONS, Correct
from upop.pruning.plan import Plan
from upop.pruning.rotation import Rotation, rotate_heads
from upop.pruning.round_to import RoundTo, check_round_to
from upop.pruning.scores import Importance, agreed, scoring
from upop.pruning.searched import Searched
from upop.pruning.shrink import cut_verified
from upop.pruning.slips import check_model
from upop.pruning.stated import Stated
from upop.pruning.targets import Target
from upop.pruning.uniform import Uniform, check_uniform
from upop.pruning.warn import warn_of_early_end, warn_of_none, warn_of_skipped, warn_of_unscored
from upop.pruning.whole import whole
from upop.pruning.width import check_width, with_readers

Progress = Literal["stages", "soft"]
_STAGES = 8
_INTERVAL = 50
"""Between updates of a soft search."""

_OLDER = {"align": "round_to", "score": "importance"}
"""Names that settings had in earlier states, and the names that they have now."""


@renamed_attributes(align="round_to", score="importance", units="groups")
class Pruner(Searched):
    """Searches during training for the channels to prune, under one budget for all modalities, and removes them.

    Call `step()` once per optimizer step, between `backward()` and `optimizer.step()`. After `steps` calls the masks
    are exactly 0 or 1, and `shrink()` cuts the layers. Then continue training; one learning rate schedule over both
    phases works best. `upop.Compression` does all of this, adds a teacher, and cuts the optimizer state too.

    Args:
        model: of timm, transformers or upop, or a custom one; DDP, torch.compile and `fully_shard` may come before or
            after this.
        ratio: share of the groups' total cost to remove, in (0, 1); 0.5 is the paper's 2x, 0.75 its 4x.
        steps: number of times that `step` will be called.
        target: instead of a ratio, limits for the whole model: {"params": 0.5}, {"params": "12M", "macs": "2x"},
            "params=40MB@float16"; several limits hold together. "macs" are the multiply-adds of a forward pass over
            `example`, "cache" the bytes of keys and values that a decoder keeps after it. Every stage makes equal
            progress.
        profile: measured latencies of the model on a machine (`upop profile`, `upop.profiling`), for a target such as
            {"latency": 0.5} or {"latency": "12ms"}; scores are then compared per millisecond.
        interval: steps between updates of the masks, which also happen at the last step; by default eight updates in
            "stages", and one at every 50th step (step 0 included) in a "soft" search.
        cost: what the budget counts: "params" (default), "macs", "reference" (the published weights, and the
            published way to set the threshold), a mapping from group names or patterns, or a function of a group.
        round_to: kept channels are multiples of this (8 suits tensor cores); {"mlp": 128} sets it by kind of group, and
            "tensor-cores", "torchao" and "nemotron-nas" are presets.
        importance: how the importance of a channel is measured at each step, from the first-order (Taylor) change of
            the loss without it: "absolute" (default) takes its magnitude, "squared" its square, "signed" (default of a
            "soft" search) the change itself. Or a function (weight, its gradient) -> a score per row, [rows]; channels
            with high scores are pruned first. It must be homogeneous of degree 1 in the gradient, because soft masks
            are divided out afterwards.
        progress: "stages" (default): each stage permanently prunes the same share of the cost, the least important
            channels since the last stage. It works best with few steps: a tenth of all training steps, and at least
            16. "soft", the published search: masks fall gradually from 1 to 0, and channels may recover. It is the
            default with cost="reference" and with importance="signed".
        correct: whether consumers of pruned channels get a least-squares correction at every stage, which keeps their
            outputs close to the old ones. It uses the last steps, four at most, until there are four tokens per input,
            repeated in evaluation mode. Its strength is cross-validated; a layer without a gain stays unchanged. The
            model must be called as a module. Between steps only inputs are kept. At the end of a stage, "auto"
            (default) uses memory of at most a quarter of the weights on the model's device; the rest waits on the CPU.
            On the CPU (where 256 MiB are always allowed) the model runs again for every few layers. True holds the
            inputs of all layers at once, at most 2 n^2 numbers for n inputs.
        rotate: whether the first step rotates attention heads to their principal axes: queries and keys, values and
            output projections are multiplied with matrices that cancel, so that no output changes, and the dimensions
            of a head become as unequal as possible. Pruned heads then lose much less. By default yes, in "stages".
            Heads where the outputs would change, with weights in half precision, or with frozen weights beside trained
            ones stay. `upop.Compression` also rotates
            the moments that an optimizer has already; with a `Pruner`, begin with a new optimizer.
        include: names or patterns (`fnmatch`) of the groups to prune; default all.
        exclude: names or patterns of groups to keep whole.
        example: inputs for one forward pass, for cost="macs", and to find the groups of a custom model
            (`find_prunable`). Without one, a custom model is traced when it is first called.
        groups: groups that you state yourself (`upop.GroupSpec`). They are proved like the others, and take precedence
            over those that cut the same axis.
        update_first_step: False skips the update of masks at step 0, as published for DeiT and Segmenter.
        uniform: "tower" makes all layers of a tower keep the same number of heads (or key-value groups) and neurons, if
            the model's configuration has numbers for them; which ones may differ by layer. The saved model is then an
            ordinary one of its library, and loads without upop.
        width: True also prunes channels of the residual stream of each tower: all layers that
            use it are cut alike. It needs a target.
        depth: True also prunes whole attentions and MLPs, by the importance of all their channels per cost; the last
            bias stays. With `uniform` it prunes whole layers, if the configuration counts them, and the other layers
            keep equally many channels.

    Raises:
        SettingError: a setting is out of range, matches nothing, or asks for more than can be pruned.
        LayoutError: the model has no group, or a group's weights are frozen or already masked; a custom model without
            an example raises both when it is first called.
    """

    @renamed_arguments(align="round_to", score="importance", units="groups")
    def __init__(
        self,
        model: nn.Module,
        ratio: float | None = None,
        steps: int | None = None,
        interval: int | None = None,
        *,
        target: Target | None = None,
        profile: Profile | None = None,
        cost: Cost = "params",
        round_to: RoundTo | str = 1,
        importance: str | Importance | None = None,
        progress: Progress | None = None,
        correct: Correct = "auto",
        rotate: bool | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        example: Any = None,
        groups: Sequence[Stated] = (),
        update_first_step: bool = True,
        uniform: Uniform | None = None,
        depth: bool = False,
        width: bool = False,
    ) -> None:
        check_model(model, "Pruner")
        goal = Goal(ratio, target, profile)
        if progress not in (None, "stages", "soft"):
            raise SettingError(f'progress is "stages" or "soft"; found {progress!r}.')
        self.progress: Progress = progress or ("soft" if cost == "reference" or importance == "signed" else "stages")
        steps = check_whole("steps", steps)
        round_to = check_round_to(round_to)
        if interval is None:
            interval = _INTERVAL if self.progress == "soft" else -(-steps // _STAGES)
        check_whole("interval", interval)
        if cost == "reference" and target is not None:
            raise SettingError("cost='reference' is the budget of the published search, which takes a ratio.")
        if cost == "reference" and round_to != 1:
            raise SettingError(
                f"cost='reference' ranks single channels as published; found round_to={round_to}. Use round_to=1."
            )
        check_uniform(uniform)
        check_depth(depth, self.progress)
        check_width(width, target, self.progress)
        if cost == "reference" and uniform:
            raise SettingError(f"cost='reference' ranks single channels as published; found uniform={uniform!r}.")
        self.steps, self.interval, self.update_first_step = steps, interval, update_first_step
        self.importance = importance or ("signed" if self.progress == "soft" else "absolute")
        self._scoring = scoring(self.importance)
        if correct is True and self.progress == "soft":
            raise SettingError("A soft search, the published one, corrects nothing; found correct=True. Leave it out.")
        self._correct: Correct = check_correct(correct) if self.progress == "stages" else False
        if rotate and self.progress == "soft":
            raise SettingError("A soft search, the published one, rotates nothing; found rotate=True. Leave it out.")
        self.rotate = self.progress == "stages" if rotate is None else rotate
        self._rotated, self._averages = not self.rotate, list[nn.Module]()
        self.rotations: list[Rotation] = []
        self._choices: list[dict[str, Choice]] = []  # of the stages so far
        self._skipped = torch.zeros((), dtype=torch.long)
        self._stale = torch.zeros((), dtype=torch.bool)  # whether the scores are of a stage that has ended
        self._warned, self._warned_unscored = 0, False
        self._scored: set[str] = set()  # groups that had a gradient at some step
        self._done = 0
        self.threshold: float | None = None
        super().__init__(
            model, goal, cost, round_to, (include, exclude), example, groups, self._scoring, uniform, depth, width
        )

    @property
    def steps_done(self) -> int:
        """The number of steps taken."""
        return self._done

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, so that the masks are binary."""
        return self._done >= self.steps

    @property
    def changes_weights(self) -> bool:
        """Whether the next step changes weights: it rotates heads, or moves the masks and corrects consumers."""
        return not self.finished and (self._due(self._done) or not self._rotated)

    @property
    def current_ratio(self) -> float:
        """The share of the cost that is masked after the last step (p_t of a soft search); 0 at first."""
        if self.ratio is None:
            return 1 - self.kept_share() if self.is_read else 0.0
        if self.progress == "soft":
            return budget.progress(self._done - 1, self.steps, self.ratio) if self._done else 0.0
        masked = self.steps if self.finished else self._done - self._done % self.interval
        return self.ratio * masked / self.steps

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped because a gradient was not finite."""
        return int(self._skipped)

    @property
    def corrections(self) -> dict[str, float]:
        """The relative squared error of each consumer after the last correction, on held-out samples."""
        return {name: choice.left for name, choice in self._choices[-1].items()} if self._choices else {}

    @torch.no_grad()
    def step(self, *, scale: float = 1.0) -> None:
        """Add this step's scores; move the masks when due. Call before `optimizer.step()`, once per optimizer step.

        A step with scores that are not finite is ignored, and counted in `skipped_steps`.

        Args:
            scale: of a GradScaler (`get_scale()`) that `unscale_` took off the optimizer's gradients. It matters only
                for weights that are frozen beside an adapter, which no optimizer knows.

        Raises:
            StepError: all steps were taken, the masks were removed, or no masked weight has a gradient.
        """
        self._check_running()
        self._first.let_compiled()
        scored = {(part.tensor, part.dim) for group in self.groups for part in group.scored}
        if self._rows.frozen is not None:
            self._rows.frozen.scale = scale
        if not self._rotated:
            self._rotate()
        rows = self._rows.of({(name, dim): (tensor_of(self.model, name), dim) for name, dim in scored})
        added = {group.name: self._channel_scores(group, rows) for group in self.groups}
        self._rows.forget()
        self._scored |= {name for name, value in added.items() if value is not None}
        if all(value is None for value in added.values()):
            raise StepError(
                "step() found no gradient on any masked weight. Call it after loss.backward() and before "
                "optimizer.step() and zero_grad()."
            )
        flags = [value.isfinite().all() for value in added.values() if value is not None]
        finite = torch.stack([flag.to(flags[0].device) for flag in flags]).all()  # a model may be spread over devices
        for name, value in added.items():
            if value is not None:
                # The model may have moved to another device since the search began.
                score, stale = self._scores[name].to(value.device), self._stale.to(value.device)
                self._scores[name] = torch.where(finite.to(value.device), value + torch.where(stale, 0.0, score), score)
        # Counted on the device: reading it here would wait for the whole step.
        self._skipped = self._skipped.to(finite.device) + (~finite).long()
        self._stale = self._stale.to(finite.device) & ~finite
        self._advance()

    def follow(self, averages: Iterable[nn.Module]) -> None:
        """Rotate the heads of copies like those of the model, such as moving averages of its weights.

        Args:
            averages: copies of the model, made before the first step.
        """
        self._averages = list(averages)

    @torch.no_grad()
    def skip(self) -> None:
        """Count a step without using its gradients, if the training loop discarded them."""
        self._check_running()
        self._rows.forget()
        self._moments.forget(self._done)
        self._skipped += 1
        self._advance()

    def plan(self) -> Plan:
        """Return the kept channels of each group; before the end of the search, those that are kept so far.

        Raises:
            StepError: a soft search has not finished, so that its masks are not binary yet.
        """
        self._check_binary("plan()")
        kept = {name: mask.nonzero().flatten().tolist() for name, mask in self.masks.items()}
        return Plan.of(
            self.groups,
            kept,
            **self._goal.described({name: len(channels) for name, channels in kept.items()}),
            steps=self.steps,
            interval=self.interval,
            cost=self.cost if isinstance(self.cost, str) else "given",
            round_to=self.round_to,
            importance=self.importance if isinstance(self.importance, str) else "given",
            progress=self.progress,
            **({"uniform": self.uniform} if self.uniform else {}),
            **({"depth": True} if self.depth else {}),
            **({"width": True} if self.width else {}),
            **({} if self.rotate or self.progress == "soft" else {"rotate": False}),
            **({} if self.finished else {"steps_done": self._done}),
        )

    def shrink(self, verify: Any = True) -> nn.Module:
        """Remove the masks and cut the model; the same object is returned, physically smaller.

        The model then carries the plan, which `upop.save` writes; a transformers model also carries it in its
        configuration, so that its own `save_pretrained` and `push_to_hub` work. A model sharded by
        `fully_shard` is gathered on the CPU for the cut, and sharded again; all processes call this together.

        Args:
            verify: inputs on which the masked and the shrunken model are compared (a tensor, a tuple of arguments,
                a mapping of keyword arguments, or a function of the model). By default a few samples of the first
                batch, or else the example. False cuts without proof.

        Raises:
            StepError: a soft search has not finished.
            SettingError: the model is quantized.
            VerificationError: the outputs differ, the cut model cannot be run, or there is nothing to verify on; the
                model keeps its masks.
        """
        plan = self.plan()
        refuse_unrecordable(self.model)
        if not self._attached:
            raise StepError("The masks were already removed; upop.shrink can still apply a plan.")
        if not self.finished:
            asked = str(self._goal) if self.ratio is None else f"{self.ratio:.0%}"
            warn_of_early_end(self._done, self.steps, self.current_ratio, asked)
        self._detach()
        try:
            with whole(self.model):
                cut_verified(self.model, self.groups, plan, verify, self._inputs())
        except BaseException:
            self._attach()
            raise
        self._first.forget()
        record_cut(self.model, plan)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the search: scores, masks and the step."""
        if self._groups is None and self._resumed is not None:
            return dict(self._resumed)
        return {
            "scores": self.scores,
            "masks": self.masks,
            "steps_done": self._done,
            "skipped_steps": self.skipped_steps,
            "threshold": self.threshold,
            "stale": bool(self._stale),
            "rotated": self._rotated,
            "seen": self._moments.state(),
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            **self._goal.settings(),
            "steps": self.steps,
            "interval": self.interval,
            "round_to": self.round_to,
            "cost": self.cost if isinstance(self.cost, str) else "given",
            "importance": self.importance if isinstance(self.importance, str) else "given",
            "progress": self.progress,
            "correct": bool(self._correct),
            **({"uniform": self.uniform} if self.uniform else {}),
            **({"depth": True} if self.depth else {}),
            **({"width": True} if self.width else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            SettingError: the state belongs to another model or to other settings.
        """
        saved = {_OLDER.get(name, name): value for name, value in state["settings"].items()}
        saved |= {"cost": "macs"} if saved.get("cost") == "flops" else {}
        if saved != self._settings():
            raise SettingError(f"The saved search has settings {saved}, this one {self._settings()}.")
        self._done = int(state["steps_done"])
        self._rotated = bool(state.get("rotated", True)) or not self.rotate  # older searches rotated nothing
        if self._groups is None:
            self._resumed = state
            return
        shapes = {name: tuple(score.shape) for name, score in state["scores"].items()}
        if shapes != {name: tuple(score.shape) for name, score in self._scores.items()}:
            raise SettingError(
                "The saved search has other groups than this model. Resume with the model it was made for."
            )
        for name, score in state["scores"].items():
            self._scores[name].copy_(score)
        self._masks.set(state["masks"])
        self._done = int(state["steps_done"])
        self._skipped.fill_(int(state["skipped_steps"]))
        self.threshold = state.get("threshold")
        self._stale.fill_(state["stale"])
        if self.finished:
            self._rows.release()
        self._observe_inputs()
        self._moments.resume(state["seen"])

    def _channel_scores(self, group: Group, rows: Mapping[tuple[str, int], Tensor]) -> Tensor | None:
        parts = [(part, (part.tensor, part.dim)) for part in group.scored]
        given = [part.reduce(rows[place]) for part, place in parts if place in rows]
        if not given:
            return None
        total = sum((each.to(given[0].device) for each in given[1:]), given[0])
        if self.progress == "soft":
            total = total / self._masks.values[group.name].to(total.device, total.dtype, non_blocking=True)
        return self._scoring.added(total)

    def _rotate(self) -> None:
        """Rotate heads to the principal axes of the first batch."""
        kept = [] if self._first.kept is None else list(self._first.kept.inputs(self.model))

        def observe() -> None:
            for batch in kept[-1:]:  # the whole one, where it is kept; generated inputs would say nothing of the data
                call(self.model, batch)

        # Frozen weights beside trained ones were scored already, in the backward pass.
        frozen = self._rows.frozen
        groups = [
            group
            for group in self.groups
            if frozen is None or all(tensor_of(self.model, part.tensor) not in frozen for part in group.producers)
        ]
        with self._moments.ignoring():
            self.rotations = rotate_heads(self.model, groups, observe, self._inputs(), self._averages)
        self._rotated = True

    def _advance(self) -> None:
        if self._due(self._done):
            self._scores = agreed(self._scores)
            (self._update if self.progress == "soft" else self._end_stage)(self._done)
            self._warn(self._done)
        self._done += 1
        self._observe_inputs()
        if self.finished:  # nothing is scored any more, however long the cut is waited for
            self._rows.release()

    def _is_one_step(self) -> bool:
        return self.steps == 1

    def _observe_gradients(self) -> None:
        if not self.finished:
            super()._observe_gradients()

    def _due(self, step: int) -> bool:
        if self.progress == "soft":
            due = step % self.interval == 0 and (step > 0 or self.update_first_step)
        else:
            due = (step + 1) % self.interval == 0
        return due or step == self.steps - 1

    def _observe_inputs(self) -> None:
        """Observe the inputs of consumers, in the last steps of a stage only."""
        self._moments.advance(self._done)
        soon = any(self._due(step) for step in range(self._done, min(self._done + OBSERVATIONS, self.steps)))
        observed = with_readers(self.groups) if soon and self._attached and self._correct else []
        self._moments.observe(self.model, observed, self._wrapper())

    def _end_stage(self, step: int) -> None:
        """Permanently mask the channels with the highest scores, and correct their consumers."""
        active = {name: mask == 1 for name, mask in self._masks.values.items()}
        scores = {name: score.cpu().masked_fill(~active[name], math.inf) for name, score in self._scores.items()}
        part = (step + 1) / self.steps
        selection = self._goal.select(self.groups, scores, self.costs, part, self.round_to, standardised=False)
        if self._correct:
            chosen = correct_consumers(self._moments, self.model, self.groups, active, selection.marked, self._correct)
            self._choices.append(chosen)
            if step == self.steps - 1 >= _STAGES - 1:  # fewer are a trial
                done = [choice.ridge is not None for stage in self._choices for choice in stage.values()]
                warn_of_none(done, self._moments.advice, stacklevel=6)
        self._masks.set({name: torch.where(pruned, 0.0, 1.0) for name, pruned in selection.marked.items()})
        self.threshold = selection.threshold
        self._stale.fill_(True)

    def _update(self, step: int) -> None:
        """Rank all channels by accumulated scores, and set the masks by the published schedule."""
        whole = self.ratio or 1.0
        share = budget.progress(step, self.steps, whole)
        if self.cost == "reference":
            selection = budget.select_as_published(self.groups, self._scores, self.costs, share)
        else:
            selection = self._goal.select(self.groups, self._scores, self.costs, share / whole, self.round_to)
        # Rounded to float32 whatever the model's precision, as the published masks are.
        value = torch.tensor(1 - share / whole, dtype=torch.float32)
        self._masks.set({name: torch.where(pruned, value, 1.0) for name, pruned in selection.marked.items()})
        self.threshold = selection.threshold

    def _warn(self, step: int) -> None:
        self._warn_unscored(step)
        if self.skipped_steps > self._warned:
            self._warned = self.skipped_steps
            warn_of_skipped(self._warned, step + 1)

    def _warn_unscored(self, step: int) -> None:
        """Warn once of groups that the loss did not depend on, at the second update of masks or the last."""
        unscored = [name for name, score in self._scores.items() if name not in self._scored and not score.any()]
        if unscored and not self._warned_unscored and (step or self.steps == 1):
            self._warned_unscored = True
            warn_of_unscored(unscored, len(self.groups), step + 1)

    def _check_running(self) -> None:
        self._refuse_unread()
        if self.finished:
            raise StepError(
                f"All {self.steps} search steps were taken and the masks are final; step() was called once more. "
                "Call shrink(), or give Pruner the true number of steps."
            )
        if not self._attached:
            raise StepError("The masks were removed; make a new Pruner to search again.")

    def _check_binary(self, what: str) -> None:
        self._refuse_unread()
        if not self.finished and self.progress == "soft":
            raise StepError(
                f"{what} needs binary masks, and only {self._done} of {self.steps} steps of the soft search were "
                "taken; cutting now would break the model. Take the remaining steps first."
            )
