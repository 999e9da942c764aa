"""Operations and bytes that jobs of the benchmarks need at least, by formula.

A pass forward takes 2 FLOPs for each weight and token, and 4·N·H for each pair of tokens and layer
(`models.families.count_forward_flops`; a token attends to half of its row on average). Training
takes three passes, of a teacher one. What is computed twice to save memory does not count.
"""

from typing import Any

import jax.numpy as jnp

from models import families
from models.qwen3.config import Config

JsonDict = dict[str, Any]


def count_weights(config: Config, with_head: bool = True) -> float:
    """Counts the weights in a token's matrix products (two FLOPs each)."""
    return families.count_forward_flops(config, 1, 0, with_head) / 2


def count_train(
    case: str, student: Config, teacher: Config, rows: int, tokens: int, dtype: str
) -> JsonDict:
    """Returns the tokens of a training step, and its FLOPs and bytes.

    Bytes: weights are read twice, the gradient is written, and AdamW reads four numbers a weight
    and writes three, all in float32; the weights of a teacher (case "reverse_kl") are read once.
    """
    M, mean, itemsize = rows * tokens, (tokens + 1) / 2, jnp.dtype(dtype).itemsize
    flop = 3 * families.count_forward_flops(student, M, mean, with_head=True)
    moved = count_weights(student) * (2 * itemsize + 8 * 4)
    if case == "reverse_kl":
        flop += families.count_forward_flops(teacher, M, mean, with_head=True)
        moved += count_weights(teacher) * itemsize
    return {"tokens": M, "flop": flop, "bytes": moved}


def count_score(case: str, config: Config, rows: int, tokens: int, dtype: str) -> JsonDict:
    """Returns the tokens of a call that scores, and its FLOPs and bytes: the weights, read once.

    case: "hidden" ends before the head, "logp" after it.
    """
    M, with_head = rows * tokens, case == "logp"
    flop = families.count_forward_flops(config, M, (tokens + 1) / 2, with_head)
    moved = count_weights(config, with_head) * jnp.dtype(dtype).itemsize
    return {"tokens": M, "flop": flop, "bytes": moved}


def count_loss(student: Config, teacher: Config, rows: int, tokens: int, dtype: str) -> JsonDict:
    """Returns the tokens of a reverse KL with its gradients, and its FLOPs and bytes.

    FLOPs: three products with the student's head, one with the teacher's. Bytes: heads and hidden
    states are read, the student's twice, and the student's gradients are written.
    """
    M, V, itemsize = rows * tokens, student.vocab_size, jnp.dtype(dtype).itemsize
    D, E = student.hidden_size, teacher.hidden_size
    # The student's head is float32.
    moved = D * (V * 12 + M * 3 * itemsize) + E * (V + M) * itemsize
    return {"tokens": M, "flop": 2 * M * V * (3 * D + E), "bytes": moved}


def count_decode_bytes(config: Config, rows: int, filled: float, dtype: str) -> float:
    """Counts the least bytes that a decoding step reads: all weights, and `filled` tokens in the
    cache of each row, once."""
    cached = families.count_cache_token_bytes(config, 1, jnp.dtype(dtype))
    return count_weights(config) * jnp.dtype(dtype).itemsize + rows * filled * cached
