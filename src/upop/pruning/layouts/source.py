"""Reading a class's source: which of its own attributes, functions and numbers its forward depends on.

Two modules whose layers have the same names may still compute different things. What a forward can do to the axis of
a unit is bounded by what it names, so readers of layouts look at the names.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from upop.pruning.layouts.reading import true_class


@dataclass(frozen=True)
class Source:
    """What the forward of a class, and the methods that it calls, depend on.

    Attributes:
        attributes: names read from `self`, methods left out; for eager attention functions, also from the module
            that they are given.
        config: names read from `self.config`.
        names: every identifier.
        arguments: the parameters of `forward`.
        shapes: every sequence of numbers that a shape is made of, each as source text, in order.
        lines: for every attribute, the lines (counted in statements) where it is read in `forward`.
        roots: source text of every square root.
        unscaled: whether fused attention is called without a scale, so that it takes the head's current size.
    """

    attributes: frozenset[str]
    config: frozenset[str]
    names: frozenset[str]
    arguments: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    lines: dict[str, list[int]]
    roots: tuple[str, ...]
    unscaled: bool


@cache
def methods_of(kind: type) -> Methods | None:
    """Return `forward` and every method that it reaches through `self`, parsed; None if the source is not there."""
    found = Methods()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        parsed = _parse(_code_of(kind, name))
        if parsed is None:
            if name == "forward":
                return None
            continue
        found[name] = parsed
        for node in ast.walk(parsed):
            reached = attribute_of_self(node)
            if reached and reached not in found and _code_of(kind, reached) is not None:
                waiting.append(reached)
    return found


def _code_of(kind: type, name: str) -> object:
    """Return the function behind a method or property of a class, or of its parent ("super.X"); None for others."""
    method = name.removeprefix("super.")
    owners = [each for each in kind.__mro__ if method in each.__dict__]
    owners = owners[1:] if name != method else owners
    value = owners[0].__dict__[method] if owners else None
    if isinstance(value, property | staticmethod | classmethod):
        value = value.fget if isinstance(value, property) else value.__func__
    own = inspect.isfunction(value) and not value.__module__.startswith("torch.nn.modules.module")
    return value if own else None


def _parse(function: object) -> ast.FunctionDef | None:
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))  # type: ignore[arg-type]
        tree = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class Methods(dict[str, ast.FunctionDef]):
    """The methods of a class by name, parsed and never changed: equal to nothing but itself, so that caches take it."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Whether it is this very one."""
        return self is other


def text_of(node: ast.AST) -> str:
    """Return the source text of a part of a method, which is asked for again and again, and so kept with the node."""
    kept: str | None = node.__dict__.get("_text")
    if kept is None:
        node.__dict__["_text"] = kept = ast.unparse(node)
    return kept


def attribute_of_self(node: ast.AST, owner: str = "self") -> str | None:
    """Return X for `self.X`, and "super.X" for `super().X`."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == owner:
            return node.attr
        parent = node.value.func if isinstance(node.value, ast.Call) else None
        if owner == "self" and isinstance(parent, ast.Name) and parent.id == "super":
            return f"super.{node.attr}"
    return None


class _Living(ast.NodeTransformer):
    """Leaves out the branches that a module never takes: those on its own flags, and on parts that it lacks."""

    def __init__(self, states: dict[str, bool | None]) -> None:
        self._states = states
        self._absent: set[str] = set()  # variables that are None wherever they are read

    def method(self, function: ast.FunctionDef) -> ast.FunctionDef:
        """Return a copy of the method without its dead branches."""
        living = copy.deepcopy(function)
        for node in ast.walk(living):
            node.__dict__.pop("_text", None)  # which may be another one then
        living = self.visit(living)
        self._absent = _always_none(living)
        living = self.visit(living) if self._absent else living
        self._absent = set()
        return living  # type: ignore[no-any-return]

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        """Replace the statement by the branch that is taken."""
        known = self._known(node.test)
        if known is None:
            return self.generic_visit(node)
        taken = [self.visit(statement) for statement in (node.body if known else node.orelse)]
        return [part for each in taken for part in (each if isinstance(each, list) else [each])] or [ast.Pass()]

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Replace the expression by the branch that is taken."""
        known = self._known(node.test)
        if known is None:
            return self.generic_visit(node)
        return self.visit(node.body if known else node.orelse)  # type: ignore[no-any-return]

    def _known(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._known(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self._known(part) for part in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in parts else None if None in parts else not decisive
        tested = test.left if isinstance(test, ast.Compare) else test
        name = attribute_of_self(tested)
        if isinstance(tested, ast.Name) and tested.id in self._absent and isinstance(test, ast.Compare):
            return isinstance(test.ops[0], ast.Is) if ast.unparse(test.comparators[0]) == "None" else None
        if name is None or name not in self._states:
            return None
        if isinstance(test, ast.Compare):
            if len(test.ops) != 1 or ast.unparse(test.comparators[0]) != "None":
                return None
            if not isinstance(test.ops[0], ast.Is | ast.IsNot):
                return None
            return (self._states[name] is None) == isinstance(test.ops[0], ast.Is)
        return bool(self._states[name])


def _always_none(function: ast.FunctionDef) -> set[str]:
    """Return the variables that a function sets to None and to nothing else."""
    nodes = list(ast.walk(function))
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    nones = [
        node.targets[0].id
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and node.value.value is None
    ]
    return {name for name in nones if stored.count(name) == nones.count(name)} - {
        argument.arg for argument in _parameters(function)
    }


def live_methods(module: nn.Module) -> Methods | None:
    """Return the methods of `methods_of`, without the branches that this module never takes."""
    kind = true_class(module)
    return _live_methods(kind, _states(module, kind))


def _states(module: nn.Module, kind: type) -> tuple[tuple[str, bool | None], ...]:
    """Return what decides about branches: flags, and whether parts are there (None: not, True: they are)."""
    states: list[tuple[str, bool | None]] = []
    for name in _tested(kind):
        if hasattr(module, name):
            value = getattr(module, name)
            if value is None or isinstance(value, bool | nn.Module | Tensor):
                states.append((name, value if isinstance(value, bool) else None if value is None else True))
    return tuple(states)


@cache
def _tested(kind: type) -> tuple[str, ...]:
    """Return the attributes that the methods' conditions name."""
    nodes = [node for method in (methods_of(kind) or {}).values() for node in ast.walk(method)]
    tests = [node.test for node in nodes if isinstance(node, ast.If | ast.IfExp)]
    names = {reached for test in tests for node in ast.walk(test) if (reached := attribute_of_self(node))}
    return tuple(sorted(names - {"training"}))


@cache
def _live_methods(kind: type, states: tuple[tuple[str, bool | None], ...]) -> Methods | None:
    methods = methods_of(kind)
    if methods is None:
        return None
    living = _Living(dict(states))
    found = {name: living.method(method) for name, method in methods.items()}
    # What only dead branches called is dead too.
    reached, waiting = {"forward"}, ["forward"]
    while waiting:
        for node in ast.walk(found[waiting.pop()]):
            name = attribute_of_self(node)
            if name in found and name not in reached:
                reached.add(name)
                waiting.append(name)
    return Methods({name: method for name, method in found.items() if name in reached})


def source_of(module: nn.Module) -> Source | None:
    """Return what the forward of `module` depends on; None if its source is not there."""
    kind = true_class(module)
    return _source_of(kind, _states(module, kind))


@cache
def _source_of(kind: type, states: tuple[tuple[str, bool | None], ...]) -> Source | None:
    methods = _live_methods(kind, states)
    if methods is None:
        return None
    forward = methods["forward"]
    arguments = tuple(argument.arg for argument in _parameters(forward))[1:]
    nodes = [node for method in methods.values() for node in ast.walk(method)]
    eager = _eager_function(kind, nodes)
    helpers = list(ast.walk(eager)) if eager is not None else []
    attributes = {reached for node in nodes if (reached := attribute_of_self(node))} - set(methods)
    attributes |= {reached for node in helpers if (reached := attribute_of_self(node, "module"))}
    calls = [node for node in [*nodes, *helpers] if isinstance(node, ast.Call)]
    return Source(
        attributes=frozenset(attributes),
        config=frozenset(
            node.attr for node in nodes if isinstance(node, ast.Attribute) and attribute_of_self(node.value) == "config"
        ),
        names=frozenset(_identifiers(nodes)),
        arguments=arguments,
        shapes=tuple(_shapes(nodes)),
        lines=_lines(forward),
        roots=tuple(_square_roots(nodes)),
        unscaled=any(_is_unscaled(node) for node in calls),
    )


_SHAPING = ("view", "reshape", "unflatten", "split", "chunk")


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _eager_function(kind: type, nodes: list[ast.AST]) -> ast.FunctionDef | None:
    """Return the function of the class's module that computes attention step by step, if the forward names it."""
    if not any(isinstance(node, ast.Name) and node.id == "eager_attention_forward" for node in nodes):
        return None
    return _parse(getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None))


def called(node: ast.Call) -> str | None:
    """Return what is called: `.name` for a method of an object, the dotted name of a function; None for own parts."""
    if attribute_of_self(node.func):
        return None
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute):
        text = text_of(node.func)
        root = text.partition(".")[0]
        return text if root in ("torch", "nn", "F", "math") and "(" not in text else f".{node.func.attr}"
    return None


def _identifiers(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg


def _shapes(nodes: list[ast.AST]) -> Iterator[tuple[str, ...]]:
    for node in nodes:
        if isinstance(node, ast.Tuple | ast.List) and isinstance(node.ctx, ast.Load):
            yield tuple(text_of(part) for part in node.elts)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPING:
            yield (f".{node.func.attr}", *(text_of(part) for part in [*node.args, *node.keywords]))


def _lines(forward: ast.FunctionDef) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for node in ast.walk(forward):
        name = attribute_of_self(node)
        if name:
            assert isinstance(node, ast.Attribute)
            found.setdefault(name, []).append(node.lineno)
    return found


def _square_roots(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Call) and text_of(node.func).rpartition(".")[2] in ("sqrt", "rsqrt"):
            yield text_of(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and "0.5" in text_of(node.right):
            yield text_of(node.left)


def _is_unscaled(node: ast.Call) -> bool:
    name = text_of(node.func).rpartition(".")[2]
    given = {keyword.arg for keyword in node.keywords}
    if name == "scaled_dot_product_attention":
        return "scale" not in given
    return name == "attention_interface" and "scaling" not in given
