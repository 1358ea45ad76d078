"""Groups that a user states: which layers produce an axis, which consume it, and what a channel is, by names and words.

    GroupSpec(MyAttention, rows={"qkv": "3 heads dim"}, columns={"proj": "heads dim"}, cut="dim", sizes={"heads": 12})

says of every `MyAttention` that the rows of its layer `qkv` are 3 times `heads` times `dim`, the innermost last, that
the columns of `proj` are `heads` times `dim`, and that `dim` can be cut. Stated groups are proved like traced ones.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from upop.pruning.deprecated import older_names, renamed_attributes
from upop.pruning.errors import SettingError, nearest, some_of
from upop.pruning.groups import Attribute, Channel, Group, Kind, Slice, number_of, tensor_of
from upop.pruning.traits import momentum_prefixes

_ROOT = " ** -0.5"


@renamed_attributes(entry="channel")
@dataclass(frozen=True)
class GroupSpec:
    """A prunable group that a user states, or one for every module of a class.

    A pattern factors a dimension, outermost first: words and numbers that are multiplied, and
    ` + ` between what lies side by side ("heads dim + groups dim + groups dim"). What lacks the word `cut` stays.
    Names are those of layers below the module, whose weight and bias are meant, or of tensors; of a tensor with several
    dimensions the pattern has commas between them, and `_` where one does not matter ("experts, _, hidden").

    Attributes:
        at: a class, whose modules each hold such a group; or the name of a module, or a pattern (`fnmatch`) of names,
            of which the outermost are meant.
        rows: layer -> pattern of its rows, of the layers that make the axis; of an attention the queries come first.
        columns: layer -> pattern of its columns, of the layers that sum over the axis.
        cut: the word of the patterns that is cut; its channels are the group's.
        sizes: word -> its number, or the attribute of the module that keeps it; what lengths tell may be left out.
        also: layer -> pattern of its rows, of what has to be cut with the axis and is not masked: gates, depthwise
            convolutions, norms and scales.
        sets: attribute of the module -> what it keeps of the axis, in the same words, to be set again: "dim",
            "heads dim"; a softmax scale as "dim ** -0.5".
        kind: "attention" or "mlp"; by default an attention where some pattern has more than one word.
        channel: what a channel is; by default inferred from the patterns.
    """

    at: type[nn.Module] | str
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    cut: str
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, str] = field(default_factory=dict)
    kind: Kind | None = None
    channel: Channel | None = None


Stated = GroupSpec | Group
"""What `groups=` takes: specs, or groups with their slices."""


@dataclass(frozen=True)
class Meant:
    """A group that a user stated, in a model, still to be proved.

    Attributes:
        group: with queries as they are first thought to lie.
        holder: the dotted name of the module that it was stated of.
        queries: other ways in which the queries may lie in the slices, by the slices' places.
    """

    group: Group
    holder: str
    queries: tuple[Mapping[int, tuple[int, ...]], ...] = ()


def meant(model: nn.Module, stated: Sequence[Stated], modality: Callable[[nn.Module, str], str]) -> list[Meant]:
    """Return the groups that are stated of a model.

    Args:
        model: whose layers are named.
        stated: by a user.
        modality: (model, name of a module) -> "vision", "text" or "other", for reports.

    Raises:
        SettingError: something does not fit: a name, a length, a word of unknown size, or an axis that two groups cut.
    """
    found = []
    for each in stated:
        if isinstance(each, Group):
            found.append(Meant(_checked(model, each), each.name))
        elif isinstance(each, GroupSpec):
            found += [_Reading(model, each, path).meant(modality(model, path)) for path in _places(model, each)]
        else:
            raise SettingError(f"groups takes a list of upop.GroupSpec (or of groups); found {type(each).__name__}.")
    found = _apart(found)
    taken: dict[tuple[str, int], list[tuple[str, set[int]]]] = {}
    for group in (each.group for each in found):
        for place, here in positions(group).items():
            for other, there in taken.setdefault(place, []):
                if here & there:
                    raise SettingError(
                        f"groups has {group.name} and {other}, which both cut {place[0]} along dimension {place[1]}. "
                        "Leave one of them out."
                    )
            taken[place].append((group.name, here))
    return found


def positions(group: Group) -> dict[tuple[str, int], set[int]]:
    """Return which positions of which dimensions of which tensors a group cuts."""
    found: dict[tuple[str, int], set[int]] = {}
    for part in group.slices:
        channels: Tensor = part.channels(group.size)
        found.setdefault((part.tensor, part.dim), set()).update((channels >= 0).nonzero().flatten().tolist())
    return found


def _apart(found: list[Meant]) -> list[Meant]:
    """Give groups of one module names that differ: those of their first layers."""
    names = [each.group.name for each in found]
    return [
        replace(each, group=replace(each.group, name=each.group.slices[0].tensor.rpartition(".")[0]))
        if names.count(each.group.name) > 1
        else each
        for each in found
    ]


def _checked(model: nn.Module, group: Group) -> Group:
    for part in group.slices:
        try:
            length = tensor_of(model, part.tensor).shape[part.dim]
        except (AttributeError, IndexError):
            raise SettingError(
                f"groups has {group.name}, and {type(model).__name__} has no tensor {part.tensor} with a dimension "
                f"{part.dim}{nearest(part.tensor, [name for name, _ in model.named_parameters()])}."
            ) from None
        if length != part.length(group.size):
            raise SettingError(
                f"groups has {group.name} of {group.size} channels, for which {part.tensor} would have "
                f"{part.length(group.size)} along dimension {part.dim}; it has {length}."
            )
    return group


def _places(model: nn.Module, spec: GroupSpec) -> list[str]:
    """Return the names of the modules that a spec is of."""
    modules = dict(model.named_modules())
    copies = momentum_prefixes(model)
    if isinstance(spec.at, str):
        matched = [spec.at] if spec.at in modules else fnmatch.filter(modules, spec.at)
        found = [path for path in matched if not any(path.startswith(f"{outer}.") for outer in matched)]
        described = f"{spec.at!r}{nearest(spec.at, list(modules))}"
    else:
        found = [path for path, module in modules.items() if isinstance(module, spec.at)]
        kinds = sorted({type(module).__name__ for module in modules.values()})
        described = f"of class {spec.at.__name__}{nearest(spec.at.__name__, kinds)}"
    found = [path for path in found if not path.startswith(copies)]
    if not found:
        raise SettingError(f"A GroupSpec is of modules {described}, and {type(model).__name__} has none.")
    return found


@dataclass(frozen=True)
class _Pattern:
    """What a dimension of a tensor is stated to be: products side by side."""

    given: str
    tensor: str
    dim: int
    length: int
    terms: tuple[tuple[str, ...], ...]
    text: str

    @property
    def words(self) -> set[str]:
        return {word for term in self.terms for word in term if not word.isdigit()}


class _Reading:
    """Reads a spec at one module of a model."""

    def __init__(self, model: nn.Module, spec: GroupSpec, path: str) -> None:
        self._model, self._spec, self._path = model, spec, path
        self._module = model.get_submodule(path)
        self._described = f"The GroupSpec of {path or type(model).__name__}: "

    def meant(self, modality: str) -> Meant:
        spec = self._spec
        rows = [each for name, text in spec.rows.items() for each in self._patterns(name, text, rows=True)]
        also = [each for name, text in spec.also.items() for each in self._patterns(name, text, rows=True)]
        columns = [each for name, text in spec.columns.items() for each in self._patterns(name, text, rows=False)]
        for what, given in (("rows", rows), ("columns", columns)):
            if not any(spec.cut in each.words for each in given):
                raise SettingError(
                    f"{self._described}no pattern of {what} has the word {spec.cut!r}, which is to be cut. Say in "
                    f"{what} which layers {'make' if what == 'rows' else 'sum over'} it."
                )
        every = [each for each in (*rows, *also, *columns) if spec.cut in each.words]
        sizes = self._sizes([*rows, *also, *columns])
        slices = [self._slice(each, sizes, produces=each in rows) for each in every]
        producers = [part for part in slices if part.produces]
        kind: Kind = spec.kind or ("attention" if any(len(each.words) > 1 for each in every) else "mlp")
        channel = spec.channel or _channel(kind, producers)
        ways = list(_queries(every, slices, spec.cut, sizes)) if channel == "dimension" else []
        ways = list({str(way): way for way in ways}.values())
        heads = len(next(iter(ways[0].values()))) if ways else producers[0].outer if channel == "dimension" else 1
        attributes = tuple(self._attribute(name, text, sizes) for name, text in spec.sets.items())
        size = sizes[spec.cut]
        if size < 2:
            raise SettingError(f"{self._described}{spec.cut} has size {size}: nothing can be pruned.")
        parts = tuple(replace(part, power=0.0) for part in slices)
        name = self._path or every[0].tensor.rpartition(".")[0]
        group = Group(name, kind, modality, size, heads, parts, attributes, channel=channel, proved=True)
        return Meant(group, self._path, tuple(ways))

    def _patterns(self, name: str, text: str, *, rows: bool) -> Iterator[_Pattern]:
        """Yield what is said of the tensors of a layer, or of a tensor."""
        layer = self._layer(name)
        if layer is None:
            yield from self._of_tensor(name, text)
            return
        weight = layer._parameters.get("weight")
        if weight is None:
            raise SettingError(
                f"{self._described}its layer {name!r}, a {type(layer).__name__}, keeps no parameter called weight (a "
                "parametrization may compute it). Name the tensor itself, with commas between its dimensions."
            )
        transposed = hasattr(layer, "nf")  # transformers' Conv1D
        dim = 0 if weight.dim() == 1 or rows != transposed else 1
        bias = layer._parameters.get("bias")
        for leaf, at in (("weight", dim), *((("bias", 0),) if rows and bias is not None else ())):
            yield self._pattern(name, f"{name}.{leaf}" if name else leaf, at, text)

    def _layer(self, name: str) -> nn.Module | None:
        try:
            return self._module.get_submodule(name)
        except AttributeError:
            return None

    def _of_tensor(self, name: str, text: str) -> Iterator[_Pattern]:
        dims = text.split(",")
        try:
            shape = tensor_of(self._module, name).shape
        except AttributeError:
            known = [path for path, _ in self._module.named_modules() if path]
            known += [path for path, _ in self._module.named_parameters()]
            raise SettingError(
                f"{self._described}it has no layer and no tensor called {name!r}{nearest(name, known)}. "
                f"It has {some_of(known)}."
            ) from None
        if len(dims) != len(shape):
            raise SettingError(
                f"{self._described}{name} has the shape {tuple(shape)}, and {text!r} describes {len(dims)} dimensions. "
                "Write a pattern for each, separated by commas, and _ for a dimension that does not matter."
            )
        yield from (self._pattern(name, name, at, part) for at, part in enumerate(dims) if part.strip() != "_")

    def _pattern(self, given: str, name: str, dim: int, text: str) -> _Pattern:
        tensor = f"{self._path}.{name}" if self._path else name
        terms = tuple(tuple(term.split()) for term in text.split("+"))
        wrong = [word for term in terms for word in term if not (word.isidentifier() or (word.isdigit() and int(word)))]
        if wrong or not all(terms):
            raise SettingError(
                f"{self._described}{text!r} is not a pattern: words and numbers separated by blanks, and + between "
                f"concatenated parts{f'; found {wrong[0]!r}' if wrong else ''}."
            )
        cut = self._spec.cut
        if any(term.count(cut) > 1 for term in terms):
            raise SettingError(f"{self._described}{text!r} has {cut!r} twice in a product.")
        return _Pattern(given, tensor, dim, tensor_of(self._model, tensor).shape[dim], terms, text.strip())

    def _sizes(self, patterns: Sequence[_Pattern]) -> dict[str, int]:
        """Return the number that every word stands for."""
        sizes = {word: self._number(word, given) for word, given in self._spec.sizes.items()}
        left = list(patterns)
        while left:
            known = [each for each in left if len(each.words - sizes.keys()) <= 1]
            if not known:
                words = sorted(set().union(*(each.words for each in left)) - sizes.keys())
                raise SettingError(
                    f"{self._described}{left[0].tensor} has {left[0].length} for {left[0].text!r}, which does not "
                    f"determine the sizes of {', '.join(words)}. Give "
                    f"sizes={{{words[0]!r}: a number, or the attribute that stores it}}."
                )
            each = known[0]
            left.remove(each)
            for word in each.words - sizes.keys():
                sizes[word] = self._solved(each, word, sizes)
            if self._length(each, sizes) != each.length:
                raise SettingError(self._misfit(each, sizes))
        return sizes

    def _number(self, word: str, given: int | str) -> int:
        value = given
        if isinstance(given, str):
            path, _, name = given.rpartition(".")
            try:
                value = number_of(self._module.get_submodule(path), name)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                raise SettingError(f"{self._described}it has no attribute {given!r}, which sizes names.") from None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{self._described}{word} should be a whole number of at least 1; found {value!r}.")
        return value

    def _solved(self, pattern: _Pattern, word: str, sizes: Mapping[str, int]) -> int:
        """Return the size of the one word of a pattern that is not known."""
        if any(term.count(word) > 1 for term in pattern.terms):
            raise SettingError(
                f"{self._described}give the size of {word!r}, which {pattern.text!r} multiplies by itself."
            )
        zero, one = (self._length(pattern, {**sizes, word: number}) for number in (0, 1))
        size, rest = divmod(pattern.length - zero, one - zero)
        if rest or size < 1:
            raise SettingError(self._misfit(pattern, sizes))
        return size

    @staticmethod
    def _length(pattern: _Pattern, sizes: Mapping[str, int]) -> int:
        return sum(math.prod(_value(word, sizes) for word in term) for term in pattern.terms)

    def _misfit(self, pattern: _Pattern, sizes: Mapping[str, int]) -> str:
        described = ", ".join(f"{word} {sizes[word]}" for word in sorted(pattern.words & sizes.keys()))
        whole = "" if pattern.words - sizes.keys() else f", which makes {self._length(pattern, sizes)}"
        return (
            f"{self._described}{pattern.tensor} has {pattern.length} along dimension {pattern.dim}, and "
            f"{pattern.text!r} does not fit that{f' with {described}' if described else ''}{whole}."
        )

    def _slice(self, pattern: _Pattern, sizes: Mapping[str, int], *, produces: bool) -> Slice:
        cut, inners, gaps = self._spec.cut, [], [0]
        for term in pattern.terms:
            if cut not in term:
                gaps[-1] += math.prod(_value(word, sizes) for word in term)
                continue
            place = term.index(cut)
            outer, inner = (
                math.prod(_value(word, sizes) for word in part) for part in (term[:place], term[place + 1 :])
            )
            inners += [inner] * outer
            gaps += [0] * outer
        module, _, leaf = pattern.tensor.rpartition(".")
        parameter = leaf in self._model.get_submodule(module)._parameters
        return Slice(
            pattern.tensor,
            pattern.dim,
            len(inners),
            inners[0] if len(set(inners)) == 1 else tuple(inners),
            produces=produces and parameter,
            gaps=tuple(gaps) if any(gaps) else (),
        )

    def _attribute(self, name: str, text: str, sizes: Mapping[str, int]) -> Attribute:
        path, _, leaf = name.rpartition(".")
        module = ".".join(part for part in (self._path, path) if part)
        try:
            held = number_of(self._model.get_submodule(module), leaf)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise SettingError(f"{self._described}it has no attribute {name!r}, which sets names.") from None
        words = text.removesuffix(_ROOT).split()
        if words.count(self._spec.cut) != 1 or (text.endswith(_ROOT) and len(words) > 1):
            raise SettingError(
                f"{self._described}{text!r} of sets should have {self._spec.cut!r} once, in a product, or be "
                f"'{self._spec.cut}{_ROOT}'."
            )
        unknown = [word for word in words if not word.isdigit() and word not in sizes]
        if unknown:
            raise SettingError(f"{self._described}{unknown[0]!r} of sets is in no pattern.")
        factor = math.prod(_value(word, sizes) for word in words if word != self._spec.cut)
        found = Attribute(module, leaf, None if text.endswith(_ROOT) else factor)
        value = found.value(sizes[self._spec.cut])
        if isinstance(held, bool) or not isinstance(held, int | float) or abs(held - value) > 1e-6 * value:
            raise SettingError(f"{self._described}{name} is {held!r}, and {text!r} of sets makes {value:g}.")
        return found


def _value(word: str, sizes: Mapping[str, int]) -> int:
    return int(word) if word.isdigit() else sizes[word]


def _channel(kind: Kind, producers: Sequence[Slice]) -> Channel:
    if kind == "mlp":
        return "neuron"
    rows = {inner for part in producers for inner in part.inners}
    return "dimension" if rows == {1} else "head" if len(rows) == 1 else "group"


def _queries(
    patterns: Sequence[_Pattern], slices: Sequence[Slice], cut: str, sizes: Mapping[str, int]
) -> Iterator[dict[int, tuple[int, ...]]]:
    """Yield ways in which queries may lie: in all of the first layer, or at the first place of one of its numbers."""
    first = patterns[0]
    owner = first.tensor.rpartition(".")[0]
    producers = [(at, each) for at, (each, part) in enumerate(zip(patterns, slices, strict=True)) if part.produces]
    before = next(term[: term.index(cut)] for term in first.terms if cut in term)
    counts = [_value(word, sizes) for word in before]
    blocks = math.prod(counts)
    numbers = [(place, math.prod(counts[place + 1 :])) for place, word in enumerate(before) if word.isdigit()]
    chosen = [tuple(at for at in range(blocks) if at // inside % counts[place] == 0) for place, inside in numbers]
    for mine in (
        [at for at, each in producers if each.given == first.given],
        [at for at, each in producers if each.tensor.rpartition(".")[0] == owner],
    ):
        yield from (dict.fromkeys(mine, queries) for queries in (*chosen, tuple(range(blocks))))


__getattr__ = older_names(__name__)
