"""Looking for what someone else holds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from threading import Event, Thread

import pytest
from torch import nn

from upop.pruning.again import held_anywhere


class Wrapper(nn.Module):
    pass


class Inner(Wrapper):
    pass


@pytest.fixture
def hurried() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_objects_of_a_class_are_found_also_put_aside() -> None:
    one, other = Wrapper(), Inner()
    assert {*held_anywhere(Wrapper)} == {one, other} and held_anywhere(Inner) == [other]
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        assert {*held_anywhere(Wrapper)} == {one, other}
        assert gc.get_freeze_count()
    finally:
        if not frozen:  # what the tests have put aside stays there (see `unburdened`)
            gc.unfreeze()


def test_other_threads_go_on_building_tuples(hurried: None) -> None:
    wrong: list[SystemError] = []
    done = Event()

    def build() -> None:
        while not done.is_set():
            try:
                tuple(number for number in range(12))  # it grows, which nobody else may hold it for
            except SystemError as error:
                wrong.append(error)

    thread = Thread(target=build)
    thread.start()
    try:
        for _ in range(6):  # what holds tuples of others was noticed by the fourth
            held_anywhere(Wrapper)
    finally:
        done.set()
        thread.join()
    assert not wrong
