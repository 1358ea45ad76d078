"""Checkpoints that lie behind a URL: fetched once, and kept where torch keeps its own."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlparse

from torch.hub import download_url_to_file, get_dir

from upop.errors import CheckpointError
from upop.files import is_file

_DIGEST = re.compile(r"-([0-9a-f]{8,})\.")  # of the file, in the names of torch's and DeiT's checkpoints


def is_remote(source: str) -> bool:
    """Whether a checkpoint is given as an http(s) URL."""
    return source.startswith(("http://", "https://"))


def fetched(source: str) -> Path:
    """Return where a copy of the checkpoint behind an http(s) URL lies; it is fetched unless it was before.

    Where its name carries the beginning of a SHA-256 digest, as in `deit_small_patch16_224-cd65a155.pth`, the file is
    checked against it.

    Raises:
        CheckpointError: it is no address, cannot be fetched, or what came is not what its name says.
    """
    try:
        name = Path(urlparse(source).path).name
    except ValueError as error:
        raise CheckpointError(f"{source} is no address: {error}. Check it.") from error
    digest = _DIGEST.search(name)
    # Without a digest, files of the same name from different places are told apart by where they come from.
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
