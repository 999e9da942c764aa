"""From prompts to sequences: what to draw, the device programs, and the host's scheduling."""

from distill.rollout.buffer import RolloutBuffer
from distill.rollout.completions import SampleSpec, complete, make_sample_spec
from distill.rollout.engine import SEEN_TOKENS_PER_CALL
from distill.rollout.options import (
    RolloutOptions,
    get_line_sizes,
    get_segment_tokens,
    get_shrunk_rows,
    make_cache_shape,
)
from distill.rollout.sampler import (
    SamplingModel,
    bucket_length,
    expand_prompts,
    make_row_keys,
    sample,
)
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.rollout.simulate import Simulation, draw_lengths, simulate

__all__ = [
    "SEEN_TOKENS_PER_CALL",
    "RolloutBuffer",
    "RolloutOptions",
    "SampleSpec",
    "Sampling",
    "SamplingModel",
    "Sequence",
    "Simulation",
    "bucket_length",
    "complete",
    "draw_lengths",
    "expand_prompts",
    "get_line_sizes",
    "get_segment_tokens",
    "get_shrunk_rows",
    "make_cache_shape",
    "make_row_keys",
    "make_sample_spec",
    "sample",
    "simulate",
]
