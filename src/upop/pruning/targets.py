"""Targets: the most parameters, multiply-adds, bytes of cache or milliseconds that a compressed model may have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.beforehand import lost_bytes, lost_parameters
from upop.pruning.counting import Quantity, cache_of, multiply_adds_of, parameters_of
from upop.pruning.errors import SettingError, nearest
from upop.pruning.groups import Group
from upop.pruning.latency import Latency, Profile

Target = str | Mapping[str, float | int | str]
"""What is to be left of the whole model: {"params": 0.5}, {"params": "12M", "macs": "2x"}, "params=40MB@float16"."""

WORDS = {
    "params": "parameters",
    "macs": "multiply-adds",
    "latency": "milliseconds",
    "cache": "bytes of the cache",
    "bytes": "bytes",
}
_EXAMPLES = {
    "params": '0.5, "2x", "12M" or "40MB@float16"',
    "macs": '0.5, "2x" or "2.1G"',
    "latency": '0.5, "2x" or "12ms"',
    "cache": '0.5, "2x" or "8MB"',
}
KINDS = tuple(_EXAMPLES)
_COUNTS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {"KB": 1e3, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_GROUPS = {
    "params": {**_COUNTS, **_BYTES},
    "macs": _COUNTS,
    "latency": {"ms": 1, "s": 1e3, "us": 1e-3},
    "cache": _BYTES,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[A-Za-z]*)\s*(?:@\s*(\w+))?\s*")


@dataclass(frozen=True)
class Limit:
    """What is asked of one count of the whole model.

    Attributes:
        kind: "params", "macs", "latency" or "cache".
        asked: as it was written.
        share: of the dense model's count, in (0, 1), or
        amount: a number of its own.
        in_bytes: whether parameters are counted in bytes.
        dtype: of these, where it is not that of the model.
    """

    kind: str
    asked: str
    share: float | None = None
    amount: float | None = None
    in_bytes: bool = False
    dtype: str = ""

    @property
    def words(self) -> str:
        """What is counted, in words."""
        return WORDS["bytes"] + (f" in {self.dtype}" if self.dtype else "") if self.in_bytes else WORDS[self.kind]

    def __str__(self) -> str:
        """Return it as it was asked for."""
        return f"{self.kind}={self.asked}"

    def most(self, dense: float) -> float:
        """Return the largest count that is allowed, of a model whose count is `dense`."""
        return self.share * dense if self.share is not None else float(self.amount or 0)


def read_target(target: object) -> tuple[Limit, ...]:
    """Return the limits that a target sets; all of them hold.

    Raises:
        SettingError: it is no target; the message says which forms there are.
    """
    values: Any = target
    if isinstance(target, str):
        pairs = [part.partition("=") for part in target.split(",")]
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise SettingError(f"target names a kind twice: {target!r}.")
        values = {name: value.strip() for name, (_, _, value) in zip(names, pairs, strict=True)}
    if not isinstance(values, Mapping) or not values:
        raise SettingError(
            f"target limits the size of the whole model: target={{'params': 0.5}} or 'params=0.5,macs=2x'; "
            f"found {target!r}."
        )
    for kind in values:
        if kind not in KINDS:
            raise SettingError(
                f"target names an unknown quantity, {kind!r}{nearest(str(kind), KINDS)}. It takes {', '.join(KINDS)}."
            )
    return tuple(_limit(kind, values[kind]) for kind in KINDS if kind in values)


def format_target(limits: Sequence[Limit]) -> str:
    """Return limits as `read_target` reads them."""
    return ",".join(map(str, limits))


def _limit(kind: str, value: object) -> Limit:
    found = None if isinstance(value, bool) else _WRITTEN.fullmatch(str(value))
    if found is not None:
        number, group, dtype = float(found[1]), found[2], found[3] or ""
        share = {"%": number / 100, "x": 1 / number if number else 0, "X": 1 / number if number else 0}.get(group)
        share = number if not group and number < 1 else share
        asked = str(value).strip()
        if share is not None and 0 < share < 1 and not dtype:
            return Limit(kind, asked, share=share)
        size = _GROUPS[kind].get(group)
        in_bytes = kind == "params" and group in _BYTES
        known = not dtype or (in_bytes and dtype in _DTYPES)
        if (
            share is None
            and size is not None
            and known
            and (number > 0 if group else number > 1 and number.is_integer())
        ):
            return Limit(kind, asked, amount=number * size, in_bytes=in_bytes, dtype=dtype)
    raise SettingError(
        f"target {kind}={value!r} cannot be read. Give a limit for the whole model, as a share, a factor or a "
        f"number: {_EXAMPLES[kind]}."
    )


def quantity_of(
    limit: Limit, model: nn.Module, groups: Sequence[Group], example: Any, profile: Profile | None
) -> Quantity | Latency:
    """Return the quantity that a limit refers to, as a function of the kept channels.

    Raises:
        SettingError: it needs a forward pass or a profile, and there is none; or the model gives no cache.
        LayoutError: it cannot be computed before the model is cut.
    """
    if limit.kind == "params":
        return parameters_of(model, groups, _bytes_in(limit.dtype) if limit.in_bytes else None)
    if limit.kind == "latency":
        if profile is None:
            raise SettingError(
                f"target {limit} needs a profile of the machine, and none was given. Measure one, `upop profile MODEL "
                "--out profile.json`, and give it: profile=upop.profiling.read_profile(...), or --set profile=FILE."
            )
        return Latency(profile, groups)
    if example is None:
        raise SettingError(
            f"target {limit} counts one forward pass, and no example inputs were given. Pass example=... (a tensor, a "
            "tuple of arguments, or a mapping of keyword arguments)."
        )
    return (multiply_adds_of if limit.kind == "macs" else cache_of)(model, groups, example)


def lost_before(limit: Limit, model: nn.Module) -> int:
    """Return how much a model had lost of what a limit counts before its search: rows of words count as parameters."""
    if limit.kind != "params":
        return 0
    dtype: torch.dtype | None = getattr(torch, limit.dtype) if limit.dtype else None
    return lost_bytes(model, dtype.itemsize if dtype else None) if limit.in_bytes else lost_parameters(model)


def _bytes_in(dtype: str) -> Callable[[Tensor], int]:
    def size(parameter: Tensor) -> int:
        kind: torch.dtype = getattr(torch, dtype) if dtype else parameter.dtype
        return kind.itemsize

    return size
