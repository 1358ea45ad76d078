"""Reads YAML files of users: bounded in size, and without duplicate keys."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from upop.errors import SettingError, nearest
from upop.files import is_file
from upop.packaged import nearest_packaged
from upop.reading import DEEPEST, LONGEST_NUMBER, read_text, reason

_LARGEST = 2**18
_MOST_VALUES = 100_000
_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; ConstructorError for a duplicate key."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into plain Python values.

    Raises:
        ValueError: the text is invalid, has a duplicate key, is too long or too deeply nested, or has too long numbers
            or too many repeated aliases.
    """
    if len(text) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST:,} characters")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # values that are no numbers or dates of their kind raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from error


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: the file.
        what: its description in messages: "Config file".

    Raises:
        SettingError: the file is missing or invalid.
    """
    if not is_file(path):
        raise SettingError(f"{what} {path} cannot be read: {_instead(path)}.")
    try:
        return parse_yaml(read_text(path, _LARGEST))
    except (OSError, ValueError) as error:
        described = f"{what} {path} is not YAML that can be read: {reason(error)}. Correct the file."
        raise SettingError(described) from error


def key_lines(path: Path) -> dict[str, int]:
    """Return key -> line of a YAML file's mapping, which `read_yaml` has already read."""
    loader = _Loader(path.read_text(encoding="utf-8-sig"))
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def _instead(path: Path) -> str:
    try:
        if path.is_dir():
            return "a folder was found there"
        if path.exists():
            return "something else than a file was found there"
        here = nearest(path.name, [other.name for other in path.parent.glob("*.yaml")])
        return f"there is none{here or nearest_packaged(path)}"
    except (OSError, ValueError):
        return "there is none"


def _check_nodes(root: yaml.Node) -> None:
    """Check a text before its values are made; ValueError where they would be too many, too deep, or too long.

    Aliases count as often as they stand for something, and one that stands for what it is in has no end.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ValueError("an alias stands for what it is a part of")
        if len(open_nodes) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            if isinstance(node, yaml.ScalarNode):
                if node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
                    raise ValueError(f"a number has {len(node.value)} digits, and {LONGEST_NUMBER} are the most")
                parts = []
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > _MOST_VALUES:
        raise ValueError(f"with what its aliases stand for, it holds more than {_MOST_VALUES:,} values")
