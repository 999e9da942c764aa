"""Checks settings against a table of rules, with one wording for all messages."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from models.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`.

    below: exclude `high`. above: exclude `low`. off: the meaning of `low` itself, for messages.
    whole: exclude fractions.
    """

    low: float = 0
    high: float = math.inf
    below: bool = False
    above: bool = False
    off: str = ""
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if (
            not isinstance(value, int if self.whole else int | float)
            or isinstance(value, bool)
            or not -math.inf < value < math.inf  # math.isfinite fails on huge integers
        ):
            return False
        reaches_low = value > self.low if self.above else value >= self.low
        return reaches_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        low += f" ({self.off})" if self.off else ""
        if self.whole:
            low = f"a whole number, {low}"
        if self.high == math.inf:
            return low
        high = f"{self.high:,}" if isinstance(self.high, int) else f"{self.high:g}"
        return f"{low} and {'below' if self.below else 'at most'} {high}"


SEEDS = Range(0, 2**32 - 1, whole=True)  # jax.random.key ignores the higher bits


Rule = Range | tuple[Any, ...]  # numbers, or choices


def check_fields(values: Any, rules: Mapping[str, Rule], prefix: str = "") -> None:
    """Checks the fields of a config, a mapping or a dataclass that are named in `rules`.

    Raises:
      UserError: names the first field that breaks its rule, preceded by `prefix`.
    """
    for field, rule in rules.items():
        value = values[field] if isinstance(values, Mapping) else getattr(values, field)
        if value not in rule:
            known, hint = str(rule), ""
            if not isinstance(rule, Range):
                known, hint = f"one of {', '.join(map(repr, rule))}", suggest(value, rule)
            raise UserError(f"{prefix}{field}={value!r}: must be {known}{hint}")
