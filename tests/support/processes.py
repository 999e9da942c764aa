"""Runs several processes of one verb on one machine, with gloo between their CPU devices."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.paths import ROOT

VERB = "import importlib; v = importlib.import_module('distill.{verb}'); "
VERB += "from distill.runtime import cli, distributed; "
VERB += "distributed.HEARTBEAT_SECONDS = {beat}; "
VERB += "cli.run(v.main, v.OPTIONS)"


def find_free_port() -> int:
    """Returns a port of this host that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    verb: str,
    count: int,
    devices: int,
    logs: Path,
    flags: Sequence[str],
    beat: int = 60,
    slurm: bool = False,
) -> list[subprocess.Popen]:
    """Starts `count` processes of `distill.VERB` with `devices` devices each; process i writes to
    LOGS.i. Flags identify them, or the variables that `srun` sets for the tasks of one node."""
    port = find_free_port()
    words = [sys.executable, "-W", "ignore", "-c", VERB.format(verb=verb, beat=beat), *flags]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    started = []
    for i in range(count):
        own = [f"--coordinator_address=localhost:{port}"]
        own += [f"--num_processes={count}", f"--process_id={i}"]
        if slurm:  # jax derives the port from the job id
            own = ["--coordinator_address=auto"]
            environment |= {"SLURM_JOB_ID": f"{os.getpid()}", "SLURM_STEP_NODELIST": "localhost"}
            environment |= {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count)}
            environment |= {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        with Path(f"{logs}.{i}").open("w") as log:
            started.append(
                subprocess.Popen(
                    words + (own if count > 1 else []),
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def end(processes: list[subprocess.Popen], logs: Path, seconds: float = 300) -> list[int]:
    """Waits for all processes and returns their exit codes; kills all of them if one does not
    end."""
    try:
        limit = time.monotonic() + seconds
        return [p.wait(timeout=max(1, limit - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(
            "\n".join(said(logs, i)[-3000:] for i in range(len(processes)))
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(verb: str, count: int, devices: int, logs: Path, flags: Sequence[str]) -> None:
    """Runs the processes and asserts that all succeed."""
    codes = end(start(verb, count, devices, logs, flags), logs)
    assert not any(codes), "\n".join(said(logs, i)[-3000:] for i in range(count))


def said(logs: Path, number: int) -> str:
    return Path(f"{logs}.{number}").read_text()


def wait_for(
    condition: Callable[[], bool], processes: list[subprocess.Popen], seconds: float = 300
):
    """Returns once `condition()` holds; raises if a process ends before, or it takes too long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert all(p.poll() is None for p in processes), "a process has ended"
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.05)
