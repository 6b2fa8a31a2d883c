from __future__ import annotations

import contextlib
import signal

import pytest

import tpaw.runtime.watch
from tpaw.errors import Interrupted
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.watch import Watch


def test_the_first_signal_waits_for_a_safe_point_and_the_second_does_not():
    stop = StopSignal()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop.listening():
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_work_is_counted_and_then_stops_where_a_stop_was_asked_for(monkeypatch):
    stop, counted = StopSignal(), []

    @contextlib.contextmanager
    def bar(description, total, unit):
        yield lambda count, note="": counted.append(count)

    monkeypatch.setattr(tpaw.runtime.watch, "progress", bar)
    with Watch(stop).progress("work", 7, "items") as on_done:
        on_done(3)
        stop.signal_number = 2
        with pytest.raises(Interrupted):
            on_done(4)
    assert counted == [3, 4]
    with pytest.raises(Interrupted), Watch(stop).progress("more work", 1, "items"):
        raise AssertionError("it began")
