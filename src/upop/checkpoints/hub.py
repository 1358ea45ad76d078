"""Where a checkpoint lies: a path, behind a URL, or on the hub, as "Salesforce/blip-vqa-base", which is fetched."""

from __future__ import annotations

import re
from pathlib import Path

from upop.checkpoints import remote
from upop.checkpoints.remote import is_remote
from upop.errors import CheckpointError, MissingLibraryError
from upop.libraries import naming_missing
from upop.packaged import located

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".onnx", ".yaml", ".json")


def local_path(name: str | Path) -> Path:
    """Return where a model lies: the path itself, or a copy of what is behind a URL or on the hub under this name.

    What exists here is a path, or else in the package, as assets/shapes-nlvr; so is what has a file's ending, no
    "owner/" in front, or the name of a folder that is here in the place of the owner. Anything else is asked for on the
    hub, unless a copy was fetched before.

    Raises:
        CheckpointError: there is no such path, and the hub does not give such a model; or the URL gives nothing.
    """
    if is_remote(str(name)):
        return remote.local_path(str(name))
    path = located(name)
    try:
        if path.exists() or isinstance(name, Path) or not is_hub_name(name):
            return path
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"{name} was asked for: {error.strerror}. Check the path.") from error
    try:
        return Path(_snapshot(str(name), offline=True))
    except MissingLibraryError:
        raise
    except Exception:  # not fetched before, or only in part
        pass
    try:
        return Path(_snapshot(str(name), offline=False))
    except Exception as error:  # no network, no such name, no permission: each has its own class of error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} was asked for: nothing was found there, and the hub gives no model of this name ({reason}). "
            "Check the path or the name, and the network."
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name can only mean a model of the hub."""
    path = Path(name)
    return bool(_NAME.fullmatch(name)) and path.suffix not in _SUFFIXES and not Path(path.parts[0]).exists()


def _snapshot(name: str, *, offline: bool) -> str:
    with naming_missing():
        import huggingface_hub
    return huggingface_hub.snapshot_download(
        name, allow_patterns=list(_FILES), local_files_only=offline, etag_timeout=10
    )
