"""Checkpoints behind a URL, from a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from upop.checkpoints import read_weights
from upop.checkpoints.files.hub import fetched, is_remote, local_path
from upop.errors import CheckpointError


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which its files are; torch keeps what it fetches beside it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_itself() -> None:
    assert not is_remote("pretrained/model.pth")
    assert local_path("pretrained/model.pth") == Path("pretrained/model.pth")


def test_what_is_behind_a_url_is_fetched_once(served: tuple[Path, str]) -> None:
    folder, address = served
    torch.save({"model": {"weight": torch.ones(2)}}, folder / "model.pth")
    path = fetched(f"{address}/model.pth")
    assert read_weights(path)["weight"].tolist() == [1, 1]
    (folder / "model.pth").unlink()
    assert fetched(f"{address}/model.pth") == path
    (folder / "other").mkdir()
    torch.save({"model": {"weight": torch.zeros(2)}}, folder / "other" / "model.pth")
    assert read_weights(fetched(f"{address}/other/model.pth"))["weight"].tolist() == [0, 0]


def test_a_digest_in_the_name_is_checked(served: tuple[Path, str]) -> None:
    folder, address = served
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    for name, content in ((f"deit-{digest}.pth", b"weights"), (f"spoilt-{digest}.pth", b"cut off")):
        (folder / name).write_bytes(content)
    assert fetched(f"{address}/deit-{digest}.pth").read_bytes() == b"weights"
    with pytest.raises(CheckpointError, match=r"spoilt-.*cannot be fetched .*invalid hash"):
        fetched(f"{address}/spoilt-{digest}.pth")


def test_what_is_not_there_is_named(served: tuple[Path, str]) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pth cannot be fetched .*404.*give its path"):
        fetched(f"{served[1]}/nothing.pth")


def test_what_is_no_address_is_said() -> None:
    with pytest.raises(CheckpointError, match=r"https://\[bad is no address"):
        fetched("https://[bad")
