"""Ctrl-C waits for the end of a block, where Python hears of it."""

import signal
import threading

import pytest

from retort.interrupts import held_back


def test_an_interruption_is_heard_at_the_end() -> None:
    done = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_is_not_hidden() -> None:
    with pytest.raises(KeyError), held_back():
        raise KeyError


def test_other_threads_hold_nothing_back() -> None:
    done = []

    def work() -> None:
        with held_back():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
