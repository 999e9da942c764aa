"""XLA: compiler options, the compilation cache, and a monitor of what is compiled."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import tempfile
import time
from pathlib import Path

import filelock
import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from distill.runtime import compiling, paths, run_files
from models.config import Config
from models.errors import UserError
from models.layers import grouped

AUTO = "auto"
MAX_USER_CACHE_BYTES = 4 * 2**30  # the programs that were not used for longest then go
MIN_COMPILE_SECONDS = 0.1  # programs that compile faster are neither cached nor named
MAX_NAMED_PROGRAMS = 8  # in one line
# Of /proc/cpuinfo, on x86 and on ARM.
_PROCESSOR_FIELDS = ("model name", "flags", "CPU implementer", "CPU part", "Features")
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


def get_compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns XLA's options for a program on `mesh` that loops over the vocabulary.

    On CPUs, jaxlib 0.10.2 hands fused sums to a library that takes ten times as long; 0.12 does
    not. The library may keep matrix products.
    """
    if mesh.devices.flat[0].platform != "cpu" or jax.__version_info__ >= (0, 11):
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def log_slow_experts(config: Config, mesh: Mesh) -> None:
    """Says, once, what experts cost on GPUs that have no kernels for them, and what to do."""
    device = mesh.devices.flat[0]
    if not config.num_experts or device.platform != "gpu":
        return
    if reason := grouped.explain_missing_gpu_kernels(device):
        _log_once(
            f"experts: each token is multiplied by all {config.num_experts} of them, at "
            f"{config.num_experts} times the operations and memory: {reason}"
        )


@functools.cache
def _log_once(line: str) -> None:
    run_files.log_line(line)


def get_user_cache() -> Path:
    """Returns this user's directory of compiled programs for this host and its processor: a home
    may be shared by hosts with others, also of the same name, whose programs would not run here."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    processor = hashlib.sha256(describe_processor().encode()).hexdigest()[:8]
    name = f"{platform.node()}-{processor}"
    return Path(caches).expanduser() / "qwen3-distill" / "compiled" / name


def describe_processor(about: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the processor's model and the instructions that it knows, which jax's keys of
    compiled programs leave out."""
    known = ""
    with contextlib.suppress(OSError):
        first, _, _ = about.read_text().partition("\n\n")
        lines = (line for line in first.splitlines() if line.startswith(_PROCESSOR_FIELDS))
        known = "\n".join(lines)
    return known or f"{platform.machine()} {platform.processor()}"


def drop_unfinished_programs(directory: Path) -> None:
    """Removes programs that a process was writing to a cache of limited size when it was killed or
    the disk was full: jax would not read or replace them, nor add any other.

    An entry is its program and, written after it, the time of its last use.
    """
    with (
        contextlib.suppress(OSError, filelock.Timeout),  # another process holds it: next time
        filelock.FileLock(directory / ".lockfile", timeout=1),
    ):
        ends = ("-cache", "-atime")
        files = {path.name: path for path in directory.iterdir() if path.name.endswith(ends)}
        for name, path in files.items():
            own, other = ends if name.endswith(ends[0]) else ends[::-1]
            if name.removesuffix(own) + other not in files:
                path.unlink()


def _require_private(directory: Path) -> None:
    """Raises UserError if others may write to a directory whose programs are run unseen."""
    about = directory.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise UserError("other users may write there")


def init_compilation_cache(directory: str = AUTO) -> None:
    """Caches compiled programs in `directory`, local or gs://.

    "auto" is the user's own, for a run of one process: without one that all hosts see, some would
    compile what others read. JAX_COMPILATION_CACHE_DIR takes its place, and "" is that or none.
    A directory that cannot be used is no reason not to run: a line says so. From here on it is
    known which threads compile.
    """
    compiling.start_watching(jax.monitoring)
    is_own = directory == AUTO
    if is_own:
        is_set = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if is_set or jax.process_count() > 1:
            return
    if not directory:
        return
    try:
        directory = str(get_user_cache()) if is_own else directory
        paths.require_reachable(directory, "config.compilation_cache")
        path = epath.Path(directory)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not paths.is_remote(directory):
            tempfile.TemporaryFile(dir=directory).close()
        if is_own:
            _require_private(Path(directory))
            drop_unfinished_programs(Path(directory))
            jax.config.update("jax_compilation_cache_max_size", MAX_USER_CACHE_BYTES)
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: no home directory
        reason = getattr(error, "strerror", None) or str(error)
        run_files.log_line(
            f"warning: compiled programs are not kept for the next start: {directory}: {reason}"
        )
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    compilation_cache.reset_cache()  # an open cache would stay in use


@dataclasses.dataclass
class CompileMonitor:
    """Records the programs compiled since the last report. Use as a context."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by name
    spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # of all programs
    reported: float = 0.0  # when the last report was
    num_programs: int = 0
    cache_hits: int = 0  # of these, in the cache

    def _record_compile(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILE_EVENT:
            name = str(about.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            self.seconds[name] = self.seconds.get(name, 0.0) + duration_secs
            self.num_programs += 1
            now = time.perf_counter()
            self.spans.append((now - duration_secs, now))

    def _record_cache_hit(self, event: str, **_: str | int) -> None:
        self.cache_hits += event == _CACHE_HIT_EVENT

    def report_compiles(self, when: str, min_seconds: float) -> float:
        """Returns the seconds since the last report in which something was compiled; logs them from
        `min_seconds` on, with those of each program. Several may be compiled at once."""
        total, end = 0.0, self.reported
        for start, stop in sorted(self.spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        if total >= min_seconds:
            long = sorted(
                (-s, name) for name, s in self.seconds.items() if s >= MIN_COMPILE_SECONDS
            )[:MAX_NAMED_PROGRAMS]
            named = ", ".join(f"{name} {-s:.1f}" for s, name in long)
            if sum(self.seconds.values()) > total + 1:
                named += ", some at once"
            run_files.log_line(
                f"{when}: compiled {self.num_programs} programs in {total:.1f} s, "
                f"{self.cache_hits} of them "
                f"from the cache{': ' if named else ''}{named}"
            )
        self.seconds, self.spans, self.num_programs, self.cache_hits = {}, [], 0, 0
        self.reported = time.perf_counter()
        return total

    def __enter__(self) -> "CompileMonitor":
        jax.monitoring.register_event_duration_secs_listener(self._record_compile)
        jax.monitoring.register_event_listener(self._record_cache_hit)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record_compile)
        jax.monitoring.unregister_event_listener(self._record_cache_hit)
