"""Keys of JSON files. Version 1 said `units`, `entries` and `entry`; version 2 says groups, channels and channel.

Every reader passes the content of a file through `current` first, so that the rest of upop knows only today's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = 2
"""The version that plans, `upop.json`, the record in `config.json` and profiles are written with."""
READ = (1, VERSION)
"""The versions that can be read."""


@dataclass(frozen=True)
class Keys:
    """The keys of a JSON object that changed.

    Attributes:
        renamed: old key -> new key.
        inside: new key -> the keys of the object that it holds.
        each: new key -> the keys of every object in the list or mapping that it holds.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, Keys] = field(default_factory=dict)
    each: Mapping[str, Keys] = field(default_factory=dict)


GROUP = Keys({"entry": "channel"})
PLAN = Keys({"units": "groups"}, each={"slices": GROUP})
FOLDER = Keys({"units": "groups"}, {"plan": PLAN}, {"groups": GROUP, "layout": Keys({"entries": "channels"})})
RECORD = Keys(each={"groups": GROUP})
PROFILE = Keys(each={"layers": Keys({"units": "groups"})})


def current(content: Any, keys: Keys) -> Any:
    """Return the content of a file under today's keys; what has another form than expected stays as it is."""
    if not isinstance(content, Mapping):
        return content
    named = {keys.renamed.get(name, name): value for name, value in content.items()}
    for name, inner in keys.inside.items():
        if name in named:
            named[name] = current(named[name], inner)
    for name, inner in keys.each.items():
        value = named.get(name)
        if isinstance(value, Mapping):
            named[name] = {each: current(held, inner) for each, held in value.items()}
        elif isinstance(value, list | tuple):
            named[name] = [current(held, inner) for held in value]
    return named


def is_readable(version: Any) -> bool:
    """Whether this upop reads files of a version."""
    return version in READ and not isinstance(version, bool)
