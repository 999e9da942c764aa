"""Why claims came out as they did, and what more computing would settle.

Each reading names the verdict that it explains: if results change, the page says that the sentence
explains another one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A reading of a claim's result.

    Args:
      verdict: that it explains, as the page words it, up to a colon.
      settle: what more computing would settle.
    """

    verdict: str
    why: str
    settle: str


READINGS: dict[tuple[str, str], Reading] = {}
"""(study, claim) -> reading"""
