"""From prompts to sequences: what is sampled, by which programs, in which order."""

from distill.rollout.sampler import (
    AsyncRollouts,
    PartialRollouts,
    bucket,
    complete,
    expand_prompts,
    row_keys,
    sample,
)
from distill.rollout.sequence import Sequence
from distill.sampling import Sampling
from distill.slots import Options

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
]
