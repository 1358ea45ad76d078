"""SIGTERM in the middle of what a library does, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, field_serializer

from upop.errors import PreemptedError
from upop.runs.preemption import Preemption


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Also where the tests run in the background, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class _Interrupted(BaseModel):
    value: int = 1

    @field_serializer("value")
    def _written(self, value: int) -> int:
        signal.raise_signal(signal.SIGTERM)
        return value


def test_a_library_that_wraps_the_error_does_not_hide_it() -> None:
    with pytest.raises(PreemptedError, match="asked to end"), Preemption():
        _Interrupted().model_dump()


def test_a_library_that_goes_on_after_any_error_does_not_hide_it() -> None:
    with pytest.raises(PreemptedError, match="asked to end"), Preemption():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("it was taken for a failure of what was tried")


def test_where_an_error_cannot_come_through_the_next_step_ends_the_run() -> None:
    """As in a finaliser."""
    with pytest.raises(PreemptedError, match="asked to end"), Preemption() as preemption:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        assert preemption.asked
        with preemption.deferred():
            stepped = True
        pytest.fail("it went on")
    assert stepped


def test_an_error_of_ones_own_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), Preemption() as preemption, preemption.deferred():
        _Interrupted().model_dump()
        _ = 1 // 0


def test_an_interrupt_between_steps_is_at_once_and_says_how_to_go_on() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"Ctrl-C.*--resume auto"), Preemption():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_a_run_that_goes_on_by_itself_is_told_no_flag() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"same command continues.*\.$"), Preemption(auto=True):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_lets_the_step_end_and_a_second_one_does_not() -> None:
    stepped = []
    described = pytest.raises(KeyboardInterrupt, match=r"Ctrl-C.*--resume auto")
    with described, Preemption() as preemption, preemption.deferred():
        signal.raise_signal(signal.SIGINT)
        stepped.append(preemption.asked)
        signal.raise_signal(signal.SIGINT)
        stepped.append(False)
    assert stepped == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_that_handles_interrupts_goes_on_doing_so() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        with Preemption() as preemption, preemption.deferred():
            signal.raise_signal(signal.SIGINT)
        assert heard
        assert not preemption.asked
    finally:
        signal.signal(signal.SIGINT, before)
