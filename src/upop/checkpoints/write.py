"""Writing files of weights: the same tensors give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from upop.checkpoints.read import shared_tensors

_LENGTH = 8  # bytes at the beginning of a file that hold the length of its header
_NOTES = "__metadata__"


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file that holds each of them once; `read_weights` gives all names back.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    shared = shared_tensors(state)
    written = {name: value.detach().cpu().contiguous() for name, value in state.items() if name not in shared}
    save_file(written, path, metadata=shared or None)
    _sort_notes(path)


def _sort_notes(path: Path) -> None:
    """Put what the header notes beside the tensors in order: safetensors writes it in another one every time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
        if len(header.get(_NOTES, ())) < 2:
            return
        header[_NOTES] = dict(sorted(header[_NOTES].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise OSError(f"the header of {path.name} does not fit into its {length} bytes")
        file.seek(_LENGTH)
        file.write(text.ljust(length))  # spaces, so that the tensors stay where they are
