"""How often a training step waits for the device: once, when it reads whether the step counts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import runs
from upop.pruning.scores import _Taken
from upop.runs.verbs import compress, train
from upop.tasks.nlvr import NlvrTask

_READING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten.masked_select")
"""Operations that need a tensor's numbers on the host. `Tensor.tolist` is one too, and goes by no dispatcher."""


_OTHERS = ("/torch/optim/", "/torch/utils/data/", "/upop/data/", "/upop/runs/loaders.py", "/transformers/")
"""What reads for itself: optimizers their counters and data their samples on the CPU, transformers its masks; scores
that were taken in a backward pass, which they are on a CPU alone, whether their gradient is the same."""


def caller() -> str | None:
    """Which line of upop reads; None for what the training loop has no part in."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(other in name for other in _OTHERS) or frame.f_code is _Taken.holds.__code__:
            return None
        if "/upop/" in name:
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


class Waits(TorchDispatchMode):
    """Notes where each step reads numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = []

    def note(self) -> None:
        place = caller()
        if place is not None:
            self.steps[-1].append(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(_READING):
            self.note()
        return func(*args, **(kwargs or {}))


class Watched(NlvrTask):
    """Has steps watched, from the loss of one to the loss of another."""

    def __init__(self, waits: Waits, first: int, last: int) -> None:
        self.waits, self.first, self.last, self.calls = waits, first, last, 0

    def loss(self, *given: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.first:
            self.waits.__enter__()
        if self.calls == self.last:
            self.waits.__exit__(None, None, None)
        self.waits.steps.append([])
        return super().loss(*given)


@pytest.mark.parametrize("verb", ["train", "search"])
def test_a_step_waits_for_the_device_once(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In dense training, and in a search that a teacher watches, between two moves of the masks."""
    config = runs.make_task("nlvr", tmp_path, batch_size_train=8, log_every=100, interval=50)
    waits = Waits()
    read = torch.Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        if waits.steps:
            waits.note()
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    task = Watched(waits, 3, 7)
    if verb == "train":
        train(task, runs.nlvr(config, output_dir=tmp_path / "run", max_epoch=1)[1])
    else:
        given = {"output_dir": tmp_path / "run", "method": "reference", "distill": 1.0}
        compress(task, runs.nlvr(config, **given)[1])
    watched = waits.steps[2:6]
    assert [len(places) for places in watched] == [1] * 4, watched
    assert {place.partition(":")[0] for places in watched for place in places} == {"loop.py"}
