"""Rounds kept sizes to multiples of channels that suit the hardware."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from upop.pruning.choice import check_whole
from upop.pruning.errors import SettingError, nearest
from upop.pruning.groups import Group, Kind

RoundTo = int | Mapping[str, int]
"""Channels that kept sizes are multiples of: of all groups, or by their kind ("attention", "mlp"); 1 where none is."""

KINDS: tuple[str, ...] = get_args(Kind)
PRESETS: Mapping[str, Mapping[str, int]] = {
    "tensor-cores": {"attention": 8, "mlp": 64},
    "torchao": {"mlp": 128},
    "nemotron-nas": {"mlp": 256},
}
"""What runs a model -> the multiples that it wants: tiles of half-precision products, groups of weights that share a
scale in 4 bits, and MLPs that DeciLM's `ffn_mult` can say without padding."""


def check_round_to(round_to: RoundTo | str) -> RoundTo:
    """Validate `round_to`; return a number or a dict, with names of `PRESETS` resolved.

    Raises:
        SettingError: it is neither an integer of at least 1, nor a mapping of kinds to such numbers, nor a name.
    """
    if isinstance(round_to, str):
        if round_to not in PRESETS:
            raise SettingError(
                "round_to must be a whole number, one for each kind of group as in attention=8,mlp=128, or a preset "
                f"({', '.join(PRESETS)}); found {round_to!r}{nearest(round_to, list(PRESETS))}."
            )
        return dict(PRESETS[round_to])
    if not isinstance(round_to, Mapping):
        check_whole("round_to", round_to)
        return round_to
    for kind, channels in round_to.items():
        if kind not in KINDS:
            raise SettingError(
                f"round_to names {kind!r}, which is no kind of group{nearest(str(kind), KINDS)}. It takes a whole "
                f"number, or one for each kind: {', '.join(map(repr, KINDS))}."
            )
        check_whole(f"round_to of {kind}", channels)
    return dict(round_to)


def read_round_to(text: str) -> RoundTo:
    """Parse `round_to` from a command line: "8", "attention=8,mlp=128", or a name of `PRESETS`.

    Raises:
        SettingError: the text has another form.
    """
    if text.strip()[:1].isalpha() and "=" not in text:
        return check_round_to(text.strip())
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if len(parts) == 1 and not parts[0][1]:
            return check_round_to(int(text))
        found = {kind.strip(): int(channels) for kind, _, channels in parts}
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(
            f"round_to takes a whole number, or one for each kind of group as in attention=8,mlp=128; found {text!r}."
        ) from None
    if len(found) < len(parts):
        raise SettingError(f"round_to names a kind of group twice: {text!r}.")
    return check_round_to(found)


def format_round_to(round_to: RoundTo) -> str:
    """Format a value for `read_round_to`."""
    return (
        ",".join(f"{kind}={number}" for kind, number in round_to.items())
        if isinstance(round_to, Mapping)
        else str(round_to)
    )


def channels_in_block(group: Group, round_to: RoundTo) -> int:
    """Return the number of channels per block of a group, so that kept channels are a multiple of `round_to`.

    A whole head, or a key-value group, counts with all its rows.
    """
    channels = round_to.get(group.kind, 1) if isinstance(round_to, Mapping) else round_to
    if group.channel not in ("head", "group"):
        return channels
    rows = [inner for part in group.producers for inner in part.inners if inner > 1]
    return channels // math.gcd(channels, *rows) if rows else channels
