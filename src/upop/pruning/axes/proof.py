"""The proof: the masked and the cut model compute the same outputs, on random numbers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from upop.pruning.again import drawing_the_same, uncompiled
from upop.pruning.axes.candidates import Candidate
from upop.pruning.axes.copies import forgetting, message_of, with_memory, written_out
from upop.pruning.axes.idle import Idle, resting
from upop.pruning.axes.mode import Mode, defined, name_of, tensors_in
from upop.pruning.costs import call, evaluating
from upop.pruning.errors import VerificationError
from upop.pruning.groups import Attribute, Group, tensor_of
from upop.pruning.norms import masked_norms
from upop.pruning.shrink import cut, restore
from upop.pruning.verify import Outputs, difference, narrowed, refuse_unlike, refuse_unsteady, rounding_of, tensors_of

_ASIDE = 8
"""How many groups of one size in a row keep different numbers, so that none is cut to what was meant for another."""
POWERS = (0.5, 0.0, 1.0, 0.25)
"""Of softmax scales that follow the size of a head: 1 / sqrt(size), fixed, 1 / size, and queries that are keys too."""


class Precise(Mode):
    """Runs operations in the precision of the weights, whatever precision the forward asks for.

    Many forwards compute norms or softmax in float32, or fail if the weights are more precise than that.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation in the precision."""
        written = name_of(func).endswith("_")
        kept = args[:1] if written else ()
        if any(self._raised(each) is not each for each in tensors_in(args)):
            args = (*kept, *tree_map_only(Tensor, self._raised, args[len(kept) :]))
        asked = kwargs.get("dtype")
        if asked is not None and asked.is_floating_point:
            kwargs = {**kwargs, "dtype": self._dtype}
        return defined(func)(*args, **kwargs)

    def _raised(self, value: Tensor) -> Tensor:
        low = value.is_floating_point() and value.dtype.itemsize < self._dtype.itemsize
        return value.to(self._dtype) if low else value

    def __enter__(self) -> Any:
        """Compute in the precision from now on."""
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        """Compute as before."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)


class Bench:
    """A copy of a model with numbers, on which groups are masked, cut and restored.

    Args:
        model: the copy.
        example: its inputs.
        idle: group names -> modules to stub while these groups are tried (see `kinds`).

    Attributes:
        misses: whether the uncut model failed with idle modules, so that the forward needs something of them.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        idle: Callable[[frozenset[str]], Mapping[str, Sequence[Any]]] | None = None,
    ) -> None:
        self._model, self._given, self._ran = model, example, False
        self._idle, self._idling = idle, dict[str, Idle]()
        self._rests: dict[frozenset[str], list[Idle]] = {}
        self._resting: list[Idle] = []
        self._steady = False  # whether two calls are known to give the same
        self._known: tuple[Any, Outputs] = (None, [])
        self.misses = False
        self._fit()

    @contextmanager
    def trying(self, groups: Sequence[Group]) -> Iterator[list[str]]:
        """Stub all modules that the groups do not involve; yield their names."""
        names = frozenset(group.name for group in groups)
        if names not in self._rests:
            idle = self._idle(names) if self._idle is not None else {}
            self._rests[names] = [self._idling.setdefault(path, Idle(path, gave)) for path, gave in idle.items()]
        self._resting = self._rests[names]
        with resting(self._model, self._resting):
            yield [each.path for each in self._resting]
        self._resting = []

    def _fit(self) -> None:
        self._dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        self._example = tree_map_only(
            Tensor,
            lambda each: with_memory(each).to(self._dtype if each.is_floating_point() else each.dtype),
            self._given,
        )
        self._spreads: dict[tuple[str, ...], list[list[float]]] = {}

    def outputs(self) -> list[tuple[str, Tensor]]:
        """Return all output tensors of a call, and all inputs of idle modules.

        They are in float32 if an operation does not support float64.
        """
        try:
            found = self._outputs()
        except Exception:
            if self._ran or self._dtype == torch.float32:
                raise
            self._model.float()
            self._fit()
            found = self._outputs()
        self._ran = True
        return found

    def _run(self, model: nn.Module) -> Any:
        """Return the outputs of a call and the inputs of idle modules."""
        for each in self._resting:
            each.start(self._dtype)
        found = call(model, self._example)
        given = {f"to {each.path}": each.given for each in self._resting}
        return {**given, "from the model": found} if given else found

    def _outputs(self) -> list[tuple[str, Tensor]]:
        device = next((each.device for each in self._model.parameters()), torch.device("cpu"))
        plainly = written_out() if self._resting else uncompiled()  # torch's fused encoder passes by its own layers
        with forgetting(), evaluating(self._model), drawing_the_same(device), plainly, Precise(self._dtype):
            return [(place, value.detach().clone()) for place, value in tensors_of(self._run(self._model))]

    def called(self) -> set[str]:
        """Return the names of all modules that a run calls."""
        seen: set[str] = set()
        names = {module: name for name, module in self._model.named_modules()}
        handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.add(names.get(module, "")))
        try:
            self.outputs()
        finally:
            handle.remove()
        return seen

    def difference(self, groups: Sequence[Group], plan: Mapping[str, Sequence[int]]) -> str:
        """Return how the cut model differs from the masked one, or the error of either; "" where they agree."""
        with self.trying(groups):
            try:
                expected = self._masked_outputs(groups, plan)
            except Exception as error:
                self.misses |= bool(self._resting)
                return message_of(error)
            undo = cut(self._model, list(groups), plan)
            try:
                found = self.outputs()
            except Exception as error:
                return message_of(error)
            finally:
                restore(undo)
            expected = narrowed(expected, found, groups, plan)
            try:
                refuse_unlike(expected, found)
            except VerificationError as error:
                return str(error).split(". ")[0]
            off = difference(expected, found, self._rounding)
            if off is not None and not self._steady:
                refuse_unsteady(self.outputs(), self.outputs())
                self._steady = True
            return f"the cut model differs by {off.size:.1e}" if off is not None else ""

    def _masked_outputs(self, groups: Sequence[Group], plan: Mapping[str, Sequence[int]]) -> Outputs:
        """Return the outputs of the masked model, cached for repeated calls with the same masks."""
        key = [(tuple(plan[group.name]), replace(part, power=0.0)) for group in groups for part in group.producers]
        if self._known[0] != key:
            with self.masked(groups, plan):
                self._known = key, self.outputs()
        return self._known[1]

    def _rounding(self) -> list[list[float]]:
        """Return how much each output differs between repeated calls by rounding alone.

        Raises:
            VerificationError: two calls of the model differ.
        """
        key = tuple(each.path for each in self._resting)
        if key not in self._spreads:
            self._spreads[key] = list(rounding_of(self.outputs, outputs=self.outputs()))
        return self._spreads[key]

    def asks(self, group: Group) -> bool:
        """Whether the queries of a group, if it has any, influence the output, so that their scale can be determined.

        They do not if there is a single token, or if all tokens are equal.
        """
        with self.trying([group]):
            return self._asks(group)

    def _asks(self, group: Group) -> bool:
        expected, asked = self.outputs(), False
        held: dict[str, Tensor] = {}
        with torch.no_grad():
            for part in group.producers:
                rows = part.query_rows(group.size)
                if part.power and len(rows):
                    asked, tensor = True, tensor_of(self._model, part.tensor)
                    held.setdefault(part.tensor, tensor.detach().clone())
                    tensor.index_copy_(part.dim, rows, -tensor.index_select(part.dim, rows))
            try:
                found = self.outputs()
            finally:
                for name, value in held.items():
                    tensor_of(self._model, name).copy_(value)
        return not asked or difference(expected, found, self._rounding) is not None

    @contextmanager
    def masked(self, groups: Sequence[Group], plan: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Zero the channels that a plan prunes, within the block."""
        held: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for group in groups:
                    keep = torch.zeros(group.size)
                    keep[list(plan[group.name])] = 1
                    for part in group.producers:
                        tensor = tensor_of(self._model, part.tensor)
                        held.setdefault(part.tensor, tensor.detach().clone())
                        rows = part.expand(keep).to(tensor.dtype)
                        tensor.mul_(rows.view([-1 if at == part.dim else 1 for at in range(tensor.dim())]))
            with masked_norms(self._model, groups, plan):
                yield
        finally:
            with torch.no_grad():
                for name, value in held.items():
                    tensor_of(self._model, name).copy_(value)


def at_random(groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """Return random channels to keep for every group: other numbers of them for neighbours of one size."""
    draw = random.Random(seed)
    plan: dict[str, list[int]] = {}
    recent: dict[int, deque[int]] = {}
    for group in groups:
        sizes = range(max(1, group.size // 4), max(2, group.size))
        near = recent.setdefault(group.size, deque(maxlen=min(_ASIDE, len(sizes) - 1)))
        kept = draw.choice([size for size in sizes if size not in near])
        near.append(kept)
        plan[group.name] = sorted(draw.sample(range(group.size), kept))
    return plan


def prove(bench: Bench, candidates: list[Candidate], found: dict[str, str], *, beside: bool = True) -> list[Candidate]:
    """Return the candidates that pass the proof: all together, then every other one and the rest, else by bisection.

    Args:
        bench: runs the trials.
        candidates: to prove.
        found: group name -> why a candidate failed; filled in.
        beside: whether each is also cut while the others stay whole.
    """
    if not candidates:
        return []
    groups = [each.group for each in candidates]
    trials = enumerate((groups, groups[::2], groups[1::2]) if beside else (groups,))
    reason = next(filter(None, (bench.difference(some, at_random(some, seed)) for seed, some in trials if some)), "")
    if not reason:
        return candidates
    if len(candidates) == 1:
        found[candidates[0].group.name] = reason
        return []
    half = len(candidates) // 2
    return prove(bench, candidates[:half], found, beside=beside) + prove(bench, candidates[half:], found, beside=beside)


def scaled(
    bench: Bench,
    model: nn.Module,
    candidates: list[Candidate],
    weighs: Callable[[Candidate], bool],
    lost: dict[str, str],
) -> list[Candidate]:
    """Determine how the softmax scale of each kind of attention depends on its head size.

    Args:
        bench: runs the trials.
        model: the original model.
        candidates: to prove.
        weighs: whether an attention has a softmax, so that its scale must matter.
        lost: group name -> why a candidate failed; filled in.
    """
    known: dict[Any, tuple[float, bool] | None] = {}
    result = []
    for each in candidates:
        if each.group.channel != "dimension":
            result.append(each)
            continue
        holder = model.get_submodule(each.holder)
        queries = tuple((part.query_groups, part.queries) for part in each.group.slices)
        key = (type(holder), queries, len(each.group.attributes))
        if key not in known:
            known[key] = _scale(bench, model, each, weighs(each))
        way = known[key]
        if way is None:
            lost[each.group.name] = _UNTOLD
            continue
        power, numbers = way
        result.append(_powered(model, each, power, numbers) or _powered(model, each, power, False) or each)
    return result


_UNTOLD = (
    "its softmax scale does not show: the example has one token, or tokens that are all alike; give one with several "
    "tokens that differ"
)


def _scale(bench: Bench, model: nn.Module, candidate: Candidate, weighs: bool) -> tuple[float, bool] | None:
    """Return the power by which a scale follows the size, and whether it is a number that modules keep; None untold."""

    def holds(power: float, numbers: bool) -> bool:
        tried = _powered(model, candidate, power, numbers)
        return tried is not None and not bench.difference([tried.group], at_random([tried.group], 2))

    for numbers in (True, False):
        for power in POWERS:
            if holds(power, numbers):
                untold = weighs and holds(power + 1, numbers) and not bench.asks(candidate.group)
                return None if untold else (power, numbers)
    return 0.5, False


def _powered(model: nn.Module, candidate: Candidate, power: float, numbers: bool) -> Candidate | None:
    """Return a candidate with this scaling of queries, optionally with the stored scales reset."""
    group = candidate.group
    scales: list[Attribute] = []
    if numbers:
        widths = _head_widths(group)
        scales = [
            Attribute(path, name, None, width)
            for path in dict.fromkeys((candidate.holder, *_query_modules(candidate)))
            for name, value in vars(model.get_submodule(path)).items()
            for width in widths
            if isinstance(value, float) and abs(value * (width * group.size) ** 0.5 - 1) < 1e-6
        ]
        if not scales:
            return None
    slices = tuple(replace(part, power=power) for part in group.slices)
    group = replace(group, slices=slices, attributes=(*group.attributes, *scales))
    return replace(candidate, group=group)


def _head_widths(group: Group) -> list[int]:
    """Return the head dimensions per channel: 1, or 2 if pairs are rotated together."""
    queries = ((part, repeat) for part in group.slices for repeat in part.queries or range(part.query_groups))
    return sorted({part.inners[repeat] for part, repeat in queries}) or [1]


def _query_modules(candidate: Candidate) -> Iterator[str]:
    """Yield the modules around layers that make queries, inside of what holds the group: several share one, at
    times.
    """
    inside = f"{candidate.holder}." if candidate.holder else ""
    for part in candidate.group.slices:
        path = part.tensor.rpartition(".")[0]
        while (part.queries or part.query_groups) and path.startswith(inside) and path != candidate.holder:
            yield path
            path = path.rpartition(".")[0]
