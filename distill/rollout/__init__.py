"""From prompts to sequences: what is sampled, by which programs, in which order."""

from distill.rollout.buffer import AsyncRollouts, PartialRollouts
from distill.rollout.engine import REMEMBER
from distill.rollout.options import (
    Options,
    cache_shape,
    fewer_rows,
    line_sizes,
    segment_steps,
)
from distill.rollout.sampler import (
    bucket,
    complete,
    expand_prompts,
    row_keys,
    sample,
)
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.rollout.simulate import Simulated, lengths, simulate

__all__ = [
    "REMEMBER",
    "AsyncRollouts",
    "Options",
    "PartialRollouts",
    "Sampling",
    "Sequence",
    "Simulated",
    "bucket",
    "cache_shape",
    "complete",
    "expand_prompts",
    "fewer_rows",
    "lengths",
    "line_sizes",
    "row_keys",
    "sample",
    "segment_steps",
    "simulate",
]
