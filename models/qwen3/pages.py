"""Keys and values in pages: one pool for all rows and layers, and a table that says whose is what.

A page holds `page` consecutive tokens of one row in one layer; the pages of a row lie anywhere.
Page p of a layer is page layer · P + p of the pool, which therefore is one array, written in place.
The mesh axes that split the rows split the pool as well: each part has P pages a layer of its own,
and ids in tables are local to it. Who gets which page is the host's affair; here is what a program
does with the ids.

Letters in names: X parts that rows are split in, L layers, P pages of a layer in a part, R rows of
the table, N pages that a row may have (of heads: query heads), B lines of T tokens, K key/value
heads, H head dim, C pages to copy.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.errors import UserError
from models.qwen3 import paged_attention, sharded
from models.qwen3.config import Config

_FAST = 2**25  # bytes of a TPU's fast memory for two pages
_SCALARS = 2**20 - 2**15
KINDS = {"tpu": "ragged", "gpu": "gpu", "cuda": "gpu"}  # by platform; of others "plain"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The pool, and where the tokens of one call of a program are in it.

    Kind "ragged" is what jax's kernel for TPU reads: one array [X, L·P, page, 2K, H], the head of
    keys before that of values. "gpu" and "plain" have two, [X, K, L·P, page, H], "plain" its keys
    as [X, K, L·P, H, page]; where these are int8, there is a float32 scale for each token and head,
    [X, K, L·P, page].

    What comes by `at` is None before. Tokens come in one of two forms: [R, 1], the next of each
    row, or [X, T], in each part one line of chunks of several rows, one behind the other in the
    order of the table's rows.
    """

    pools: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    layers: int = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    table_RN: jax.Array | None = None  # int32: ids of a row's pages; below 0: none
    length_R: jax.Array | None = None  # int32: tokens once this call's are written; 0: no row
    starts_XR: jax.Array | None = None  # int32 [X, R/X + 1]: where chunks begin in their line
    row_BT: jax.Array | None = None  # int32: whose token, a row of the part's table; -1: padding
    position_BT: jax.Array | None = None  # int32

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.pools[-1].shape[2 if self.kind == "ragged" else 3]

    @property
    def pages(self) -> int:
        """P: pages of a layer in a part."""
        return self.pools[0].shape[1 if self.kind == "ragged" else 2] // self.layers

    def at(
        self,
        table_RN: jax.Array,
        length_R: jax.Array,
        starts_XR: jax.Array,
        row_BT: jax.Array,
        position_BT: jax.Array,
    ) -> "Pages":
        """For one call: which tokens it brings, and where their rows' pages are.

        Rows of a part's table that have tokens in a line come before those that have none.
        """
        return dataclasses.replace(
            self,
            table_RN=table_RN,
            length_R=length_R,
            starts_XR=starts_XR,
            row_BT=row_BT,
            position_BT=position_BT,
        )

    def step(self, table_RN: jax.Array, length_R: jax.Array) -> "Pages":
        """`at` for the next token of each row, tokens [R, 1]; length 0: none of this row. Of rows
        behind the last of a part that has one nothing is read."""
        X, R = self.pools[0].shape[0], len(length_R)
        row_R = jnp.where(length_R > 0, jnp.arange(R, dtype=jnp.int32) % (R // X), -1)
        at_R = jnp.arange(R // X + 1, dtype=jnp.int32)
        last_X = jnp.max(jnp.where(length_R.reshape(X, -1) > 0, at_R[1:], 0), axis=1)
        starts_XR = jnp.minimum(at_R[None], last_X[:, None])
        return self.at(table_RN, length_R, starts_XR, row_R[:, None], length_R[:, None] - 1)

    def begin(self, length_B: jax.Array, steps: int) -> "Pages":
        """For a segment of at most `steps` calls of `step`: nothing is to be prepared."""
        del length_B, steps
        return self

    def end(self, count_B: jax.Array) -> "Pages":
        """Ends a segment that brought each row so many tokens: they are in place."""
        del count_B
        return self

    def bare(self) -> "Pages":
        """Without what `at` said."""
        return Pages(self.pools, self.scales, self.layers, self.kind)

    def update(
        self, layer: Any, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
    ) -> tuple[jax.Array, "Pages"]:
        """`write`, and then `attend`: [B, T, N, H], and the pool with the tokens in it."""
        written = self.write(layer, k_BTKH, v_BTKH)
        return written.attend(layer, q_BTNH), written

    def write(self, layer: Any, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Pages":
        """Stores the tokens' keys and values of one layer, in place where the pool is donated.

        Pages are used again without being cleared, and a weight of 0 does not silence a NaN: a
        token whose values are not finite has values of 0 and keys of NaN. Who attends to it still
        gets NaN; who only has its page does not.
        """
        bad_BTK1 = ~jnp.all(jnp.isfinite(v_BTKH), axis=-1, keepdims=True)
        k_BTKH = jnp.where(bad_BTK1, jnp.nan, k_BTKH)
        v_BTKH = jnp.where(bad_BTK1, 0, v_BTKH)
        new = paged_attention.stored(k_BTKH, v_BTKH, self.pools[0].dtype, self.kind)

        def local(pools: Any, table_RN: Any, row_BT: Any, position_BT: Any, new: Any) -> Any:
            row_T, position_T = row_BT.reshape(-1), position_BT.reshape(-1)
            page_T = table_RN[jnp.maximum(row_T, 0), jnp.maximum(position_T, 0) // self.page]
            # Past the end: dropped. Each at its own place, for the scatter is told there are no two
            # of one.
            none_T = self.layers * self.pages + jnp.arange(len(row_T), dtype=jnp.int32)
            page_T = jnp.where((row_T < 0) | (page_T < 0), none_T, page_T + layer * self.pages)
            offset_T = position_T % self.page
            turned = (self.kind == "plain", *(False for _ in new[1:]))
            return tuple(
                self._put(into, page_T, offset_T, x, keys)
                for into, x, keys in zip(pools, new, turned, strict=True)
            )

        written = self._per_part(
            local,
            (self._specs(), _ROWS, _ROWS, _ROWS, tuple(_HEADS for _ in new)),
            self._specs(),
        )(self._arrays(), self.table_RN, self.row_BT, self.position_BT, new)
        return self._with(written)

    def _put(self, into: Any, page_T: Any, offset_T: Any, x: jax.Array, turned: bool) -> Any:
        """One array of a part, [1, ...], with tokens [B, T, heads, ...] at their places."""
        x = x.reshape(-1, *x.shape[2:])
        options: Any = {"mode": "drop", "unique_indices": True}
        if self.kind == "ragged":
            return into.at[0, page_T, offset_T].set(x, **options)
        if turned:
            return into.at[0, :, page_T, :, offset_T].set(x, **options)
        return into.at[0, :, page_T, offset_T].set(x, **options)

    def attend(self, layer: Any, q_BTNH: jax.Array) -> jax.Array:
        """Each token over its row's up to its own, which are written; padding gets 0."""

        def local(pools: Any, index: Any, q_BTNH: Any) -> Any:
            table_RN, length_R, starts_XR, row_BT, position_BT = index
            table_RN = jnp.maximum(table_RN, 0) + layer * self.pages
            pools = tuple(x.reshape(x.shape[1:]) for x in pools)
            out_BTNH = paged_attention.TABLE[self.kind](
                q_BTNH, pools, table_RN, length_R, starts_XR[0], row_BT, position_BT
            )
            return jnp.where(row_BT[:, :, None, None] >= 0, out_BTNH, 0)

        index = (self.table_RN, self.length_R, self.starts_XR, self.row_BT, self.position_BT)
        return self._per_part(local, (self._specs(), (_ROWS,) * 5, _HEADS), _HEADS)(
            self._arrays(), index, q_BTNH
        )

    def copy(self, source_XC: jax.Array, target_XC: jax.Array) -> "Pages":
        """With page target_XC[x, c] of part x as page source_XC[x, c] is, in every layer, in place;
        below 0: none. No target is a source, too.

        One page after the other: of a scatter of whole pages TPU compilers make a copy of the pool.
        """
        axis = 1 if self.kind == "ragged" else 2

        def local(pools: Any, source_XC: Any, target_XC: Any) -> Any:
            none_C = (source_XC[0] < 0) | (target_XC[0] < 0)
            source_C, target_C = (jnp.where(none_C, 0, x[0]) for x in (source_XC, target_XC))

            def one(c: Any, pools: Any) -> Any:
                pages = (jax.lax.dynamic_slice_in_dim(x, source_C[c], 1, axis + 1) for x in pools)
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(x, page, target_C[c], axis + 1)
                    for x, page in zip(pools, pages, strict=True)
                )

            split = tuple(
                x.reshape(*x.shape[:axis], self.layers, self.pages, *x.shape[axis + 1 :])
                for x in pools
            )
            behind = jnp.max(jnp.where(none_C, 0, jnp.arange(1, len(source_C) + 1)))
            split = jax.lax.fori_loop(0, behind, one, split)
            return tuple(x.reshape(old.shape) for x, old in zip(split, pools, strict=True))

        copied = self._per_part(local, (self._specs(), _ROWS, _ROWS), self._specs())(
            self._arrays(), source_XC, target_XC
        )
        return self._with(copied)

    def _arrays(self) -> tuple[jax.Array, ...]:
        return (*self.pools, *self.scales)

    def _with(self, arrays: tuple[jax.Array, ...]) -> "Pages":
        count = len(self.pools)
        return dataclasses.replace(self, pools=arrays[:count], scales=arrays[count:])

    def _specs(self) -> tuple[tuple[str | None, ...], ...]:
        return tuple(_names(self.kind, x.ndim) for x in self._arrays())

    def _per_part(self, local: Callable[..., Any], names: Any, out: Any) -> Callable[..., Any]:
        """`local` on each device's own rows and heads: a kernel is opaque to the partitioner, and
        ids are local."""
        if not sharded.axes("batch"):  # no mesh, or no rules that give it a meaning
            return local
        return jax.shard_map(
            local, in_specs=_partition(names), out_specs=_partition(out), check_vma=False
        )


_ROWS = ("batch",)
_HEADS = ("batch", None, "act_heads")


def _names(kind: str, dims: int) -> tuple[str | None, ...]:
    """The logical names of the axes of a pool, or of its scales."""
    named = {0: "batch", 3 if kind == "ragged" else 1: "act_heads"}
    return tuple(named.get(i) for i in range(dims))


def _partition(names: Any) -> Any:
    """Tuples of logical names as PartitionSpecs; of tuples of these, all of them."""
    if all(name is None or isinstance(name, str) for name in names):
        return PartitionSpec(*(name and sharded.axes(name) for name in names))
    return tuple(_partition(n) for n in names)


def init_pages(
    config: Config, parts: int, pages: int, page: int, dtype: jnp.dtype, kind: str
) -> Pages:
    """An empty pool of `pages` pages a layer in each of `parts` parts, which is how many the mesh
    splits rows in.

    dtype: of keys and values: one of 8 bits, or floating point.
    """
    L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    if kind == "ragged":
        shapes = [((parts, L * pages, page, 2 * K, H), dtype)]
    else:
        last = [(H, page) if kind == "plain" else (page, H), (page, H)]
        shapes = [((parts, K, L * pages, *of), dtype) for of in last]
    scaled = [((parts, K, L * pages, page), jnp.float32) for _ in shapes if dtype == jnp.int8]
    pools, scales = (
        tuple(_constrained(jnp.zeros(*of), kind) for of in some) for some in (shapes, scaled)
    )
    return Pages(pools, scales, L, kind)


def _constrained(x: jax.Array, kind: str) -> jax.Array:
    if not sharded.axes("batch"):
        return x
    return jax.lax.with_sharding_constraint(x, _partition(_names(kind, x.ndim)))


def check_page(
    page: int, config: Config, tensor: int, dtype: jnp.dtype, kind: str, field: str
) -> None:
    """Raises UserError, naming `field`, if such pages cannot be read where `tensor` devices share
    the heads."""
    K, H = config.num_key_value_heads // tensor, config.head_dim
    cannot = {"a page holds at least one token": page < 1}
    if kind == "ragged":
        # Keys and values lie beside each other, in words of 32 bits and these in whole tiles.
        words, rest = divmod(2 * K * dtype.itemsize, 4)
        tiled = not rest and (words in (1, 2, 4) or words % 8 == 0)
        cannot |= {
            f"the kernel for TPU takes no head_dim={H}, only 128": H != 128,
            "the kernel for TPU takes no int8, which needs a scale for each token; "
            "float8_e4m3fn does without": dtype == jnp.int8,
            f"the kernel for TPU takes no {K} key/value heads a device in {dtype.name}": not tiled,
            f"pages of {page} tokens do not fit a TPU's fast memory": 8 * page * words * H > _FAST,
        }
    elif kind == "gpu":
        cannot |= {
            f"the kernel for GPU takes pages of 16, 32, 64 or 128 tokens, not {page}": page
            not in (16, 32, 64, 128),
            f"the kernel for GPU takes no head_dim={H}": H < 16 or H & (H - 1) > 0,
            f"pages for GPU are not of {dtype.name}; int8 has 8 bits, too": dtype.itemsize == 1
            and dtype != jnp.int8,
        }
    for reason, true in cannot.items():
        if true:
            raise UserError(f"{field}: {reason}")


def check_table(rows: int, columns: int, kind: str, field: str) -> None:
    """Raises UserError, naming `field`, if the kernel for TPU has no room for a table of so many
    rows a part: it holds it in its memory for scalars, 1 MiB, in lines of 128."""
    if kind == "ragged" and 4 * rows * (-(-columns // 128) * 128) > _SCALARS:
        raise UserError(
            f"{field}: a table of {rows} rows x {columns} pages is too large for the kernel for "
            "TPU; take longer pages"
        )


def token_bytes(config: Config, tensor: int, dtype: jnp.dtype) -> int:
    """What the keys and values of one token take on each of the devices that share the heads."""
    scale = 4 if dtype == jnp.int8 else 0
    heads = config.num_hidden_layers * config.num_key_value_heads // tensor
    return 2 * heads * (config.head_dim * dtype.itemsize + scale)


def read_bytes(lengths: Iterable[int], page: int, columns: int, token: int, kind: str) -> int:
    """What a decoding step reads of a device's pool, for rows of these lengths, their newest token
    included, under a table of `columns` pages a row; `token`: `token_bytes`.

    Kernels fetch several pages together, also where a row ends, and of a row that has ended (0)
    before one that goes on TPU's reads as much as of one token."""
    together = page * paged_attention.together(kind, page, columns, decoding=True)
    if kind == "ragged":
        lengths = [max(1, n) for n in lengths]
    return token * sum(-(-n // together) * together for n in lengths)
