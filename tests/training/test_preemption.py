"""SIGTERM in the middle of what a library does."""

from __future__ import annotations

import contextlib
import signal

import pytest
from pydantic import BaseModel, field_serializer

from upop.errors import PreemptedError
from upop.training.preemption import Preemption


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
