"""Reading files of weights: what is no plain checkpoint is refused, with its path, and never executed."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from upop.checkpoints.files.weights import read_weights
from upop.errors import CheckpointError

WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3)}


class Trap:
    """Creates a file when unpickled by a reader that executes what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_reads_published_and_bare_state_dicts(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    path = tmp_path / "x.pth"
    content = {"model": WEIGHTS, "epoch": 3, "config": {"lr": 1e-5}} if wrapped else WEIGHTS
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in (path, str(path)):
        found = read_weights(name)
        assert list(found) == list(WEIGHTS)
        assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())


def test_reads_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    assert {key: value.tolist() for key, value in read_weights(tmp_path / "x.safetensors").items()} == {
        key: value.tolist() for key, value in WEIGHTS.items()
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_could_run_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, sprung = tmp_path / "x.pth", tmp_path / "sprung"
    content = {"model": WEIGHTS, "extra": Trap(sprung)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"extra": Trap(sprung)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert not sprung.exists()
    assert str(path) in str(caught.value)
    if form != "pickle":  # the trap itself works
        torch.load(path, weights_only=False)
        assert sprung.exists()


def test_objects_beside_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"Python objects .* refused.*Found argparse\.Namespace"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_that_were_cut_short(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 97)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        # A legacy file cut within the name of a class looks like one that names another class.
        with pytest.raises(CheckpointError, match=r"x\.pth (is no .*cut short|carries Python objects)"):
            read_weights(path)


@pytest.mark.parametrize("length", [0, 4, 8, 60, -1])
def test_safetensors_that_were_cut_short(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*readable safetensors.*again"):
        read_weights(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world\n",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'{"a": 1}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"PK\x03\x04" + bytes(64),
        bytes(range(256)),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_another_kind(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is no .*again") as caught:
        read_weights(path)
    assert "Python objects" not in str(caught.value)


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.pth does not exist\. Give the path"):
        read_weights(tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        read_weights(tmp_path)
    (tmp_path / "best").mkdir()
    for path in (tmp_path, tmp_path / "last"):
        with pytest.raises(CheckpointError, match=r"or .*best"):
            read_weights(path)
    with pytest.raises(CheckpointError, match=r"\.safetensors file\.$"):
        read_weights(tmp_path / "best")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1}}, "x"])
def test_content_that_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"should hold .*found|without tensors"):
        read_weights(tmp_path / "x.pth")
