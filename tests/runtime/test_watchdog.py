"""Tests what the watchdog takes for a hang, and what it says."""

import ctypes
import os
import threading
import time

import jax
import pytest

from distill.runtime import progress, watchdog
from distill.runtime.watchdog import Watchdog


def wait(seconds=0.5):
    time.sleep(seconds)


def test_a_step_that_hangs_is_named_with_all_stacks(capfd):
    ended = threading.Event()
    other = threading.Thread(target=lambda: ended.wait(20))
    other.start()
    with Watchdog(0.1, exits=False) as dog:
        dog.start_step(7)
        wait()
        dog.start_step(8)
    ended.set()
    other.join()
    said = capfd.readouterr().err
    assert said.count("warning: step 7 hangs outside sampling and updating: it has taken 0 s") == 1
    assert "test_watchdog.py" in said and said.count("hread 0x") >= 3
    assert "step 8" not in said


def test_steps_within_ten_times_their_median_do_not_hang(capfd):
    with Watchdog(0.1, exits=False) as dog:
        dog._durations["step"] = watchdog.collections.deque([0.2, 0.2, 9.0])
        dog.start_step(0)
        wait()
        dog.stop_step()
        wait()  # no step runs
        with dog.watch_evaluation(1):
            wait()
    said = capfd.readouterr().err
    assert "step 0" not in said and "warning: the evaluation after step 1 hangs" in said


def test_an_evaluation_does_not_lengthen_its_step(capfd):
    with Watchdog(0.3, exits=False) as dog:
        dog._durations["evaluation"] = watchdog.collections.deque([1.0])
        dog.start_step(0)
        wait(0.2)
        with dog.watch_evaluation(1):
            wait()
        dog.stop_step()
        assert dog._durations["step"][-1] < 0.3 <= dog._durations["evaluation"][-1]
    assert not capfd.readouterr().err


def test_compiling_does_not_count() -> None:
    def trace_once(x):  # long to compile, short to run
        for i in range(250):
            x = jax.numpy.sin(x @ x + i)
        return x

    with Watchdog(0.05, exits=False) as dog:
        x = jax.numpy.ones((4, 4))
        lowered = jax.jit(trace_once).lower(x)
        dog.start_step(0)
        start = time.monotonic()
        lowered.compile()
        seconds = time.monotonic() - start
        dog.stop_step()
        assert seconds > 0.15 and dog._durations["step"][-1] < seconds / 2


def test_the_stack_of_a_running_thread_is_not_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Python 3.11 does not bear that: see compiling.py."""
    looks = []
    monkeypatch.setattr(watchdog, "list_files_on_stack", lambda thread: looks.append(thread) or [])
    with Watchdog(0.2, exits=False) as dog, progress.show_progress(2, 0, "task") as bar:
        for step in range(10):
            dog.start_step(step)
            wait(0.06)
            bar.update(1)
        assert not looks
        wait(1.2)  # step 9 hangs: it takes more than ten times as long
    assert looks == [threading.get_ident()] and "step 9 hangs" in capfd.readouterr().err


def test_a_run_may_end_itself_and_zero_is_off(capfd, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Watchdog(0.1, exits=True) as dog:
        dog.start_step(0)
        wait()
    assert codes == [1] and "error: the step hangs" in capfd.readouterr().err
    with Watchdog(0.0, exits=True) as dog:
        dog.start_step(0)
        wait(0.1)
        assert not dog._thread.is_alive()


def test_stacks_can_be_read_while_other_threads_are_added() -> None:
    """Threads that Python has not started, as XLA's, register themselves when they call it."""
    libc, ends = ctypes.CDLL(None), threading.Event()
    make_function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    function = make_function(lambda _: None)
    libc.pthread_join.argtypes = [ctypes.c_ulong, ctypes.c_void_p]

    def add_threads() -> None:
        while not ends.is_set():
            threads = [ctypes.c_ulong() for _ in range(8)]
            for thread in threads:
                libc.pthread_create(ctypes.byref(thread), None, function, None)
            for thread in threads:
                libc.pthread_join(thread, None)

    adding = [threading.Thread(target=add_threads) for _ in range(2)]
    for thread in adding:
        thread.start()
    try:
        for _ in range(20_000):
            assert __file__ in watchdog.list_files_on_stack(threading.get_ident())
        assert "test_watchdog.py" in watchdog.format_stacks()
    finally:
        ends.set()
        for thread in adding:
            thread.join()
