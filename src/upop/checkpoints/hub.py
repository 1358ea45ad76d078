"""Locates checkpoints: local paths, URLs, and names on the hub such as "Salesforce/blip-vqa-base"."""

from __future__ import annotations

import re
from pathlib import Path

from upop.checkpoints.remote import fetched, is_remote
from upop.errors import CheckpointError, MissingLibraryError
from upop.libraries import naming_missing
from upop.packaged import located

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".onnx", ".yaml", ".json")


def local_path(name: str | Path) -> Path:
    """Return the local path of a model: the path itself, or a downloaded copy of a URL or hub model.

    Existing files are paths, and so are files of the package (assets/shapes-nlvr). A name with a file extension,
    without an "owner/", or with an existing folder in place of the owner is a path too. Any other name is downloaded
    from the hub, unless it is cached.

    Raises:
        CheckpointError: there is no such path, and no such model on the hub; or the URL cannot be read.
    """
    if is_remote(str(name)):
        return fetched(str(name))
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
    """Whether a name can only be that of a hub model."""
    path = Path(name)
    return bool(_NAME.fullmatch(name)) and path.suffix not in _SUFFIXES and not Path(path.parts[0]).exists()


def _snapshot(name: str, *, offline: bool) -> str:
    with naming_missing():
        import huggingface_hub
    return huggingface_hub.snapshot_download(
        name, allow_patterns=list(_FILES), local_files_only=offline, etag_timeout=10
    )
