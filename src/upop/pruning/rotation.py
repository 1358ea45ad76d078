"""Rotates attention heads to their principal axes before a search, which leaves the outputs of the model as they are.

In every head, queries and keys only meet in products q.k, and values only reach the output projection W_o. So any
invertible matrices A and T may be put between them: q' = A q, k' = A^-T k, v' = T v, W_o' = W_o T^-1. Trained head
dimensions are about equally important, because training prefers no basis. A and T are chosen so that they become as
unequal as possible: the products (and the contributions to the output) of different dimensions are uncorrelated, and
the first dimensions carry the most. With C_q and C_k the second moments of queries and keys and the singular value
decomposition C_q^1/2 C_k^1/2 = U S V^T, A = S^1/2 U^T C_q^-1/2 is the basis in which the best approximation of q.k
with fewer dimensions is a choice of the first ones; likewise for values, with W_o^T W_o in place of C_k.

Where heads are not linear (rotary positions, norms of queries and keys) this does not hold. So every rotation is tried:
one that changes an output is not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.again import buffers_kept, drawing_the_same, uncompiled
from upop.pruning.costs import call, evaluating
from upop.pruning.frozen import thawed
from upop.pruning.groups import Group, Slice, owner_of, tensor_of
from upop.pruning.sharded import is_sharded_tensor, many_processes, reshard, through_whole
from upop.pruning.verify import Outputs, outputs_of, tensors_of

_PRECISE = (torch.float32, torch.float64)
_LEAST = 1e-6
"""Least eigenvalue of second moments, and least singular value, as a share of the largest: it bounds rounding."""
_SAME, _SAME_ROUNDED = 1e-7, 1e-3
"""Most that outputs may change, as a share of the largest, in float64 and otherwise."""
_READINGS = 6
"""Most ways to divide the rows of an attention into queries, keys and values that are tried."""

_MODULES = 5
"""Most modules that keys and values come from: two, and adapters beside them."""

_Rows = tuple[tuple[Slice, tuple[int, ...]], ...]
"""Slices with those of their repeats that have a role, one repeat per head."""


@dataclass(frozen=True)
class _Roles:
    """Which rows of a group's tensors are queries, keys and values, and which columns read the values."""

    queries: _Rows
    keys: _Rows
    values: _Rows
    outputs: _Rows

    def rows(self, role: str) -> _Rows:
        """Return the rows with a role, by name."""
        found: _Rows = getattr(self, role)
        return found


_TURNED = {
    "queries": ("products", False),
    "keys": ("products", True),
    "values": ("sums", False),
    "outputs": ("sums", True),
}
"""Role -> the matrix that its rows are multiplied with, and whether by its inverse transposed."""


@dataclass(frozen=True)
class Rotation:
    """The matrices for the heads of a group.

    Attributes:
        group: whose heads are rotated.
        roles: of its rows.
        products: A of the module's docstring, for each head of keys, [heads, head_dim, head_dim]; None leaves queries
            and keys alone.
        sums: T, for each head of values, of the same shape; None leaves values alone.
    """

    group: Group
    roles: _Roles
    products: Tensor | None
    sums: Tensor | None

    def turns(self, model: nn.Module, roles: Iterable[str] = tuple(_TURNED)) -> Iterator[Turn]:
        """Yield what happens to each tensor of a model with this group, and of its momentum copies."""
        for role in roles:
            name, inverse = _TURNED[role]
            matrices: Tensor | None = getattr(self, name)
            if matrices is None:
                continue
            other = torch.linalg.inv(matrices).mT
            forth, back = (other, matrices) if inverse else (matrices, other)
            for part, repeats in self.roles.rows(role):
                for each in (part, *_followers(self.group, part)):
                    yield Turn(tensor_of(model, each.tensor), each, repeats, forth, back, self.group.size)

    @torch.no_grad()
    def apply(self, model: nn.Module, roles: Iterable[str] = tuple(_TURNED)) -> None:
        """Rotate the weights of a model with this group, and their gradients."""
        for turn in self.turns(model, roles):
            turn.apply(turn.tensor, 0)
            if turn.tensor.grad is not None:
                turn.apply(turn.tensor.grad, -1)


@dataclass(frozen=True)
class Turn:
    """The rotation of some rows of one tensor.

    Attributes:
        tensor: the parameter.
        part: the slice of it.
        repeats: whose rows, one per head.
        forth: what they are multiplied with, [heads, head_dim, head_dim].
        back: what their gradients are multiplied with.
        size: head_dim.
    """

    tensor: Tensor
    part: Slice
    repeats: tuple[int, ...]
    forth: Tensor
    back: Tensor
    size: int

    def apply(self, value: Tensor, degree: int) -> None:
        """Rotate a tensor of the parameter's shape, in place.

        Args:
            value: the weights, or what an optimizer keeps for them.
            degree: 0 of weights, -1 of gradients, -2 of squared gradients: for the latter, gradients of different
                dimensions count as independent, so that the squares of the matrix add them up.
        """
        matrices = {0: self.forth, -1: self.back, -2: self.back.square()}[degree]
        _multiply(value, self.part, self.repeats, matrices, self.size)


def rotate_heads(
    model: nn.Module,
    groups: Iterable[Group],
    observe: Callable[[], Any],
    inputs: Iterable[Any],
    averages: Iterable[nn.Module] = (),
) -> list[Rotation]:
    """Rotate the heads of a model to their principal axes; its outputs stay as they are, up to rounding.

    Groups stay as they are where that is impossible: heads with rotary positions, for one, and weights in half
    precision, which would be rounded again. All processes call this together, sharded or not, and rotate alike.

    Args:
        model: the dense model; it may have masks, as long as none is below 1.
        groups: of the model.
        observe: runs the model on representative batches.
        inputs: possible inputs of the model, to check that outputs stay.
        averages: copies of the model, for instance moving averages of its weights, which are rotated alike.

    Returns:
        The rotations, one for each group whose heads were rotated.
    """
    subjects = [group for group in groups if _is_plain(model, group)]
    if not subjects:
        return []
    seen = _observed(model, subjects, observe)
    check = _Check.of(model, list(inputs))
    found: list[Rotation] = []
    if check is not None:
        check.differentiate(subjects)
        for kind in _kinds(model, subjects):
            found += _tried(check, kind, seen)
    for each, rotation in itertools.product((model, *averages), found):
        rotation.apply(each)
    return found


# -- which rows are what --------------------------------------------------------------------------------------------


def _is_plain(model: nn.Module, group: Group) -> bool:
    """Whether a group consists of head dimensions whose tensors can be rotated at all."""
    if group.kind != "attention" or group.channel != "dimension" or group.size < 2 or group.norms:
        return False
    tensors = [tensor_of(model, part.tensor) for part in group.slices]
    usable = all(
        isinstance(each, nn.Parameter) and each.dtype in _PRECISE and not (each.is_meta or each.is_inference())
        for each in tensors
    )
    rows = all(set(part.inners) == {1} and not part.silent for part in group.slices)
    online = group.online
    followed = all(len(_followers(group, part)) == len(_followers(group, online[0])) for part in online)
    copies = sum(len(_followers(group, part)) for part in online) == len(group.slices) - len(online)
    return usable and rows and followed and copies and next(_readings(model, group), None) is not None


def _followers(group: Group, part: Slice) -> list[Slice]:
    """Return the slices of momentum copies that follow a slice: copies are listed in the order of what they copy."""
    online = group.online
    copies = [each for each in group.slices if each.follows]
    if len(copies) % len(online):
        return []
    found = copies[online.index(part) :: len(online)]
    return [each for each in found if replace(each, tensor=part.tensor, follows=False) == part]


def _readings(model: nn.Module, group: Group) -> Iterator[_Roles]:
    """Yield the ways to divide the rows of a group into queries, keys and values, the likeliest first.

    The tracer knows the queries. What else produces head dimensions are keys and values: one tensor each, or
    both in one tensor, one after the other or in turns.
    """
    readers = [part for part in group.online if not part.produces]
    heads = readers[-1].outer if readers else 0
    if not readers or any(part.outer != heads for part in readers):
        return
    queries: list[tuple[Slice, tuple[int, ...]]] = []
    others: dict[str, list[tuple[Slice, tuple[int, ...]]]] = {}  # module -> what of its tensors are no queries
    for part in group.producers:
        asked = part.queries or tuple(range(part.query_groups))
        rest = tuple(repeat for repeat in range(part.outer) if repeat not in asked)
        if asked:
            queries.append((part, asked))
        if rest:
            others.setdefault(part.tensor.rpartition(".")[0], []).append((part, rest))
    if any(len(asked) != heads for _, asked in queries) or not queries:
        return
    names = list(others)
    options = [_divided(others[name][0][1]) for name in names]
    outputs = tuple((part, tuple(range(heads))) for part in readers)
    count = 0
    for chosen in itertools.product(*options) if len(options) <= _MODULES else ():
        roles: dict[int, list[tuple[Slice, tuple[int, ...]]]] = {0: [], 1: []}
        for name, pair in zip(names, chosen, strict=True):
            for (part, rest), role in itertools.product(others[name], (0, 1)):
                if rest == others[name][0][1] and pair[role]:
                    roles[role].append((part, pair[role]))
        weights = [sum(_is_weight(model, part) for part, _ in each) for each in roles.values()]
        sizes = {len(rows) for each in roles.values() for _, rows in each}
        if min(weights) and len(sizes) == 1 and heads % min(sizes) == 0:  # an adapter is one more weight
            yield _Roles(tuple(queries), tuple(roles[0]), tuple(roles[1]), outputs)
            count += 1
        if count == _READINGS:
            return


def _is_weight(model: nn.Module, part: Slice) -> bool:
    return tensor_of(model, part.tensor).dim() > 1


def _is_linear(layer: nn.Module) -> bool:
    """Whether a module only multiplies with its weight, like transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or (hasattr(layer, "nf") and not list(layer.children()))


def _divided(rest: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the ways to divide some repeats into keys and values."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [(rest, ()), ((), rest)]
    if len(rest) % 2 == 0:
        half = len(rest) // 2
        found += [(rest[:half], rest[half:]), (rest[::2], rest[1::2])]
    return found


def _kinds(model: nn.Module, groups: Iterable[Group]) -> list[list[Group]]:
    """Return the groups by kind: those of one kind are the same code with other weights."""
    found: dict[Any, list[Group]] = {}
    for group in groups:
        layout = tuple((part.dim, part.outer, part.gaps, part.query_groups, part.queries) for part in group.slices)
        owners = tuple(type(owner_of(model, part.tensor)[0]) for part in group.slices)
        found.setdefault((layout, owners, group.size), []).append(group)
    return list(found.values())


def _positions(part: Slice, repeats: Sequence[int], size: int) -> Tensor:
    """Return the positions of the channels of some repeats along the slice's dimension, [repeats, size]."""
    gaps = part.gaps or (0,) * (part.outer + 1)
    starts = torch.tensor([sum(gaps[: repeat + 1]) + repeat * size for repeat in repeats], device="cpu")
    return starts[:, None] + torch.arange(size, device="cpu")


def _taken(tensor: Tensor, part: Slice, repeats: Sequence[int], size: int) -> Tensor:
    """Return the rows of some repeats in float64 on the CPU, [repeats, size, everything else]."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]
    rows = tensor.movedim(part.dim, 0)[_positions(part, repeats, size).to(tensor.device)]
    return (rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(2)).cpu().double()


def _multiply(tensor: Tensor, part: Slice, repeats: Sequence[int], matrices: Tensor, size: int) -> None:
    """Multiply the rows of some repeats with matrices, [heads, size, size]; neighbouring repeats may share one."""
    new = matrices.repeat_interleave(len(repeats) // len(matrices), 0) @ _taken(tensor, part, repeats, size)

    def change(whole: Tensor) -> Tensor:
        at = _positions(part, repeats, size).to(whole.device)
        rows = whole.movedim(part.dim, 0)
        rows[at] = new.view(*at.shape, *rows.shape[1:]).to(rows.device, rows.dtype)
        return whole

    if is_sharded_tensor(tensor):
        shard: Any = through_whole(tensor, change)
        tensor.detach().to_local().copy_(shard.to_local())  # type: ignore[attr-defined]
    else:
        change(tensor.detach())


# -- which axes are principal -----------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Sums over the tokens of a layer, on the CPU.

    Attributes:
        count: number of tokens.
        sums: their sum, [n].
        products: the sum of their outer products within each head, [heads, head_dim, head_dim].
    """

    count: int
    sums: Tensor
    products: Tensor

    @classmethod
    def none(cls, heads: int = 1, size: int = 1) -> _Moments:
        """Return the moments of no token; by default those that any can be added to."""
        shapes = (heads * size,), (heads, size, size)
        return cls(0, *(torch.zeros(shape, device="cpu", dtype=torch.float64) for shape in shapes))

    def add(self, tokens: Tensor, size: int) -> None:
        """Add tokens, [..., n]."""
        tokens = tokens.detach().flatten(0, -2)
        tokens = tokens.double() if tokens.device.type == "cpu" else tokens.float()  # not every device has float64
        blocks = tokens.unflatten(1, (-1, size)).transpose(0, 1)
        self.count += len(tokens)
        self.sums = self.sums + tokens.sum(0).cpu().double()
        self.products = self.products + (blocks.mT @ blocks).cpu().double()


_Seen = dict[tuple[str, str], _Moments]
"""(name of a group, name of a tensor) -> moments of its layer's outputs if it produces, else of its inputs."""


def _observed(model: nn.Module, groups: Iterable[Group], observe: Callable[[], Any]) -> _Seen:
    """Return the moments of all layers that are called as modules, and whose channels have no gaps."""
    found: _Seen = {}

    def hook(group: Group, part: Slice) -> Callable[[nn.Module, Any, Any], None]:
        def add(_: nn.Module, given: Any, made: Any) -> None:
            tokens = made if part.produces else given[0] if given else None
            if not isinstance(tokens, Tensor) or tokens.shape[-1] != part.length(group.size) or not tokens.numel():
                return
            key = group.name, part.tensor
            found.setdefault(key, _Moments.none()).add(tokens, group.size)

        return add

    handles = [
        layer.register_forward_hook(hook(group, part))
        for group in groups
        for part in group.online
        if _is_linear(layer := owner_of(model, part.tensor)[0]) and _is_weight(model, part) and not part.gaps
    ]
    device = next(model.parameters()).device
    try:
        with evaluating(model), buffers_kept(model), drawing_the_same(device), uncompiled():
            observe()
    except Exception:  # the model's own: what is wrong with a batch comes up where it is scored
        found.clear()
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)
    return _summed(model, groups, found) if many_processes() else found


def _summed(model: nn.Module, groups: Iterable[Group], seen: _Seen) -> _Seen:
    """Return the sums over all processes, as one process would have seen all samples."""
    found: _Seen = {}
    for group in groups:
        for part in group.online:
            heads, size = part.outer, group.size
            own = seen.get((group.name, part.tensor)) or _Moments.none(heads, size)
            flat = torch.cat([own.sums.new_tensor([own.count]), own.sums, own.products.flatten()])
            count, sums, products = _all(model, flat, "SUM").split([1, heads * size, heads * size * size])
            if count > 0:
                found[group.name, part.tensor] = _Moments(int(count), sums, products.view(heads, size, size))
    return found


def _all(model: nn.Module, values: Tensor, how: str) -> Tensor:
    """Return the sum ("SUM") or the least ("MIN") of values over all processes; themselves if there is only one."""
    if not many_processes():
        return values
    parameter = next(model.parameters())
    mesh: Any = getattr(parameter, "device_mesh", None)
    device = parameter.device if mesh is None else torch.device(mesh.device_type)
    together = values.to(device, torch.float32 if device.type == "mps" else values.dtype)
    torch.distributed.all_reduce(together, getattr(torch.distributed.ReduceOp, how))
    return together.to(values)


def _second_moments(model: nn.Module, group: Group, rows: _Rows, seen: _Seen, *, centred: bool) -> Tensor:
    """Return the second moments of what rows produce, or of what columns consume, [heads, head_dim, head_dim].

    Of layers that were not observed they are those for inputs of equal variance in all directions.
    """
    part, repeats = next(pair for pair in rows if _is_weight(model, pair[0]))
    moments = seen.get((group.name, part.tensor))
    if moments is not None and moments.count and bool(moments.products.isfinite().all()):
        at = torch.tensor(repeats, device="cpu")
        mean = (moments.sums / moments.count).unflatten(0, (-1, group.size))[at].unsqueeze(2)
        found = moments.products[at] / moments.count
        return found.sub(mean @ mean.mT) if centred else found
    weights = _taken(tensor_of(model, part.tensor), part, repeats, group.size)
    return weights @ weights.mT


def _principal(one: Tensor, other: Tensor) -> Tensor:
    """Return A = S^1/2 U^T C^-1/2 of the module's docstring for second moments of both sides, [heads, d, d]."""
    roots = []
    for moments in (one, other):
        values, vectors = torch.linalg.eigh(moments)
        values = values.clamp_min(values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) * _LEAST)
        roots.append(
            (vectors * values.sqrt().unsqueeze(-2) @ vectors.mT, vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT)
        )
    left, strengths, _ = torch.linalg.svd(roots[0][0] @ roots[1][0])
    strengths = strengths.clamp_min(strengths.amax(-1, keepdim=True) * _LEAST)
    matrices: Tensor = strengths.sqrt().unsqueeze(-1) * (left.mT @ roots[0][1])
    return matrices


def _rotation(model: nn.Module, group: Group, roles: _Roles, seen: _Seen) -> Rotation:
    """Return the rotation of a group's heads to principal axes."""
    kept = len(roles.keys[0][1])

    def together(moments: Tensor) -> Tensor:
        of_keys: Tensor = moments.unflatten(0, (kept, -1)).mean(1)  # several heads of queries may share one of keys
        return of_keys

    queries = together(_second_moments(model, group, roles.queries, seen, centred=False))
    # A softmax does not depend on what all keys have in common, and a bias can stand for what all values have.
    keys = _second_moments(model, group, roles.keys, seen, centred=True)
    reader, repeats = roles.outputs[-1]
    biased = owner_of(model, reader.tensor)[0]._parameters.get("bias") is not None
    observed = (group.name, reader.tensor) in seen
    rows = roles.outputs if observed else roles.values
    values = _second_moments(model, group, rows, seen, centred=biased)
    columns = _taken(tensor_of(model, reader.tensor), reader, repeats, group.size)
    sums = _principal(together(values) if observed else values, together(columns @ columns.mT))
    products = _principal(queries, keys)
    if many_processes():  # the same bits everywhere, whatever the machines are
        first = float(torch.distributed.get_rank() == 0)
        products, sums = (_all(model, first * each, "SUM") for each in (products, sums))
    return Rotation(group, roles, products, sums)


# -- whether the outputs stay -----------------------------------------------------------------------------------------


class _Check:
    """Compares the outputs of a rotated model with those of the given one.

    Args:
        model: a copy in float64, or the given model if that cannot be copied; rotated weights are put back.
        example: inputs of a call.
        most: largest change of outputs that is rounding.
    """

    def __init__(self, model: nn.Module, example: Any, expected: Outputs, most: float) -> None:
        self.model, self._example, self._expected, self._most = model, example, expected, most
        self._gradients: dict[str, Tensor | None] = {}
        self._is_sharded = False

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[Any]) -> _Check | None:
        """Return the check on the first inputs with which the model runs; None without any."""
        for number in range(int(_all(model, torch.tensor(len(inputs), device="cpu"), "MIN"))):
            for make in (cls._precise, cls._rounded):
                check = None
                with suppress(Exception):  # the model's own; some models compute in a fixed precision
                    check = make(model, inputs[number])
                reshard(model)
                if _all(model, torch.tensor(int(check is not None), device="cpu"), "MIN"):
                    return check
        return None

    @classmethod
    def _precise(cls, model: nn.Module, example: Any) -> _Check | None:
        from upop.pruning.shrink import precise_copy

        copied = precise_copy(model, example)
        if copied is None:
            return None
        with _precisely():
            return cls(*copied, outputs_of(*copied), _SAME)

    @classmethod
    def _rounded(cls, model: nn.Module, example: Any) -> _Check:
        is_precise = all(each.dtype == torch.float64 for each in model.parameters())
        return cls(model, example, outputs_of(model, example), _SAME if is_precise else _SAME_ROUNDED)

    def holds(self, rotations: Sequence[Rotation], roles: Iterable[str] = tuple(_TURNED)) -> bool:
        """Whether the outputs stay as they are with these rotations, of rows with some roles."""
        found: Outputs = []
        names = dict.fromkeys(part.tensor for each in rotations for part in each.group.slices)
        held = {tensor: tensor.detach().clone() for tensor in (tensor_of(self.model, name) for name in names)}
        gradients = {tensor: tensor.grad for tensor in held}
        try:
            for tensor in held:
                tensor.grad = None
            for each in rotations:
                each.apply(self.model, roles)
            found = self._run(lambda: outputs_of(self.model, self._example))
        except Exception:  # the model's own
            found = []
        finally:
            reshard(self.model)
            with torch.no_grad():
                for tensor, old in held.items():
                    tensor.copy_(old)
                    tensor.grad = gradients[tensor]
        places = [[place for place, _ in outputs] for outputs in (self._expected, found)]
        same = places[0] == places[1] and all(
            self._same(one, other) for (_, one), (_, other) in zip(self._expected, found, strict=True)
        )
        return bool(_all(self.model, torch.tensor(int(same), device="cpu"), "MIN"))

    def differentiate(self, groups: Iterable[Group]) -> None:
        """Compute the gradients of a random sum of the outputs with respect to the tensors of groups.

        Those of a sharded model would go to its shards; there, each role is changed by itself instead.
        """
        self._is_sharded = any(map(is_sharded_tensor, self.model.parameters()))
        if self._is_sharded:
            return
        names = dict.fromkeys(part.tensor for group in groups for part in group.online)
        tensors = [tensor_of(self.model, name) for name in names]
        with suppress(Exception), thawed(tensors):  # the model's own
            found = torch.autograd.grad(self._run(self._random_sum), tensors, allow_unused=True)
            self._gradients = dict(zip(names, found, strict=True))

    def reaches(self, rotation: Rotation, role: str) -> bool:
        """Whether rows with a role influence the outputs: only then do unchanged outputs prove anything."""
        if self._is_sharded:
            return not self.holds([rotation], [role])
        reached = True
        for part, repeats in rotation.roles.rows(role):
            gradient = self._gradients.get(part.tensor)
            if _is_weight(self.model, part):  # a bias of keys influences nothing
                size = rotation.group.size
                reached &= gradient is not None and bool((_taken(gradient, part, repeats, size) != 0).any())
        return bool(_all(self.model, torch.tensor(int(reached), device="cpu"), "MIN"))

    def _random_sum(self) -> Tensor:
        device = next(self.model.parameters()).device
        with ExitStack() as stack:
            for context in (evaluating(self.model), buffers_kept(self.model), drawing_the_same(device)):
                stack.enter_context(context)
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(torch.enable_grad())
            found = [value for _, value in tensors_of(call(self.model, self._example)) if value.requires_grad]
            parts = [torch.where(value.isfinite(), value * torch.randn_like(value), 0.0).sum() for value in found]
            return torch.stack([part.cpu().double() for part in parts]).sum()  # not every device has float64

    def _run(self, run: Callable[[], Any]) -> Any:
        with _precisely() if self._most == _SAME else nullcontext():
            return run()

    def _same(self, one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            return False
        one, other = (value[value.isfinite()].cpu().double() for value in (one, other))
        return not one.numel() or float((one - other).abs().max()) <= self._most * float(one.abs().max())


@contextmanager
def _precisely() -> Iterator[None]:
    from upop.pruning.axes.copies import forgetting
    from upop.pruning.axes.proof import Precise

    with forgetting(), Precise(torch.float64):
        yield


def _tried(check: _Check, groups: Sequence[Group], seen: _Seen) -> list[Rotation]:
    """Return the rotations of groups of one kind that leave the outputs as they are."""
    layouts = zip(*(itertools.islice(_readings(check.model, group), _READINGS) for group in groups), strict=False)
    for layout in layouts:
        try:
            found = [_rotation(check.model, group, roles, seen) for group, roles in zip(groups, layout, strict=True)]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of weights that are not finite, for one
            return []
        found = [each for each in found if check.reaches(each, "values")]
        reached = [check.reaches(each, role) for each in found for role in ("queries", "keys")]
        for rotations in (found if all(reached) else [], [replace(each, products=None) for each in found]):
            if rotations and check.holds(rotations):
                return rotations
    return []
