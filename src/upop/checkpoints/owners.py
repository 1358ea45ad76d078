"""Libraries whose models a folder may hold; each is imported when a model or a folder is its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.description import Description
from upop.libraries import installed_version, is_pretrained, naming_missing
from upop.pruning import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(model: nn.Module | None, plan: Plan | None) -> dict[str, Any]:
    """Return how the dense form of a model is built: by its name in timm, or by its parts in open_clip."""
    found: dict[str, Any] = {"timm": None, "open_clip": None}
    library = type(model).__module__.partition(".")[0]
    if model is not None and library == "timm":
        from upop.checkpoints import timm_models

        found["timm"] = timm_models.describe(model, plan)
    elif model is not None and library == "open_clip":
        from upop.checkpoints import open_clip_models

        found["open_clip"] = open_clip_models.describe(model, plan)
    return found


def plain_timm(model: nn.Module, described: Mapping[str, Any], plan: Plan | None) -> dict[str, Any] | None:
    """Return config.json in timm's form for a cut model that timm builds by itself; None for any other."""
    if plan is None or described["timm"] is None:
        return None
    from upop.checkpoints import plain

    return plain.plain_timm(model, described["timm"])


def write_code(model: nn.Module, folder: Path) -> None:
    """Do what `loading_code.write_code` does."""
    from upop.checkpoints import loading_code

    loading_code.write_code(model, folder)


def timm_config(model: nn.Module, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `timm_models.hub_config` does."""
    from upop.checkpoints import timm_models

    return timm_models.hub_config(model, name, arguments)


def build(description: Description, source: str) -> nn.Module | None:
    """Return the dense model that `describe` described, with initial weights; None for one of another library.

    Raises:
        CheckpointError: the library that is installed does not build it.
        MissingLibraryError: the library is not installed.
    """
    with naming_missing():
        if description.timm is not None:
            from upop.checkpoints import timm_models

            return timm_models.build(description.timm, source)
        if description.open_clip is not None:
            from upop.checkpoints import open_clip_models

            return open_clip_models.build(description.open_clip, source)
    return None


def load_transformers(
    folder: Path, kind: str | type[PreTrainedModel] | None = None, *, strict: bool
) -> PreTrainedModel:
    """Return what `formats.transformers.load_transformers` does.

    Raises:
        CheckpointError: as it says.
        MissingLibraryError: transformers is not installed.
    """
    with naming_missing():
        from upop.checkpoints.formats import transformers
    return transformers.load_transformers(folder, kind, strict=strict)


def mark(model: nn.Module) -> None:
    """Write into a transformers model's configuration how much it keeps."""
    from upop.checkpoints import quantizer

    quantizer.mark(model)


def without_layers(model: nn.Module, plan: Plan | None) -> nn.Module | str | None:
    """Return what `layers.without_layers` does; None for models of other libraries."""
    if type(model).__module__.partition(".")[0] not in ("timm", "transformers") and not is_pretrained(model):
        return None
    from upop.checkpoints import layers

    return layers.without_layers(model, plan)


def is_plain(model: nn.Module) -> bool:
    """Whether a transformers model's configuration says all of its sizes by its own numbers."""
    from upop.checkpoints import quantizer

    return not quantizer.recorded(getattr(model, "config", None))


def versions() -> dict[str, str]:
    """Return the versions of upop, and of the libraries that a model may be of, as far as they are installed."""
    found = {name: installed_version(name) for name in ("upop", "torch", "timm", "transformers")}
    return {name: version for name, version in found.items() if version is not None}
