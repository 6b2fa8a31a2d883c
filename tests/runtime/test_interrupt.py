from __future__ import annotations

import signal

import pytest

from tpaw.errors import Interrupted
from tpaw.pipeline.stages import _stoppable
from tpaw.runtime.interrupt import StopSignal


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


def test_work_is_counted_and_then_stops_where_a_stop_was_asked_for():
    stop, counted = StopSignal(), []
    on_done = _stoppable(counted.append, stop)
    on_done(3)
    stop.signal_number = 2
    with pytest.raises(Interrupted):
        on_done(4)
    assert counted == [3, 4]
