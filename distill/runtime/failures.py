"""Explains in one line what a machine lacks: memory, a device, its driver, or the network.

Does not import JAX, which verbs that only read files do without.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Collection

from distill.runtime import gpu, host_memory, phases

GIB = 2**30
_MAX_TEXT = 300  # of an error of a library
_OFFLINE = ("ConnectError", "ConnectTimeout", "gaierror", "LocalEntryNotFoundError")

# Part of "file:function" -> what it does; comes before phases.PHASES. The first that is on the
# stack counts.
_PHASES = {
    "saving.py:save": "saving a checkpoint",
    "saving.py:restore_or_init": "making or restoring the state",
    "update.py:init_train_state": "making the optimiser's state",
    "policy/policy.py:load": "loading weights",
    "policy/policy.py:restore": "loading weights",
}
_STATE = ("student.lora.rank", "STAGE.optim.momentum_dtype", "mesh.fsdp with more devices")
_TRAINING = ("STAGE.accumulate (raise it)", "STAGE.max_response_tokens", "loss_chunk_mib")
_TRAINING += ("student.remat", "student.lora.rank", "mesh with more devices")
# Keys of a run's config that make a phase smaller.
KNOBS = {
    "saving a checkpoint": _STATE,
    "making or restoring the state": _STATE,
    "making the optimiser's state": _STATE,
    "loading weights": ("teacher.param_dtype", "student.param_dtype (with LoRA)", *_STATE),
    "sampling": (
        *("STAGE.rollout.slots", "STAGE.rollout.cache_tokens", "STAGE.rollout.cache_dtype"),
        *("STAGE.max_response_tokens", "STAGE.batch_size", "mesh with more devices"),
    ),
    "scoring": ("STAGE.accumulate (raise it)", "loss_chunk_mib", "teacher.param_dtype"),
    "updating": _TRAINING,
    "waiting for the update": _TRAINING,
    "evaluating": ("eval.batch_size", "eval.max_new_tokens"),
}
_OTHER_KNOBS = ("STAGE.accumulate (raise it)", "STAGE.batch_size", "student.lora.rank")
_VERB_FLAGS = ("batch_size", "samples", "max_new_tokens", "dtype", "limit")


def explain_failure(error: BaseException, options: Collection[str]) -> str | None:
    """Returns one line about an error that the machine is to blame for; None about any other.

    options: names of the flags of the verb that raised it.
    """
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return _explain_memory(error, text, options)
    frames = traceback.extract_tb(error.__traceback__)
    if frames and os.path.basename(frames[-1].filename) == "xla_bridge.py":
        return _explain_device(error, text)
    if _is_offline(error):
        return f"the network cannot be reached, or the hub does not answer: {text[:_MAX_TEXT]}"
    return None


def _is_offline(error: BaseException) -> bool:
    """Returns True if an error, or what caused it, is a connection that could not be made; the
    libraries for the hub raise types of their own."""
    found: BaseException | None = error
    while found is not None:
        if type(found).__name__ in _OFFLINE or type(found) is ConnectionError:
            return True
        found = found.__cause__ or found.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True for an allocation that failed, on the host or on a device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or "std::bad_alloc" in str(error):
        return True
    exhausted = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and (
        "RESOURCE_EXHAUSTED" in str(error)
    )
    return exhausted and bool(re.search(r"memory|allocat|hbm", str(error), re.IGNORECASE))


def _explain_memory(error: BaseException, text: str, options: Collection[str]) -> str:
    phase = find_phase(error)
    parts = [f"out of memory{f' while {phase}' if phase else ''}", find_size(text)]
    parts.append(describe_memory())
    if "config" in options:
        knobs = [f"config.{key}" for key in KNOBS.get(phase, _OTHER_KNOBS)]
    else:
        knobs = [f"--{flag}" for flag in _VERB_FLAGS if flag in options]
    if knobs:
        parts.append(f"less is needed with other values of {', '.join(knobs)}")
    return "; ".join(part for part in parts if part)


def find_phase(error: BaseException) -> str:
    """Returns what was being done when an error was raised, by the functions on its stack; "" if
    they are of none of the known phases."""
    frames = [
        f"{frame.filename}:{frame.name}"
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    ]
    for part, phase in _PHASES.items():
        if any(part in frame for frame in frames):
            return phase
    return phases.find_phase(frames, "")


def find_size(text: str) -> str:
    """Returns what an error's text says was asked for; "" if it says nothing."""
    if size := re.search(r"llocat\w* (\d+) bytes", text):
        return f"{int(size[1]) / GIB:,.2f} GiB were asked for"
    if size := re.search(r"llocate ([\d.]+ ?[KMGT]i?B)(.*? and data type \S+)?", text):
        return f"{size[1]} were asked for{size[2] or ''}"
    if size := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text):  # by TPU's compiler
        return f"the program takes {size[1]} of {size[2]} HBM"
    return ""


def describe_memory() -> str:
    """Describes the memory of the devices that are in use, or of the host."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        if limit := stats.get("bytes_limit"):
            used = stats.get("bytes_in_use", 0)
            return f"the device has {limit / GIB:.2f} GiB, of which {used / GIB:.2f} are in use"
    free = host_memory.measure_free_bytes()
    return f"{free / GIB:.2f} GiB are free on the host" if free is not None else ""


def _explain_device(error: BaseException, text: str) -> str | None:
    """Explains why JAX has no device. Where it knows no backend of a name, it only asserts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    unable = re.match(
        r"Unable to initialize backend '(\w+)': (.*?)( \(set JAX_PLATFORMS.*)?$", text
    )
    if unable:
        reason = unable[2]
    elif isinstance(error, AssertionError):
        reason = "no plugin of JAX for it is installed (requirements-gpu.txt, requirements-tpu.txt)"
        if gpu.is_gpu_expected():
            reason = "JAX's plugin finds no GPU, or no driver (`nvidia-smi` shows both)"
    elif isinstance(error, RuntimeError):
        reason = text
    else:
        return None
    name = f"JAX_PLATFORMS={platforms}" if platforms else "JAX"
    return f"{name}: there is no such device that can be used: {reason}"
