"""Model families: `models.get_family(config)` returns a `Family`, the spec of one.

Names are resolved on first use, so that importing models.errors alone does not import JAX.
"""

from typing import Any

_NAMES = ("FAMILIES", "Family", "get_family", "make_model", "read_config")


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models import families

    return getattr(families, name)
