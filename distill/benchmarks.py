"""The problems that a model is judged by, and responses to them that somebody stored."""

from distill import arithmetic, data, rewards
from models.errors import UserError

PROBLEM_SEED = 20_000  # of the generated test problems: the same ones in every evaluation
ARITHMETIC_PROBLEMS = 1000

Row = dict[str, object]


def problems(benchmark: str, path: str, limit: int) -> list[tuple[str, Row]]:
    """(name, row) of each problem; a row has id, question (or messages) and answer.

    Raises:
      UserError: for an unknown benchmark, no data where it needs some, or a row without an answer.
    """
    if benchmark not in rewards.GRADERS:
        raise UserError(f"--benchmark={benchmark}: known are {', '.join(rewards.GRADERS)}")
    if benchmark == "arithmetic" and not path:
        return [_generated(i) for i in range(limit or ARITHMETIC_PROBLEMS)]
    if not path:
        raise UserError(f"--data: {benchmark} needs a jsonl file of question and answer")
    rows, names = data.read_jsonl(path), set()
    for number, (where, row) in enumerate(rows):
        if not isinstance(row.get("answer"), str | int | float):
            raise UserError(f"{where}: no answer among its fields {sorted(row)}")
        row["answer"] = str(row["answer"])
        name = str(row.setdefault("id", f"{benchmark}-{number}"))
        if name in names:
            raise UserError(f"{where}: id {name!r} is that of an earlier row")
        names.add(name)
    return rows[: limit or None]


def _generated(index: int) -> tuple[str, Row]:
    p = arithmetic.problem(PROBLEM_SEED, index, "test", (3, 5))
    name = f"arithmetic-test-{index}"
    return name, {"id": name, "question": p.question, "answer": p.answer, "level": p.operations}


def stored(path: str, rows: list[tuple[str, Row]]) -> list[Row]:
    """Responses from a file, each with its answer: its own, or that of the problem it names."""
    answers = {
        str(row.get(field)): row["answer"] for _, row in rows for field in ("id", "question")
    }
    found = []
    for number, (where, row) in enumerate(data.read_jsonl(path)):
        if not isinstance(row.get("response"), str):
            raise UserError(f"{where}: no response among its fields {sorted(row)}")
        name = next((str(row[f]) for f in ("id", "question") if row.get(f) is not None), None)
        answer = row.get("answer", answers.get(name) if name else None)
        if answer is None:
            raise UserError(f"{where}: no answer, and no problem of --data matches it")
        found.append(
            {"id": name or f"row-{number}", "answer": str(answer), "response": row["response"]}
        )
    return found
