"""The problems of a benchmark, and stored responses to them, from files or hub sets."""

from distill.data import sources
from distill.evaluation import tasks
from distill.evaluation.tasks.task import NAME_FIELDS, Record, Task
from models.errors import UserError

Problems = list[tuple[str, Record]]  # (where the row stands, its fields)


def require_task(benchmark: str) -> Task:
    """Returns the task of this name.

    Raises UserError if it is unknown, or if its grader is not installed.
    """
    if benchmark not in tasks.BENCHMARKS:
        raise UserError(f"--benchmark={benchmark}: known are {', '.join(tasks.BENCHMARKS)}")
    task = tasks.BENCHMARKS[benchmark]
    task.require_installed()
    return task


def load_problems(benchmark: str, source: str, limit: int) -> Problems:
    """Loads the first `limit` problems (0: all); each row has id, question or messages, and answer.

    `source` is what `sources.open_rows` reads; hf: or tfds: alone is the benchmark's own set.

    Raises:
      UserError: for an unknown benchmark, no data where it needs some, or a row without an answer.
    """
    task = require_task(benchmark)
    if task.make_problem and not source:
        rows = map(task.make_problem, range(limit or task.num_problems))
        return [(row["id"], row) for row in rows]
    if not source:
        raise UserError(
            f"--data: {benchmark} needs a jsonl file of question and answer, "
            "or hf:NAME:CONFIG:SPLIT"
        )
    if source in ("hf:", "tfds:"):
        own_source = task.hf if source == "hf:" else task.tfds
        if not own_source:
            raise UserError(
                f"--data={source}: no set is named for {benchmark}: {source}NAME::SPLIT"
            )
        source = own_source
    problems, names = [], set()
    for number, (where, published_row) in enumerate(sources.open_rows(source)):
        row = task.adapt_row(published_row, where)
        name = str(row.setdefault("id", f"{benchmark}-{number}"))
        if name in names:
            raise UserError(f"{where}: id {name!r} is that of an earlier row")
        names.add(name)
        problems.append((where, row))
    return problems[: limit or None]


def check_gradable(benchmark: str, problems: Problems) -> None:
    """Raises UserError if responses to some of these problems cannot be graded on this machine."""
    answers = [str(row["answer"]) for _, row in problems]
    if reason := tasks.BENCHMARKS[benchmark].explain_ungradable(answers):
        raise UserError(f"--benchmark={benchmark}: {reason}")


def render_question(benchmark: str, row: Record, template: str = "") -> Record:
    """Returns the row with its question put by `template`, or in the benchmark's own way.

    Rows of messages, prompts and ids stay as they are.
    """
    template = template or tasks.BENCHMARKS[benchmark].prompt
    if "question" not in row:
        return row
    return {**row, "question": template.replace("{question}", str(row["question"]))}


def load_responses(benchmark: str, path: str, problems: Problems) -> list[Record]:
    """Loads stored responses, each with its own answer or that of the problem it names.

    Raises UserError for an unknown benchmark, or a row without response or answer.
    """
    task = require_task(benchmark)
    answers = {
        str(row.get(field)): row["answer"] for _, row in problems for field in ("id", "question")
    }
    responses = []
    for number, (where, row) in enumerate(sources.open_rows(path)):
        if not isinstance(row.get("response"), str):
            raise UserError(f"{where}: no response among its fields {sorted(row)}")
        names = [str(row[f]) for f in NAME_FIELDS if isinstance(row.get(f), str | int)]
        answer = next((answers[name] for name in names if name in answers), None)
        if row.get(task.answer_field) is not None:
            answer = task.adapt_row(row, where)["answer"]
        if answer is None:
            raise UserError(f"{where}: no answer, and no problem of --data matches it")
        name = names[0] if names else f"row-{number}"
        responses.append({"id": name, "answer": str(answer), "response": row["response"]})
    return responses
