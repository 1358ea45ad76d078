"""Locates checkpoints: local paths, URLs, and names on the hub such as "Salesforce/blip-vqa-base"."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlparse

from torch.hub import download_url_to_file, get_dir

from upop.errors import CheckpointError, MissingLibraryError
from upop.files import is_file
from upop.libraries import naming_missing
from upop.packaged import located

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_DIGEST = re.compile(r"-([0-9a-f]{8,})\.")  # of the file, in the names of torch's and DeiT's checkpoints
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
        raise CheckpointError(f"{name} cannot be read: {error.strerror}. Check the path.") from error
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
            f"{name} is neither a path here nor a model that the hub gives ({reason}). "
            "Check the path or the name, and the network."
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name can only be the name of a model on the hub."""
    path = Path(name)
    return bool(_NAME.fullmatch(name)) and path.suffix not in _SUFFIXES and not Path(path.parts[0]).exists()


def _snapshot(name: str, *, offline: bool) -> str:
    with naming_missing():
        import huggingface_hub
    return huggingface_hub.snapshot_download(
        name, allow_patterns=list(_FILES), local_files_only=offline, etag_timeout=10
    )


def is_remote(source: str) -> bool:
    """Whether a checkpoint is given as an http(s) URL."""
    return source.startswith(("http://", "https://"))


def fetched(source: str) -> Path:
    """Return the local copy of a checkpoint behind an http(s) URL, which is downloaded once.

    If the name carries the beginning of a SHA-256 digest, as in `deit_small_patch16_224-cd65a155.pth`, the file is
    checked against it.

    Raises:
        CheckpointError: the URL is invalid, the download fails, or the digest differs.
    """
    try:
        name = Path(urlparse(source).path).name
    except ValueError as error:
        raise CheckpointError(f"{source} is no address: {error}. Check it.") from error
    digest = _DIGEST.search(name)
    # Without a digest, a hash of the URL tells apart files of the same name.
    origin = "" if digest else f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-"
    path = Path(get_dir()) / "checkpoints" / f"{origin}{name}"
    if is_file(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(source, str(path), digest[1] if digest else None, progress=False)
    except Exception as error:  # whatever the network, the disk or the check of the digest raises
        raise CheckpointError(
            f"{source} cannot be fetched to {path}: {error or type(error).__name__}. Check the address and the "
            "connection, or fetch the file yourself and give its path."
        ) from error
    return path
