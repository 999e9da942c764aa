"""Runs of several processes: joining, agreeing on values, and exiting.

Each process of a run drives the devices of its own host, and all make the same calls in the same
order. Disks, clocks and signals may differ between hosts, so process 0 reads them and broadcasts
the result. If a process is lost, the others exit, since none can continue without it: they say so
in one line, and the exit code LOST_EXIT_CODE tells a launcher that the cause is in another log.
"""

import contextlib
import ctypes
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from distill.runtime.run_files import is_primary
from models.errors import UserError

HEARTBEAT_SECONDS = 60  # seconds without a heartbeat after which a process counts as lost
START_TIMEOUT_SECONDS = 300  # seconds to wait for all processes to start
LOST_EXIT_CODE = 75  # greater than the exit codes of a cause, 1 and 2
# Substrings of errors caused by a lost peer: on CPUs, on GPUs, from the coordination service.
_LOST_PEER_SIGNS = (
    "Gloo",
    "NCCL",
    "coordination service",
    "CoordinationService",
    "Connection closed by",
)
_ADVICE = "its own log says why; restart every process to resume the run from its checkpoint"


@contextlib.contextmanager
def join_processes(options: flags.FlagValues) -> Iterator[None]:
    """Context in which this process is part of the run that its flags describe.

    Enter it before any other use of JAX. Without flags the process runs alone. Raises UserError if
    the flags are inconsistent, do not match the run, or the other processes do not connect in time.
    """
    address, count, number = (
        options[name].value for name in ("coordinator_address", "num_processes", "process_id")
    )
    if not address:
        if (count or 1) > 1 or number:
            raise UserError("--coordinator_address: is needed with --num_processes or --process_id")
        if jax.process_count() > 1:  # on a TPU slice, whose hosts know each other
            raise UserError(
                f"these are devices of {jax.process_count()} hosts: start this on each of them "
                "with --coordinator_address=auto"
            )
        yield
        return
    exit_code = _init_distributed(address, count, number)
    try:
        yield
        multihost_utils.sync_global_devices("end")  # no process leaves while others still work
    except BaseException as error:
        exit_code[0] = _find_exit_code(error)
        if not isinstance(error, UserError | SystemExit | KeyboardInterrupt) and any(
            s in str(error) for s in _LOST_PEER_SIGNS
        ):
            _exit_lost(str(error).splitlines()[0])
        raise


def _find_exit_code(error: BaseException) -> int:
    """Returns the code with which `cli.run` exits after `error`."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    return {UserError: 2, SystemExit: getattr(error, "code", 1)}.get(type(error), 1)


def _init_distributed(address: str, count: int | None, number: int | None) -> list[int]:
    """Connects to the other processes. Returns the one-element list of `_install_abort_handler`."""
    init_args = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if address == "auto":
        init_args = {}
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # JAX would use it as the address
    elif not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise UserError(f"--coordinator_address={address}: must be HOST:PORT, or auto")
    elif count is None or number is None or not 0 <= number < count:
        raise UserError(
            f"--process_id={number}: must be below --num_processes={count}, and both be given"
        )
    try:
        jax.distributed.initialize(
            **init_args,
            initialization_timeout=START_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"--coordinator_address={address}: {reason}") from error
    # JAX handles SIGTERM for a service that is not used here (see `max_over_processes`), unknown to
    # Python, which is given back what it had.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return _install_abort_handler()


_c_callbacks: list[Any] = []  # callbacks that C code holds must not be garbage-collected


def _install_abort_handler() -> list[int]:
    """Makes the last line of output a short one when JAX aborts because a peer is lost.

    A thread of JAX aborts the process, printing pages, if a peer is silent or the connection to
    process 0 is closed. Returns a one-element list: set it to the exit code if it is this process
    that is exiting.
    """
    exit_code = [0]

    def handle_abort(_: int) -> None:
        if exit_code[0]:  # this process left first
            os._exit(exit_code[0])
        _exit_lost(f"no heartbeat for {HEARTBEAT_SECONDS} s, or connection closed, see above")

    # Python's own signal handlers run too late: the abort never returns.
    _c_callbacks.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle_abort))
    ctypes.CDLL(None).signal(signal.SIGABRT, _c_callbacks[-1])
    return exit_code


def _exit_lost(reason: str) -> None:
    """Exits at once: a normal exit would wait for the lost process."""
    os.write(2, f"error: another process of this run is lost ({reason}): {_ADVICE}\n".encode())
    os._exit(LOST_EXIT_CODE)


def broadcast_from_primary(compute: Callable[[], Any]) -> Any:
    """Runs `compute` in process 0 and returns its result (JSON) in every process.

    A UserError that it raises there is raised in every process.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return compute()
    outcome: list[Any] = [None, ""]
    if is_primary():
        try:
            outcome[0] = compute()
        except UserError as error:
            outcome[1] = str(error)
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded_size = 1 << size.bit_length()  # few distinct sizes, since each is compiled
    padded = np.pad(text if is_primary() else text[:0], (0, padded_size))[:padded_size]
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]
    value, reason = json.loads(received.tobytes())
    if reason:
        raise UserError(reason)
    return value


def max_over_processes(number: int) -> int:
    """Returns the maximum of `number` over processes: the signal received by one of them, say."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def reduce_means(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Returns means of (sum, count) pairs over all processes, which must pass the same names.

    Names whose total count is 0 are left out.
    """
    if jax.distributed.is_initialized():
        own = np.array(list(sums.values()), np.float32)
        every = np.reshape(multihost_utils.process_allgather(own), (-1, *own.shape))
        sums = dict(zip(sums, every.sum(0).tolist(), strict=True))
    return {name: total / count for name, (total, count) in sums.items() if count}
