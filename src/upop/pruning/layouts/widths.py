"""Forwards that take the width of the heads from the width of their input: the same forwards, without that.

Many libraries write `B, N, C = x.shape` and then `.reshape(B, N, C)` of the heads, which a cut attention cannot do. The
class that such a module takes on when it is cut has the library's own forward, where the heads' shapes name the width
of the output projection in place of `C`; everything else is as it was.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from upop.pruning.layouts.heads import trace
from upop.pruning.layouts.source import methods_of


@cache
def without_input_width(kind: type, makers: frozenset[str], output: str | None, width: str) -> type[nn.Module] | None:
    """Return a subclass of `kind` whose forward works at any width of the heads; None if that cannot be written.

    Args:
        kind: the library's class.
        makers: the attributes that make queries, keys and values.
        output: the attribute that consumes the heads.
        width: an expression of `self` that gives the width of all heads, as the module stands.
    """
    methods = methods_of(kind)
    if methods is None:
        return None
    methods = copy.deepcopy(methods)
    found = trace(methods, makers, output)
    meant = {id(node) for node in found.widths}
    of_parents = [method for name, method in methods.items() if name.startswith("super.")]
    if found.strays or any(id(node) in meant for method in of_parents for node in ast.walk(method)):
        return None
    content: dict[str, Any] = {
        "uncut_class": kind,
        # No module holds the class, so that a copy, or what a file of torch.save holds, is made of how it came about.
        "__reduce__": lambda self: (_revived, (kind, makers, output, width), self.__dict__),
    }
    for name, method in methods.items():
        if any(id(node) in meant for node in ast.walk(method)):
            _Widths(meant, width).visit(method)
            function = _compiled(kind, name, method)
            if function is None:
                return None
            content[name] = function
    return type(f"Narrow{kind.__name__}", (kind,), content)


def _revived(kind: type, makers: frozenset[str], output: str | None, width: str) -> nn.Module:
    """Return an empty module of the class that `without_input_width` makes."""
    narrow = without_input_width(kind, makers, output, width)
    if narrow is None:
        raise TypeError(f"This version of its library has another {kind.__name__} than the model was cut with.")
    return narrow.__new__(narrow)


class _Widths(ast.NodeTransformer):
    """Puts the width of the heads where a forward names that of its input."""

    def __init__(self, meant: set[int], width: str) -> None:
        self._meant, self._width = meant, width

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace a node that means the width of the heads."""
        if id(node) in self._meant:
            return ast.copy_location(ast.parse(self._width, mode="eval").body, node)
        return self.generic_visit(node)


def _compiled(kind: type[nn.Module], name: str, method: ast.FunctionDef) -> Callable[..., Any] | None:
    """Return a method made of its changed source, in the module that defined it; None if it needs more than that."""
    original = inspect.unwrap(getattr(kind, name))
    module = sys.modules.get(kind.__module__)
    if module is None or original.__closure__ or "super" in original.__code__.co_names:
        return None
    tree = ast.fix_missing_locations(ast.Module([method], []))
    ast.increment_lineno(tree, original.__code__.co_firstlineno - 1)
    found: dict[str, Any] = {}
    exec(compile(tree, original.__code__.co_filename, "exec"), vars(module), found)
    function: Callable[..., Any] = found[name]
    return function
