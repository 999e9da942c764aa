"""Several processes, one run: who they are, what they agree on, how they end.

Each process of a run drives its own host's devices, and all make the same calls in the same order.
What a disk, a clock or a signal says may differ between hosts, so process 0 reads it, and tells the
others. A process that is lost ends the others, for none can go on without it: they say so in one
line, and their exit code LOST tells a launcher that the cause is in another log.
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

HEARTBEAT_SECONDS = 60  # seconds of silence after which a process counts as lost
START_TIMEOUT_SECONDS = 300  # seconds that the processes may start apart
LOST_EXIT_CODE = 75  # exit code; above those of a cause: 1 and 2
# What errors say that come of a lost peer: of CPUs, of GPUs, of the coordination service.
_LOST_PEER_SIGNS = (
    "Gloo",
    "NCCL",
    "coordination service",
    "CoordinationService",
    "Connection closed by",
)
_ADVICE = "its own log says why; started again on every host, the run goes on from its checkpoint"


def define_flags(options: flags.FlagValues) -> None:
    """The flags of a verb that several processes may run together."""
    flags.DEFINE_string(
        "coordinator_address",
        os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "Of one run by several processes: HOST:PORT of process 0, the same for all, with "
        "--num_processes and --process_id; or auto: a TPU slice, Slurm or MPI says all three. "
        "Default: JAX_COORDINATOR_ADDRESS, or one process.",
        flag_values=options,
    )
    for name, meaning in (
        ("num_processes", "How many processes there are"),
        ("process_id", "The number of this one, from 0"),
    ):
        default = os.environ.get(f"JAX_{name.upper()}")
        description = f"{meaning}. Default: JAX_{name.upper()}."
        flags.DEFINE_integer(name, default, description, lower_bound=0, flag_values=options)


@contextlib.contextmanager
def join_processes(options: flags.FlagValues) -> Iterator[None]:
    """Within it this process is one of those that its flags name; without any, the only one.

    Before jax is used in any other way. Raises UserError for flags that name no run, or name
    another than there is, and where the others did not come.
    """
    address, count, number = (
        options[name].value for name in ("coordinator_address", "num_processes", "process_id")
    )
    if not address:
        if (count or 1) > 1 or number:
            raise UserError("--coordinator_address: is needed with --num_processes, --process_id")
        if jax.process_count() > 1:  # of a TPU slice, whose hosts know of each other anyhow
            raise UserError(
                f"these are devices of {jax.process_count()} hosts: start this on each of them "
                "with --coordinator_address=auto"
            )
        yield
        return
    exit_code = _init_distributed(address, count, number)
    try:
        yield
        multihost_utils.sync_global_devices("end")  # none leaves while others still work
    except BaseException as error:
        exit_code[0] = {UserError: 2, SystemExit: getattr(error, "code", 1)}.get(type(error), 1)
        if not isinstance(error, UserError | SystemExit) and any(
            s in str(error) for s in _LOST_PEER_SIGNS
        ):
            _exit_lost(str(error).splitlines()[0])
        raise


def _init_distributed(address: str, count: int | None, number: int | None) -> list[int]:
    """Connects to the others. Returns where to put the exit code of a process that is ending."""
    init_args = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if address == "auto":
        init_args = {}
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # jax would take it for an address
    elif not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise UserError(f"--coordinator_address={address}: is none; HOST:PORT, or auto")
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
    # jax takes SIGTERM for itself, for a service that is not in use here: see `anyone`.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return _install_abort_handler()


_c_callbacks: list[Any] = []  # what C calls must not be collected


def _install_abort_handler() -> list[int]:
    """Where a thread of jax's finds that a peer is silent, or the connection to process 0 closed,
    it aborts, over pages of its own: the last line is then ours. Returns what `_join` does."""
    exit_code = [0]

    def handle_abort(_: int) -> None:
        if exit_code[0]:  # it was this process that left the others
            os._exit(exit_code[0])
        _exit_lost(
            f"no sign of it for {HEARTBEAT_SECONDS} s, or its connection is closed, see above"
        )

    # Python's own signal handlers would run after an abort, which is never.
    _c_callbacks.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle_abort))
    ctypes.CDLL(None).signal(signal.SIGABRT, _c_callbacks[-1])
    return exit_code


def _exit_lost(reason: str) -> None:
    """Ends this process at once: the usual way out would wait for the one that is lost."""
    os.write(2, f"error: another process of this run is lost ({reason}): {_ADVICE}\n".encode())
    os._exit(LOST_EXIT_CODE)


def broadcast_from_primary(compute: Callable[[], Any]) -> Any:
    """What `make` returns (JSON) or raises (UserError) in process 0, in every process."""
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
    padded_size = 1 << size.bit_length()  # few sizes: each is compiled
    padded = np.pad(text if is_primary() else text[:0], (0, padded_size))[:padded_size]
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]
    value, reason = json.loads(received.tobytes())
    if reason:
        raise UserError(reason)
    return value


def max_over_processes(number: int) -> int:
    """The greatest of the processes' numbers: a signal that came to one of them, say."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def reduce_means(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The means that all processes' sums and counts come to; of what none counted there is none.
    All name the same."""
    if jax.distributed.is_initialized():
        own = np.array(list(sums.values()), np.float32)
        every = np.reshape(multihost_utils.process_allgather(own), (-1, *own.shape))
        sums = dict(zip(sums, every.sum(0).tolist(), strict=True))
    return {name: total / count for name, (total, count) in sums.items() if count}
