"""The folder of an evaluation: what names its rows, what may go on in it, what is read from it.

examples.jsonl has a row a response, in the order of the problems, and nothing that depends on time
or on where the work was interrupted; protocol.json says how they came about, and is written first.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from distill.evaluation import statistics
from distill.policy.policy import Policy
from distill.runtime import distributed, run_files
from distill.runtime.checkpoint import checksum
from models.errors import UserError

Row = dict[str, Any]

EXAMPLES = "examples.jsonl"

_SHOWN = 10  # responses in a quick look
_TOGETHER = 64  # rows that one process tells the others at a time


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits of all parameters: the same on any mesh, of no other checkpoint."""

    @jax.jit
    def checksums(leaves: list[jax.Array]) -> list[jax.Array]:
        return [checksum(x) for x in leaves]

    sums = checksums(jax.tree.leaves(params))
    return hashlib.sha256(repr([int(s) for s in sums]).encode()).hexdigest()[:16]


def digest(*content: object) -> str:
    return hashlib.sha256(run_files.dumps(content).encode()).hexdigest()


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
) -> int:
    """How many problems are complete in OUT/examples.jsonl, which keeps the rows of just these."""
    _refuse_another(out, protocol, rows)
    path, samples, count = out / EXAMPLES, len(keys[0]), 0
    for row, key in zip(_rows(path), itertools.chain(*keys), strict=False):
        count += 1
        if row.get("key") != key:
            raise UserError(f"{path}:{count}: not a row of this evaluation ({row.get('id')!r})")
    out.mkdir(parents=True, exist_ok=True)
    run_files.write_json(out / "protocol.json", protocol)
    run_files.write_jsonl(path, itertools.islice(_rows(path), count // samples * samples))
    return count // samples


def _rows(path: epath.Path) -> Iterator[Row]:
    """The rows of a jsonl file, read as they are asked for; none where there is no file."""
    if path.is_file():
        with path.open() as file:
            for line in file:
                with contextlib.suppress(ValueError):  # a killed run may leave half a last line
                    yield json.loads(line)


class Stored:
    """The rows of an evaluation in every process: the first reads them, anew each time that they
    are gone through, and few are held at a time."""

    def __init__(self, out: epath.Path) -> None:
        self._path = out / EXAMPLES

    def __iter__(self) -> Iterator[Row]:
        rows = _rows(self._path)
        while some := distributed.from_primary(lambda: list(itertools.islice(rows, _TOGETHER))):
            yield from some


_BULKY = ("prompt_tokens", "tokens", "response")


def brief(row: Row) -> Row:
    """A row without what nothing is counted of, so that all rows of an evaluation can be held."""
    return {name: x for name, x in row.items() if name not in _BULKY}


def summarise(out: epath.Path, ks: list[int]) -> Row:
    """What the rows of an evaluation amount to."""
    return statistics.summarise([brief(row) for row in _rows(out / EXAMPLES)], ks)


def transcripts(rows: list[tuple[str, Row]], examples: epath.Path) -> str:
    """The first responses of an evaluation with their questions, to be read."""
    questions = {str(row["id"]): row.get("question", "") for _, row in rows}
    said = []
    for row in itertools.islice(_rows(examples), _SHOWN):
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
        "memory": run_files.memory(),
        "parameters": subject.config.num_parameters,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(subject.params)),
    }
