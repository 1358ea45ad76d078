"""Files to resume from: whatever is not as it was written, or not whole, is noticed, told, and passed over."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upop.errors import CheckpointError, RunFolderError
from upop.runs.checkpoints import Checkpoints, Position, check_whole
from upop.runs.randomness import random_state


def state(step: int) -> dict[str, Any]:
    """All that a run of one weight goes on from."""
    return {
        "settings": {"p": 0.5},
        "task": "nlvr",
        "samples_per_step": 16,
        "accumulate": 1,
        "batches": 4,
        "place": {**vars(Position()), "phase": "search", "steps": step},
        "phases": [],
        "notes": {"best": 50.0, "plan": "{}"},
        "model": {"weight": torch.arange(200.0) + step},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "average": None,
        "compression": {"pruner": {"scores": torch.ones(3)}},
        "randomness": [random_state(torch.device("cpu"))],
        "metrics": 120,
        "seconds": 1.5,
    }


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """An older and a newer checkpoint."""
    found = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        found.write(step, state(step))
    return found


def newest_step(found: Checkpoints) -> int:
    newest = found.newest(whole=True)
    assert newest is not None
    assert newest[1]["model"]["weight"][0] == newest[1]["place"]["steps"]
    return int(newest[1]["place"]["steps"])


def test_every_flipped_bit_is_noticed(two: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002.pt"
    whole, draw = path.read_bytes(), random.Random(0)
    assert newest_step(two) == 2
    places = [*range(64), *range(len(whole) - 90, len(whole)), *draw.sample(range(len(whole)), 150)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"step-00000002\.pt is damaged: .+ It is skipped"):
            assert newest_step(two) == 1, place


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_file_that_is_cut_off_is_noticed(two: Checkpoints, tmp_path: Path, share: float) -> None:
    path = tmp_path / "step-00000002.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.warns(UserWarning, match="is skipped"):
        assert newest_step(two) == 1


def test_what_was_written_again_by_something_else_is_noticed(two: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002.pt"
    torch.save(torch.load(path, weights_only=True), path)
    with pytest.warns(UserWarning, match="no checksum"):
        assert newest_step(two) == 1


def without(*names: str | int) -> Callable[[Any], None]:
    """Take a field away."""

    def change(content: Any) -> None:
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return change


def with_value(value: Any, *names: str | int) -> Callable[[Any], None]:
    """Give a field another value."""

    def change(content: Any) -> None:
        for name in names[:-1]:
            content = content[name]
        content[names[-1]] = value

    return change


CHANGES: list[tuple[Callable[[Any], None], str]] = [
    *((without(name), f"{name} is missing") for name in state(1)),
    *((with_value("text", name), f"{name} is of type str") for name in state(1) if name != "task"),
    (without("place", "steps"), "place.steps is missing"),
    (with_value(True, "place", "steps"), "place.steps is of type bool"),
    (with_value(-1, "metrics"), "metrics is -1"),
    (with_value(float("nan"), "seconds"), "seconds is nan"),
    (with_value(0, "accumulate"), "accumulate is 0"),
    (with_value(1, "place", "laps"), "place has 'laps'"),
    (with_value(7, "place", "steps"), "it is of step 7"),
    (with_value({}, "model"), "model is empty"),
    (with_value([1.0], "model", "weight"), "model holds no tensor 'weight'"),
    (without("optimizer", "state"), "optimizer.state is missing"),
    (with_value([], "randomness"), "randomness is empty"),
    (without("randomness", 0, "python"), "randomness of process 0: python is missing"),
    (with_value([3], "randomness"), "randomness of process 0: torch is missing"),
]


@pytest.mark.parametrize(("change", "described"), CHANGES, ids=[described for _, described in CHANGES])
def test_what_is_not_whole_is_passed_over(two: Checkpoints, change: Callable[[Any], None], described: str) -> None:
    content = state(3)
    change(content)
    two.write(3, content)
    with pytest.warns(UserWarning, match=rf"step-00000003\.pt is damaged: {described}"):
        assert newest_step(two) == 2


def test_files_of_the_last_version_are_read_and_checked_too(two: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "step-00000003.pt"
    torch.save({"format": 1, **state(3)}, path)
    assert newest_step(two) == 3
    whole = path.read_bytes()
    place = whole.index(state(3)["model"]["weight"].numpy().tobytes()) + 401
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    with pytest.warns(UserWarning, match="checksum (of its part .* )?does not match"):
        assert newest_step(two) == 2
    torch.save({"format": 1, "model": {}}, path)
    with pytest.warns(UserWarning, match="settings is missing"):
        assert newest_step(two) == 2


@pytest.mark.parametrize("version", [1, 2])
def test_keys_of_earlier_formats_are_read_under_those_of_today(version: int, two: Checkpoints, tmp_path: Path) -> None:
    of_today = {**state(3), "identity": {"data": {"train": {"images": 4, "names": "a"}}}}
    older = {**of_today, "identity": {"data": {"train": {"pictures": 4, "names": "a"}}}, "format": version}
    older["records_per_step"] = older.pop("samples_per_step")
    if version == 1:
        torch.save(older, tmp_path / "step-00000003.pt")
    else:
        two.write(3, older)
    found = two.read("step-00000003.pt", whole=True)
    assert found["identity"] == of_today["identity"]
    assert found["samples_per_step"] == 16 and "records_per_step" not in found


def test_a_damaged_file_does_not_push_out_the_good_one(two: Checkpoints, tmp_path: Path) -> None:
    """The run goes on from before it; the good one must not be the one too many."""
    (tmp_path / "step-00000009.pt").write_bytes(b"no checkpoint")
    (tmp_path / "step-mine.pt").write_bytes(b"a file of the user's")
    one = Checkpoints(tmp_path, keep=1)
    with pytest.warns(UserWarning, match="is skipped"):
        assert newest_step(one) == 2
    one.write(3, state(3))
    assert newest_step(one) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003.pt", "step-mine.pt"]


def test_all_damaged_says_what_is_wrong_with_each(two: Checkpoints, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"step-0000000{number}.pt").write_bytes(b"x" * number)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError) as caught:
        two.newest(whole=True)
    assert all(f"step-0000000{number}.pt is damaged" in str(caught.value) for number in (1, 2))


def test_a_file_that_cannot_be_written_leaves_the_older_ones(two: Checkpoints, tmp_path: Path) -> None:
    wrong = {**state(3), "model": {"weight": lambda: 0}}  # a bug of ours is no full disk
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        two.write(3, wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.pt", "step-00000002.pt"]
    assert newest_step(two) == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunFolderError, match=r"cannot be written: Not a directory"):
        Checkpoints(blocked / "checkpoints", 2).write(1, state(1))


def test_this_state_is_whole() -> None:
    check_whole(state(1))
