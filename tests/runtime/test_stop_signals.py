"""SIGTERM and SIGINT to verbs that wait, compute in C, or save, with SIGINT ignored by their shell:
a shell that is not interactive ignores it in what it starts in the background."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import hashlib, os, sys, time
from absl import flags
from distill.runtime import cli, stop_signals

def compute():  # without the interpreter's lock, and deaf to signals, as a compiler is
    hashlib.pbkdf2_hmac("sha256", b"", b"salt", 10**9)

def wait():
    try:
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

def save():
    with stop_signals.StopSignals("stopping soon") as signals:
        print("ready", flush=True)
        while not signals.received:
            time.sleep(0.01)
        signals.start_saving()
        time.sleep(1)
        print("saved", flush=True)
    sys.exit(128 + signals.received)

def load():
    with stop_signals.StopSignals() as signals:
        print("ready", flush=True)
        while not signals.received:
            time.sleep(0.01)
        with signals.interrupt():
            print("not reached", flush=True)

def collect():  # no exception comes out of a callback of the collector; JAX has such a one
    import gc
    def wait_forever(phase, _):
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
    with stop_signals.StopSignals() as signals, signals.interrupt():
        gc.callbacks.append(wait_forever)
        gc.collect()
        gc.callbacks.remove(wait_forever)
        time.sleep(60)

def main():
    stop_signals.COMPILE_SECONDS = stop_signals.POLL_SECONDS = 0.3
    stop_signals.is_compiling = lambda thread: True
    with stop_signals.advise_interrupted(lambda: "go on like this"):
        if sys.argv[1] in ("compute", "wait"):
            print("ready", flush=True)
        globals()[sys.argv[1]]()

work, sys.argv = sys.argv[1], sys.argv[:1]
main_of, argv = main, sys.argv

def run():
    sys.argv = [*argv, work]
    main_of()

cli.run(run, flags.FlagValues())
"""


def run_and_signal(work: str, *numbers: int) -> tuple[int, str, str, float]:
    """Runs a function of PROGRAM; returns its exit code, stdout, stderr and the seconds it took
    after the first of the signals, which are sent 0.2 s apart."""
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "", sys.executable, "-c", PROGRAM, work],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    start = time.monotonic()
    for number in numbers:
        time.sleep(0.2)
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err, time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_verb_cleans_up_and_says_how_to_go_on(number):
    answer = {
        signal.SIGINT: "stopping; again to leave at once\n",
        signal.SIGTERM: "SIGTERM: stopping\n",
    }[number]
    code, out, err, seconds = run_and_signal("wait", number)
    assert (code, out) == (128 + number, "cleaned up\n")
    # The answer comes from a thread, so it may come second.
    assert sorted(err.splitlines(True)) == sorted([answer, "interrupted; go on like this\n"])
    assert seconds < 5


def test_sigint_is_answered_while_c_code_runs_and_the_second_leaves():
    code, _, err, seconds = run_and_signal("compute", signal.SIGINT, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert err == "stopping; again to leave at once\ninterrupted\n"
    assert seconds < 5


def test_sigterm_does_not_wait_for_a_compiler():
    code, _, err, seconds = run_and_signal("compute", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert err.startswith("SIGTERM: stopping\nstopped ") and "without waiting" in err
    assert seconds < 5


def test_a_save_is_waited_for():
    code, out, err, seconds = run_and_signal("save", signal.SIGTERM)
    assert (code, out) == (128 + signal.SIGTERM, "saved\n")
    assert err == "SIGTERM: stopping soon\n" and seconds > 1
    code, out, err, _ = run_and_signal("save", signal.SIGINT, signal.SIGINT)
    assert (code, out) == (128 + signal.SIGINT, "")
    assert err == "stopping soon; again to leave at once\ninterrupted\n"


def test_a_signal_that_came_before_interrupts():
    code, out, err, _ = run_and_signal("load", signal.SIGTERM)
    assert (code, out) == (128 + signal.SIGTERM, "")
    assert "interrupted; go on like this" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_the_garbage_collector_swallows_is_raised_again(number):
    code, _, err, seconds = run_and_signal("collect", number)
    assert code == 128 + number and seconds < 5
    assert len(err.splitlines()) == 2 and "interrupted; go on like this" in err
