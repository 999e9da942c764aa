"""From prompts to sequences: what is sampled, by which programs, in which order."""

from distill.rollout.buffer import AsyncRollouts, PartialRollouts
from distill.rollout.options import Options
from distill.rollout.sampler import (
    bucket,
    complete,
    expand_prompts,
    row_keys,
    sample,
    to_batch,
)
from distill.rollout.sequence import Sequence
from distill.sampling import Sampling

__all__ = [
    "AsyncRollouts",
    "Options",
    "PartialRollouts",
    "Sampling",
    "Sequence",
    "bucket",
    "complete",
    "expand_prompts",
    "row_keys",
    "sample",
    "to_batch",
]
