"""The folder of an evaluation: what names its rows, what may go on in it, what is read from it.

examples.jsonl has a row a response, in the order of the problems, and nothing that depends on time
or on where the work was interrupted; protocol.json says how they came about, and is written first.
"""

import contextlib
import hashlib
import itertools
import json
from typing import Any

import jax
from etils import epath

from distill import metrics
from distill.checkpoint import checksum
from distill.policy import Policy
from models.errors import UserError

Row = dict[str, Any]

_SHOWN = 10  # responses in a quick look


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits of all parameters: the same on any mesh, of no other checkpoint."""
    sums = jax.jit(lambda leaves: [checksum(x) for x in leaves])(jax.tree.leaves(params))
    return hashlib.sha256(repr([int(s) for s in sums]).encode()).hexdigest()[:16]


def digest(*content: object) -> str:
    return hashlib.sha256(metrics.dumps(content).encode()).hexdigest()


# What does not change a response: where the parameters lie, and how many other problems there are.
_OUTWARD = ("model", "step", "problems", "problems_sha256")


def row_keys(protocol: Row, rows: list[tuple[str, Row]], samples: int) -> list[list[str]]:
    """What names each sample of each problem: a hash of the problem, the protocol with the weights,
    and the number."""
    manner = {k: v for k, v in protocol.items() if k not in _OUTWARD}
    return [[digest(manner, row, number)[:16] for number in range(samples)] for _, row in rows]


def _refuse_another(out: epath.Path, protocol: Row, rows: list[tuple[str, Row]]) -> None:
    """Raises UserError if OUT holds another evaluation: not this, nor one of its first problems."""
    said = out / "protocol.json"
    if not said.is_file():
        if (out / "examples.jsonl").is_file():
            raise UserError(f"{out} holds stored responses that were graded, not this evaluation")
        return
    before = json.loads(said.read_text())
    now, count = dict(protocol), before.get("problems")
    if isinstance(count, int) and 0 < count < len(rows):
        now |= {"problems": count, "problems_sha256": digest([row for _, row in rows[:count]])}
    if before != now:
        changed = next(k for k in now | before if before.get(k) != now.get(k))
        raise UserError(
            f"{out} holds another evaluation: {changed} was {before.get(changed)!r}, "
            f"now {protocol.get(changed)!r}"
        )


def resume(
    out: epath.Path, protocol: Row, rows: list[tuple[str, Row]], keys: list[list[str]]
) -> list[Row]:
    """Rows of complete problems in OUT/examples.jsonl, which keeps just these."""
    _refuse_another(out, protocol, rows)
    path, samples = out / "examples.jsonl", len(keys[0])
    kept: list[Row] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # a killed run may leave half a last line
            kept.append(json.loads(line))
    for number, (row, key) in enumerate(zip(kept, itertools.chain(*keys), strict=False), start=1):
        if row.get("key") != key:
            raise UserError(f"{path}:{number}: not a row of this evaluation ({row.get('id')!r})")
    out.mkdir(parents=True, exist_ok=True)
    metrics.write_json(out / "protocol.json", protocol)
    kept = kept[: len(kept) // samples * samples]
    metrics.write_jsonl(path, kept)
    return kept


def transcripts(rows: list[tuple[str, Row]], examples: epath.Path) -> str:
    """The first responses of an evaluation with their questions, to be read."""
    questions = {str(row["id"]): row.get("question", "") for _, row in rows}
    said = []
    for line in examples.read_text().splitlines()[:_SHOWN]:
        row = json.loads(line)
        head = f"--- {row['id']}, sample {row['sample']}: {row['outcome']}"
        wanted = f"(wanted {row['answer']}; {row['length']} tokens, {row['finish_reason']})"
        said.append(f"{head} {wanted}\n{questions[row['id']]}\n>>>\n{row['response']}\n")
    return "\n".join(said)


def cost(subject: Policy, seconds: float, problems: int, tokens: int) -> Row:
    """What it takes to run the model: the pace of what this process did (null where nothing was
    left to do), memory, and the size of the parameters as they were held."""
    return {
        "seconds": seconds,
        "seconds_per_problem": seconds / problems if problems else None,
        "tokens_per_second": tokens / seconds if tokens else None,
        "memory": metrics.memory(),
        "parameters": subject.config.num_parameters,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(subject.params)),
    }
