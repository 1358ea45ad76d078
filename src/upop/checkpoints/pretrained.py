"""Loads a model for a task from a folder, the hub or a run, as a start of training or for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from upop.checkpoints.files.config_json import read_config
from upop.checkpoints.formats.format import Kind
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.errors import CheckpointError
from upop.libraries import naming_missing

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")


@dataclass(frozen=True)
class Opened:
    """A model of a library.

    Attributes:
        model: in evaluation mode, on the CPU, in the saved precision.
        path: the folder that it was read from.
        library: the library of its class: "open_clip", "transformers", "timm", or "upop" for all other models.
        fresh: names of tensors that the folder lacks, which are newly initialised.
    """

    model: nn.Module
    path: Path
    library: Kind
    fresh: tuple[str, ...] = ()


def open_model(
    source: str | Path | Checkpoint,
    autos: Sequence[str] = (),
    *,
    fresh: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Opened:
    """Load the model in a folder, on the hub, or in a run directory.

    Args:
        source: the folder or the name.
        autos: names of transformers' Auto classes, in order of preference ("AutoModelForImageClassification"), one of
            which must have the model's class. Without any, config.json names the class.
        fresh: for training: whether weights may be newly initialised, such as a missing head, tensors that `changes`
            give another shape, or all of them if the folder has only a config.json.
        changes: fields of config.json to override; only with `fresh`.

    Raises:
        CheckpointError: the model is missing or damaged, its format is unknown, or it is of another class.
        MissingLibraryError: its library is not installed.
    """
    checkpoint = open_checkpoint(source)
    path, description = checkpoint.path, checkpoint.description
    if checkpoint.kind == "timm":
        raise CheckpointError(
            f"{path} holds a timm model. Such classifiers have a task of their own: upop compress classification "
            f"--pretrained {path}."
        )
    if checkpoint.kind == "state_dict":
        raise CheckpointError(f"{path} is a file of tensors. Give the folder of a model, or a name on the hub.")
    if description is not None:
        if not (changes and description.transformers and description.plan is None):
            if changes:
                raise CheckpointError(
                    f"{path} holds a compressed model, whose head cannot be replaced. Give data that it was trained "
                    "for, or compress a dense model that was trained on these data."
                )
            model = checkpoint.load()
            if description.transformers:
                _check_auto(type(model).__name__, autos, path)
            return Opened(model, path, _library_of(model))
    elif checkpoint.kind == "open_clip":
        return Opened(checkpoint.load(), path, "open_clip")
    with naming_missing():
        return _of_transformers(path, autos, fresh=fresh, changes=changes or {})


def _of_transformers(path: Path, autos: Sequence[str], *, fresh: bool, changes: Mapping[str, Any]) -> Opened:
    from upop.checkpoints.formats import transformers as library

    config = read_config(path)
    named = library.architectures(path, config)
    empty = not any(True for pattern in _WEIGHTS for _ in path.glob(pattern))
    known = _classes_of(autos)
    if empty and fresh:
        model = library.built(path, _named_class(known, named, config, path, autos), changes)
        return Opened(model, path, "transformers", tuple(model.state_dict()))
    if not autos or (set(named[:1]) & set(known.values()) and not changes):
        return Opened(library.load_transformers(path), path, "transformers")
    kind = _named_class(known, named, config, path, autos)
    if not fresh:
        raise CheckpointError(
            f"{path} holds a {named[0] if named else 'model without a name'}, and a {kind} is needed. Train it first: "
            "upop train takes such a folder, and initialises missing weights."
        )
    model, lacking = library.started(path, kind, changes)
    return Opened(model, path, "transformers", tuple(lacking))


def class_named(checkpoint: Checkpoint) -> str:
    """Return the name of the class of the model in a folder of transformers or upop.

    Raises:
        CheckpointError: the folder is of neither.
    """
    if checkpoint.description is not None:
        return checkpoint.description.kind.rpartition(".")[2]
    if checkpoint.kind != "transformers":
        open_model(checkpoint)  # raises
    from upop.checkpoints.formats import transformers

    return transformers.class_named(checkpoint.path)


def classes_of(autos: Iterable[str]) -> frozenset[str]:
    """Return the names of the classes behind some Auto classes of transformers."""
    return frozenset(_classes_of(autos).values())


def _classes_of(autos: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return (Auto class, model type) -> class name, for some Auto classes of transformers."""
    import transformers

    found: dict[tuple[str, str], str] = {}
    for auto in autos:
        names: Mapping[str, Any] = getattr(transformers, auto)._model_mapping._model_mapping
        for kind, name in names.items():
            found[auto, kind] = name if isinstance(name, str) else name[0]
    return found


def _named_class(
    known: Mapping[tuple[str, str], str],
    named: Sequence[str],
    config: Mapping[str, Any],
    path: Path,
    autos: Sequence[str],
) -> str:
    """Return the name of the class to build: the saved one if an Auto class has it, else one of an Auto class."""
    if named and (not autos or named[0] in known.values()):
        return named[0]
    found = next((known[auto, kind] for auto, kind in known if kind == config.get("model_type")), None)
    if found is None:
        raise CheckpointError(
            f"{path} holds a {named[0] if named else config.get('model_type')}, and transformers has no "
            f"{' or '.join(autos)} of the type {config.get('model_type')!r}. Give a model of such a class."
        )
    return found


def _check_auto(name: str, autos: Sequence[str], path: Path) -> None:
    if autos and name not in _classes_of(autos).values():
        raise CheckpointError(f"{path} holds a {name}, which is no {' or '.join(autos)}. Give a model of such a class.")


def _library_of(model: nn.Module) -> Kind:
    first = next((kind.__module__ for kind in type(model).__mro__ if not kind.__module__.startswith("upop")), "")
    name = first.partition(".")[0]
    return name if name in ("transformers", "open_clip", "timm") else "upop"  # type: ignore[return-value]
