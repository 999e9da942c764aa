"""Drafted tokens: guesses of the next ones, from which decoding keeps those that it draws itself.

A table remembers which token last followed the last few, in prompts and in responses. Sequences
with the same prompt share what they remember, so a response is drafted from its own text and from
that of its siblings in the same shard of rows. With several guesses, each lookup includes the guess
before. Since every guess is checked, a stale entry, or one that two contexts fight over, costs
time and changes no draw. (Lookup in the text so far: arXiv 2304.04487.)

Letters: X shards, B rows, M tokens of a shard, C tokens that a guess looks back on, k guesses.
"""

import dataclasses
import zlib
from collections import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib

ORDERS = (1, 2, 3)  # tokens that a guess looks back on: as many as have been met before
MAX_ORDER = max(ORDERS)
MAX_ENTRIES = 2**22  # of a shard's table: 16 MiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftTable:
    """What the device remembers for drafts.

    An entry holds the token that followed, in its lowest bits, and above it a tag, in which few of
    the contexts that share the entry agree.
    """

    entries_XH: jax.Array  # uint32
    recent_BC: jax.Array  # int32: the tokens before each row's newest, the last of them last; -1


def init_table(shards: int, rows: int, max_length: int) -> DraftTable:
    """Returns an empty table for rows of at most max_length tokens, `rows` in each shard."""
    entries = min(MAX_ENTRIES, 1 << (len(ORDERS) * rows * max_length - 1).bit_length())
    return DraftTable(
        mesh_lib.split_rows(jnp.zeros((shards, entries), jnp.uint32)),
        mesh_lib.split_rows(jnp.full((shards * rows, MAX_ORDER - 1), -1, jnp.int32)),
    )


def hash_prompt(prompt: abc.Sequence[int]) -> int:
    """Returns the int32 under which sequences with this prompt share what they remember."""
    return zlib.crc32(np.asarray(prompt, np.int32).tobytes()) - 2**31


def list_fields(sequence: Sequence) -> list[int]:
    """Returns the row fields of decode_types.DRAFT_FIELDS: the hash, and the tokens before the
    newest; -1: none."""
    count = MAX_ORDER - 1
    before = [-1] * count + list(sequence.all_tokens[:-1][-count:])
    return [hash_prompt(sequence.prompt), *before[-count:]]


def find_drafts(
    table: DraftTable, group_B: jax.Array, token_B: jax.Array, k: int, vocab_size: int
) -> jax.Array:
    """Returns guesses [B, k] of the tokens after the newest ones; -1 from where none is known."""
    context_BC = jnp.concatenate([table.recent_BC, token_B[:, None]], axis=1)

    def find_local(entries_XH: Any, group_B: Any, context_BC: Any) -> Any:
        def find_next(context_BC: Any, _: Any) -> tuple[Any, Any]:
            guess_B = _look_up(entries_XH[0], group_B, context_BC, vocab_size)
            return jnp.concatenate([context_BC[:, 1:], guess_B[:, None]], axis=1), guess_B

        _, guess_kB = jax.lax.scan(find_next, context_BC, length=k)
        return guess_kB.T

    guess_Bk = _map_shards(find_local, table.entries_XH, group_B, context_BC)
    return jnp.where(jnp.cumsum(guess_Bk < 0, axis=1) > 0, -1, guess_Bk)


def add_drawn_tokens(
    table: DraftTable,
    group_B: jax.Array,
    token_B: jax.Array,
    drawn_BT: jax.Array,
    count_B: jax.Array,
    vocab_size: int,
) -> DraftTable:
    """Remembers the first count_B tokens of drawn_BT, which follow token_B. Returns the table with
    the row's last tokens moved on by as many."""
    T, C = drawn_BT.shape[1], MAX_ORDER
    stream_BS = jnp.concatenate([table.recent_BC, token_B[:, None], drawn_BT], axis=1)
    at_BT = jnp.arange(T)[None] < count_B[:, None]

    def add_local(entries_XH: Any, group_B: Any, stream_BS: Any, at_BT: Any) -> Any:
        before_BTC = jnp.stack([stream_BS[:, i : i + T] for i in range(C)], axis=2)
        flat = (jnp.repeat(group_B, T), before_BTC.reshape(-1, C), stream_BS[:, C:].reshape(-1))
        return _store(entries_XH[0], *flat, at_BT.reshape(-1), vocab_size)[None]

    entries_XH = _map_shards(add_local, table.entries_XH, group_B, stream_BS, at_BT)
    kept_BC = count_B[:, None] + jnp.arange(C - 1)[None]
    return DraftTable(entries_XH, jnp.take_along_axis(stream_BS, kept_BC, axis=1))


def add_prompt_tokens(
    table: DraftTable,
    group_R: jax.Array,
    tokens_XT: jax.Array,
    row_XT: jax.Array,
    vocab_size: int,
) -> DraftTable:
    """Remembers lines of pieces of prompts, as `decode.prefill` reads them."""
    C = MAX_ORDER

    def add_local(entries_XH: Any, group_R: Any, tokens_XT: Any, row_XT: Any) -> Any:
        tokens_T, row_T = tokens_XT[0], row_XT[0]
        before = []
        for back in range(C, 0, -1):
            token, row = (
                jnp.concatenate([jnp.full(back, -1, jnp.int32), x])[: len(row_T)]
                for x in (tokens_T, row_T)
            )
            before.append(jnp.where(row == row_T, token, -1))
        group_T = group_R[jnp.maximum(row_T, 0)]
        flat = (group_T, jnp.stack(before, axis=1), tokens_T, row_T >= 0)
        return _store(entries_XH[0], *flat, vocab_size)[None]

    entries_XH = _map_shards(add_local, table.entries_XH, group_R, tokens_XT, row_XT)
    return dataclasses.replace(table, entries_XH=entries_XH)


def _look_up(
    entries_H: jax.Array, group_B: jax.Array, context_BC: jax.Array, vocab_size: int
) -> jax.Array:
    """Returns the tokens [B] that followed the longest known end of each context; -1: none."""
    guess_B = jnp.full(len(group_B), -1, jnp.int32)
    bits = vocab_size.bit_length()
    for order in sorted(ORDERS):
        slot_B, tag_B = _hash_context(group_B, context_BC[:, -order:], len(entries_H), bits)
        entry_B = entries_H[slot_B]
        token_B = (entry_B & ((1 << bits) - 1)).astype(jnp.int32)
        found_B = (entry_B >> bits == tag_B) & (context_BC[:, -order] >= 0)
        guess_B = jnp.where(found_B, token_B, guess_B)
    return guess_B


def _store(
    entries_H: jax.Array,
    group_M: jax.Array,
    before_MC: jax.Array,
    token_M: jax.Array,
    valid_M: jax.Array,
    vocab_size: int,
) -> jax.Array:
    """Remembers tokens under the contexts before them; of those with the same entry, the last."""
    bits, M = vocab_size.bit_length(), len(token_M)
    at_M = jnp.arange(M, dtype=jnp.int32)
    for order in ORDERS:
        slot_M, tag_M = _hash_context(group_M, before_MC[:, -order:], len(entries_H), bits)
        entry_M = tag_M << bits | token_M.astype(jnp.uint32)
        valid_order_M = valid_M & (before_MC[:, -order] >= 0)
        # Scatters to one place have no order on GPUs; and indices past the end, which are dropped,
        # must differ, too.
        slot_M = jnp.where(valid_order_M, slot_M, len(entries_H) + at_M)
        later_MM = (slot_M[:, None] == slot_M[None]) & (at_M[:, None] < at_M[None])
        slot_M = jnp.where(jnp.any(later_MM, axis=1), len(entries_H) + at_M, slot_M)
        entries_H = entries_H.at[slot_M].set(entry_M, mode="drop", unique_indices=True)
    return entries_H


def _hash_context(
    group_B: jax.Array, context_Bn: jax.Array, num_entries: int, bits: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the entry of each context, and the tag that it should have."""
    hash_B = jnp.full(len(group_B), context_Bn.shape[1], jnp.uint32)
    for x_B in (group_B, *context_Bn.T):
        hash_B = (hash_B ^ x_B.astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hash_B = hash_B ^ (hash_B >> 15)
    hash_B = hash_B * jnp.uint32(0x85EBCA77)
    slot_B = (hash_B ^ (hash_B >> 13)) & jnp.uint32(num_entries - 1)
    return slot_B.astype(jnp.int32), hash_B >> bits


def _map_shards(local: abc.Callable[..., Any], *arrays: Any) -> Any:
    """Maps `local` over each device's own rows and table, so that no device asks another."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*arrays)
    spec = jax.sharding.PartitionSpec(mesh_lib.ROW_AXES)
    return jax.shard_map(local, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(
        *arrays
    )
