"""What XLA compiles while a run goes on, how long that takes, and where it is kept."""

import dataclasses

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from distill.runtime import run_files
from models.errors import UserError

SHORT = 0.1  # seconds: programs that compile faster are not kept, nor named
NAMED = 8  # programs at most that are named in one line
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"


def options(mesh: Mesh) -> dict[str, str]:
    """XLA's options of a program on `mesh` that goes through the vocabulary.

    On CPUs, sums of what is computed on the way to them are given to a library that takes ten times
    as long, with jaxlib 0.10.2; 0.12 does not. It may keep the products.
    """
    if mesh.devices.flat[0].platform != "cpu" or jax.__version_info__ >= (0, 11):
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def keep(directory: str) -> None:
    """Has compiled programs kept in `directory`, local or gs://, and read from there; "": as jax
    does by itself. Raises UserError if it cannot be."""
    if not directory:
        return
    run_files.require_reachable(directory, "--config.compilation_cache")
    try:
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--config.compilation_cache={directory}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORT)
    compilation_cache.reset_cache()  # or one that is open already would stay


@dataclasses.dataclass
class Compiled:
    """Programs compiled since the last look. Use as a context."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by name
    programs: int = 0
    found: int = 0  # of these, in the cache

    def _note(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILED:
            name = str(about.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            self.seconds[name] = self.seconds.get(name, 0.0) + duration_secs
            self.programs += 1

    def _hit(self, event: str, **_: str | int) -> None:
        self.found += event == _FOUND

    def look(self, when: str, least: float) -> float:
        """Seconds that compiling took since the last look; told, if `least` or more."""
        total = sum(self.seconds.values())
        if total >= least:
            long = sorted((-s, name) for name, s in self.seconds.items() if s >= SHORT)[:NAMED]
            named = ", ".join(f"{name} {-s:.1f}" for s, name in long)
            run_files.say(
                f"{when}: compiled {self.programs} programs in {total:.1f} s, {self.found} of them "
                f"from the cache{': ' if named else ''}{named}"
            )
        self.seconds, self.programs, self.found = {}, 0, 0
        return total

    def __enter__(self) -> "Compiled":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        jax.monitoring.register_event_listener(self._hit)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)
        jax.monitoring.unregister_event_listener(self._hit)
