"""Model families: `models.get_family(config)` hands out a `Family`, the spec of one.

Names are looked up when they are first used: whoever wants models.errors alone starts without JAX.
"""

from typing import Any

_NAMES = ("FAMILIES", "Family", "get_family", "make_model", "read_config")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models import families

    return getattr(families, name)
