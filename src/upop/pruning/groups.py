"""Groups of coupled tensor slices, as plain records.

A group is one axis that several tensors share: the head dimensions of an attention, the hidden neurons of an MLP, or
the residual stream of a tower. Every step of the method (mask, score, cost, cut) is a loop over these records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from upop.pruning.deprecated import older_names, renamed_arguments, renamed_attributes

Kind = Literal["attention", "mlp", "residual"]
Channel = Literal["dimension", "head", "group", "neuron", "channel"]


@renamed_attributes(entries="channels")
@dataclass(frozen=True)
class Slice:
    """One tensor that carries a group's axis.

    Along `dim` the tensor is laid out as (`outer`, size of the group, `inner`), flattened: a fused qkv weight of
    12 heads has outer = 36, a whole-head axis has inner = head_dim.

    Attributes:
        tensor: dotted name of the parameter (or buffer), from the model.
        dim: the dimension of the tensor along which the axis lies (0: rows, 1: columns of a linear layer).
        outer: how many times the axis is repeated along `dim`.
        inner: how many neighbouring rows belong to one channel; a tuple gives one number for each of the `outer`
            repeats (queries, keys and values of grouped-query attention in one tensor).
        produces: True where the tensor produces the axis (it is masked, and its gradients count for importance), False
            where it is only cut: it consumes the axis, or gates what another tensor produces.
        query_groups: how many of the first `outer` repeats are queries; `shrink` folds the softmax scale into them.
        follows: True for a tensor of a momentum copy, which is cut with the axis and otherwise left alone: it is
            neither masked, nor scored, nor counted.
        silent: which of the `outer` repeats are cut, but neither masked nor scored (the gate of a gated MLP).
        direct: True where the library reads the tensor itself, so that masks must scale it in place of its layer's
            forward (packed projections, fused kernels, layers that are no `nn.Linear`).
        gaps: rows of something else before each of the `outer` repeats, and behind the last one; () where the group's
            axis is all there is.
        power: queries are multiplied by (kept / size) ** power at the cut, for the softmax scale that follows the size.
        queries: which of the `outer` repeats are queries, where they are not the first `query_groups`.
        reads: True where a residual stream's channels are scored by what the tensor sums of them.
    """

    tensor: str
    dim: int = 0
    outer: int = 1
    inner: int | tuple[int, ...] = 1
    produces: bool = True
    query_groups: int = 0
    follows: bool = False
    silent: tuple[int, ...] = ()
    direct: bool = False
    gaps: tuple[int, ...] = ()
    power: float = 0.5
    queries: tuple[int, ...] = ()
    reads: bool = False

    @property
    def inners(self) -> tuple[int, ...]:
        """Rows per channel in each of the `outer` repeats."""
        return self.inner if isinstance(self.inner, tuple) else (self.inner,) * self.outer

    def length(self, size: int) -> int:
        """Return the length of the tensor along `dim` when the group has `size` channels."""
        return size * sum(self.inners) + sum(self.gaps)

    def query_rows(self, size: int) -> Tensor:
        """Return the positions along `dim` that are queries when the group has `size` channels, int64."""
        queries = self.queries or tuple(range(self.query_groups))
        others = replace(self, silent=tuple(repeat for repeat in range(self.outer) if repeat not in queries))
        return (others.expand(torch.zeros(size, device="cpu")) == 0).nonzero().flatten()

    def channels(self, size: int) -> Tensor:
        """Return the channel that every position along `dim` belongs to, [length], int64; -1 in gaps."""
        gaps = self.gaps or (0,) * (self.outer + 1)
        with torch.device("cpu"):  # models may be built with another one as the default
            parts = [torch.full((gaps[0],), -1)]
            for inner, gap in zip(self.inners, gaps[1:], strict=True):
                parts += [torch.arange(size).repeat_interleave(inner), torch.full((gap,), -1)]
            return torch.cat(parts)

    def index(self, kept: Tensor, size: int) -> Tensor:
        """Return the positions along `dim` of the `kept` channels (int64, ascending per group)."""
        gaps, kept = self.gaps or (0,) * (self.outer + 1), kept.unique()
        whole = partial(torch.arange, device=kept.device)
        start, parts = gaps[0], [whole(gaps[0])]
        for inner, gap in zip(self.inners, gaps[1:], strict=True):
            parts.append((start + kept.unsqueeze(1) * inner + whole(inner)).flatten())
            start += size * inner
            parts.append(whole(start, start + gap))
            start += gap
        return torch.cat(parts)

    @renamed_arguments(entries="channels")
    def expand(self, channels: Tensor) -> Tensor:
        """Repeat one value per channel, [size], to one value per row, [length]; silent rows and gaps get 1."""
        ones, gaps = torch.ones_like(channels), self.gaps or (0,) * (self.outer + 1)
        parts = [channels.new_ones(gaps[0])]
        for repeat, (inner, gap) in enumerate(zip(self.inners, gaps[1:], strict=True)):
            parts += [(ones if repeat in self.silent else channels).repeat_interleave(inner), channels.new_ones(gap)]
        return torch.cat(parts)

    def reduce(self, rows: Tensor, *, silent: bool = False) -> Tensor:
        """Sum one value per row, shape [length], to one value per channel, shape [size]; silent rows only if asked."""
        if isinstance(self.inner, int) and not self.gaps and (silent or not self.silent):
            return rows.view(self.outer, -1, self.inner).sum(dim=(0, 2))
        size = (len(rows) - sum(self.gaps)) // sum(self.inners)
        gaps = self.gaps or (0,) * (self.outer + 1)
        lengths = [each for inner, gap in zip(self.inners, gaps[1:], strict=True) for each in (size * inner, gap)]
        repeats = rows[gaps[0] :].split(lengths)
        counted = [
            part.view(size, -1).sum(1)
            for repeat, part in enumerate(repeats[::2])
            if silent or repeat not in self.silent
        ]
        return torch.stack(counted).sum(0)


@dataclass(frozen=True)
class Attribute:
    """A stored number of a module that depends on the size of the group, and is updated by the cut.

    Its new value is `factor * kept`, or `(width * kept) ** -0.5` if `factor` is None: a softmax scale of heads whose
    channels have `width` dimensions each, such as pairs that are rotated together.
    """

    module: str
    name: str
    factor: int | None = 1
    width: int = 1

    def __str__(self) -> str:
        """Return the attribute and its new value, in words."""
        name = f"{self.module}.{self.name}" if self.module else self.name
        if self.factor is None:
            kept = "kept" if self.width == 1 else f"({self.width} x kept)"
            return f"{name} = {kept} ** -0.5"
        return f"{name} = {'' if self.factor == 1 else f'{self.factor} x '}kept"

    def value(self, kept: int) -> int | float:
        """Return the attribute's value for `kept` channels."""
        if self.factor is not None:
            return self.factor * kept
        return (self.width * kept) ** -0.5 if kept else 1.0  # where nothing is left, nothing is scaled


@dataclass(frozen=True)
class Swap:
    """A class that replaces that of a module at the cut, if its own forward hard-codes the uncut width.

    Attributes:
        module: dotted name of the module, from the model.
        kind: a subclass of the module's class whose forward takes the width from the weights; same parameters.
    """

    module: str
    kind: type[nn.Module]
    how: str = ""
    """Under which name a plan writes the class down; "" where it cannot be made again from the module's."""


@renamed_attributes(entry="channel")
@dataclass(frozen=True)
class Group:
    """One prunable axis and all slices of tensors that are coupled along it (one mask vector zeta in the paper).

    Attributes:
        name: dotted name of the module that holds it, unique in the model.
        kind: "attention", "mlp", or "residual" for the residual stream of a tower.
        modality: "vision", "text" or "other"; for reports, and for the published cost weights.
        size: number of channels before pruning.
        heads: number of attention heads that share the channels; 1 for an MLP, and where channels are whole heads.
        slices: every tensor that carries the axis; the first that produces it is the query, the second the key
            (or the first is a fused query-key-value), and the last one consumes it.
        attributes: the numbers to set again after the cut.
        swaps: the classes to take on with the cut.
        channel: what one channel is: a "dimension" of every head, a whole "head", a key-value "group" of heads with all
            queries that share it, a "neuron" of an MLP, or a "channel" of a residual stream.
        proved: whether masking and cutting it were compared on numbers, and agree (see `find_prunable`).
        norms: the modules that normalise over a residual stream: masked, they compute over the kept channels.
    """

    name: str
    kind: Kind
    modality: str
    size: int
    heads: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    swaps: tuple[Swap, ...] = ()
    channel: Channel = "dimension"
    proved: bool = False
    norms: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe the coupled slices, over several lines, for people."""
        lines = [f"{self.name or 'the model'}: {self.kind} ({self.modality}), {_channels(self)}"]
        last = self.online[-1:]
        for heading, parts in (
            ("producers", self.producers),
            ("cut with it", [part for part in self.online if not part.produces and part not in last and not part.dim]),
            ("consumers", [part for part in self.online if not part.produces and (part in last or part.dim)]),
            ("copied in", [part for part in self.slices if part.follows]),
        ):
            lines += [
                f"  {heading if number == 0 else '':<13}{part.tensor}, {_layout(part, self.size)}"
                for number, part in enumerate(parts)
            ]
        lines += [f"  {'set again':<13}{number}" for number in self.attributes]
        lines += [f"  {'norm':<13}{norm}" for norm in self.norms]
        lines += [f"  {'class':<13}{swap.module or 'the model'} becomes a {swap.kind.__name__}" for swap in self.swaps]
        how = "masked and cut, the model computes the same on random numbers" if self.proved else "no"
        return "\n".join([*lines, f"  {'proved':<13}{how}"])

    @property
    def width(self) -> int:
        """Columns of the consumer that belong to one channel."""
        return sum(self.online[-1].inners)

    @property
    def producers(self) -> tuple[Slice, ...]:
        """The slices that produce the axis: masked while searching, scored at every step."""
        return tuple(part for part in self.slices if part.produces and not part.follows)

    @property
    def scored(self) -> tuple[Slice, ...]:
        """The slices whose gradients give the importance: the producers, or the consumers of a residual stream.

        A channel of a stream leaves it where weights sum over it: the derivative of the loss to a mask on all that they
        read is the first-order change of the loss without the channel. Masks on what writes it would count it again at
        every block.
        """
        return tuple(part for part in self.slices if part.reads) or self.producers

    @property
    def online(self) -> tuple[Slice, ...]:
        """The slices outside momentum copies, which make up the cost of a channel."""
        return tuple(part for part in self.slices if not part.follows)


def _channels(group: Group) -> str:
    called = {"group": "groups of heads"}
    heads = f" of each of {group.heads} heads" if group.channel == "dimension" else ""
    return f"{group.size} {called.get(group.channel, f'{group.channel}s')}{heads}"


def _layout(part: Slice, size: int) -> str:
    """Describe the position of the channels in a tensor: "dimension 0 as 12 x 64 x 1"."""
    inner = str(part.inner) if isinstance(part.inner, int) else f"({', '.join(map(str, part.inner))})"
    described = f"dimension {part.dim} as {part.outer} x {size} x {inner}"
    if part.gaps:
        described += f", beside {sum(part.gaps)} of others"
    if part.power and (part.queries or part.query_groups > 0):
        described += f"; queries times (kept / {size}) ** {part.power:g}"
    return described


Swapped = Callable[[type[nn.Module]], type[nn.Module]]


@dataclass(frozen=True)
class Skipped:
    """A part of a model that looks prunable but is skipped, and why."""

    name: str
    reason: str


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called `name`, unmasked even if its module carries a mask.

    Raises:
        AttributeError: there is no such tensor.
    """
    module, leaf = owner_of(model, name)
    held: Tensor | None = module._parameters.get(leaf)
    held = module._buffers.get(leaf) if held is None else held
    if held is None:
        raise AttributeError(f"{type(model).__name__} has no tensor {name!r}")
    return held


def has_tensor(model: nn.Module, name: str) -> bool:
    """Whether `tensor_of` finds a parameter or buffer called `name`."""
    try:
        tensor_of(model, name)
    except AttributeError:
        return False
    return True


def owner_of(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """Return the module that holds the parameter `tensor`, and the parameter's name inside it."""
    path, _, leaf = tensor.rpartition(".")
    return model.get_submodule(path), leaf


def around(module: str) -> Iterator[str]:
    """Yield the name of a module and of its ancestors, up to the model itself."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""


_ABSENT = object()


def number_of(module: nn.Module, name: str) -> Any:
    """Return a stored number by name: an attribute, or "attribute[key][key]" for an item in it."""
    attribute, *keys = _path(name)
    value: Any = getattr(module, attribute, {}) if keys else getattr(module, attribute)
    for key in keys:
        value = value.get(key, _ABSENT) if isinstance(value, Mapping) else value[int(key)]
    return value


def has_number(module: nn.Module, name: str) -> bool:
    """Whether a module has a number of this name, or can be given one."""
    return "[" in name or hasattr(module, name)


def set_number(module: nn.Module, name: str, value: Any) -> None:
    """Set a number by its name of `number_of`; lists and mappings are replaced, not changed in place."""
    attribute, *keys = _path(name)
    setattr(module, attribute, _replaced(getattr(module, attribute, {}), keys, value) if keys else value)


def _path(name: str) -> list[str]:
    return [part.removesuffix("]") for part in name.split("[")]


def _replaced(held: Any, keys: list[str], value: Any) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(held, Mapping):
        others = {each: number for each, number in held.items() if each != key}
        new = _replaced(held.get(key), rest, value)
        return others if new is _ABSENT else {**others, key: new}
    place = int(key)
    return type(held)([*held[:place], _replaced(held[place], rest, value), *held[place + 1 :]])


__getattr__ = older_names(__name__)
