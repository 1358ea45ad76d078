"""What commands tell under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
import typer

from upop.cli import processes
from upop.cli.app import main
from upop.errors import DataError, LostProcessError

RESET = "[/pytorch/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:4: Connection reset by peer. This is typical."


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0)


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_a_lost_process_is_not_told_as_the_cause(torchrun: None) -> None:
    with pytest.raises(LostProcessError, match=r"reset by peer\. .*error") as raised:
        processes.recorded(raising(RuntimeError(RESET)))
    assert "typical" not in str(raised.value)


def test_other_errors_stay_what_they_are(torchrun: None) -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        processes.recorded(raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_a_command_that_succeeds_leaves_the_group(torchrun: None, tmp_path: Path) -> None:
    command = typer.Typer()

    @command.command()
    def joins() -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        assert dist.is_initialized()

    processes.recorded(partial(command, []))
    assert not dist.is_initialized()


def test_without_torchrun_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(RuntimeError, match="gloo"):
        processes.recorded(raising(RuntimeError(RESET)))
    assert processes.place() == ""


def test_an_error_says_its_rank(
    torchrun: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = typer.Typer()
    command.command()(raising(DataError("data.json, sample 3: no image.")))
    monkeypatch.setattr("sys.argv", ["upop"])
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert "Error (rank 3 of 8): DataError: data.json, sample 3: no image." in capfd.readouterr().err
