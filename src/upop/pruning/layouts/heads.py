"""Following queries, keys and values through a forward pass, in the source: what is done to heads and dimensions.

The axis of an attention unit goes from the projections through reshapes to the scores, and with the values on to the
output projection. `trace` reads the forward statement by statement, tells projections (queries, keys, values and what
attention makes of them) from scores, and lists everything else that is done to them.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

from upop.pruning.layouts.source import Methods, attribute_of_self, called, text_of


class Level(IntEnum):
    """What an expression holds: nothing that matters, scores, or projections and what attention makes of them."""

    NOTHING = 0
    SCORES = 1
    PROJECTION = 2


_MATRIX = ("torch.matmul", "torch.bmm", ".matmul", ".bmm", "torch.baddbmm")
_ATTEND = ("scaled_dot_product_attention", "attention_interface")
_SOFTMAX = ("softmax", "Softmax")
# What is asked of a tensor without touching its entries.
_FACTS = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
_QUESTIONS = ("isinstance", "len", "hasattr", "range", ".size", ".dim", ".numel", ".tolist", "torch.finfo", ".item")
_LAST = ("shape[-1]", "size(-1)", "shape[2]", "size(2)")
_SHAPES = (".view", ".reshape", ".unflatten", ".split", "torch.reshape", "torch.split")


@dataclass(frozen=True)
class Touch:
    """Something done to projections or scores.

    Attributes:
        what: "call", "part" (a call of one of the module's own parts), "sum" or "product" with something else, "mix"
            (of two projections), "turn" (another axis becomes the last one), "pick" (along the last axis), "take"
            (along the second axis), "keep" (beyond the forward).
        name: what is called, or the text of the other operand.
        level: projections or scores.
        text: the whole expression.
    """

    what: str
    name: str
    level: Level
    text: str = ""


@dataclass
class Trace:
    """Everything that a forward does to heads and dimensions; kept and handed out again, so never changed by readers.

    Attributes:
        touches: in the order of the source.
        widths: expressions that stand for the width of the input in the shape of heads.
        strays: whether the width of the input has another say about heads, which cannot be taken from it.
        reached: whether the output projection is given what attention made.
    """

    touches: list[Touch] = field(default_factory=list)
    widths: list[ast.expr] = field(default_factory=list)
    strays: bool = False
    reached: bool = False


@cache
def trace(methods: Methods, makers: frozenset[str], output: str | None, given: tuple[Level, ...] = ()) -> Trace:
    """Follow what `makers` make through `methods`, until `output` consumes it.

    Args:
        methods: `forward` and the methods that it reaches, parsed.
        makers: attributes of the module that make queries, keys and values: projections and bare biases.
        output: the attribute that consumes the heads; None if another module does.
        given: the levels of the arguments of `forward`, where heads are handed to it.
    """
    nodes = [node for method in methods.values() for node in ast.walk(method)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and attribute_of_self(node.func) in makers]
    inputs = {
        name.id for node in calls for given in node.args[:1] for name in ast.walk(given) if isinstance(name, ast.Name)
    }
    found = Trace()
    _Follower(methods, makers, output, inputs, found).method("forward", given, {})
    return found


class _Follower:
    """One function while it is followed: the level of every name."""

    def __init__(
        self,
        methods: Methods,
        makers: frozenset[str],
        output: str | None,
        inputs: set[str],
        found: Trace,
        depth: int = 0,
    ) -> None:
        self._methods, self._makers, self._output, self._found = methods, makers, output, found
        self._inputs, self._depth = inputs, depth
        self._widths: set[str] = set()  # names for the width of the input
        self._derived: set[str] = set()  # names for numbers that were computed from it
        self._levels: dict[str, Level] = {}
        self._returned: list[tuple[Level, ...]] = []
        self._several: tuple[Level, ...] = ()  # of the values that the last method returned

    def method(self, name: str, given: Sequence[Level], named: dict[str, Level]) -> Level:
        """Follow a method with its arguments at the given levels; return the level of what it returns."""
        function = self._methods[name]
        places = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
        if places[:1] == ["self"]:
            places = places[1:]
        self._levels = {**dict(zip(places, given, strict=False)), **named}
        self._block(function.body)
        self._several = tuple(max(levels) for levels in zip(*self._returned, strict=False))
        return max(self._several, default=Level.NOTHING)

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            combined = ast.BinOp(_load(node.target), node.op, node.value)
            self._assign(node.target, self._level(ast.fix_missing_locations(ast.copy_location(combined, node))))
        elif isinstance(node, ast.Return):
            parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] if node.value else []
            self._returned.append(tuple(self._level(part) for part in parts))
        elif isinstance(node, ast.If):
            self._level(node.test)
            before = dict(self._levels)
            self._block(node.body)
            after, self._levels = self._levels, before
            self._block(node.orelse)
            for name, level in after.items():
                self._levels[name] = max(level, self._levels.get(name, Level.NOTHING))
        elif isinstance(node, ast.For):
            self._assign(node.target, self._level(node.iter))
            for _ in range(2):  # what one round leaves, the next one finds
                self._block(node.body)
        elif isinstance(node, ast.FunctionDef):
            self._visit(node)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._statement(child)
                elif isinstance(child, ast.expr):
                    self._level(child)
                elif isinstance(child, ast.withitem):
                    self._level(child.context_expr)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            levels = [self._level(part) for part in value.elts]
            for part, level in zip(target.elts, levels, strict=True):
                self._assign(part, level)
            return
        self._note_widths(target, value)
        self._several = ()
        level = self._level(value)
        own = isinstance(value, ast.Call) and attribute_of_self(value.func) in self._methods
        if own and isinstance(target, ast.Tuple) and len(target.elts) == len(self._several):
            for part, level in zip(target.elts, self._several, strict=True):
                self._assign(part, level)
        else:
            self._assign(target, level)

    def _note_widths(self, target: ast.expr, value: ast.expr) -> None:
        """Remember which names hold the width of the input, or numbers computed from it."""
        shaped = value.func if isinstance(value, ast.Call) else value
        if isinstance(target, ast.Tuple) and isinstance(shaped, ast.Attribute) and shaped.attr in ("shape", "size"):
            last = target.elts[-1]
            if isinstance(last, ast.Name):
                of_input = self._level(shaped.value) == Level.NOTHING
                (self._widths.add if of_input else self._widths.discard)(last.id)
        elif isinstance(target, ast.Name):
            derived = any(self._is_width(part) or self._is_derived(part) for part in ast.walk(value))
            plain = not any(isinstance(part, ast.Call) and called(part) in _SHAPES for part in ast.walk(value))
            (self._derived.add if derived and plain else self._derived.discard)(target.id)
            self._widths.discard(target.id)

    def _is_derived(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self._derived

    def _is_width(self, node: ast.AST) -> bool:
        """Whether an expression is the width of the input: a name for it, or its shape at the last place."""
        if isinstance(node, ast.Name):
            return node.id in self._widths
        text = text_of(node) if isinstance(node, ast.Subscript | ast.Call) else ""
        root, _, rest = text.partition(".")
        return root in self._inputs and rest in _LAST and self._levels.get(root, Level.NOTHING) == Level.NOTHING

    def _assign(self, target: ast.expr, level: Level) -> None:
        if level == Level.PROJECTION and isinstance(target, ast.Attribute | ast.Subscript):
            self._touch("keep", target, level)
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                self._levels[node.id] = level

    def _touch(self, what: str, node: ast.AST, level: Level, name: str | None = None) -> None:
        text = text_of(node)
        self._found.touches.append(Touch(what, name or text[:60], level, text))

    def _visit(self, node: ast.AST) -> Level:
        """Look into something of which no rule speaks."""
        levels = [self._level(child) for child in ast.walk(node) if isinstance(child, ast.Name | ast.Call)]
        level = max(levels, default=Level.NOTHING)
        if level == Level.PROJECTION:
            self._touch("call", node, level)
        return level

    def _level(self, node: ast.expr) -> Level:
        if isinstance(node, ast.Name):
            return self._levels.get(node.id, Level.NOTHING)
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.Lambda):
            return Level.NOTHING
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Attribute):
            own = attribute_of_self(node)
            if own is not None:
                return Level.PROJECTION if own in self._makers else Level.NOTHING
            level = self._level(node.value)
            if node.attr in ("T", "mT", "H") and level == Level.PROJECTION:
                self._touch("turn", node, level)
            return Level.NOTHING if node.attr in _FACTS else level
        if isinstance(node, ast.BinOp):
            return self._binary(node)
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        if isinstance(node, ast.IfExp):
            self._level(node.test)
            return max(self._level(node.body), self._level(node.orelse))
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return max((self._level(part) for part in node.elts), default=Level.NOTHING)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            for loop in node.generators:
                self._assign(loop.target, self._level(loop.iter))
            return self._level(node.elt)
        if isinstance(node, ast.Starred | ast.UnaryOp | ast.NamedExpr):
            level = self._level(node.operand if isinstance(node, ast.UnaryOp) else node.value)
            if isinstance(node, ast.NamedExpr):
                self._assign(node.target, level)
            return level
        if isinstance(node, ast.Compare | ast.BoolOp | ast.Slice | ast.Dict):
            self._found.strays |= isinstance(node, ast.Compare) and any(map(self._is_width, ast.walk(node)))
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._level(child)
            return Level.NOTHING
        return self._visit(node)

    def _binary(self, node: ast.BinOp) -> Level:
        if isinstance(node.op, ast.MatMult):
            return self._matrix(node.left, node.right)
        left, right = self._level(node.left), self._level(node.right)
        joined = isinstance(node.left, ast.Tuple) or isinstance(node.right, ast.Tuple)
        if Level.PROJECTION not in (left, right) or joined:
            return max(left, right)
        if left == right or Level.SCORES in (left, right):
            self._touch("mix", node, Level.PROJECTION)
            return Level.PROJECTION
        other = node.right if left == Level.PROJECTION else node.left
        if isinstance(node.op, ast.Add | ast.Sub):
            self._touch("sum", node, Level.PROJECTION, text_of(other))
        elif not isinstance(other, ast.Constant):
            self._touch("product", node, Level.PROJECTION, text_of(other))
        return Level.PROJECTION

    def _subscript(self, node: ast.Subscript) -> Level:
        level = self._level(node.value)
        self._level(node.slice)
        if level == Level.PROJECTION and isinstance(node.slice, ast.Tuple):
            last = node.slice.elts[-1]
            whole = isinstance(last, ast.Slice) and last.lower is None and last.upper is None and last.step is None
            whole |= isinstance(last, ast.Constant) and last.value in (..., None)
            if (
                not whole and any(isinstance(part, ast.Constant) and part.value is ... for part in node.slice.elts)
            ) or (not whole and len(node.slice.elts) > 3):
                self._touch("pick", node, level)
            if text_of(node.slice.elts[1]) not in (":", "None") and "..." not in text_of(node.slice.elts[0]):
                self._touch("take", node, level)
        return level

    def _matrix(self, left: ast.expr, right: ast.expr) -> Level:
        first = self._level(left)
        turned = isinstance(right, ast.Call) and called(right) in (".transpose", ".swapaxes")
        if turned:
            assert isinstance(right, ast.Call) and isinstance(right.func, ast.Attribute)
            second = self._level(right.func.value)
        else:
            second = self._level(right)
        if Level.NOTHING in (first, second):
            if Level.PROJECTION in (first, second):
                self._touch("product", left, Level.PROJECTION)
            return max(first, second)
        return Level.SCORES if first == second == Level.PROJECTION else Level.PROJECTION

    def _call(self, node: ast.Call) -> Level:
        own = attribute_of_self(node.func)
        if own is not None:
            return self._own(own, node)
        name = called(node) or text_of(node.func)[:60]
        batches = [keyword.value for keyword in node.keywords if keyword.arg in ("batch1", "batch2")]
        if len(batches) == 2:
            return self._matrix(*batches)
        if name in _MATRIX:
            operands = node.args if name.startswith("torch") else [node.func.value, *node.args]  # type: ignore[attr-defined]
            return self._matrix(*operands[-2:])
        receiver = self._level(node.func.value) if isinstance(node.func, ast.Attribute) else Level.NOTHING
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        receiver = max([receiver, *(self._level(argument) for argument in arguments)])
        if receiver == Level.NOTHING or name in _QUESTIONS:
            return Level.NOTHING
        self._collect_widths(name, arguments)
        if name.rpartition(".")[2] in _ATTEND:
            return Level.PROJECTION
        if name.endswith("einsum") or "bias" in name:
            self._touch("call", node, receiver, name)
            return Level.SCORES
        if name.rpartition(".")[2] in _SOFTMAX or "Softmax" in name:
            if receiver == Level.PROJECTION:
                self._touch("call", node, receiver, name)
            return Level.SCORES
        what = "turn" if receiver == Level.PROJECTION and _turns(name, node) else "call"
        self._touch(what, node, receiver, name)
        return receiver

    def _collect_widths(self, name: str, arguments: list[ast.expr]) -> None:
        """Note where the width of the input speaks of heads: in their shapes, or elsewhere."""
        for part in (node for argument in arguments for node in ast.walk(argument)):
            if self._is_width(part) and name in _SHAPES:
                assert isinstance(part, ast.expr)
                self._found.widths.append(part)
            elif self._is_width(part) or self._is_derived(part):
                self._found.strays = True

    def _own(self, name: str, node: ast.Call) -> Level:
        """Return the level of a call of one of the module's own attributes."""
        given = [self._level(argument) for argument in node.args]
        named = {keyword.arg: self._level(keyword.value) for keyword in node.keywords if keyword.arg}
        level = max([*given, *named.values()], default=Level.NOTHING)
        if name in self._makers:
            return Level.PROJECTION
        if name == self._output:
            self._found.reached |= level == Level.PROJECTION
            return Level.NOTHING
        if name in self._methods and self._depth < 4:
            inner = _Follower(self._methods, self._makers, self._output, self._inputs, self._found, self._depth + 1)
            numbers = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(self._is_width(part) or self._is_derived(part) for each in numbers for part in ast.walk(each)):
                self._found.strays = True
            level = inner.method(name, given, named)
            self._several = inner._several
            return level
        if level != Level.NOTHING:
            self._touch("part", node, level, name)
        return level


def _turns(name: str, node: ast.Call) -> bool:
    """Whether a call makes another axis than the last one the last."""
    arguments = [text_of(argument) for argument in node.args]
    if name in (".transpose", "torch.transpose", ".swapaxes"):
        return bool({"-1", "3", "4"} & set(arguments))
    if name == ".permute":
        numbers = [int(argument) for argument in arguments if argument.lstrip("-").isdigit()]
        return len(numbers) != len(arguments) or numbers[-1] not in (-1, len(numbers) - 1)
    return False


def _load(target: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(target), mode="eval").body
