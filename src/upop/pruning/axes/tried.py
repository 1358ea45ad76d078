"""Turns candidates into proved groups: one per kind first, then all together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from upop.pruning.axes.candidates import Candidate
from upop.pruning.axes.copies import Shapes, numbered
from upop.pruning.axes.kinds import counterpart, idle, kinds, unread
from upop.pruning.axes.narrow import WIDTHS, piece_of
from upop.pruning.axes.proof import Bench, at_random, prove, scaled
from upop.pruning.axes.reasons import explain
from upop.pruning.axes.settle import Trials, mistakable, settle, told_apart
from upop.pruning.axes.trace import Trace
from upop.pruning.groups import around

MOST_MEMORY = 6 * 2**30
"""Bytes that the numbers of a proof may take, with what is cut of them."""
MOST_MULTIPLY_ADDS = 50_000_000_000
"""Of one run of a model that is proved as a whole: about a second of one core in float64."""


class Proof:
    """Proves the candidates of one model.

    One candidate of each kind is settled and proved at several sizes, with unrelated modules stubbed; the others of its
    kind take over the result. Then all groups are proved together: on numbers if the model is small enough, otherwise
    by their shapes alone.

    Args:
        model: left as it is.
        example: the arguments of a call.
        shapes: makes copies on fake tensors.
        trace: of a run on fake tensors.

    Attributes:
        alike: group name -> why it was left out though it was proved (`told_by_sums`).
    """

    def __init__(self, model: nn.Module, example: Any, shapes: Shapes, trace: Trace) -> None:
        self._model, self._example, self._shapes, self._trace = model, example, shapes, trace
        self.alike: dict[str, str] = {}

    def of(self, candidates: list[Candidate], wrong: dict[str, str]) -> list[Candidate]:
        """Return the proved candidates; `wrong` collects the reasons for the others, by group name."""
        found = kinds(self._model, self._trace, candidates)
        tried = self._settled([each for each, *_ in found], wrong)
        proved = {each.group.name: each for each in self._proved(tried, wrong)}
        # A gate of what is not 0 without it, as in (a + 1) * silu(b), makes the channels together with that.
        loud = [
            replace(each, group=replace(each.group, slices=each.loud))
            for each in tried
            if each.loud and each.group.name not in proved
        ]
        proved |= {each.group.name: each for each in self._proved(loud, wrong)}
        everyone = []
        for first, *others in found:
            best = proved.get(first.group.name)
            if best is not None:
                everyone += [best, *(counterpart(self._model, best, each) for each in others)]
            else:
                wrong.update({each.group.name: wrong[first.group.name] for each in others})
        everyone = told_apart(told_by_sums(everyone, self.alike))
        if len(everyone) == len(proved):
            return everyone
        small = self._trace.multiply_adds <= MOST_MULTIPLY_ADDS
        groups = [each.group for each in everyone]
        for resting in (True, False) if small else ():
            bench = self._bench(everyone, resting=resting)
            if bench is None or not bench.difference(groups, at_random(groups, 0)):
                break
            if not bench.misses:
                return self._checked(bench, self._settled(everyone, wrong), wrong, beside=False)
        return everyone if small and bench is not None else self._settled(everyone, wrong)

    def _still(self, candidates: list[Candidate]) -> dict[str, list[Any]]:
        """Return the modules to stub in a trial; none if the forward depends on numbers."""
        return {} if self._shapes.mode is None else idle(self._model, self._trace, candidates)

    def _settled(self, candidates: list[Candidate], wrong: dict[str, str]) -> list[Candidate]:
        trials = Trials(self._shapes, self._trace, self._still(candidates), candidates)
        settled, reasons = settle(self._model, trials, candidates)
        if reasons and trials.stop([]) is not None:  # something is asked of what is idle, or is kept between calls
            settled, reasons = settle(self._model, Trials(self._shapes, self._trace), candidates)
        wrong.update(reasons)
        return settled

    def _proved(self, candidates: list[Candidate], wrong: dict[str, str], *, resting: bool = True) -> list[Candidate]:
        """Return the proved ones among candidates of different kinds."""
        if not candidates:
            return []
        bench = self._bench(candidates, resting=resting)
        if bench is None and len(candidates) > 1 and resting:
            half = len(candidates) // 2
            return self._proved(candidates[:half], wrong) + self._proved(candidates[half:], wrong)
        if bench is None:
            reason = f"its proof would take more than {MOST_MEMORY / 2**30:.0f} GiB of memory"
            wrong.update({each.group.name: reason for each in candidates})
            return []
        reasons: dict[str, str] = {}
        candidates = scaled(bench, self._model, candidates, self._weighs, wrong)
        found = self._unmistaken(bench, self._checked(bench, candidates, reasons), reasons)
        if bench.misses:
            return self._proved(candidates, wrong, resting=False)
        wrong.update(reasons)
        return found

    def _unmistaken(self, bench: Bench, candidates: list[Candidate], wrong: dict[str, str]) -> list[Candidate]:
        """Return the candidates whose hard-coded widths match no other tensor, tested at sizes where they might."""
        found = []
        for each in candidates:
            size = each.group.size
            for kept in mistakable(self._trace, each):
                if bench.difference([each.group], {each.group.name: range(size - kept, size)}):
                    wrong[each.group.name] = f"its forward names a width that something else has when {kept} are kept"
                    break
            else:
                found.append(each)
        return found

    def _checked(
        self, bench: Bench, candidates: list[Candidate], wrong: dict[str, str], *, beside: bool = True
    ) -> list[Candidate]:
        reasons: dict[str, str] = {}
        found = prove(bench, candidates, reasons, beside=beside)
        if not bench.misses:
            explain(bench, self._model, self._trace, candidates, reasons)
        wrong.update(reasons)
        return found

    def _weighs(self, candidate: Candidate) -> bool:
        """Whether a softmax runs in the module that holds the layers of a candidate."""
        return any(
            ("softmax" in step.name or "dot_product_attention" in step.name) and candidate.holder in around(step.module)
            for step in self._trace.steps
        )

    def _bench(self, candidates: list[Candidate], *, resting: bool = True) -> Bench | None:
        """Return a copy with numbers for these candidates; None if it would take too much memory."""
        model, trace = self._model, self._trace
        still = self._still(candidates) if resting else {}
        without = unread(model, trace, still) if resting and self._shapes.mode is not None else set()
        count = sum(each.numel() for name, each in model.named_parameters() if name not in without)
        named = {each.group.name: each for each in candidates}
        tensors = {part.tensor for each in candidates for part in each.group.slices}

        def rests(names: frozenset[str]) -> dict[str, list[Any]]:
            return self._still([named[name] for name in names])

        for dtype in (torch.float64, torch.float32):
            if 2 * dtype.itemsize * count <= MOST_MEMORY:
                return Bench(numbered(model, dtype, without, tensors), self._example, rests if resting else None)
        return None


def told_by_sums(candidates: list[Candidate], wrong: dict[str, str]) -> list[Candidate]:
    """Leave out groups whose split into several lengths could be confused with that of another block.

    If one forward pass runs several blocks, only the length of its input identifies the block of such a call: pieces of
    2 and 4 look like pieces of 4 and 2. Of the groups that one call splits, the largest are kept.

    Args:
        candidates: that are proved.
        wrong: group name -> why it was left out; filled in.
    """
    calls: dict[tuple[Any, ...], dict[str, set[int]]] = {}
    for each in candidates:
        for attribute in each.group.attributes:
            found = piece_of(attribute.name[len(WIDTHS) + 1 : -1]) if attribute.name.startswith(WIDTHS) else None
            if found is not None:
                calls.setdefault((attribute.module, found[0]), {}).setdefault(each.group.name, set()).add(found[1])
    sizes = {each.group.name: sum(part.length(each.group.size) for part in each.group.slices) for each in candidates}
    lost: set[str] = set()
    for groups in calls.values():
        kinds: dict[frozenset[int], list[str]] = {}
        for name, places in groups.items():
            kinds.setdefault(frozenset(places), []).append(name)
        if len(kinds) > 1 and sum(map(len, groups.values())) > len(set().union(*groups.values())):
            largest = max(kinds.values(), key=lambda names: sum(sizes[name] for name in names))
            lost |= groups.keys() - set(largest)
    reason = "one forward splits it for several blocks, and pieces of other blocks may have the same sum"
    wrong.update({name: reason for name in sizes if name in lost})
    return [each for each in candidates if each.group.name not in lost]
