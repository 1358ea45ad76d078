"""Predicts the latency of a cut model on one machine, from a table of latencies of each kind of layer at some sizes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upop.pruning.counting import Sizes
from upop.pruning.errors import SettingError
from upop.pruning.file_keys import PROFILE, VERSION, current, is_readable
from upop.pruning.groups import Group


@dataclass(frozen=True)
class Layers:
    """Groups of one kind, which differ in their position alone.

    Attributes:
        groups: their names.
        size: channels of each group in the dense model.
        sizes: measured numbers of channels, ascending; the first is 0 if the model runs without such a branch, the
            last is `size`.
        saved: milliseconds saved by a group of each of these sizes; the last is 0.
    """

    groups: tuple[str, ...]
    size: int
    sizes: tuple[int, ...]
    saved: tuple[float, ...]

    @property
    def _least(self) -> int:
        return self.sizes[0] or self.sizes[1]

    @property
    def channel(self) -> float:
        """The average saving per channel."""
        return self.at(self._least) / self.size

    @property
    def beside(self) -> float:
        """The saving of a branch that is pruned whole, beyond that of its channels."""
        return max(0.0, self.saved[0] - self.size * self.channel)

    def at(self, kept: int) -> float:
        """Return the saving of a group that keeps `kept` channels, interpolated between the measured sizes.

        Between the smallest size and 0 it is a step, since a branch of any size takes a fixed time.
        """
        kept = min(max(kept, self._least if kept else self.sizes[0]), self.size)
        if not kept:
            return self.saved[0]
        right = max(1, bisect.bisect_left(self.sizes, kept))
        (low, high), (before, after) = self.sizes[right - 1 : right + 1], self.saved[right - 1 : right + 1]
        return before + (after - before) * (kept - low) / (high - low)


@dataclass(frozen=True)
class Profile:
    """Measured latencies of a model on a machine.

    Attributes:
        dense: milliseconds of one forward pass of the dense model.
        layers: by kind.
        about: model, device, batch, runtime and threads, for people.
    """

    dense: float
    layers: tuple[Layers, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        layers = [
            {"groups": list(each.groups), "size": each.size, "sizes": list(each.sizes), "saved_ms": list(each.saved)}
            for each in self.layers
        ]
        return {"version": VERSION, "dense_ms": self.dense, "about": dict(self.about), "layers": layers}

    @classmethod
    def from_json(cls, content: Any) -> Profile:
        """Read a profile from the output of `to_json`.

        Raises:
            SettingError: it is no profile.
        """
        content = current(content, PROFILE)
        try:
            if not is_readable(content["version"]):
                raise ValueError(f"version {content['version']!r}")
            layers = tuple(
                Layers(
                    tuple(map(str, each["groups"])),
                    int(each["size"]),
                    tuple(map(int, each["sizes"])),
                    tuple(map(float, each["saved_ms"])),
                )
                for each in content["layers"]
            )
            found = cls(float(content["dense_ms"]), layers, dict(content["about"]))
            wrong = [each for each in layers if not _is_table(each)]
            if wrong or not 0 < found.dense < float("inf"):
                raise ValueError("sizes that do not increase to the full size, or times that do not decrease")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SettingError(
                f"This is not a profile of `upop profile`: {error!r}. Profile the model again."
            ) from error
        return found


def _is_table(layers: Layers) -> bool:
    sizes, saved = layers.sizes, layers.saved
    rising = all(one < other for one, other in itertools.pairwise(sizes)) and sizes[-1:] == (layers.size,)
    falling = all(one >= other for one, other in itertools.pairwise(saved)) and saved[-1:] == (0.0,)
    enough = len(sizes) == len(saved) > 1 and sizes[0] >= 0
    return enough and rising and falling and saved[0] < float("inf")


class Latency:
    """Milliseconds of a forward pass, as a function of the kept channels.

    Args:
        profile: of the model.
        groups: of the model.

    Attributes:
        whole: milliseconds of the dense model.

    Raises:
        SettingError: the profile is of another model, or residual streams are pruned, which it does not cover.
    """

    def __init__(self, profile: Profile, groups: Sequence[Group]) -> None:
        self._layers = {name: each for each in profile.layers for name in each.groups}
        streams = [group.name for group in groups if group.kind == "residual"]
        if streams:
            raise SettingError(
                f"A target in milliseconds was given with width=True, but a profile times layers, and the channels of "
                f"{streams[0]} belong to all of them. Give params or macs as the target, or leave width out."
            )
        strange = [
            group.name for group in groups if (each := self._layers.get(group.name)) is None or each.size < group.size
        ]
        if strange:
            raise SettingError(
                f"The profile is of another model ({profile.about.get('model', 'unknown')}): it lacks "
                f"{strange[0]}, or has it at another size. Profile this model: upop profile MODEL."
            )
        self.whole = profile.dense

    def at(self, kept: Sizes) -> float:
        """Return the milliseconds for given numbers of kept channels."""
        return max(0.0, self.whole - sum(self._layers[name].at(count) for name, count in kept.items()))

    def channel(self, group: Group) -> float:
        """Return the average milliseconds saved per channel of a group; positive, since scores are divided by it."""
        return max(self._layers[group.name].channel, 1e-9 * self.whole)

    def beside(self, group: Group) -> float:
        """Return the milliseconds that a group pruned whole saves beyond its channels."""
        return self._layers[group.name].beside
