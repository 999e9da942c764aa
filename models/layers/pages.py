"""Keys and values in pages: one pool for all rows and layers, and a table of each row's pages.

A page holds a fixed number of consecutive tokens of one row in one layer; a row's pages may be
anywhere. Page p of a layer is page layer · P + p of the pool, so the pool is one array, updated in
place. The mesh axes that split rows also split the pool: each shard has its own P pages per layer,
and ids in tables are local to it. The host allocates pages; the code here only uses their ids.

Letters in names: X shards of rows, L layers, P pages of a layer in a shard, R rows of the table,
N pages that a row may have (for heads: query heads), B lines of T tokens, K key/value heads, H head
dim, C pages to copy.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.config import Config
from models.errors import UserError
from models.layers import paged_attention, sharded

_VMEM_BYTES = 2**25  # bytes of a TPU's fast memory for two pages
_SMEM_BYTES = 2**20 - 2**15
BACKENDS = {"tpu": "ragged", "gpu": "gpu", "cuda": "gpu"}  # by platform; "plain" on others


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The pool, and the places of one call's tokens in it.

    Backend "ragged" is for JAX's TPU kernel: one array [X, L·P, page, 2K, H], with each head's keys
    before its values. "gpu" and "plain" have two, [X, K, L·P, page, H], except that the keys of
    "plain" are [X, K, L·P, H, page]; if they are int8, there are float32 scales of each token and
    head, [X, K, L·P, page].

    Fields set by `bind_tokens` are None before it. Tokens have one of two shapes: [R, T], the next
    of each row, or [X, T], one line per shard of concatenated chunks of several rows, in the order
    of the table's rows.
    """

    pools: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    num_layers: int = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(metadata={"static": True})
    table_RN: jax.Array | None = None  # int32: ids of a row's pages; negative: none
    length_R: jax.Array | None = None  # int32: tokens including this call's; 0: unused row
    starts_XR: jax.Array | None = None  # int32 [X, R/X + 1]: starts of chunks in their line
    row_BT: jax.Array | None = None  # int32: the token's row in the shard's table; -1: padding
    position_BT: jax.Array | None = None  # int32

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pools[-1].shape[2 if self.backend == "ragged" else 3]

    @property
    def num_pages(self) -> int:
        """P: pages of a layer in a shard."""
        return self.pools[0].shape[1 if self.backend == "ragged" else 2] // self.num_layers

    def bind_tokens(
        self,
        table_RN: jax.Array,
        length_R: jax.Array,
        starts_XR: jax.Array,
        row_BT: jax.Array,
        position_BT: jax.Array,
    ) -> "Pages":
        """Sets one call's tokens and the pages of their rows; see the fields.

        In a shard's table, rows with tokens in the line must come before rows without.
        """
        return dataclasses.replace(
            self,
            table_RN=table_RN,
            length_R=length_R,
            starts_XR=starts_XR,
            row_BT=row_BT,
            position_BT=position_BT,
        )

    def bind_next_tokens(self, table_RN: jax.Array, length_R: jax.Array) -> "Pages":
        """Calls `bind_tokens` for the next token of each row, tokens [R, 1]; length 0: none.

        Rows after the last one of a shard that has a token are not read.
        """
        X, R = self.pools[0].shape[0], len(length_R)
        row_R = jnp.where(length_R > 0, jnp.arange(R, dtype=jnp.int32) % (R // X), -1)
        at_R = jnp.arange(R // X + 1, dtype=jnp.int32)
        last_X = jnp.max(jnp.where(length_R.reshape(X, -1) > 0, at_R[1:], 0), axis=1)
        starts_XR = jnp.minimum(at_R[None], last_X[:, None])
        return self.bind_tokens(
            table_RN, length_R, starts_XR, row_R[:, None], length_R[:, None] - 1
        )

    def bind_drafts(
        self, table_RN: jax.Array, length_R: jax.Array, count_R: jax.Array, T: int
    ) -> "Pages":
        """Calls `bind_tokens` for the next token of each row and drafts after it, tokens [R, T]:
        the last count_R of T; the others are padding. length_R counts all of them; 0: none.

        Padding comes first, so that no kernel reads beyond a row's last token.
        """
        bound = self.bind_next_tokens(table_RN, length_R)
        assert bound.row_BT is not None and bound.starts_XR is not None
        at_T = jnp.arange(T, dtype=jnp.int32)[None]
        row_RT = jnp.where(at_T >= T - count_R[:, None], bound.row_BT, -1)
        position_RT = length_R[:, None] - T + at_T
        return self.bind_tokens(table_RN, length_R, bound.starts_XR * T, row_RT, position_RT)

    def begin_segment(self, length_B: jax.Array, steps: int) -> "Pages":
        """Begins a segment of at most `steps` decoding steps; pages need no preparation."""
        del length_B, steps
        return self

    def end_segment(self, count_B: jax.Array) -> "Pages":
        """Ends a segment that added count_B tokens to each row; they are already in place."""
        del count_B
        return self

    def unbind_tokens(self) -> "Pages":
        """Clears the fields set by `bind_tokens`."""
        return Pages(self.pools, self.scales, self.num_layers, self.backend)

    def write_and_attend(
        self, layer: Any, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
    ) -> tuple[jax.Array, "Pages"]:
        """Calls `write_tokens`, then `attend`; returns [B, T, N, H] and the updated pool."""
        written = self.write_tokens(layer, k_BTKH, v_BTKH)
        return written.attend(layer, q_BTNH), written

    def write_tokens(self, layer: Any, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Pages":
        """Stores the tokens' keys and values of one layer, in place if the pool is donated.

        Pages are reused without being cleared, and a weight of 0 does not mask a NaN. So a token
        whose values are not finite is stored with values of 0 and keys of NaN: tokens that attend
        to it get NaN, and those that merely read its page do not.
        """
        bad_BTK1 = ~jnp.all(jnp.isfinite(v_BTKH), axis=-1, keepdims=True)
        k_BTKH = jnp.where(bad_BTK1, jnp.nan, k_BTKH)
        v_BTKH = jnp.where(bad_BTK1, 0, v_BTKH)
        new = paged_attention.to_pool_format(k_BTKH, v_BTKH, self.pools[0].dtype, self.backend)

        def write_local(pools: Any, table_RN: Any, row_BT: Any, position_BT: Any, new: Any) -> Any:
            row_T, position_T = row_BT.reshape(-1), position_BT.reshape(-1)
            page_T = table_RN[jnp.maximum(row_T, 0), jnp.maximum(position_T, 0) // self.page_size]
            # Indices past the end are dropped. They differ, because the scatter is promised unique
            # indices.
            none_T = self.num_layers * self.num_pages + jnp.arange(len(row_T), dtype=jnp.int32)
            page_T = jnp.where((row_T < 0) | (page_T < 0), none_T, page_T + layer * self.num_pages)
            offset_T = position_T % self.page_size
            transposed = (self.backend == "plain", *(False for _ in new[1:]))
            return tuple(
                self._scatter_tokens(into, page_T, offset_T, x, is_transposed)
                for into, x, is_transposed in zip(pools, new, transposed, strict=True)
            )

        written = self._map_shards(
            write_local,
            (
                self._get_array_axes(),
                _ROW_AXES,
                _ROW_AXES,
                _ROW_AXES,
                tuple(_HEAD_AXES for _ in new),
            ),
            self._get_array_axes(),
        )(self._get_arrays(), self.table_RN, self.row_BT, self.position_BT, new)
        return self._replace_arrays(written)

    def _scatter_tokens(
        self, array: Any, page_T: Any, offset_T: Any, x: jax.Array, transposed: bool
    ) -> Any:
        """Writes tokens [B, T, heads, ...] to their places in one array of a shard, [1, ...]."""
        x = x.reshape(-1, *x.shape[2:])
        options: Any = {"mode": "drop", "unique_indices": True}
        if self.backend == "ragged":
            return array.at[0, page_T, offset_T].set(x, **options)
        if transposed:
            return array.at[0, :, page_T, :, offset_T].set(x, **options)
        return array.at[0, :, page_T, offset_T].set(x, **options)

    def attend(self, layer: Any, q_BTNH: jax.Array) -> jax.Array:
        """Attends each token to its row's tokens up to itself, all written; padding gets 0."""

        def attend_local(pools: Any, index: Any, q_BTNH: Any) -> Any:
            table_RN, length_R, starts_XR, row_BT, position_BT = index
            table_RN = jnp.maximum(table_RN, 0) + layer * self.num_pages
            pools = tuple(x.reshape(x.shape[1:]) for x in pools)
            out_BTNH = paged_attention.TABLE[self.backend](
                q_BTNH, pools, table_RN, length_R, starts_XR[0], row_BT, position_BT
            )
            return jnp.where(row_BT[:, :, None, None] >= 0, out_BTNH, 0)

        index = (self.table_RN, self.length_R, self.starts_XR, self.row_BT, self.position_BT)
        return self._map_shards(
            attend_local, (self._get_array_axes(), (_ROW_AXES,) * 5, _HEAD_AXES), _HEAD_AXES
        )(self._get_arrays(), index, q_BTNH)

    def copy_pages(self, source_XC: jax.Array, target_XC: jax.Array) -> "Pages":
        """Copies page source_XC[x, c] of shard x to page target_XC[x, c], in every layer, in place.

        Negative ids are skipped. No page may be both a source and a target. Pages are copied one by
        one, because TPU compilers copy the whole pool for a scatter of pages.
        """
        axis = 1 if self.backend == "ragged" else 2

        def copy_local(pools: Any, source_XC: Any, target_XC: Any) -> Any:
            none_C = (source_XC[0] < 0) | (target_XC[0] < 0)
            source_C, target_C = (jnp.where(none_C, 0, x[0]) for x in (source_XC, target_XC))

            def copy_page(c: Any, pools: Any) -> Any:
                pages = (jax.lax.dynamic_slice_in_dim(x, source_C[c], 1, axis + 1) for x in pools)
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(x, page, target_C[c], axis + 1)
                    for x, page in zip(pools, pages, strict=True)
                )

            split = tuple(
                x.reshape(*x.shape[:axis], self.num_layers, self.num_pages, *x.shape[axis + 1 :])
                for x in pools
            )
            count = jnp.max(jnp.where(none_C, 0, jnp.arange(1, len(source_C) + 1)))
            split = jax.lax.fori_loop(0, count, copy_page, split)
            return tuple(x.reshape(old.shape) for x, old in zip(split, pools, strict=True))

        copied = self._map_shards(
            copy_local, (self._get_array_axes(), _ROW_AXES, _ROW_AXES), self._get_array_axes()
        )(self._get_arrays(), source_XC, target_XC)
        return self._replace_arrays(copied)

    def _get_arrays(self) -> tuple[jax.Array, ...]:
        return (*self.pools, *self.scales)

    def _replace_arrays(self, arrays: tuple[jax.Array, ...]) -> "Pages":
        count = len(self.pools)
        return dataclasses.replace(self, pools=arrays[:count], scales=arrays[count:])

    def _get_array_axes(self) -> tuple[tuple[str | None, ...], ...]:
        return tuple(_get_pool_axes(self.backend, x.ndim) for x in self._get_arrays())

    def _map_shards(
        self, local: Callable[..., Any], in_axes: Any, out_axes: Any
    ) -> Callable[..., Any]:
        """Maps `local` over each device's own rows and heads, because kernels are opaque to the
        partitioner and ids are local."""
        if not sharded.get_mesh_axes("batch"):  # no mesh, or no rules for logical names
            return local
        return jax.shard_map(
            local,
            in_specs=_to_partition_specs(in_axes),
            out_specs=_to_partition_specs(out_axes),
            check_vma=False,
        )


_ROW_AXES = ("batch",)
_HEAD_AXES = ("batch", None, "act_heads")


def _get_pool_axes(backend: str, ndim: int) -> tuple[str | None, ...]:
    """Returns the logical axis names of a pool or of its scales."""
    named = {0: "batch", 3 if backend == "ragged" else 1: "act_heads"}
    return tuple(named.get(i) for i in range(ndim))


def _to_partition_specs(names: Any) -> Any:
    """Converts tuples of logical names, which may be nested in tuples, to PartitionSpecs."""
    if all(name is None or isinstance(name, str) for name in names):
        return PartitionSpec(*(name and sharded.get_mesh_axes(name) for name in names))
    return tuple(_to_partition_specs(n) for n in names)


def init_pages(
    config: Config, num_shards: int, num_pages: int, page_size: int, dtype: jnp.dtype, backend: str
) -> Pages:
    """Makes an empty pool of `num_pages` pages per layer in each of `num_shards` shards.

    `num_shards` is the number of parts that the mesh splits rows into. `dtype`, of keys and values,
    is floating point or has 8 bits.
    """
    L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    if backend == "ragged":
        shapes = [((num_shards, L * num_pages, page_size, 2 * K, H), dtype)]
    else:
        last = [(H, page_size) if backend == "plain" else (page_size, H), (page_size, H)]
        shapes = [((num_shards, K, L * num_pages, *dims), dtype) for dims in last]
    scale_shapes = [
        ((num_shards, K, L * num_pages, page_size), jnp.float32)
        for _ in shapes
        if dtype == jnp.int8
    ]
    pools, scales = (
        tuple(_constrain_sharding(jnp.zeros(*shape_dtype), backend) for shape_dtype in group)
        for group in (shapes, scale_shapes)
    )
    return Pages(pools, scales, L, backend)


def _constrain_sharding(x: jax.Array, backend: str) -> jax.Array:
    if not sharded.get_mesh_axes("batch"):
        return x
    return jax.lax.with_sharding_constraint(x, _to_partition_specs(_get_pool_axes(backend, x.ndim)))


def check_page_size(
    page_size: int, config: Config, tensor: int, dtype: jnp.dtype, backend: str, field: str
) -> None:
    """Raises UserError, naming `field`, if the backend's kernel cannot read such pages where
    `tensor` devices share the heads."""
    K, H = config.num_key_value_heads // tensor, config.head_dim
    obstacles = {"a page holds at least one token": page_size < 1}
    if backend == "ragged":
        # Keys and values are interleaved, in 32-bit words that must fill whole tiles.
        words, rest = divmod(2 * K * dtype.itemsize, 4)
        tiled = not rest and (words in (1, 2, 4) or words % 8 == 0)
        obstacles |= {
            f"the kernel for TPU takes no head_dim={H}, only 128": H != 128,
            "the kernel for TPU takes no int8, which needs a scale for each token; "
            "float8_e4m3fn does without": dtype == jnp.int8,
            f"the kernel for TPU takes no {K} key/value heads a device in {dtype.name}": not tiled,
            f"pages of {page_size} tokens do not fit a TPU's fast memory": 8 * page_size * words * H
            > _VMEM_BYTES,
        }
    elif backend == "gpu":
        obstacles |= {
            f"the GPU kernel takes pages of 16, 32, 64 or 128 tokens, not {page_size}": page_size
            not in (16, 32, 64, 128),
            f"the kernel for GPU takes no head_dim={H}": H < 16 or H & (H - 1) > 0,
            f"pages for GPU are not of {dtype.name}; int8 has 8 bits, too": dtype.itemsize == 1
            and dtype != jnp.int8,
        }
    for reason, applies in obstacles.items():
        if applies:
            raise UserError(f"{field}: {reason}")


def check_table_size(rows: int, columns: int, backend: str, field: str) -> None:
    """Raises UserError, naming `field`, if a table of `rows` rows per shard is too large for TPU's
    kernel, which keeps it in scalar memory: 1 MiB, in lines of 128."""
    if backend == "ragged" and 4 * rows * (-(-columns // 128) * 128) > _SMEM_BYTES:
        raise UserError(
            f"{field}: a table of {rows} rows x {columns} pages is too large for the kernel for "
            "TPU; use longer pages"
        )


def count_token_bytes(config: Config, tensor: int, dtype: jnp.dtype) -> int:
    """Counts the bytes of a token's keys and values on each of `tensor` devices sharing heads."""
    scale = 4 if dtype == jnp.int8 else 0
    heads = config.num_hidden_layers * config.num_key_value_heads // tensor
    return 2 * heads * (config.head_dim * dtype.itemsize + scale)


def count_read_bytes(
    lengths: Iterable[int], page_size: int, columns: int, bytes_per_token: int, backend: str
) -> int:
    """Counts the bytes that a decoding step reads from a device's pool.

    Args:
      lengths: tokens of each row, including the newest.
      page_size, columns: tokens per page, and pages per row of the table.
      bytes_per_token: see `count_token_bytes`.
      backend: a backend of `Pages`.

    Kernels fetch several pages at a time, even at the end of a row. For a finished row (length 0)
    before one that continues, TPU's kernel reads as much as for one token.
    """
    tokens_per_fetch = page_size * paged_attention.count_pages_per_fetch(
        backend, page_size, columns, decoding=True
    )
    if backend == "ragged":
        lengths = [max(1, n) for n in lengths]
    return bytes_per_token * sum(-(-n // tokens_per_fetch) * tokens_per_fetch for n in lengths)
