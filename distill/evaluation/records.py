"""The folder of an evaluation: row keys, resumption, and what is read back from it.

examples.jsonl has one row per response, in the order of the problems, and nothing that depends on
time or on where the work was interrupted. protocol.json records how the responses were made, and
is written first.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from distill.evaluation import statistics
from distill.evaluation.example_rows import EXAMPLES_FILE, drop_bulky_fields
from distill.evaluation.tasks.task import Task
from distill.policy.policy import Policy
from distill.runtime import distributed, environment, paths, run_files
from distill.runtime.integrity import compute_checksum
from models.errors import UserError

Record = dict[str, Any]

PROTOCOL_FILE = "protocol.json"

# Of every sampled response.
_FIELDS = {"id", "sample", "answer", "response", "length", "finish_reason", "outcome", "correct"}

MAX_TRANSCRIPTS = 10  # responses that are printed
_ROWS_PER_BROADCAST = 64  # rows that the first process sends to the others at once


def fingerprint_params(params: Any) -> str:
    """Hashes all parameters to 16 hexadecimal digits, which do not depend on the mesh."""
    sums = jax.device_get(compute_checksums(jax.tree.leaves(params)))
    return hashlib.sha256(repr([int(s) for s in sums]).encode()).hexdigest()[:16]


@jax.jit
def compute_checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [compute_checksum(x) for x in leaves]


def hash_content(*content: object) -> str:
    return hashlib.sha256(run_files.to_json(content).encode()).hexdigest()


# Fields that do not affect a response (the model's location, and how many problems there are) or
# that only protocol.json needs to tell apart.
_UNHASHED_FIELDS = ("model", "step", "problems", "problems_sha256", "tokenizer")


def make_row_keys(
    protocol: Record, rows: list[tuple[str, Record]], samples: int
) -> list[list[str]]:
    """Returns the key of each sample of each problem: a hash of the problem, the protocol (with the
    fingerprint of the weights) and the sample's number."""
    hashed_protocol = {k: v for k, v in protocol.items() if k not in _UNHASHED_FIELDS}
    return [
        [hash_content(hashed_protocol, row, number)[:16] for number in range(samples)]
        for _, row in rows
    ]


def _require_same_evaluation(
    out_dir: epath.Path, protocol: Record, rows: list[tuple[str, Record]]
) -> None:
    """Raises UserError if `out_dir` holds another evaluation.

    One of the first problems of this evaluation may be continued.
    """
    protocol_path = out_dir / PROTOCOL_FILE
    if not protocol_path.is_file():
        if (out_dir / EXAMPLES_FILE).is_file():
            raise UserError(
                f"{out_dir} holds stored responses that were graded, not this evaluation"
            )
        return
    try:
        stored_protocol = dict(json.loads(protocol_path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{protocol_path}: no protocol of an evaluation ({error})") from None
    current_protocol, count = dict(protocol), stored_protocol.get("problems")
    if isinstance(count, int) and 0 < count < len(rows):
        current_protocol |= {
            "problems": count,
            "problems_sha256": hash_content([row for _, row in rows[:count]]),
        }
    # Fields that an earlier version did not record are passed over.
    changed = next((k for k, x in stored_protocol.items() if x != current_protocol.get(k)), None)
    if changed is not None:
        raise UserError(
            f"{out_dir} holds another evaluation: {changed} was {stored_protocol.get(changed)!r}, "
            f"now {protocol.get(changed)!r}"
        )


def resume_evaluation(
    out_dir: epath.Path, protocol: Record, rows: list[tuple[str, Record]], keys: list[list[str]]
) -> int:
    """Returns how many problems are complete in examples.jsonl, and drops the rows after them."""
    _require_same_evaluation(out_dir, protocol, rows)
    path, samples, count = out_dir / EXAMPLES_FILE, len(keys[0]), 0
    for row, key in zip(_iter_rows(path), itertools.chain(*keys), strict=False):
        count += 1
        if row.get("key") != key or not _has_fields(row):
            raise UserError(f"{path}:{count}: not a row of this evaluation ({row.get('id')!r})")
    out_dir.mkdir(parents=True, exist_ok=True)
    run_files.write_json(out_dir / PROTOCOL_FILE, protocol)
    run_files.write_jsonl(path, itertools.islice(_iter_rows(path), count // samples * samples))
    return count // samples


def _has_fields(row: Record) -> bool:
    """Returns True if a row has what the summary and the transcripts read."""
    return row.keys() >= _FIELDS and type(row["length"]) is int and isinstance(row["response"], str)


def _iter_rows(path: epath.Path) -> Iterator[Record]:
    """Yields the rows of a jsonl file lazily; none if there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                row = None
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                if isinstance(row, dict):  # a killed run may leave a partial last line
                    yield row


class StoredRows:
    """The rows of an evaluation, iterable in every process.

    Each iteration reads the file again, in the first process, which broadcasts a few rows at a
    time.
    """

    def __init__(self, out_dir: epath.Path) -> None:
        self._path = out_dir / EXAMPLES_FILE

    def __iter__(self) -> Iterator[Record]:
        rows = _iter_rows(self._path)
        while chunk := distributed.broadcast_from_primary(
            lambda: list(itertools.islice(rows, _ROWS_PER_BROADCAST))
        ):
            yield from chunk


def summarise_evaluation(out_dir: epath.Path, task: Task, ks: Sequence[int]) -> Record:
    """Returns the statistics of an evaluation's rows."""
    rows = [drop_bulky_fields(row) for row in _iter_rows(out_dir / EXAMPLES_FILE)]
    return statistics.summarise_rows(rows, ks) | task.summarise(rows)


def render_transcripts(rows: list[tuple[str, Record]], examples_path: epath.Path) -> str:
    """Renders the first responses of an evaluation with their questions, for reading."""
    questions = {str(row["id"]): row.get("question", "") for _, row in rows}
    blocks = []
    for row in itertools.islice(_iter_rows(examples_path), MAX_TRANSCRIPTS):
        head = f"--- {row['id']}, sample {row['sample']}: {row['outcome']}"
        wanted = f"(wanted {row['answer']}; {row['length']} tokens, {row['finish_reason']})"
        question = questions.get(str(row["id"]), "")
        texts = [_indent("Q", question), _indent("A", row["response"])]
        blocks.append("\n".join([f"{head} {wanted}", *texts, ""]))
    return paths.escape_controls("\n".join(blocks))


def _indent(letter: str, text: object) -> str:
    """Returns a text after a letter, all its lines below each other."""
    return f"{letter}  " + "\n   ".join(str(text).splitlines())


COST_FIELDS = ("seconds", "seconds_per_problem", "tokens_per_second", "memory")


def read_cost(out_dir: epath.Path, default: Record) -> Record:
    """Returns the measured cost of an evaluation that is finished, from its summary.json; that of
    `default` if there is none."""
    path, summary = out_dir / "summary.json", {}
    if path.is_file():
        with contextlib.suppress(ValueError, TypeError):
            summary = dict(json.loads(path.read_bytes()))
    return {name: summary.get(name, default[name]) for name in COST_FIELDS}


def measure_speed(seconds: float, problems: int, tokens: int) -> Record:
    """Returns the speed of this process; null if nothing was left to do."""
    return {
        "seconds": seconds,
        "seconds_per_problem": seconds / problems if problems else None,
        "tokens_per_second": tokens / seconds if tokens else None,
    }


def measure_cost(subject: Policy, seconds: float, problems: int, tokens: int) -> Record:
    """Measures the cost of running the model: speed of this process, memory, and size of the
    parameters as loaded."""
    return {
        **measure_speed(seconds, problems, tokens),
        "memory": environment.measure_memory(),
        "parameters": subject.config.num_parameters,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(subject.params)),
    }
