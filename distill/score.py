"""python -m distill.score --model=DIR --tokens=FILE.jsonl --out=FILE.jsonl: log-probabilities.

Each row of FILE has `tokens` (ids). OUT has the same rows in the same order, with `logprobs`: one
number a token, the log-probability (temperature 1) of that token after those before it; the first
is null. With --top_k=K also `top`: for each token the K most likely ones at its place, a list of
[id, logprob] from the most likely down; the first is null.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from distill import cli, data, forward, head, layout, losses, metrics, policy, rollout, sources
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.policy import Policy
from models.errors import UserError
from models.qwen3 import model
from models.qwen3.model import Params, Qwen3

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", None, "Model directory, hub id or run directory.", OPTIONS, required=True
)
TOKENS = flags.DEFINE_string("tokens", None, "jsonl of token ids.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Most likely tokens to list at each place.", lower_bound=0, flag_values=OPTIONS
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Rows scored together.", lower_bound=1, flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    policy.PARAM_DTYPES,
    "Of parameters and computation; 8 bits are those of the layers' kernels alone. "
    "Default: bfloat16, but float32 on CPU, where it is faster.",
    flag_values=OPTIONS,
)

LOGITS_MIB = 128.0  # float32 logits of one chunk on a device

Logprobs = list[float | None]
Top = list[list[list[float]] | None]  # [id, logprob] pairs of each token


@functools.partial(jax.jit, static_argnames=("qwen3", "top_k", "logits_mib"))
def _stats(
    qwen3: Qwen3, params: Params, batch: Batch, top_k: int, logits_mib: float
) -> losses.Stats:
    return head.token_stats(
        forward.hidden(qwen3, params, batch),
        model.head(params),
        losses.shift(batch.tokens_BT),
        logits_mib=logits_mib,
        split=mesh_lib.split_vocabulary,
        top_k=top_k,
    )


def tokens(subject: Policy, rows: Iterable[tuple[str, dict]]) -> data.TokenLists:
    """The `tokens` of each row. Reads no parameters of `subject`.

    Raises:
      UserError: naming the first row without tokens that the model can read.
    """
    limit = subject.config.context_length
    found = data.TokenLists()
    for where, row in rows:
        if "tokens" not in row:
            raise UserError(f"{where}: no tokens among its fields {sorted(row)}")
        ids = data.prompt_tokens(row, where, None, None)
        data.require_ids(ids, subject.config.vocab_size, where)
        if len(ids) > limit:
            raise UserError(f"{where}: {len(ids)} tokens exceed the model's {limit} positions")
        found.append(ids)
    return found


def score(
    subject: Policy, sequences: Sequence[list[int]], *, batch_size: int, top_k: int = 0
) -> Iterator[tuple[Logprobs, Top]]:
    """Yields (logprobs, top) of each sequence, both as long as it and first null; `top` is empty
    without top_k. Within `policy.use(subject)`.

    A batch is as wide as the bucket of its longest row: one compilation for each width met.
    """
    mesh = policy.mesh_of(subject)
    shards = mesh_lib.row_shards(mesh)
    size = -(-min(batch_size, len(sequences)) // shards) * shards
    for start in range(0, len(sequences), size):
        chunk = sequences[start : start + size]
        width = rollout.bucket(max(map(len, chunk)))
        examples = [data.Example(ids, [], "", "") for ids in chunk]
        examples += [data.Example([], [], "", "")] * (size - len(chunk))
        batch = jax.device_put(layout.traces(examples, width, 0), mesh_lib.rows(mesh))
        stats = _stats(subject.model, subject.params, batch, top_k, LOGITS_MIB * mesh.size)
        host = {name: jax.device_get(x) for name, x in stats.items() if name != "entropy"}
        for row, ids in enumerate(chunk):
            # Column t is about token t + 1.
            of_row = {name: x[row, : len(ids) - 1].tolist() for name, x in host.items()}
            top: Top = []
            if top_k:
                places = zip(of_row["top_ids"], of_row["top_logp"], strict=True)
                top = [None, *([[i, x] for i, x in zip(*k, strict=True)] for k in places)]
            yield [None, *of_row["logp"]], top


def main() -> None:
    rows = sources.open_rows(TOKENS.value)
    subject = policy.reader(MODEL.value, DTYPE.value if DTYPE.value in policy.DTYPES else "")
    out = cli.output(OUT.value)
    if TOP_K.value > subject.config.vocab_size:
        raise UserError(
            f"--top_k={TOP_K.value}: the model's vocabulary has {subject.config.vocab_size} tokens"
        )
    ids = tokens(subject, rows)

    def scored() -> Iterator[dict]:
        found = score(subject, ids, batch_size=BATCH_SIZE.value, top_k=TOP_K.value)
        with metrics.progress(len(rows), 0, "score") as bar:
            for number, ((_, row), (logprobs, top)) in enumerate(zip(rows, found, strict=True)):
                yield {**row, "logprobs": logprobs, **({"top": top} if TOP_K.value else {})}
                bar.update(number + 1, {})

    with policy.use(subject):
        subject = policy.load(subject, DTYPE.value or jnp.dtype(subject.model.dtype).name)
        metrics.write_jsonl(out, scored())


if __name__ == "__main__":
    cli.run(main, OPTIONS)
