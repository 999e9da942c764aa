"""Keys and values of tokens that were read before, as a ring of slots with one write pointer.

All rows write at the same slot, so that a step's write is one slice, not a scatter; a row's tokens
are the slots just before the pointer, as many as it has, and `valid_BS` says which they are. The
pointer goes round: what it writes over belongs to no row, as long as every row is shorter than the
ring. Only this file knows how the arrays are laid out.

Letters in names: B rows, T tokens, S slots, N query heads, K key/value heads, H head dim, L layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.qwen3.attention import softmax
from models.qwen3.config import Config

PIECE = 2**23  # bytes of keys that a device reads at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The slots, in one of two layouts.

    Stacked: arrays [L, S, K, B, H], what TPU compilers update in place inside a scan over layers:
    with slots inside rows, or heads inside rows, they copy the cache, and hold it twice. Per layer:
    tuples of L arrays, keys [B, K, H, S] and values [B, K, S, H], 1.5 to 3 times faster on CPU.
    Where keys and values are int8, each slot and head has a float32 scale: [L, S, K, B], or L of
    [B, K, S].
    """

    keys: Any
    values: Any
    key_scales: Any  # None unless int8
    value_scales: Any
    valid_BS: jax.Array  # bool: the slot holds a token of the row
    slot: jax.Array  # int32 scalar: where the next token goes, the same for every row

    @property
    def rows(self) -> int:
        return self.valid_BS.shape[0]

    @property
    def slots(self) -> int:
        return self.valid_BS.shape[1]

    def fill(self, filled_BT: jax.Array) -> "Cache":
        """Marks the next T slots as holding a token or not."""
        valid_BS = jax.lax.dynamic_update_slice_in_dim(self.valid_BS, filled_BT, self.slot, axis=1)
        return dataclasses.replace(self, valid_BS=valid_BS)

    def move(self, count: int) -> "Cache":
        """With the pointer `count` slots on."""
        return dataclasses.replace(self, slot=(self.slot + count) % self.slots)

    def write(self, layer: Any, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Cache":
        """Stores T tokens of one layer in the next slots, which must not reach round the end."""
        new = {"keys": k_BTKH, "values": v_BTKH}
        if self.key_scales is not None:
            new["keys"], new["key_scales"] = _quantise(k_BTKH)
            new["values"], new["value_scales"] = _quantise(v_BTKH)
        written = {}
        for name, x in new.items():
            into = getattr(self, name)
            if isinstance(into, tuple):
                x = x.transpose(_LAYERED[name]).astype(into[layer].dtype)
                axis = _LAYERED[name].index(1)
                x = jax.lax.dynamic_update_slice_in_dim(into[layer], x, self.slot, axis)
                written[name] = (*into[:layer], x, *into[layer + 1 :])
            else:
                x = x.transpose(1, 2, 0, *range(3, x.ndim))[None].astype(into.dtype)
                at = (layer, self.slot) + (0,) * (x.ndim - 2)
                written[name] = jax.lax.dynamic_update_slice(into, x, at)
        return dataclasses.replace(self, **written)

    def attend(self, layer: Any, q_BTNH: jax.Array) -> jax.Array:
        """Queries of the T tokens just written, over filled slots up to their own: [B, T, N, H].

        T > 1 takes the order of slots for that of tokens: the ring must not have turned yet.
        """
        B, T, N, H = q_BTNH.shape
        K = self.heads
        mask_BTS = self.valid_BS[:, None, :]
        if T > 1:
            now_TS = jnp.arange(self.slots)[None] <= self.slot + jnp.arange(T)[:, None]
            mask_BTS = mask_BTS & now_TS[None]
        q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
        size = self._piece()
        if T == 1 and size < self.slots:
            out_BKMH = self._in_pieces(layer, q_BKMH, size)
        else:
            scores = self._scores(layer, q_BKMH, 0, self.slots)
            scores = scores.reshape(B, K, N // K, T, self.slots)
            weights = softmax(scores, mask_BTS[:, None, None]).reshape(B, K, -1, self.slots)
            out_BKMH = self._sums(layer, weights, 0, self.slots, q_BTNH.dtype)
        return out_BKMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

    @property
    def heads(self) -> int:
        """Key/value heads."""
        stacked = not isinstance(self.keys, tuple)
        return self.keys.shape[2] if stacked else self.keys[0].shape[1]

    def _piece(self) -> int:
        """How many slots one token's queries meet at a time: all, or as many of a stacked cache as
        a device's fast memory holds. A layer that does not fit in there is copied before it is
        read, and moves three times."""
        if isinstance(self.keys, tuple):
            return self.slots
        mesh = jax.sharding.get_abstract_mesh()
        slot = math.prod(self.keys.shape[2:]) * self.keys.dtype.itemsize
        slot = max(1, slot // mesh.size) if mesh.axis_names else slot
        return max(128, PIECE // slot // 128 * 128)

    def _in_pieces(self, layer: Any, q_BKMH: jax.Array, size: int) -> jax.Array:
        """`attend` for one token a row, the softmax put together from pieces of the slots."""
        B, K, M, H = q_BKMH.shape

        def piece(i: Any, carry: Any) -> Any:
            top_BKM, sum_BKM, out_BKMH = carry
            first = jnp.minimum(i * size, self.slots - size)  # the last one overlaps
            valid_BC = jax.lax.dynamic_slice_in_dim(self.valid_BS, first, size, axis=1)
            scores = self._scores(layer, q_BKMH, first, size)
            scores = jnp.where(valid_BC[:, None, None], scores, jnp.finfo(scores.dtype).min)
            new_C = first + jnp.arange(size) >= i * size
            scores = jnp.where(new_C[None, None, None], scores, -jnp.inf)
            new_BKM = jnp.maximum(top_BKM, jnp.max(scores, axis=-1))
            weights, kept = jnp.exp(scores - new_BKM[..., None]), jnp.exp(top_BKM - new_BKM)
            added = self._sums(layer, weights, first, size, q_BKMH.dtype).astype(jnp.float32)
            out_BKMH = out_BKMH * kept[..., None] + added
            return new_BKM, sum_BKM * kept + jnp.sum(weights, axis=-1), out_BKMH

        none = (jnp.full((B, K, M), -jnp.inf), jnp.zeros((B, K, M)), jnp.zeros((B, K, M, H)))
        count = -(-self.slots // size)
        _, sum_BKM, out_BKMH = jax.lax.fori_loop(0, count, piece, none)
        return (out_BKMH / sum_BKM[..., None]).astype(q_BKMH.dtype)

    def _read(self, name: str, layer: Any, first: Any, size: int, target: str) -> jax.Array:
        """`size` slots of one layer, their axes in the order `target`."""
        x = getattr(self, name)
        if isinstance(x, tuple):
            return x[layer]  # stored in this order, and never in pieces
        starts, sizes = (layer, first, *(0,) * (x.ndim - 2)), (1, size, *x.shape[2:])
        x = x[layer] if size == self.slots else jax.lax.dynamic_slice(x, starts, sizes)[0]
        return jnp.einsum(f"{'SKBH'[: x.ndim]}->{target}", x)

    def _scores(self, layer: Any, q_BKMH: jax.Array, first: Any, size: int) -> jax.Array:
        k_BKHS = self._read("keys", layer, first, size, "BKHS").astype(q_BKMH.dtype)
        scores = jnp.einsum("BKMH,BKHS->BKMS", q_BKMH, k_BKHS, preferred_element_type=jnp.float32)
        scores = scores * q_BKMH.shape[-1] ** -0.5
        if self.key_scales is not None:
            scores = scores * self._read("key_scales", layer, first, size, "BKS")[:, :, None]
        return scores

    def _sums(
        self, layer: Any, weights_BKMS: jax.Array, first: Any, size: int, dtype: jnp.dtype
    ) -> jax.Array:
        v_BKSH = self._read("values", layer, first, size, "BKSH").astype(dtype)
        if self.value_scales is not None:
            scale_BKS = self._read("value_scales", layer, first, size, "BKS")
            weights_BKMS = weights_BKMS * scale_BKS[:, :, None]
        return jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS.astype(dtype), v_BKSH)

    def insert(self, source: "Cache", source_B: jax.Array, row_B: jax.Array, count: Any) -> "Cache":
        """Rows row_B[:count] become the rows source_B[:count] of another cache.

        `source` was filled from an empty one and its pointer is back at slot 0, so its rows end at
        its last slot; here they end just before the pointer. Tokens that have no room must be
        none: a source with more slots is cut at the front.
        """

        def copy(rows: int, slots: int, into: jax.Array, x: jax.Array, i: Any) -> jax.Array:
            x = jax.lax.dynamic_slice_in_dim(x, source_B[i], 1, rows)
            x = jax.lax.slice_in_dim(x, max(0, x.shape[slots] - self.slots), None, axis=slots)
            pad = [(0, 0)] * x.ndim
            pad[slots] = (self.slots - x.shape[slots], 0)
            x = jnp.roll(jnp.pad(x, pad), self.slot, axis=slots)
            return jax.lax.dynamic_update_slice_in_dim(into, x, row_B[i], rows)

        # Row by row, in place: the price is that of the rows that come, not of the whole cache.
        def step(i: Any, cache: "Cache") -> "Cache":
            return _each(lambda r, s, into, x: copy(r, s, into, x, i), cache, source)

        source = source.constrained(rows=None)  # every device that splits the rows needs them all
        return jax.lax.fori_loop(0, count, step, self).constrained()

    def refit(self, rows_XB: jax.Array, kept_XB: jax.Array, slots: int) -> "Cache":
        """The same in other numbers of rows and slots.

        Rows are split in X parts that live on different devices, and stay in their part: entry i
        of a part becomes its row rows_XB[x, i], whose tokens are lost unless kept_XB[x, i].
        Kept rows must not be longer than `slots`.
        """

        def move(rows: int, axis: int, x: jax.Array) -> jax.Array:
            x = take_rows(x, rows_XB, rows)
            x = jnp.roll(x, -self.slot, axis=axis)  # the oldest first
            if slots <= self.slots:
                return jax.lax.slice_in_dim(x, self.slots - slots, None, axis=axis)
            pad = [(0, 0)] * x.ndim
            pad[axis] = (0, slots - self.slots)
            return jnp.pad(x, pad)

        cache = _each(move, self)
        valid_BS = cache.valid_BS & kept_XB.reshape(-1)[:, None]
        slot = jnp.asarray(self.slots if slots > self.slots else 0, jnp.int32)
        return dataclasses.replace(cache, valid_BS=valid_BS, slot=slot).constrained()

    def constrained(self, rows: str | None = "batch") -> "Cache":
        """With its rows and heads split over the mesh."""

        def names(row: int, slot: int, x: jax.Array) -> jax.Array:
            of: list[str | None] = [None] * x.ndim
            of[row] = rows
            if x.ndim > 2:
                of[2 if row == 3 else 1] = "act_heads"
            return nn.with_logical_constraint(x, tuple(of))

        return _each(names, self)


# Per layer: where the axes of [B, T, K, H] go.
_LAYERED = {
    "keys": (0, 2, 3, 1),
    "values": (0, 2, 1, 3),
    "key_scales": (0, 2, 1),
    "value_scales": (0, 2, 1),
}


def _each(fn: Callable[..., jax.Array], cache: Cache, *others: Cache) -> Cache:
    """`fn(axis of rows, axis of slots, array, ...)` over all arrays; the pointer stays."""
    changed: dict[str, Any] = {}
    for name, order in _LAYERED.items():
        arrays = [getattr(c, name) for c in (cache, *others)]
        axes = (0, order.index(1)) if isinstance(cache.keys, tuple) else (3, 1)
        changed[name] = jax.tree.map(lambda *x, axes=axes: fn(*axes, *x), *arrays)
    changed["valid_BS"] = fn(0, 1, *(c.valid_BS for c in (cache, *others)))
    return dataclasses.replace(cache, **changed)


def take_rows(x: jax.Array, rows_XB: jax.Array, axis: int = 0) -> jax.Array:
    """Rows rows_XB[x] out of the x-th of X equal parts of an axis: no row changes its part."""
    X, shape = rows_XB.shape[0], x.shape
    x = x.reshape(*shape[:axis], X, shape[axis] // X, *shape[axis + 1 :])
    x = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), (axis, 0), axis)(x, rows_XB)
    return x.reshape(*shape[:axis], rows_XB.size, *shape[axis + 1 :])


def init_cache(config: Config, rows: int, slots: int, dtype: jnp.dtype, stacked: bool) -> Cache:
    """An empty cache of `rows` rings of `slots` slots, in the layout asked for.

    dtype: of keys and values: floating point, or int8.
    """
    L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    shape = {"B": rows, "T": slots, "K": K, "H": H}

    def zeros(name: str) -> Any:
        scales = name.endswith("scales")
        if scales and dtype != jnp.int8:
            return None
        of = jnp.float32 if scales else dtype
        letters = "BTK" if scales else "BTKH"
        if stacked:
            order = "TKB" if scales else "TKBH"
            return jnp.zeros((L, *(shape[x] for x in order)), of)
        sizes = [shape[letters[axis]] for axis in _LAYERED[name]]
        return tuple(jnp.zeros(sizes, of) for _ in range(L))

    arrays = {name: zeros(name) for name in _LAYERED}
    empty = jnp.zeros((rows, slots), bool)
    return Cache(**arrays, valid_BS=empty, slot=jnp.zeros((), jnp.int32)).constrained()


def _quantise(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [B, T, K, H] and float32 scales [B, T, K]: x = int8 · scale, to half a scale."""
    wide = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-12) / 127
    return jnp.round(wide / scale_BTK[..., None]).astype(jnp.int8), scale_BTK
