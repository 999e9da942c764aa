"""Measures how much memory this process can still allocate on its host."""

import contextlib
import resource
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroups write "max", or numbers above any memory


def measure_free_bytes() -> int | None:
    """Returns the smallest of what the host, the cgroup (a container) and the process's own limit
    (ulimit -v) leave; None where the system does not say (not Linux).

    Linux kills a process that takes more than the first two without a word, so whoever plans must
    compare first.
    """
    limits = [_read_available(), _read_cgroup_rest(), _read_address_space_rest()]
    return min((limit for limit in limits if limit is not None), default=None)


def _read_available() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _read_cgroup_rest() -> int | None:
    """Reads the limit of this process's cgroup, version 2 or 1, less what it holds and cannot give
    up. Inside a container its own group is mounted as the root."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((_CGROUP / limit).read_text())
            stat = (_CGROUP / limit).with_name("memory.stat").read_text().split()
            reclaimable = int(stat[stat.index(cache) + 1])
            used = int((_CGROUP / usage).read_text()) - reclaimable
            if most < _UNLIMITED:
                return max(0, most - used)
    return None


def _read_address_space_rest() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError):
        pages = int((_PROC / "self/statm").read_text().split()[0])
        return max(0, limit - pages * resource.getpagesize())
    return None
