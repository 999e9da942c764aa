"""How sequences are sampled, and the shape of the cache that follows from it."""

import dataclasses
import sys

import jax.numpy as jnp
from jax.sharding import Mesh

from distill.policy.policy import DTYPES, PARAM_DTYPES
from distill.rollout.decode import CacheShape, get_min_rows
from distill.runtime import mesh as mesh_lib
from models.config import Config
from models.errors import UserError
from models.layers import pages

CACHE_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")
DEFAULT_PAGE_SIZE = 128  # tokens
SHRINK_DIVISOR = 4  # of slabs: the part of the rows that the last sequences decode on with
OVERSUBSCRIPTION = (
    3  # times the longest sequences that a pool holds: how many sequences decode from it
)


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """Nothing here changes what is drawn."""

    slots: int = 0  # rows that decode together, rounded up to what the mesh divides; 0: see CROWD
    max_length: int = 0  # tokens of prompt and response that a sequence may have; 0: as at hand
    segment: int = 64  # steps at most between two looks of the host
    prefill_chunk: int = 512  # tokens of prompts that each part of the rows reads in one call
    cache_tokens: int = 0  # that the cache holds in all; 0: as many as `slots` sequences may have
    page_size: int = 0  # tokens of a page; 0: PAGE
    cache_dtype: str = ""  # of CACHE_DTYPES; "": that of the model
    param_dtype: str = ""  # of the weights, see decode.weights
    gather_weights: bool = True
    cache_backend: str = ""  # of CacheShape.kind; "": what the platform prefers
    stacked: bool | None = None  # weights, over layers; None: what the platform prefers

    def __post_init__(self) -> None:
        for name, least in (
            ("slots", 0),
            ("segment", 1),
            ("prefill_chunk", 1),
            ("cache_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be {least} or more")
        if self.page_size < 0:
            raise UserError(f"page_size={self.page_size}: must be 0 (the default) or more")
        for name, known in (("cache_dtype", CACHE_DTYPES), ("param_dtype", PARAM_DTYPES)):
            if (value := getattr(self, name)) not in ("", *known):
                raise UserError(f"{name}={value!r}: must be {', '.join(known)} or empty")

    def get_max_sequence_tokens(self, mesh: Mesh) -> int:
        """The tokens that a sequence may have: each part of the rows must hold at least one."""
        return (
            self.cache_tokens // mesh_lib.count_row_shards(mesh)
            if self.cache_tokens
            else sys.maxsize
        )


def choose_cache_backend(mesh: Mesh, config: Config) -> str:
    """The kind of cache for a platform: pages, read by its kernel; on CPUs slabs."""
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return "ragged" if config.head_dim % 128 == 0 else "plain"
    return "gpu" if mesh_lib.is_on_gpu(mesh) else "slabs"


def make_cache_shape(
    options: RolloutOptions, config: Config, mesh: Mesh, dtype: str, count: int, max_length: int
) -> CacheShape:
    """The cache for `count` sequences of at most `longest` tokens, on the mesh that decodes.

    Raises:
      UserError: if it cannot hold one, or the kernel does not take such pages.
    """
    shards, least = mesh_lib.count_row_shards(mesh), get_min_rows(mesh)
    backend, dtype = (
        options.cache_backend or choose_cache_backend(mesh, config),
        options.cache_dtype or dtype,
    )
    max_length = options.max_length or max_length
    if options.get_max_sequence_tokens(mesh) < max_length:
        raise UserError(
            f"cache_tokens={options.cache_tokens}: leaves "
            f"{options.get_max_sequence_tokens(mesh)} tokens for a "
            f"sequence, which may have {max_length}"
        )
    tokens = options.cache_tokens or (options.slots or count) * max_length
    rows = min(options.slots or OVERSUBSCRIPTION * tokens // max_length, count)
    if backend == "slabs":
        if jnp.dtype(dtype).itemsize == 1 and dtype != "int8":
            raise UserError(f"cache_dtype={dtype}: is of pages; slabs, on CPUs, take int8")
        rows = max(least, min(-(-rows // least) * least, tokens // max_length // least * least))
        return CacheShape(backend, dtype, rows, shards, rows // shards, max_length, 1)
    page = options.page_size or DEFAULT_PAGE_SIZE
    rows = max(1, -(-rows // least)) * least
    columns = -(-max_length // page)
    num_pages = max(columns, min(tokens // (shards * page), rows // shards * columns))
    field = (
        f"page_size={page}" if not options.cache_dtype else f"page_size={page}, cache_dtype={dtype}"
    )
    if backend != "plain":
        pages.check_page_size(page, config, mesh.shape["tensor"], jnp.dtype(dtype), backend, field)
        pages.check_table_size(rows // shards, columns, backend, field)
    return CacheShape(backend, dtype, rows, shards, num_pages, page, columns)


def get_shrunk_rows(shape: CacheShape) -> int:
    """Of slabs: the rows that the last sequences decode on with, once they are enough; 0: all."""
    shrunk = -(-(shape.rows // shape.shards) // SHRINK_DIVISOR) * shape.shards
    return shrunk if shape.backend == "slabs" and shrunk < shape.rows else 0


def get_segment_steps(options: RolloutOptions, shape: CacheShape) -> int:
    """Decoding steps at most in one segment. Of slabs fewer: each step reads the whole buffer of
    what the segment has added."""
    return min(options.segment, 32) if shape.backend == "slabs" else options.segment


def get_line_sizes(options: RolloutOptions, shape: CacheShape) -> tuple[int, ...]:
    """Tokens of a line of prompts: many at once, or few where few are waiting."""
    # A CPU takes 128 tokens in about the time of 64 in two lines: it reads the weights once.
    most = min(options.prefill_chunk, 128) if shape.backend == "slabs" else options.prefill_chunk
    return tuple(sorted({max(min(most, 32), most // 8), most}))
