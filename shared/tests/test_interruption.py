"""Signals that wait for a good moment."""

import signal

import pytest

from decathlon.shared.interruption import Interruption


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM] * 3, [signal.SIGTERM, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]]
)
def test_signals_of_a_scheduler_wait_for_the_end_of_the_step(signals):
    """Several come, from the scheduler and from the parent; the first is handed on after the block."""
    handed_on = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _: handed_on.append(number))
    try:
        interruption = Interruption(deferred=True)
        interruption.__enter__()
        for number in signals:
            signal.raise_signal(number)
        assert interruption.asked and not handed_on
        with pytest.raises(KeyboardInterrupt):
            interruption.__exit__(None)
        assert handed_on == signals[:1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(deferred=True) as interruption:
            signal.raise_signal(signal.SIGINT)
        assert not interruption.asked
    finally:
        signal.signal(signal.SIGINT, before)
