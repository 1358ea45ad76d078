"""Reads and writes files of weights: tensors only, never code. The same tensors give the same bytes."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from upop.errors import CheckpointError
from upop.files import is_file
from upop.values import shortened

# How torch names a class or function in a pickle that it refuses to build or call.
_OBJECT = re.compile(r"GLOBAL ([\w.]+)")
_LENGTH = 8  # bytes at the beginning of a safetensors file that hold the length of its header
_NOTES = "__metadata__"


def read_weights(path: str | Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` or `.safetensors` file, on the CPU.

    A `.pth` holds `{"model": state_dict}`, as published, or a bare state dict.

    Args:
        path: the file.
        mapped: whether to map a `.pth` into memory where its format allows it, so that shapes alone are cheap.

    Raises:
        CheckpointError: the file is missing, is no checkpoint, or holds anything but tensors; it is never executed.
    """
    path = Path(path)
    if not is_file(path):
        raise _nothing_there(path)
    if path.suffix == ".safetensors":
        with _reading_safetensors(path):
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
        return _with_shared(tensors, notes)
    _refuse_packed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old formats, which are read all the same
            lazily = mapped and zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # torch raises whatever its parsers meet: struct.error, AssertionError, KeyError, ...
        refused = _OBJECT.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"{path} carries Python objects beside tensors and was refused: reading it could run code. "
                f"Save a plain state dict from a place that you trust. (Found {refused[1]}.)"
            ) from error
        raise CheckpointError(
            f"{path} is no checkpoint that torch can read, or was cut short ({type(error).__name__}). "
            "Fetch or write it again."
        ) from error
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, Mapping) else None
    if isinstance(state, Mapping) and not state:
        raise CheckpointError(f"{path} holds a state dict without tensors. Fetch or write it again.")
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str | int) and isinstance(value, Tensor) for name, value in state.items()
    ):
        names = [shortened(name) for name in content if isinstance(name, str)] if isinstance(content, Mapping) else []
        found = f"[{', '.join(sorted(names)[:8])}]" if names else type(content).__name__
        raise CheckpointError(f'{path} should hold {{"model": state dict}} or a state dict of tensors; found {found}.')
    for name, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "without content" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
            raise CheckpointError(f"{path}: {name} is {kind}; upop reads plain tensors. Save a dense state dict.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(value.shape)}, and the file holds only a part of its numbers. Save "
                "it as it is: tensor.contiguous()."
            )
    return {str(name): value for name, value in state.items()}


def read_meta(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file on the meta device: float32 for any floating-point type, else int64.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(path)
    if not is_file(path):
        raise _nothing_there(path)
    with _reading_safetensors(path), safe_open(path, framework="pt") as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(name)
            kind = torch.float32 if part.get_dtype().startswith(("F", "BF")) else torch.int64
            found[name] = torch.empty(part.get_shape(), dtype=kind, device="meta")
        notes = file.metadata() or {}
    return _with_shared(found, notes)


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, each shared one once; `read_weights` returns all names again.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    shared = shared_tensors(state)
    written = {name: value.detach().cpu().contiguous() for name, value in state.items() if name not in shared}
    save_file(written, path, metadata=shared or None)
    _sort_notes(path)


def _sort_notes(path: Path) -> None:
    """Sort the metadata in the header, whose order in a file of safetensors varies."""
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


def safe_weights(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the file of weights of a folder, as a list of one: the first name that exists. Pickles do not count.

    Raises:
        CheckpointError: there is none.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        raise CheckpointError(
            f"{folder} holds no {' or '.join(names)}"
            f"{f', and upop does not read the pickles of a folder ({shortened(pickled)})' if pickled else ''}. Fetch "
            "or write its weights again, as safetensors."
        )
    return [own_file(found, folder)]


def own_file(file: Path, folder: Path) -> Path:
    """Return a file of weights that lies in its folder, or in the hub's cache, to which cached folders link.

    Raises:
        CheckpointError: the file is missing, or is a link out of the folder.
    """
    place, real = folder.resolve(), file.resolve()
    copies = place.parent.parent / "blobs" if place.parent.name == "snapshots" else place
    if not file.is_file():
        raise CheckpointError(f"{folder} lacks {file.name}, a part of its weights. Fetch or write it again.")
    if real.parent not in (place, copies):
        raise CheckpointError(
            f"{file} is a link to {real}, and a folder's weights must lie in it. Copy the file to the folder, or "
            "give the folder that it lies in."
        )
    return file


def shared_tensors(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> earlier name, of the entries of `state` that are the same tensor.

    A safetensors file holds each tensor once and these pairs in its metadata, as safetensors' own `save_model` does.
    """
    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, value in state.items():
        if value.numel() and value.device.type != "meta":
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if first.setdefault(place, name) != name:
                shared[name] = first[place]
    return shared


def _with_shared(state: dict[str, Tensor], notes: Mapping[str, str]) -> dict[str, Tensor]:
    return state | {name: state[kept] for name, kept in notes.items() if kept in state and name not in state}


@contextmanager
def _reading_safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, MemoryError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}. Fetch or write it again.") from error


def _nothing_there(path: Path) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}. "
        f"Give the path of a .pth or .safetensors file{run_folder_hint(path)}."
    )


def _refuse_packed(path: Path) -> None:
    """Refuse a compressed archive, which may unpack to any size: torch stores its records uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # the older format, or nothing that torch reads either
    packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a compressed archive, which torch does not write. Write it again with torch.save."
        )


def run_folder_hint(path: Path) -> str:
    """Return the end of a sentence that names the model `best/` of a run at or beside a path; "" without one."""
    places = (folder / "best" for folder in (path, path.parent))
    best = next((place for place in places if place.is_dir() and place != path), None)
    return f", or {best}, which a run of ours left there" if best is not None else ""
