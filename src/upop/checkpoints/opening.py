"""Opens checkpoints: determines the format of a path, for every function and command that takes one.

1. A URL or a name on the hub becomes a local path (`files.hub.local_path`).
2. A folder has the format of the first of these files that it holds: `upop.json` (ours, possibly a library's format
   too), `open_clip_config.json`, `config.json` with a `model_type` (transformers), `config.json` with an `architecture`
   (timm).
3. A file of weights in such a folder stands for the folder: shapes determine neither heads nor softmax scales.
4. Any other file holds a state dict: a published checkpoint, or any other `.pth` or `.safetensors`.

Every format is a module of `upop.checkpoints.formats`. Nothing in a file is executed, and pickles in a folder are not
opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from upop.checkpoints.files.config_json import FILE as CONFIG
from upop.checkpoints.files.config_json import is_transformers_folder, read_config
from upop.checkpoints.files.description import FILE as DESCRIPTION
from upop.checkpoints.files.description import Description, check_digests, is_folder, read_description
from upop.checkpoints.files.hub import local_path
from upop.checkpoints.files.weights import read_meta, read_weights, run_folder_hint
from upop.checkpoints.formats.format import OPEN_CLIP, Format, Kind, Own
from upop.errors import CheckpointError
from upop.files import is_file
from upop.libraries import naming_missing

if TYPE_CHECKING:
    from torch import nn

    from upop.pruning import Plan

_GIVE = (
    "Give a folder that upop.save, transformers, open_clip or timm wrote, a .pth or .safetensors file, or a name on "
    "the hub"
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint. Its content is read on first use.

    Attributes:
        kind: the format.
        path: the local file or folder.
    """

    kind: Kind
    path: Path

    @cached_property
    def library(self) -> Kind:
        """The library of the model's class; for a folder of upop, that of the model in it."""
        if self.description is None:
            return self.kind
        if is_transformers_folder(self.path):
            return "transformers"
        if self.description.timm is not None:
            return "timm"
        return "upop" if self.description.open_clip is None else "open_clip"

    @cached_property
    def description(self) -> Description | None:
        """The content of `upop.json`; None for other formats."""
        return read_description(self.path) if self.kind == "upop" else None

    @property
    def description_file(self) -> Path:
        """The file that describes the model; for a state dict, the file itself."""
        names = {"upop": DESCRIPTION, "open_clip": OPEN_CLIP, "transformers": CONFIG, "timm": CONFIG}
        return self.path / names[self.kind] if self.kind in names else self.path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the model, in the form of its library; empty for a state dict.

        For transformers, config.json; for timm, "architecture", "arguments" and "pretrained_cfg"; for open_clip,
        "class", "arguments" and "preprocess"; for upop's own models, the fields of their configuration.
        """
        return _format(self.kind).config(self.path)

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """The saved tensors, on the CPU."""
        return {name: value for file in self._files() for name, value in read_weights(file).items()}

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of a compressed model; None if the format does not record it."""
        if self.description is None:
            return None
        from upop.checkpoints.formats import ours

        return ours.read_plan(self.description, self.path)

    def meta_state(self) -> dict[str, Tensor]:
        """Return the tensors for their names and shapes alone; those of a safetensors file are on the meta device."""
        found: dict[str, Tensor] = {}
        for file in self._files():
            found |= read_meta(file) if file.suffix == ".safetensors" else read_weights(file, mapped=True)
        return found

    def load(self, *, strict: bool = True) -> nn.Module:
        """Load the model as the class that it was saved from, in evaluation mode, on the CPU.

        A published checkpoint becomes the model of the task that its tensor names determine.

        Args:
            strict: False warns of misfits instead of raising.

        Raises:
            CheckpointError: the checkpoint is damaged, does not fit, or its class cannot be built.
            MissingLibraryError: its library is not installed.
        """
        return _format(self.kind).load(self, strict=strict)

    def own(self) -> Own:
        """Return the checkpoint as one of upop's own models.

        Raises:
            CheckpointError: it is damaged, or no model of upop computes the same.
            MissingLibraryError: its library is not installed.
        """
        found = _format(self.library).own(self)
        description = self.description
        if description is None:
            return found

        def read(strict: bool) -> Mapping[str, Tensor]:
            check_digests(self.path, description, strict=strict)
            return found.read(strict)

        return replace(found, read=read)

    def _files(self) -> Sequence[Path]:
        return _format(self.kind).weights(self.path)


def open_checkpoint(source: str | Path | Checkpoint) -> Checkpoint:
    """Open the checkpoint at a path, behind a URL or under a name of the hub; an opened one is returned as it is.

    Raises:
        CheckpointError: nothing is found, or its format is unknown.
    """
    if isinstance(source, Checkpoint):
        return source
    if not str(source).strip():
        raise CheckpointError(f"The path is empty. {_GIVE}.")
    path = local_path(source)
    kind = kind_of_path(path)
    if kind == "state_dict":
        return _file(path)
    if kind is not None:
        return Checkpoint(kind, path)
    if path.is_dir():
        found = f"the folder holds no {DESCRIPTION}, no {OPEN_CLIP}, and no {CONFIG} of transformers or timm"
    else:
        found = "nothing was found there" if not path.exists() else "it is no regular file"
    raise CheckpointError(f"{source} is no checkpoint: {found}. {_GIVE}{run_folder_hint(path)}.")


def _file(path: Path) -> Checkpoint:
    """Open a file: the model of its folder if it is one of the folder's files of weights, else a state dict."""
    if path.suffix == ".json":
        raise CheckpointError(f"{path} holds no weights. Give the folder that it lies in: {path.parent}.")
    kind = kind_of_path(path.parent) if path.suffix == ".safetensors" else None
    if kind is not None and path in _format(kind).weights(path.parent):
        return Checkpoint(kind, path.parent)
    return Checkpoint("state_dict", path)


def kind_of_path(path: Path) -> Kind | None:
    """Return the format of a path; None if it has none."""
    if is_folder(path):
        return "upop"
    if (path / OPEN_CLIP).is_file():
        return "open_clip"
    if is_transformers_folder(path):
        return "transformers"
    if (path / CONFIG).is_file() and isinstance(read_config(path).get("architecture"), str):
        return "timm"
    return "state_dict" if is_file(path) else None


def _format(kind: Kind) -> Format:
    """Import and return the module of a format, with the library that it needs."""
    with naming_missing():
        if kind == "upop":
            from upop.checkpoints.formats import ours

            return ours
        if kind == "open_clip":
            from upop.checkpoints.formats import open_clip

            return open_clip
        if kind == "transformers":
            from upop.checkpoints.formats import transformers

            return transformers
        if kind == "timm":
            from upop.checkpoints.formats import timm

            return timm
        from upop.checkpoints.formats import state_dict

        return state_dict
