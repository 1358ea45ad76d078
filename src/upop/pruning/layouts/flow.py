"""Following an axis through a forward pass, in the source: where an MLP's neurons are made, gated and consumed.

Every projection makes an axis. `follow` reads the forward of a module statement by statement and keeps track of these
axes: functions of single entries (activations, dropout) and products pass them on, another projection consumes them,
and anything else lets them escape. An axis that never escapes and is consumed by one projection alone can be cut.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from upop.pruning.layouts.elements import FUNCTIONS, METHODS, element_function, is_neutral
from upop.pruning.layouts.reading import forward_of, is_projection
from upop.pruning.layouts.source import attribute_of_self, live_methods, text_of

# A projection, and which half of its outputs; None for all of them.
Part = tuple[str, int | None]
# What may be asked of a tensor without touching its entries.
_FACTS = ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda")
_TORCH = ("torch", "nn", "F", "functional")


@dataclass(frozen=True)
class Hidden:
    """A tensor whose last axis the projections `parts` made.

    Attributes:
        parts: the projections, or halves of them, that were multiplied together.
        masked: those of them that make an entry 0 when they are scaled by 0.
        linear: whether no activation was applied yet.
    """

    parts: frozenset[Part]
    masked: frozenset[Part]
    linear: bool = True


# What an expression is worth: a hidden tensor, several values, or nothing that matters.
_Value = Hidden | tuple[Any, ...] | None


@dataclass(frozen=True)
class Axis:
    """An axis that stays inside a module: made by `parts` together, consumed by `consumer` alone.

    Attributes:
        parts: projections (dotted, from the module), or halves of them.
        masked: the parts whose scaling by 0 removes the entry; never empty.
        consumer: the projection that consumes it.
    """

    parts: frozenset[Part]
    masked: frozenset[Part]
    consumer: str


@dataclass
class _Ledger:
    """What became of every axis: which escaped, which layers are out of reach, and what each layer consumed."""

    escaped: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    consumed: dict[str, list[_Value]] = field(default_factory=dict)

    def escape(self, value: _Value, why: str) -> None:
        if isinstance(value, tuple):
            for part in value:
                self.escape(part, why)
        elif value is not None:
            for name, _ in value.parts:
                self.escaped.setdefault(name, why)

    def axes(self) -> Iterator[Axis]:
        for consumer, values in self.consumed.items():
            first = values[0]
            if not isinstance(first, Hidden) or any(value != first for value in values) or consumer in self.blocked:
                continue
            makers = {name for name, _ in first.parts}
            elsewhere = {
                name
                for other, inputs in self.consumed.items()
                if other != consumer
                for value in inputs
                if isinstance(value, Hidden)
                for name, _ in value.parts
            }
            halves = {(name, other) for name, half in first.parts if half is not None for other in (0, 1)}
            if not first.masked:
                self.blocked.update(dict.fromkeys(makers, "its activation moves 0, so masking it removes nothing"))
            elif halves <= first.parts and not makers & (elsewhere | {*self.escaped, *self.blocked, consumer}):
                yield Axis(first.parts, first.masked, consumer)


@dataclass(frozen=True)
class Followed:
    """What `follow` found: the axes that can be cut, and why others cannot."""

    axes: tuple[Axis, ...]
    escaped: dict[str, str]


def follow(module: nn.Module) -> Followed:
    """Follow every axis that a projection of `module`, or of a child of it, makes in the module's forward."""
    ledger = _Ledger()
    if isinstance(module, nn.Sequential) and forward_of(module) is nn.Sequential.forward:
        ledger.escape(_through(module, ledger), "it is what the module returns")
    else:
        for method in (live_methods(module) or {}).values():
            frame = _Frame(module, ledger)
            ledger.escape(tuple(frame.run(method, {})), "it is what the module returns")
    axes = tuple(ledger.axes())
    return Followed(axes, {**ledger.escaped, **ledger.blocked})


def _through(module: nn.Sequential, ledger: _Ledger) -> _Value:
    value: _Value = None
    for name, child in module.named_children():
        if is_projection(child):
            ledger.consumed.setdefault(name, []).append(value)
            value = _made_by(name)
        else:
            value = _element_wise(child, value, ledger, name)
    return value


def _made_by(name: str) -> Hidden:
    part = frozenset({(name, None)})
    return Hidden(part, part)


def _element_wise(function: object, value: _Value, ledger: _Ledger, name: str) -> _Value:
    """Return what a function of single entries makes of a value; any other function lets it escape."""
    if is_neutral(function):
        return value
    keeps_zero = element_function(function)
    if keeps_zero is None:
        ledger.escape(value, f"it goes through {name} ({type(function).__name__})")
        return None
    return _activated(value, keeps_zero, ledger)


def _activated(value: _Value, keeps_zero: bool, ledger: _Ledger) -> _Value:
    if not isinstance(value, Hidden):
        ledger.escape(value, "several tensors go through one function")
        return None
    return replace(value, masked=value.masked if keeps_zero else frozenset(), linear=False)


def _product(first: _Value, second: _Value, ledger: _Ledger) -> _Value:
    if not (isinstance(first, Hidden) and isinstance(second, Hidden)) or first.parts & second.parts:
        ledger.escape((first, second), "it is multiplied by something that is no part of the layout")
        return None
    # Masks go to the linear half: scaling it scales the product, whatever the gate does.
    halves = sorted((half for half in (first, second) if half.masked), key=lambda half: not half.linear)
    return Hidden(first.parts | second.parts, halves[0].masked if halves else frozenset(), linear=False)


class _Frame:
    """One function while it is read: the values of its variables."""

    def __init__(self, module: nn.Module, ledger: _Ledger, prefix: str = "") -> None:
        self._module, self._ledger, self._prefix = module, ledger, prefix
        self._values: dict[str, _Value] = {}
        self._returned: list[_Value] = []
        self._repeated = 0

    def run(self, function: ast.FunctionDef, arguments: dict[str, _Value]) -> list[_Value]:
        """Read a function with its arguments bound; return what each of its returns gives."""
        self._values = dict(arguments)
        self._block(function.body)
        return self._returned

    def _block(self, statements: list[ast.stmt]) -> bool:
        """Read statements in order; return whether they end by leaving the function."""
        return any(self._statement(statement) for statement in statements)

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            self._returned.append(self._value(node.value))
            return True
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Assign):
            value = self._value(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign):
            self._assign(node.target, self._value(node.value))
        elif isinstance(node, ast.AugAssign):
            self._assign(node.target, self._binary(_loaded(node.target), node.op, node.value))
        elif isinstance(node, ast.If):
            return self._if(node)
        elif isinstance(node, ast.For | ast.While):
            self._repeated += 1
            self._visit(node)
            self._repeated -= 1
        elif isinstance(node, ast.With):
            for item in node.items:
                self._opaque(item.context_expr)
            return self._block(node.body)
        else:
            self._visit(node)
        return False

    def _assign(self, target: ast.expr, value: _Value) -> None:
        if isinstance(target, ast.Name):
            self._values[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, tuple) and len(target.elts) == len(value):
            for part, each in zip(target.elts, value, strict=True):
                self._assign(part, each)
        else:
            self._ledger.escape(value, "it is kept")
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self._values[name.id] = None

    def _if(self, node: ast.If) -> bool:
        self._opaque(node.test)
        before = dict(self._values)
        left = self._block(node.body)
        after, self._values = self._values, before
        left_too = self._block(node.orelse)
        if left or left_too:
            self._values = self._values if left else after
            return left and left_too
        for name in {*after, *self._values}:
            first, second = after.get(name), self._values.get(name)
            if first != second:
                self._ledger.escape((first, second), "it depends on a condition")
                self._values[name] = None
        return False

    def _visit(self, node: ast.AST) -> None:
        """Read something of which only the parts matter: statements in order, hidden tensors escape."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.expr):
                self._opaque(child)
            else:
                self._visit(child)

    def _opaque(self, node: ast.expr) -> None:
        value = self._value(node)
        if value is not None:
            self._ledger.escape(value, f"it is used in `{text_of(node)[:60]}`")

    def _value(self, node: ast.expr | None) -> _Value:
        if node is None:
            return None
        if isinstance(node, ast.Name):
            return self._values.get(node.id)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp):
            return self._binary(node.left, node.op, node.right)
        if isinstance(node, ast.Tuple):
            return tuple(self._value(part) for part in node.elts)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            several = self._value(node.value)
            place = node.slice.value
            if isinstance(several, tuple) and isinstance(place, int) and -len(several) <= place < len(several):
                return several[place]  # type: ignore[no-any-return]
            self._ledger.escape(several, f"it is used in `{text_of(node)[:60]}`")
            return None
        self._visit(node)
        return None

    def _attribute(self, node: ast.Attribute) -> _Value:
        name = attribute_of_self(node)
        if name is not None:
            if is_projection(getattr(self._module, name, None)):
                self._ledger.blocked.setdefault(self._prefix + name, "its layer is handed on")
            return None
        inner = attribute_of_self(node.value)
        if inner is not None and node.attr in ("weight", "bias"):
            if is_projection(getattr(self._module, inner, None)):
                self._ledger.blocked.setdefault(self._prefix + inner, f"its {node.attr} is read directly")
            return None
        if node.attr in _FACTS:
            return None  # whatever it is asked of stays where it is
        self._opaque(node.value)
        return None

    def _binary(self, left: ast.expr, op: ast.operator, right: ast.expr) -> _Value:
        first, second = self._value(left), self._value(right)
        if isinstance(op, ast.Mult):
            if first is None and second is None:
                return None
            for value, other in ((first, right), (second, left)):
                if isinstance(value, Hidden) and self._is_number(other):
                    return value
            return _product(first, second, self._ledger)
        self._ledger.escape((first, second), f"it is used in `{text_of(left)[:40]} ... {text_of(right)[:40]}`")
        return None

    def _is_number(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Constant):
            return isinstance(node.value, int | float)
        name = attribute_of_self(node)
        return name is not None and isinstance(getattr(self._module, name, None), int | float)

    def _call(self, node: ast.Call) -> _Value:
        name = attribute_of_self(node.func)
        if name is not None:
            return self._own(name, node)
        function = text_of(node.func)
        if function in ("isinstance", "hasattr", "len"):
            return None
        root, _, last = function.rpartition(".")
        if root.partition(".")[0] in _TORCH and node.args:
            if last in FUNCTIONS:
                return self._passed(node, lambda value: _activated(value, FUNCTIONS[last], self._ledger))
            if last == "dropout":
                return self._passed(node, lambda value: value)
            if last == "chunk":
                return self._halves(self._value(node.args[0]), node.args[1:], node)
            if last == "mul" and len(node.args) == 2:
                return self._binary(node.args[0], ast.Mult(), node.args[1])
        elif isinstance(node.func, ast.Attribute):
            value = self._value(node.func.value)
            if isinstance(value, Hidden):
                return self._method(value, node.func.attr, node)
            self._ledger.escape(value, f"it is used in `{function[:60]}`")
        self._arguments(node)
        return None

    def _arguments(self, node: ast.Call, skip: int = 0) -> None:
        for argument in [*node.args[skip:], *(keyword.value for keyword in node.keywords)]:
            self._opaque(argument)

    def _passed(self, node: ast.Call, function: Callable[[_Value], _Value]) -> _Value:
        value = self._value(node.args[0])
        self._arguments(node, 1)
        return function(value) if value is not None else None

    def _method(self, value: Hidden, name: str, node: ast.Call) -> _Value:
        if name == "chunk":
            return self._halves(value, node.args, node)
        self._arguments(node)
        if name in METHODS:
            return value
        if name == "clamp" and self._spans_zero(node):
            return value
        if name in FUNCTIONS and not node.args:
            return _activated(value, FUNCTIONS[name], self._ledger)
        self._ledger.escape(value, f"it is used in `{text_of(node)[:60]}`")
        return None

    def _spans_zero(self, node: ast.Call) -> bool:
        """Whether a clamp leaves 0 at 0: its bounds are known numbers on both sides of it."""
        bounds = dict(zip(("min", "max"), node.args, strict=False))
        bounds.update({keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
        for side, bound in bounds.items():
            value = self._number(bound)
            if value is None or (value > 0 if side == "min" else value < 0):
                return False
        return True

    def _number(self, node: ast.expr) -> float | None:
        """Return what a bound is: a number, one of the module's own, or minus that; where there is no bound, 0."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self._number(node.operand)
            return None if inner is None else -inner
        name = attribute_of_self(node)
        value = getattr(self._module, name, "") if name else node.value if isinstance(node, ast.Constant) else ""
        return 0.0 if value is None else float(value) if isinstance(value, int | float) else None

    def _halves(self, value: _Value, arguments: list[ast.expr], node: ast.Call) -> _Value:
        whole = isinstance(value, Hidden) and len(value.parts) == 1 and value.linear
        if isinstance(value, Hidden) and whole and arguments and text_of(arguments[0]) == "2" and self._last(node):
            ((name, half),) = value.parts
            if half is None:
                parts = [frozenset({(name, half)}) for half in (0, 1)]
                return tuple(Hidden(part, part) for part in parts)
        self._ledger.escape(value, f"it is used in `{text_of(node)[:60]}`")
        return None

    def _last(self, node: ast.Call) -> bool:
        """Whether a chunk is along the axis that the projection made: the last one, or channels."""
        given = [keyword.value for keyword in node.keywords if keyword.arg == "dim"]
        places = given or node.args[1 + (text_of(node.func).partition(".")[0] in _TORCH) :]
        if not places:
            return False
        name = attribute_of_self(places[0])
        dim = getattr(self._module, name) if name else None
        return dim == -1 or text_of(places[0]) == "-1"

    def _own(self, name: str, node: ast.Call) -> _Value:
        """Return what a call of one of the module's own attributes gives."""
        target = getattr(self._module, name, None)
        full = self._prefix + name
        if is_projection(target):
            value = self._value(node.args[0]) if node.args else None
            self._arguments(node, 1)
            self._ledger.consumed.setdefault(full, []).append(value)
            if self._repeated:
                self._ledger.blocked.setdefault(full, "it is made in a loop")
            return _made_by(full)
        if is_neutral(target) or element_function(target) is not None:
            if not node.args:
                return None
            return self._passed(node, lambda value: _element_wise(target, value, self._ledger, name))
        if isinstance(target, nn.Module) and not self._prefix and _holds_projections(target):
            return self._inside(target, name, node)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self._ledger.escape(self._value(argument), f"it goes through {name} ({type(target).__name__})")
        return None

    def _inside(self, module: nn.Module, name: str, node: ast.Call) -> _Value:
        """Read the forward of a child with its arguments; what it makes may be consumed by the next child."""
        values = [self._value(argument) for argument in node.args]
        named = {keyword.arg: self._value(keyword.value) for keyword in node.keywords}
        methods = None if isinstance(module, nn.Sequential) else live_methods(module)
        if methods is None or None in named or any(isinstance(argument, ast.Starred) for argument in node.args):
            self._ledger.escape((*values, *named.values()), f"it goes through {name} ({type(module).__name__})")
            if methods is None:
                return None
        forward = methods["forward"]
        places = [argument.arg for argument in [*forward.args.posonlyargs, *forward.args.args]][1:]
        bound = {**dict(zip(places, values, strict=False)), **{key: value for key, value in named.items() if key}}
        frame = _Frame(module, self._ledger, f"{self._prefix}{name}.")
        frame._repeated = self._repeated
        returned = frame.run(forward, bound)
        if len(returned) == 1 and isinstance(returned[0], Hidden):
            return returned[0]
        self._ledger.escape(tuple(returned), f"it is what {name} returns")
        return None


def _holds_projections(module: nn.Module) -> bool:
    return any(is_projection(child) for child in module.children())


def _loaded(target: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(target), mode="eval").body
