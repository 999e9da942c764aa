"""Chooses how many tokens to draft, from how many were accepted and from what a step costs.

Nothing here depends on time: all processes, and a run that is resumed, choose the same.
"""

import dataclasses

PRIOR_COMPARED, PRIOR_ACCEPTED = 64.0, 32.0  # drafts at the start, as if they had been seen
KEPT = 0.9  # of what was counted before, after each segment
PROBE_EVERY = 16  # segments without drafts, after which one drafts again


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of a decoding step that reads `tokens`: fixed + tokens, in units of one token's own."""

    fixed: float

    def get_ratio(self, rows: int, length: int) -> float:
        """Returns the cost of a step that reads 1 + length tokens of each row, over that of one
        that reads one."""
        return (self.fixed + rows * (1 + length)) / (self.fixed + rows)


class DraftLengths:
    """Chooses the length of each segment's drafts.

    lengths: to choose from, ascending from 0; none: no drafts.
    """

    def __init__(self, lengths: tuple[int, ...], cost: StepCost) -> None:
        self.lengths, self.cost = lengths, cost
        self.compared, self.accepted = PRIOR_COMPARED, PRIOR_ACCEPTED
        self.num_off = 0  # segments since the last one with drafts

    def choose(self, rows: int) -> int | None:
        """Returns the length with most tokens for its cost, for `rows` rows of a device."""
        if not self.lengths:
            return None
        best = max(self.lengths, key=lambda length: self.estimate_gain(rows, length))
        self.num_off = 0 if best else self.num_off + 1
        if self.num_off >= PROBE_EVERY:
            self.num_off, best = 0, self.lengths[1]
        return best

    def estimate_gain(self, rows: int, length: int) -> float:
        """Returns how many times as fast a row goes on with drafts of this length: if each draft is
        accepted as often as those before it were, one after another."""
        rate = self.accepted / self.compared
        tokens = sum(rate**i for i in range(length + 1))
        return tokens / self.cost.get_ratio(rows, length)

    def add_counts(self, compared: int, accepted: int) -> None:
        """Adds the drafts of a segment: those compared with a draw, and those that equalled it."""
        if compared:
            self.compared = KEPT * self.compared + compared
            self.accepted = KEPT * self.accepted + accepted


def estimate_step_cost(platform: str) -> StepCost:
    return StepCost(6.0 if platform == "cpu" else 160.0)


def list_lengths(most: int) -> tuple[int, ...]:
    """Returns the lengths to choose from, each a program: 0, about half of `most`, and `most`."""
    return tuple(sorted({0, most // 2, most}))
