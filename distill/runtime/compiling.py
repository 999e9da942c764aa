"""Which threads compile, by what JAX says when it begins and ends.

The stacks of running threads would show it too. But their frames come and go while another thread
looks at them, and Python 3.11 has then taken other objects for frames. JAX is not imported here, so
that verbs that only read files start quickly.
"""

import threading
from types import ModuleType

# Of a program: tracing the function, lowering that, and compiling it or reading it from the cache.
_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)

_is_watching = threading.Event()
_depths: dict[int, int] = {}  # by thread: programs that it compiles, one inside another


def start_watching(monitoring: ModuleType) -> None:
    """From the first call on `is_compiling` knows.

    Args:
      monitoring: `jax.monitoring`.
    """
    if _is_watching.is_set():
        return
    _is_watching.set()
    monitoring.register_scalar_listener(_note_begin)
    monitoring.register_event_duration_secs_listener(_note_end)


def is_compiling(thread: int) -> bool:
    """Returns True if a thread traces, lowers or compiles a program.

    Args:
      thread: its `threading.get_ident()`.
    """
    return _depths.get(thread, 0) > 0


def _note_begin(event: str, *_: object, **__: object) -> None:
    if event in _EVENTS:
        thread = threading.get_ident()
        _depths[thread] = _depths.get(thread, 0) + 1


def _note_end(event: str, *_: object, **__: object) -> None:
    thread = threading.get_ident()
    if event in _EVENTS and thread in _depths:  # it may have begun before anyone watched
        _depths[thread] -= 1
        if _depths[thread] <= 0:
            del _depths[thread]
