"""Kept sizes as multiples of a number of channels, which is what hardware takes fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from upop.pruning.choice import check_whole
from upop.pruning.errors import SettingError, nearest
from upop.pruning.units import Kind, Unit

Align = int | Mapping[str, int]
"""Channels that kept sizes are multiples of: of all units, or by their kind ("attention", "mlp"); 1 where none is."""

KINDS: tuple[str, ...] = get_args(Kind)
PRESETS: Mapping[str, Mapping[str, int]] = {
    "tensor-cores": {"attention": 8, "mlp": 64},
    "torchao": {"mlp": 128},
    "nemotron-nas": {"mlp": 256},
}
"""What runs a model -> the multiples that it wants: tiles of half-precision products, groups of weights that share a
scale in 4 bits, and MLPs that DeciLM's `ffn_mult` can say without padding."""


def check_align(align: Align | str) -> Align:
    """Return an alignment, a mapping as a dict, and a name of `PRESETS` as what it stands for.

    Raises:
        SettingError: it is neither a whole number of at least 1, nor a mapping of kinds to such numbers, nor a name.
    """
    if isinstance(align, str):
        if align not in PRESETS:
            raise SettingError(
                "align must be a whole number, one for each kind of unit as in attention=8,mlp=128, or a preset "
                f"({', '.join(PRESETS)}); found {align!r}{nearest(align, list(PRESETS))}."
            )
        return dict(PRESETS[align])
    if not isinstance(align, Mapping):
        check_whole("align", align)
        return align
    for kind, channels in align.items():
        if kind not in KINDS:
            raise SettingError(
                f"align names {kind!r}, which is no kind of unit{nearest(str(kind), KINDS)}. It takes a whole number, "
                f"or one for each kind: {', '.join(map(repr, KINDS))}."
            )
        check_whole(f"align of {kind}", channels)
    return dict(align)


def read_align(text: str) -> Align:
    """Return what a command line says: "8", "attention=8,mlp=128", or a name of `PRESETS`.

    Raises:
        SettingError: it says something else.
    """
    if text.strip()[:1].isalpha() and "=" not in text:
        return check_align(text.strip())
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if len(parts) == 1 and not parts[0][1]:
            return check_align(int(text))
        found = {kind.strip(): int(channels) for kind, _, channels in parts}
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(
            f"align takes a whole number, or one for each kind of unit as in attention=8,mlp=128; found {text!r}."
        ) from None
    if len(found) < len(parts):
        raise SettingError(f"align names a kind of unit twice: {text!r}.")
    return check_align(found)


def told_align(align: Align) -> str:
    """Return an alignment as `read_align` reads it."""
    return ",".join(f"{kind}={number}" for kind, number in align.items()) if isinstance(align, Mapping) else str(align)


def entries_in_block(unit: Unit, align: Align) -> int:
    """Return how many entries of a unit have to go or stay together, so that kept channels are a multiple.

    An entry that is a head, or a group of them, has as many channels as its layers have rows for it.
    """
    channels = align.get(unit.kind, 1) if isinstance(align, Mapping) else align
    if unit.entry not in ("head", "group"):
        return channels
    rows = [inner for part in unit.producers for inner in part.inners if inner > 1]
    return channels // math.gcd(channels, *rows) if rows else channels
