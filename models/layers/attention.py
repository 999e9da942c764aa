"""Causal grouped-query attention within segments, with an implementation for each platform.

A token attends to itself and to earlier tokens of its own segment, which are contiguous; the
softmax is computed in float32. All implementations are tested to agree with `attend_xla`.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

from models.errors import UserError
from models.layers import blockwise

# (q [B, T, N, H], k and v [B, T, K, H], segments [B, T]) -> [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_LANES = 128  # width of a TPU's vector unit: splash attention needs T and H to be multiples of it
_BLOCK_SIZES = (1024, 512, 384, 256, 128)  # tokens per block of splash attention
# The longest block, by device kind. For each block of queries the kernel reads all earlier keys and
# values, so that it does as many operations per byte as the block is long; a chip's matrix unit
# is saturated from 240 (v5e), 166 (v5p) or 560 (v6e). By arithmetic alone: not timed.
_MAX_BLOCK_SIZES = {"TPU v6 lite": 1024}


attend_xla = blockwise.attend  # compiled by XLA, on any platform


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where the mask is true; uniform if it is true nowhere."""
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)


def choose_block_size(T: int, device_kind: str) -> int:
    """Returns the longest block for a device kind that divides a row of T tokens."""
    longest = _MAX_BLOCK_SIZES.get(device_kind, 512)
    return next(size for size in _BLOCK_SIZES if size <= longest and T % size == 0)


def make_splash_kernel(T: int, N: int, block: int, interpret: bool) -> Any:
    """Makes JAX's causal kernel for a row of T tokens and N heads, in blocks of `block` tokens."""
    names = (f"block_{x}{suffix}" for x in ("q", "kv") for suffix in ("", "_dkv", "_dq"))
    sizes: Any = dict.fromkeys(names, block)
    return splash_lib.make_splash_mha_single_device(
        mask=splash_lib.MultiHeadMask([splash_lib.CausalMask((T, T))] * N),
        block_sizes=splash_lib.BlockSizes(**sizes),
        interpret=interpret,
    )


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Runs JAX's Pallas kernel for TPU, forward and backward, on each device's rows and heads.

    H must be a multiple of 128, as in every released Qwen3. `interpret` runs the kernel on any
    platform, slowly.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    pad = -T % _LANES
    mesh = jax.sharding.get_abstract_mesh()
    block = choose_block_size(
        T + pad, mesh.abstract_device.device_kind if mesh.abstract_device else ""
    )

    def attend_local(q_BTNH, k_BTKH, v_BTKH, segments_BT):
        kernel = make_splash_kernel(T + pad, q_BTNH.shape[2], block, interpret)

        def attend_row(row):
            q_NTH, k_KTH, v_KTH, segments_T = row
            restricted = _restrict_to_segments(kernel, segments_T, block)
            return restricted(q_NTH, k_KTH, v_KTH, splash_lib.SegmentIds(segments_T, segments_T))

        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, pad)))
        heads_first = (
            jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)
            for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)
        )
        # Row by row, because the kernel's tables depend on the row.
        out_BNTH: Any = jax.lax.map(attend_row, (*heads_first, segments_BT))
        return out_BNTH.swapaxes(1, 2)[:, :T]

    # A kernel is opaque to the partitioner, hence the explicit shard_map.
    spec = nn.logical_to_mesh_axes(("batch", None, "act_heads", None))
    if mesh.empty or spec is None or spec[0] is None:  # no mesh, or no rules for logical names
        return attend_local(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    rows = jax.sharding.PartitionSpec(spec[0], None)
    return jax.shard_map(
        attend_local, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _restrict_to_segments(kernel: Any, segments_T: jax.Array, block: int) -> Any:
    """Returns a causal kernel that neither computes nor fetches blocks that share no segment.

    Its tables say, for each block of queries (I) and of keys (J), whether it is computed and which
    block is in fast memory at that step; where nothing is computed, that is the block of the step
    before or after.
    """
    blocks = len(segments_T) // block
    starts_T = jnp.diff(segments_T, prepend=segments_T[:1] - 1) != 0
    began_T = jax.lax.cummax(jnp.where(starts_T, jnp.arange(len(segments_T)), 0))
    first_I1 = began_T[::block, None] // block  # first block of keys seen by a block of queries
    i_I1, j_1J = jnp.arange(blocks)[:, None], jnp.arange(blocks)[None]
    runs_IJ = (first_I1 <= j_1J) & (j_1J <= i_I1)
    next_I1 = jnp.append(first_I1[1:], first_I1[:1], axis=0)
    keys_IJ = jnp.where(j_1J <= i_I1, jnp.maximum(j_1J, first_I1), next_I1)
    # The last block of queries that sees a block of keys.
    last_1J = j_1J + jnp.sum(runs_IJ, axis=0, keepdims=True) - 1
    queries_IJ = jnp.minimum(jnp.maximum(i_I1, j_1J), last_1J)

    def replace_info(info: Any, data_IJ: jax.Array) -> Any:
        return info._replace(
            block_mask=runs_IJ[None].astype(info.block_mask.dtype),
            data_next=data_IJ[None].astype(info.data_next.dtype),
        )

    return type(kernel)(
        replace_info(kernel.fwd_mask_info, keys_IJ),
        replace_info(kernel.dq_mask_info, keys_IJ),
        replace_info(kernel.dkv_mask_info, queries_IJ),
        **kernel.kwargs,
    )


def attend_cudnn(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Runs cuDNN's fused attention for NVIDIA GPUs, in bfloat16 or float16 only.

    It stores no scores, but does store the mask: [B, T, T] in q's dtype, shared by the heads.
    """
    return _attend_masked(q_BTNH, k_BTKH, v_BTKH, segments_BT, "cudnn")


def attend_cudnn_by_length(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Like `attend_cudnn` without a mask, for rows with one contiguous segment each.

    Padding may be on either side. cuDNN gets the lengths and skips everything beyond them.
    """
    return _attend_by_length(q_BTNH, k_BTKH, v_BTKH, segments_BT, "cudnn")


def _attend_masked(
    q_BTNH, k_BTKH, v_BTKH, segments_BT, implementation: Literal["xla", "cudnn"]
) -> jax.Array:
    same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same_B1TT, is_causal=True, implementation=implementation
    )


def _attend_by_length(
    q_BTNH, k_BTKH, v_BTKH, segments_BT, implementation: Literal["xla", "cudnn"]
) -> jax.Array:
    real_BT = segments_BT > 0
    first_B = jnp.argmax(real_BT, axis=1)
    length_B = jnp.maximum(jnp.sum(real_BT, axis=1, dtype=jnp.int32), 1)  # a row may be all padding
    real_BT11 = real_BT[..., None, None]
    # The kernel's output beyond the length is undefined, forward and backward: the two selections
    # keep it out of values and gradients.
    left = (_roll_rows(jnp.where(real_BT11, x, 0), first_B) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BTNH = jax.nn.dot_product_attention(
        *left,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        is_causal=True,
        implementation=implementation,
    )
    return jnp.where(real_BT11, _roll_rows(out_BTNH, -first_B), 0)


@jax.custom_vjp
def _roll_rows(x_BTNH: jax.Array, shift_B: jax.Array) -> jax.Array:
    """Rolls each row of x to the left by its own shift.

    The gradient rolls back: JAX's gradient of the gather would be a scatter, which is slow.
    """
    T = x_BTNH.shape[1]
    from_BT = (jnp.arange(T)[None] + shift_B[:, None]) % T
    return jnp.take_along_axis(x_BTNH, from_BT[..., None, None], axis=1)


_roll_rows.defvjp(
    lambda x_BTNH, by_B: (_roll_rows(x_BTNH, by_B), by_B),
    lambda by_B, g_BTNH: (_roll_rows(g_BTNH, -by_B), None),
)


TABLE: dict[str, Attend] = {
    "xla": attend_xla,
    "splash": attend_splash,
    "cudnn": attend_cudnn,
    "cudnn_lengths": attend_cudnn_by_length,
}


def choose_kernel(
    requested: str, platform: str, head_dim: int, dtype: jnp.dtype, packed: bool = True
) -> str:
    """Returns the key of TABLE for `requested`; "auto" selects the platform's fastest kernel.

    packed: rows may hold more than one segment; if not, cuDNN is faster.

    Raises:
      UserError: if the requested kernel cannot run there.
    """
    obstacles = {
        "xla": "",
        "splash": "needs a TPU"
        if platform != "tpu"
        else f"head_dim={head_dim} is no multiple of {_LANES}"
        if head_dim % _LANES
        else "",
        "cudnn": "needs a GPU"
        if platform not in ("gpu", "cuda")
        else f"needs bfloat16, not {dtype.name}"
        if dtype.itemsize > 2
        else "",
    }
    if requested == "auto":
        requested = next(name for name in ("splash", "cudnn", "xla") if not obstacles[name])
    if requested not in obstacles:
        raise UserError(f"attention={requested!r} is none of auto, {', '.join(obstacles)}")
    if obstacles[requested]:
        raise UserError(f"attention={requested!r}: {obstacles[requested]}")
    return "cudnn_lengths" if requested == "cudnn" and not packed else requested
