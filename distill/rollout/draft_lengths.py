"""Chooses how many tokens to draft, from how many were accepted and from what a step costs.

Nothing here depends on time: all processes, and a run that is resumed, choose the same.
"""

import dataclasses

import jax
import jax.numpy as jnp

from distill.rollout.decode_types import Decoder
from models.layers import pages
from models.transformer import Params

PRIOR_COMPARED, PRIOR_ACCEPTED = 64.0, 32.0  # drafts at the start, as if they had been seen
KEPT = 0.9  # of what was counted before, after each segment
PROBE_EVERY = 16  # segments without drafts, after which one drafts again
CPU_TOKENS, ACCELERATOR_TOKENS = 10.0, 160.0  # see estimate_step_cost


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of a decoding step, in units of the arithmetic of one token.

    fixed: that of reading the weights.
    overlaps: reading and arithmetic go on at once, so that the longer one counts.
    rereads: each draft reads the cache once more.
    """

    fixed: float
    overlaps: bool = False
    rereads: bool = False

    def get_ratio(self, rows: int, length: int, cached: float = 0.0) -> float:
        """Returns the cost of a step that reads 1 + length tokens of each row, over that of one
        that reads one. cached: bytes of the cache over those of the weights."""

        def estimate(tokens: int) -> float:
            read = self.fixed * (1 + cached * (tokens if self.rereads else 1))
            compute = rows * tokens
            return max(read, compute) if self.overlaps else read + compute

        return estimate(1 + length) / estimate(1)


class DraftLengths:
    """Chooses the length of each segment's drafts.

    lengths: to choose from, ascending from 0; none: no drafts.
    """

    def __init__(self, lengths: tuple[int, ...], cost: StepCost, token_share: float = 0.0) -> None:
        self.lengths, self.cost = lengths, cost
        self.token_share = token_share  # bytes of a token in the cache over those of the weights
        self.compared, self.accepted = PRIOR_COMPARED, PRIOR_ACCEPTED
        self.num_off = 0  # segments since the last one with drafts

    def choose(self, rows: int, cached_tokens: int = 0) -> int | None:
        """Returns the length with most tokens for its cost, for `rows` rows of a device that have
        so many tokens in the cache; None: no drafts."""
        cached = cached_tokens * self.token_share
        if not self.lengths:
            return None
        best = max(self.lengths, key=lambda length: self.estimate_gain(rows, length, cached))
        self.num_off = 0 if best else self.num_off + 1
        if self.num_off >= PROBE_EVERY:
            self.num_off, best = 0, self.lengths[1]
        return best

    def estimate_gain(self, rows: int, length: int, cached: float = 0.0) -> float:
        """Returns how many times as fast a row goes on with drafts of this length: if each draft is
        accepted as often as those before it were, one after another."""
        rate = self.accepted / self.compared
        tokens = sum(rate**i for i in range(length + 1))
        return tokens / self.cost.get_ratio(rows, length, cached)

    def add_counts(self, compared: int, accepted: int) -> None:
        """Adds the drafts of a segment: those compared with a draw, and those that equalled it."""
        if compared:
            self.compared = KEPT * self.compared + compared
            self.accepted = KEPT * self.accepted + accepted


def estimate_step_cost(platform: str) -> StepCost:
    """Returns the cost on a platform: tokens whose arithmetic takes as long as reading the weights.

    A TPU or GPU takes 160 to 560 FLOPs in the time of a byte, and a token takes one FLOP for each
    byte of weights in bfloat16. CPUs: measured, LOG.md, "Checked drafts".
    """
    if platform == "cpu":
        return StepCost(CPU_TOKENS)
    return StepCost(ACCELERATOR_TOKENS, overlaps=True, rereads=platform != "tpu")


def make_draft_lengths(lengths: tuple[int, ...], decoder: Decoder, params: Params) -> DraftLengths:
    """Makes what chooses the drafts of a decoder, within mesh_lib.use_mesh of its mesh."""
    cost = estimate_step_cost(jax.sharding.get_mesh().devices.flat[0].platform)
    dtype = jnp.dtype(decoder.cache.dtype)
    token_bytes = pages.count_token_bytes(decoder.model.config, 1, dtype)
    return DraftLengths(lengths, cost, token_bytes / sum(x.nbytes for x in jax.tree.leaves(params)))


def list_lengths(most: int) -> tuple[int, ...]:
    """Returns the lengths to choose from, each a program: 0, about half of `most`, and `most`."""
    return tuple(sorted({0, most // 2, most}))
