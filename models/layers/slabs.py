"""Keys and values of decoding rows on a CPU: a slab for each row, read without a gather.

Each row of the batch owns one slab, which stores its tokens in order from the start. Tokens added
by a segment of decoding go to a small buffer, to which all rows write at the same position, the
segment's step, so that a step's write is one slice (drafts: each row at a position of its own); at
the end of the segment the new tokens are moved into the slabs. Slabs are cut into blocks along
their tokens, each a separate array, so that a step can read only the blocks needed by the longest
row, without a copy.

Only this file and slab_attention.py depend on the layout of the arrays.

Letters in names: B rows (slabs), X lines of prompts (one per shard of rows), T tokens and R prompts
of a line, N query heads, K key/value heads, H head dim, M queries of a key/value head, S tokens of
a block, W tokens of the buffer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import Config
from models.layers import sharded
from models.layers.paged_attention import quantise_int8
from models.layers.slab_attention import (
    attend_blocks,
    group_queries,
    place_tokens,
    ungroup_queries,
    write_tokens,
)

MIN_BLOCK_TOKENS = 128  # blocks are not made smaller than this
MAX_BLOCKS = 4

# The transposition of [rows, T, K, H] (scales: [rows, T, K]).
_AXIS_ORDER = {
    "keys": (0, 2, 3, 1),
    "values": (0, 2, 1, 3),
    "key_scales": (0, 2, 1),
    "value_scales": (0, 2, 1),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Prompts, or pieces of them, concatenated in a line of T tokens for each shard."""

    slab_XR: jax.Array  # int32: the slab of each prompt; undefined after the last
    start_XR: jax.Array  # int32: the start of its piece in the line
    count_XR: jax.Array  # int32: tokens of the piece; 0 after the last prompt
    position_XR: jax.Array  # int32: its first token's position; 0 except for prompt 0
    row_XT: jax.Array  # int32: the prompt of a token; -1: padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentBuffer:
    """Tokens added by the current segment: layer -> arrays like those of a slab of W tokens."""

    arrays: dict[str, tuple[jax.Array, ...]]
    step: jax.Array  # int32 scalar
    length_B: jax.Array  # int32: tokens in each row's slab
    last_block: jax.Array  # int32 scalar: the last block that holds any of them
    place_BT: jax.Array | None = None  # int32: of drafts in the buffer; -1: padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slabs:
    """arrays: name (see _AXIS_ORDER) -> layer -> block: keys [B, K, H, S], values [B, K, S, H]; if
    they are int8, also float32 scales [B, K, S]."""

    arrays: dict[str, tuple[tuple[jax.Array, ...], ...]]
    packed: PackedPrompts | None = None
    new: tuple[dict[str, jax.Array], ...] = ()  # layer -> arrays of the line, still to be written
    segment_buffer: SegmentBuffer | None = None

    @property
    def block_lengths(self) -> list[int]:
        """Tokens of each block."""
        return [block.shape[3] for block in self.arrays["keys"][0]]

    def bind_tokens(
        self,
        table_RN: jax.Array,
        length_R: jax.Array,
        starts_XR: jax.Array,
        row_XT: jax.Array,
        position_XT: jax.Array,
    ) -> "Slabs":
        """Prepares a call on lines of prompts; arguments as in Pages.bind_tokens. A row's one page
        is its slab. Only the first prompt of a line may continue earlier pieces."""
        X = len(starts_XR)
        count_XR = starts_XR[:, 1:] - starts_XR[:, :-1]
        position_XR = length_R.reshape(X, -1) - count_XR
        line = PackedPrompts(
            table_RN[:, 0].reshape(X, -1), starts_XR[:, :-1], count_XR, position_XR, row_XT
        )
        return dataclasses.replace(self, packed=line)

    def begin_segment(self, length_B: jax.Array, steps: int) -> "Slabs":
        """Begins a segment of at most `steps` decoding steps, each with a token of every row."""

        def make_buffer(name: str, block: jax.Array) -> jax.Array:
            shape = list(block.shape)
            shape[_get_token_axis(name) + 1] = steps
            return jnp.zeros(shape, block.dtype)

        arrays = {
            name: tuple(make_buffer(name, blocks[0]) for blocks in layers)
            for name, layers in self.arrays.items()
        }
        ends = jnp.cumsum(jnp.array(self.block_lengths, jnp.int32))[:-1]
        further = jnp.sum(jnp.max(length_B) > ends, dtype=jnp.int32)
        return dataclasses.replace(
            self, segment_buffer=SegmentBuffer(arrays, jnp.int32(-1), length_B, further)
        )

    def bind_next_tokens(self, table_RN: jax.Array, length_R: jax.Array) -> "Slabs":
        """Prepares a call of the model on the next token of each row."""
        del table_RN, length_R  # all rows write at one step; slabs change at the end
        assert self.segment_buffer is not None
        recent = dataclasses.replace(self.segment_buffer, step=self.segment_buffer.step + 1)
        return dataclasses.replace(self, segment_buffer=recent)

    def bind_drafts(
        self, table_RN: jax.Array, length_R: jax.Array, count_R: jax.Array, T: int
    ) -> "Slabs":
        """Prepares a call on the next token of each row and drafts after it; see Pages."""
        del table_RN
        recent, at_T = self.segment_buffer, jnp.arange(T, dtype=jnp.int32)[None]
        assert recent is not None
        place_BT = (length_R - recent.length_B)[:, None] - T + at_T
        place_BT = jnp.where(at_T >= T - count_R[:, None], place_BT, -1)
        return dataclasses.replace(
            self, segment_buffer=dataclasses.replace(recent, place_BT=place_BT)
        )

    def unbind_tokens(self) -> "Slabs":
        """Writes the line that `bind_tokens` prepared, if any, to the slabs, and clears the rest.

        This comes after the last layer, not in each, so that XLA knows that nothing is read any
        more: else it copies the slabs of all rows in each layer, which takes longer than the model.
        """
        if (recent := self.segment_buffer) is not None:
            recent = dataclasses.replace(recent, place_BT=None)
            return dataclasses.replace(self, segment_buffer=recent)
        if self.packed is None:
            return self

        def write_local(slabs: Any, new: Any, packed: PackedPrompts) -> Any:
            packed = jax.tree.map(lambda x: x[0], packed)  # one line per shard

            def write_prompt(r: jax.Array, slabs: Any) -> Any:
                fields = packed.slab_XR, packed.start_XR, packed.count_XR, packed.position_XR
                at = [x_R[r] for x_R in fields]

                def write_layer(name: str, blocks: tuple, layer: dict) -> tuple:
                    axis = _get_token_axis(name)
                    return write_tokens(blocks, self.block_lengths, axis, layer[name][0], *at)

                return {
                    name: tuple(map(functools.partial(write_layer, name), layers, new))
                    for name, layers in slabs.items()
                }

            return jax.lax.fori_loop(0, jnp.sum(packed.count_XR > 0), write_prompt, slabs)

        arrays = _map_shards(write_local, self.arrays, self.new, self.packed)
        return dataclasses.replace(self, arrays=arrays, packed=None, new=())

    def end_segment(self, count_B: jax.Array) -> "Slabs":
        """Ends a segment: moves each row's first count_B tokens of it into the slabs."""
        assert self.segment_buffer is not None
        recent = self.segment_buffer
        sizes = self.block_lengths

        def flush_local(slabs: Any, new: Any, length_B: jax.Array, count_B: jax.Array) -> Any:
            def flush_row(b: jax.Array, slabs: Any) -> Any:
                def flush_array(name: str, blocks: tuple, layer: jax.Array) -> tuple:
                    source = jax.lax.dynamic_index_in_dim(layer, b, keepdims=False)
                    at = b, jnp.int32(0), count_B[b], length_B[b]
                    return write_tokens(blocks, sizes, _get_token_axis(name), source, *at)

                return {
                    name: tuple(
                        map(lambda x, y, n=name: flush_array(n, x, y), slabs[name], new[name])
                    )
                    for name in slabs
                }

            return jax.lax.fori_loop(0, count_B.shape[0], flush_row, slabs)

        arrays = _map_shards(flush_local, self.arrays, recent.arrays, recent.length_B, count_B)
        return dataclasses.replace(self, arrays=arrays, segment_buffer=None).constrain_sharding()

    def write_and_attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "Slabs"]:
        """Stores a call's keys and values [rows, T, K, H] of one layer, attends to all tokens, and
        returns the output [rows, T, N, H] and the updated slabs."""
        bad = ~jnp.all(jnp.isfinite(v), axis=-1, keepdims=True)
        # Slabs are reused without being cleared, and a weight of 0 does not mask a NaN.
        new = {"keys": jnp.where(bad, jnp.nan, k), "values": jnp.where(bad, 0, v)}
        if "key_scales" in self.arrays:
            new["keys"], new["key_scales"] = quantise_int8(k)
            new["values"], new["value_scales"] = quantise_int8(v)
        dtype = self.arrays["keys"][0][0].dtype
        new = {
            name: x.transpose(_AXIS_ORDER[name]).astype(jnp.float32 if "scales" in name else dtype)
            for name, x in new.items()
        }
        if self.segment_buffer is not None:
            return self._decode(layer, q, new)
        assert self.packed is not None
        return self._prefill(layer, q, new)

    def _decode(self, layer: int, q_BTNH: jax.Array, new: dict) -> tuple[jax.Array, "Slabs"]:
        recent = self.segment_buffer
        assert recent is not None
        arrays = {}
        for name, x in new.items():
            layers, axis = recent.arrays[name], _get_token_axis(name) + 1
            if recent.place_BT is None:
                into = jax.lax.dynamic_update_slice_in_dim(layers[layer], x, recent.step, axis)
            else:
                into = place_tokens(layers[layer], x, recent.place_BT, axis)
            arrays[name] = (*layers[:layer], into, *layers[layer + 1 :])
        recent = dataclasses.replace(recent, arrays=arrays)
        B, T, N, H = q_BTNH.shape
        new = {name: layers[layer] for name, layers in arrays.items()}
        K, steps = new["keys"].shape[1], new["keys"].shape[3]
        q_BKMH = q_BTNH.reshape(B, K, N // K, H) if T == 1 else group_queries(q_BTNH, K)

        def attend_first_blocks(count: int) -> jax.Array:
            parts, masks, first = [], [], 0
            for block, size in enumerate(self.block_lengths[:count]):
                parts.append({name: layers[layer][block] for name, layers in self.arrays.items()})
                masks.append((first + jnp.arange(size))[None] < recent.length_B[:, None])
                first += size
            if recent.place_BT is None:
                now_W = jnp.arange(steps) <= recent.step
                masks.append(jnp.broadcast_to(now_W[None], (B, steps)))
                mask = jnp.concatenate(masks, axis=1)[:, None, None]
                return attend_blocks(q_BKMH, [*parts, new], mask)
            before_BS = jnp.concatenate(masks, axis=1)
            now_BTW = jnp.arange(steps)[None, None] <= recent.place_BT[:, :, None]
            before_BTS = jnp.broadcast_to(before_BS[:, None], (B, T, before_BS.shape[1]))
            mask = jnp.concatenate([before_BTS, now_BTW], axis=2)
            mask = jnp.tile(mask, (1, N // K, 1))[:, None]
            return attend_blocks(q_BKMH, [*parts, new], mask)

        choices = [
            functools.partial(attend_first_blocks, count)
            for count in range(1, len(self.block_lengths) + 1)
        ]
        out_BKMH = jax.lax.switch(recent.last_block, choices)
        out_BTNH = out_BKMH.reshape(B, 1, N, H) if T == 1 else ungroup_queries(out_BKMH, T)
        return out_BTNH, dataclasses.replace(self, segment_buffer=recent)

    def _prefill(self, layer: int, q_XTNH: jax.Array, new: dict) -> tuple[jax.Array, "Slabs"]:
        def prefill_local(slabs: Any, new: Any, packed: PackedPrompts, q_XTNH: Any) -> jax.Array:
            packed = jax.tree.map(lambda x: x[0], packed)  # one line per shard
            return _attend_prompts(q_XTNH[0], new, slabs, packed)[None]

        own = {name: layers[layer] for name, layers in self.arrays.items()}
        out_XTNH = _map_shards(prefill_local, own, new, self.packed, q_XTNH, queries=True)
        return out_XTNH, dataclasses.replace(self, new=(*self.new, new))

    def copy_pages(self, source_XC: jax.Array, target_XC: jax.Array) -> "Slabs":
        """Copies slab source_XC[x, c] of shard x to target_XC[x, c]; -1 (none) only at the end."""

        def copy_local(slabs: Any, source_XC: jax.Array, target_XC: jax.Array) -> Any:
            source_C, target_C = source_XC[0], target_XC[0]

            def copy_slab(i: jax.Array, slabs: Any) -> Any:
                def copy_array(x: jax.Array) -> jax.Array:
                    row = jax.lax.dynamic_slice_in_dim(x, source_C[i], 1)
                    return jax.lax.dynamic_update_slice_in_dim(x, row, target_C[i], 0)

                return jax.tree.map(copy_array, slabs)

            return jax.lax.fori_loop(0, jnp.sum(source_C >= 0), copy_slab, slabs)

        copied = _map_shards(copy_local, self.arrays, source_XC, target_XC)
        return dataclasses.replace(self, arrays=copied)

    def gather_rows(self, rows_XR: jax.Array) -> "Slabs":
        """Selects rows: entry i of shard x is its slab rows_XR[x, i]; for -1 it is undefined."""

        def gather_local(slabs: Any, rows_XR: jax.Array) -> Any:
            return jax.tree.map(lambda x: x[jnp.maximum(rows_XR[0], 0)], slabs)

        return dataclasses.replace(self, arrays=_map_shards(gather_local, self.arrays, rows_XR))

    def constrain_sharding(self) -> "Slabs":
        """Splits rows and heads over the mesh."""

        def constrain_array(x: jax.Array) -> jax.Array:
            return nn.with_logical_constraint(x, ("batch", "act_heads", *[None] * (x.ndim - 2)))

        return dataclasses.replace(self, arrays=jax.tree.map(constrain_array, self.arrays))


def init_slabs(config: Config, rows: int, tokens: int, dtype: jnp.dtype) -> Slabs:
    """Makes empty slabs of `tokens` tokens; `dtype` is floating point or int8."""
    L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    names = [name for name in _AXIS_ORDER if "scales" not in name or dtype == jnp.int8]

    def make_zeros(name: str, S: int) -> jax.Array:
        shape = (rows, S, K) if "scales" in name else (rows, S, K, H)
        array_dtype = jnp.float32 if "scales" in name else dtype
        return jnp.zeros([shape[axis] for axis in _AXIS_ORDER[name]], array_dtype)

    sizes = choose_block_sizes(tokens)
    arrays = {
        name: tuple(tuple(make_zeros(name, S) for S in sizes) for _ in range(L)) for name in names
    }
    return Slabs(arrays).constrain_sharding()


def choose_block_sizes(tokens: int) -> list[int]:
    """Returns tokens of each block of a slab: about an eighth, an eighth, a quarter and a half."""
    ends = [max(tokens, 1)]
    while ends[0] >= 2 * MIN_BLOCK_TOKENS and len(ends) < MAX_BLOCKS:
        ends.insert(0, -(-ends[0] // 2))
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _get_token_axis(name: str) -> int:
    """Returns the token axis of a single slab."""
    return _AXIS_ORDER[name].index(1) - 1


def _attend_prompts(q_TNH: jax.Array, new: dict, slabs: dict, packed: PackedPrompts) -> jax.Array:
    """Attends tokens of a line to earlier ones of their own prompt: in the line and, if the first
    prompt continues earlier pieces, in its slab."""
    T, N, H = q_TNH.shape
    K = new["keys"].shape[1]
    q_1KMH = q_TNH.reshape(T, K, N // K, H).transpose(1, 2, 0, 3).reshape(1, K, -1, H)
    row_T = packed.row_XT
    own_TT = (row_T[:, None] == row_T[None]) & (jnp.arange(T)[:, None] >= jnp.arange(T)[None])
    before = packed.position_XR[0]

    def repeat_mask(mask_TS: jax.Array) -> jax.Array:
        return jnp.tile(mask_TS, (N // K, 1))[None, None]

    def attend_new_only() -> jax.Array:
        return attend_blocks(q_1KMH, [new], repeat_mask(own_TT))

    def attend_with_prefix() -> jax.Array:
        parts, masks, first = [], [], 0
        for block in range(len(slabs["keys"])):
            part = {
                name: jax.lax.dynamic_slice_in_dim(blocks[block], packed.slab_XR[0], 1)
                for name, blocks in slabs.items()
            }
            size = part["keys"].shape[3]
            parts.append(part)
            masks.append((row_T == 0)[:, None] & ((first + jnp.arange(size)) < before)[None])
            first += size
        mask = jnp.concatenate([*masks, own_TT], axis=1)
        return attend_blocks(q_1KMH, [*parts, new], repeat_mask(mask))

    out_1KMH = jax.lax.cond(before > 0, attend_with_prefix, attend_new_only)
    return out_1KMH.reshape(K, N // K, T, H).transpose(2, 0, 1, 3).reshape(T, N, H)


def _map_shards(function: Callable, slabs: Any, *others: Any, queries: bool = False) -> Any:
    """Maps `function`, which returns slabs, over each device's own and its part of other arrays.

    The first axis of those is rows or lines; the second, if there are more than two, is heads. With
    `queries` the last is queries, with heads on the third axis, and so is what it returns.
    """
    rows, heads = sharded.get_mesh_axes("batch"), sharded.get_mesh_axes("act_heads")
    if not rows:  # no mesh, or no rules for logical names
        return function(slabs, *others)
    P = jax.sharding.PartitionSpec

    def make_spec(x: Any) -> P:
        return P(rows, heads) if x.ndim > 2 and x.dtype != jnp.int32 else P(rows)

    specs = [jax.tree.map(make_spec, tree) for tree in (slabs, *others)]
    if queries:
        specs[-1] = P(rows, None, heads)
    out = specs[-1] if queries else specs[0]
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out, check_vma=False)(
        slabs, *others
    )
