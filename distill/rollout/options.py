"""How sequences are sampled, and the shape of the cache that follows from it."""

import dataclasses
import sys

import jax.numpy as jnp
from jax.sharding import Mesh

from distill.policy.policy import DTYPES, PARAM_DTYPES
from distill.rollout import draft_lengths
from distill.rollout.decode import CacheShape
from distill.runtime import mesh as mesh_lib
from models.checks import Range, check_fields
from models.config import Config
from models.errors import UserError
from models.layers import pages

CACHE_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")
DEFAULT_PAGE_SIZE = 128  # tokens
DRAFTS = ("", "ngram")
DEFAULT_DRAFT_TOKENS = 3
SHRINK_DIVISOR = 4  # slabs: the last sequences decode on with this part of the rows
# A pool of pages serves this many times the sequences that it could hold at full length.
OVERSUBSCRIPTION = 3


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How to sample, and what to record. Nothing here changes what is drawn."""

    slots: int = 0  # rows that decode together, rounded up to what the mesh divides; 0: as fit
    max_length: int = 0  # tokens of prompt and response; 0: those of the longest sequence
    segment: int = 64  # decoding steps at most between two turns of the host
    prefill_chunk: int = 512  # prompt tokens that each row shard reads in one call
    cache_tokens: int = 0  # that the cache holds in all; 0: enough for `slots` full sequences
    page_size: int = 0  # tokens of a page; 0: DEFAULT_PAGE_SIZE
    cache_dtype: str = ""  # one of CACHE_DTYPES; "": that of the model
    param_dtype: str = ""  # of the weights that decode, see decode_weights.prepare_weights
    gather_weights: bool = True  # each row shard holds all weights
    cache_backend: str = ""  # see CacheShape.backend; "": the platform's
    stacked: bool | None = None  # weights, over layers; None: what the platform prefers
    top_logprobs: int = 0  # record the model's own log-probabilities: this many of the likeliest
    routing: bool = False  # record the experts of all tokens but the last, which is never read
    warm_up: bool = False  # compile all programs first, also those that these sequences do not need
    drafts: str = ""  # one of DRAFTS: guesses of the next tokens, checked; "": none
    draft_tokens: int = DEFAULT_DRAFT_TOKENS  # that a step guesses at most for a row

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "slots": Range(),
                "segment": Range(1),
                "prefill_chunk": Range(1),
                "cache_tokens": Range(),
                "page_size": Range(off="the default"),
                "cache_dtype": ("", *CACHE_DTYPES),
                "param_dtype": ("", *PARAM_DTYPES),
                "drafts": DRAFTS,
            },
        )
        if self.draft_tokens not in Range(1, whole=True):
            raise UserError(
                f"draft_tokens={self.draft_tokens!r}: must be a whole number, at least 1; "
                "drafts='' turns them off"
            )

    @property
    def draft_lengths(self) -> tuple[int, ...]:
        """Values of Decoder.draft_tokens that sampling may use, ascending; none without drafts."""
        return draft_lengths.list_lengths(self.draft_tokens) if self.drafts else ()

    def get_max_sequence_tokens(self, mesh: Mesh) -> int:
        """Returns the tokens that a sequence may have: each row shard must hold at least one."""
        if not self.cache_tokens:
            return sys.maxsize
        return self.cache_tokens // mesh_lib.count_row_shards(mesh)


def get_min_rows(mesh: Mesh) -> int:
    """Returns the fewest rows that decode together: one in each row shard; on GPUs two, because XLA
    writes all terms of a single row's products to memory: 1.4 times the bytes of two rows."""
    return mesh_lib.count_row_shards(mesh) * (2 if mesh_lib.is_on_gpu(mesh) else 1)


def choose_cache_backend(mesh: Mesh, config: Config) -> str:
    """Returns the platform's cache: pages and the kernel that reads them, or slabs on CPUs."""
    if mesh.devices.flat[0].platform == "tpu":
        return "ragged" if config.head_dim % 128 == 0 else "plain"
    return "gpu" if mesh_lib.is_on_gpu(mesh) else "slabs"


def make_cache_shape(
    options: RolloutOptions, config: Config, mesh: Mesh, dtype: str, count: int, max_length: int
) -> CacheShape:
    """Returns the cache for `count` sequences of at most `max_length` tokens on a decoding mesh.

    Raises:
      UserError: if it cannot hold one sequence, or the kernel does not take such pages.
    """
    shards, least = mesh_lib.count_row_shards(mesh), get_min_rows(mesh)
    backend = options.cache_backend or choose_cache_backend(mesh, config)
    dtype = options.cache_dtype or dtype
    max_length = options.max_length or max_length
    if (capacity := options.get_max_sequence_tokens(mesh)) < max_length:
        raise UserError(
            f"cache_tokens={options.cache_tokens}: leaves {capacity} tokens for a sequence, which "
            f"may have {max_length}"
        )
    tokens = options.cache_tokens or (options.slots or count) * max_length
    rows = min(options.slots or OVERSUBSCRIPTION * tokens // max_length, count)
    page = max_length if backend == "slabs" else options.page_size or DEFAULT_PAGE_SIZE
    if options.drafts and options.draft_tokens > page:
        raise UserError(
            f"draft_tokens={options.draft_tokens}: at most the {page} tokens of a page of the cache"
        )
    if backend == "slabs":
        if jnp.dtype(dtype).itemsize == 1 and dtype != "int8":
            raise UserError(f"cache_dtype={dtype}: needs a paged cache; on CPUs take int8")
        rows = max(least, min(-(-rows // least) * least, tokens // max_length // least * least))
        return CacheShape(backend, dtype, rows, shards, rows // shards, max_length, 1)
    rows = max(1, -(-rows // least)) * least
    columns = -(-max_length // page)
    num_pages = max(columns, min(tokens // (shards * page), rows // shards * columns))
    field = f"page_size={page}" + (f", cache_dtype={dtype}" if options.cache_dtype else "")
    if backend != "plain":
        pages.check_page_size(page, config, mesh.shape["tensor"], jnp.dtype(dtype), backend, field)
        pages.check_table_size(rows // shards, columns, backend, field)
    return CacheShape(backend, dtype, rows, shards, num_pages, page, columns)


def get_shrunk_rows(shape: CacheShape) -> int:
    """Returns the rows that the last sequences decode on with (slabs only); 0: all rows."""
    shrunk = -(-(shape.rows // shape.shards) // SHRINK_DIVISOR) * shape.shards
    return shrunk if shape.backend == "slabs" and shrunk < shape.rows else 0


def get_segment_tokens(options: RolloutOptions, shape: CacheShape) -> int:
    """Returns the tokens that a row may add in one segment: one a step, with drafts more. Slabs
    take fewer: each step reads the whole buffer of what the segment has added."""
    tokens = min(options.segment, 32) if shape.backend == "slabs" else options.segment
    return 2 * tokens if options.drafts else tokens


def get_line_sizes(options: RolloutOptions, shape: CacheShape) -> tuple[int, ...]:
    """Returns the token counts that a line of prompts may have: a large one and, for few tokens, a
    small one."""
    # A CPU takes 128 tokens in about the time of 64 in two lines: it reads the weights once.
    most = min(options.prefill_chunk, 128) if shape.backend == "slabs" else options.prefill_chunk
    return tuple(sorted({max(min(most, 32), most // 8), most}))
