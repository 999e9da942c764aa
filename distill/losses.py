"""Losses over arrays: one streamed head, and the table of per-token losses that read from it.

The logits of B·T tokens over a vocabulary of 151,936 do not fit in memory, so nothing here ever
holds more than one chunk of them: hidden states go through both heads chunk by chunk, inside a
scan whose body is recomputed in the backward pass. What comes out is one number a token.

The logits at position t predict token t + 1. `shift` aligns targets and mask with the hidden
states that predict them, once, for every loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Stats = dict[str, jax.Array]  # name -> [B, T] float32


def shift(x_BT: jax.Array) -> jax.Array:
    """Row t of the result is about token t + 1; the last column is zero (nothing is predicted)."""
    return jnp.concatenate([x_BT[:, 1:], jnp.zeros_like(x_BT[:, :1])], axis=1)


def unshift(x_BT: jax.Array) -> jax.Array:
    """Undoes `shift`: column t is about token t again, column 0 is zero."""
    return jnp.concatenate([jnp.zeros_like(x_BT[:, :1]), x_BT[:, :-1]], axis=1)


def _logits(hidden_BCD: jax.Array, head_VD: jax.Array) -> jax.Array:
    # Multiplied in the model's dtype, summed and kept in float32. Casting the head here, inside
    # the chunk, lets its gradient be summed over chunks in the head's own dtype, float32.
    return jnp.einsum(
        "BCD,VD->BCV",
        hidden_BCD,
        head_VD.astype(hidden_BCD.dtype),
        preferred_element_type=jnp.float32,
    )


def token_stats(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    teacher_hidden_BTE: jax.Array | None = None,
    teacher_head_VE: jax.Array | None = None,
    *,
    logits_mib: float,
    split: Callable[[jax.Array], jax.Array] = lambda logits_BCV: logits_BCV,
    top_k: int = 0,
) -> Stats:
    """Per-token figures of the distributions that predict `targets_BT`, vocabulary streamed.

    Args:
      hidden_BTD: final hidden states that predict the targets.
      head_VD: output head; gradients flow into it and into hidden_BTD.
      targets_BT: int32, the token that each position predicts.
      teacher_hidden_BTE, teacher_head_VE: the same of the teacher, whose width may differ; never
        differentiated.
      logits_mib: how many MiB one chunk of float32 logits of one model may take.
      split: puts a sharding on a chunk's logits [B, C, V].
      top_k: also find this many of the most likely tokens.

    Returns:
      Float32 [B, T] arrays, differentiable (once) in the student: "logp" log p(target), "entropy"
      of p in nats; with a teacher q also "teacher_logp" log q(target) and "reverse_kl", the exact
      KL(p‖q) = Σ_v p(v) (log p(v) - log q(v)) over the whole vocabulary (arXiv 2306.13649, eq. 2,
      with the arguments in the order that on-policy distillation uses). With top_k also
      "top_logp" and int32 "top_ids", [B, T, K], the most likely first.
    """
    B, T = targets_BT.shape
    V = head_VD.shape[0]
    chunk = max(1, min(T, int(logits_mib * 2**20 / (4 * B * V))))
    chunks = -(-T // chunk)
    chunk = -(-T // chunks)  # equal chunks pad least

    def cut(x_BT: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x_BT.ndim - 2)
        padded = jnp.pad(x_BT, padding)
        return padded.reshape(B, chunks, chunk, *x_BT.shape[2:]).swapaxes(0, 1)

    xs = {"hidden": cut(hidden_BTD), "targets": cut(targets_BT)}
    if teacher_hidden_BTE is not None:
        xs["teacher"] = cut(jax.lax.stop_gradient(teacher_hidden_BTE))
        teacher_head_VE = jax.lax.stop_gradient(teacher_head_VE)

    def log_probs(hidden_BCD: jax.Array, head: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(split(_logits(hidden_BCD, head)), axis=-1)

    def pick(logp_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logp_BCV, targets_BC[..., None], axis=-1)[..., 0]

    def body(_: None, x: dict[str, jax.Array]) -> tuple[None, Stats]:
        logp_BCV = log_probs(x["hidden"], head_VD)
        p_BCV = jnp.exp(logp_BCV)
        stats = {
            "logp": pick(logp_BCV, x["targets"]),
            "entropy": -jnp.sum(p_BCV * logp_BCV, axis=-1),
        }
        if "teacher" in x:
            assert teacher_head_VE is not None
            logq_BCV = log_probs(x["teacher"], teacher_head_VE)
            stats["teacher_logp"] = pick(logq_BCV, x["targets"])
            # The gradient is Σ ∇p (log p - log q) alone: the other term, Σ p ∇log p, is zero, but
            # computed it leaves rounding noise, which Adam blows up where p is nearly q.
            ratio_BCV = jax.lax.stop_gradient(logp_BCV - logq_BCV)
            stats["reverse_kl"] = jnp.sum(p_BCV * ratio_BCV, axis=-1)
        if top_k:
            stats["top_logp"], stats["top_ids"] = jax.lax.top_k(logp_BCV, top_k)
        return None, stats

    if chunks == 1:
        _, stats = body(None, {name: x[0] for name, x in xs.items()})
        return stats
    _, stats = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, xs)
    return {
        name: x.swapaxes(0, 1).reshape(B, chunks * chunk, *x.shape[3:])[:, :T]
        for name, x in stats.items()
    }


def cross_entropy(stats: Stats) -> jax.Array:
    """-log p(target): maximum likelihood on traces."""
    return -stats["logp"]


def reverse_kl(stats: Stats) -> jax.Array:
    """Exact KL(student‖teacher) at each token of the student's own samples.

    The gradient is that of each token's own divergence: the effect of a token on the states that
    follow it is left out (discount 0), as in every published recipe.
    """
    return stats["reverse_kl"]


# objective -> per-token loss [B, T]
TABLE: dict[str, Callable[[Stats], jax.Array]] = {"sft": cross_entropy, "opd": reverse_kl}
