"""Tests what the watchdog takes for a hang, and what it says."""

import ctypes
import os
import threading
import time

import jax
import pytest

from distill.runtime import watchdog
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


def test_compiling_does_not_count(capfd, monkeypatch):
    seen = []
    find = watchdog.list_files_on_stack
    monkeypatch.setattr(
        watchdog, "list_files_on_stack", lambda thread: seen.append(find(thread)) or seen[-1]
    )

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
    assert any(file.endswith(watchdog._COMPILER) for files in seen for file in files)


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


@pytest.mark.parametrize(
    ("files", "phase"),
    [
        (["jax/x.py", "/a/distill/rollout/engine.py", "/a/distill/training/loop.py"], "sampling"),
        (["/a/distill/rollout/engine.py", "/a/distill/training/eval_hook.py"], "evaluating"),
        (["/a/distill/teachers/local.py", "/a/distill/training/update.py"], "scoring"),
    ],
)
def test_phases_are_found_on_the_stack(files, phase):
    assert watchdog.find_phase(files) == phase


def test_the_stack_of_a_busy_thread_can_be_read() -> None:
    """Its frames come and go while they are listed."""
    ends = threading.Event()

    def recurse(depth: int) -> None:
        if depth and not ends.is_set():
            recurse(depth - 1)

    def work() -> None:
        while not ends.is_set():
            recurse(50)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert thread.ident
        for _ in range(3000):
            assert __file__ in watchdog.list_files_on_stack(thread.ident)
            assert __file__ in watchdog.list_files_on_stack(threading.get_ident())
    finally:
        ends.set()
        thread.join()
    assert watchdog.list_files_on_stack(thread.ident) == []


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
