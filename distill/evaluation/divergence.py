"""How far a student is from its teacher, on responses that were written before."""

import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from distill import rollout
from distill.batch import TeacherOutput
from distill.data import collate, dataset
from distill.objectives import fused_head, losses
from distill.policy import forward, policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from models import transformer

Record = dict[str, object]


def compute_reverse_kl(
    subject: Policy, teacher: Policy, rows: Iterable[Record], batch_size: int
) -> float:
    """Mean exact KL(subject‖teacher) in nats a token, over the tokens that `rows` hold, which are
    gone through twice.

    On the subject's own samples at temperature 1 this is what on-policy distillation lowers.
    """

    def iter_examples() -> Iterator[dataset.Example]:
        for row in rows:
            yield dataset.Example(row["prompt_tokens"], row["tokens"], "", str(row["id"]))  # type: ignore[arg-type]

    width = rollout.bucket_length(max(len(e.prompt) + len(e.response) for e in iter_examples()))
    mesh = policy.get_mesh(subject)
    batch_size = -(-batch_size // mesh.size) * mesh.size

    @jax.jit
    def compute_kl_sum(params, teacher_params, batch):
        inputs = fused_head.HeadInputs(
            forward.compute_hidden(subject.model, params, batch),
            transformer.get_output_head(params),
            losses.shift(batch.tokens_BT),
            teacher=TeacherOutput(
                hidden_BTE=(forward.compute_hidden(teacher.model, teacher_params, batch),),
                heads_VE=(transformer.get_output_head(teacher_params),),
            ),
        )
        options = fused_head.StatsOptions(128.0 * mesh.size, split=mesh_lib.split_vocabulary)
        stats = fused_head.compute_token_stats(inputs, options)
        mask_BT = losses.shift(batch.mask_BT).astype(jnp.float32)
        return jnp.sum(stats["reverse_kl"] * mask_BT), jnp.sum(mask_BT)

    total = count = 0.0
    remaining = iter_examples()
    while chunk := list(itertools.islice(remaining, batch_size)):
        padding_example = dataset.Example([], [], "", "padding")
        batch = collate.collate_padded(
            chunk + [padding_example] * (batch_size - len(chunk)), 0, width
        )
        batch = jax.tree.map(
            lambda x: mesh_lib.to_global_array(x, mesh_lib.make_row_sharding(mesh)), batch
        )
        kl, tokens = compute_kl_sum(subject.params, teacher.params, batch)
        total, count = total + float(kl), count + float(tokens)
    return total / count
