"""Loads a benchmark's problems, and stored responses to them, from files or data sets."""

import functools
import itertools
import re

from distill.data import answers, canonical, columns, sources, values
from distill.evaluation import tasks
from distill.evaluation.tasks.task import NAME_FIELDS, ROW_NUMBER, Record, Task, find_id
from distill.runtime import run_files
from models.errors import UserError, suggest

_DATE = re.compile(r"\d{4}-\d{2}(?:-\d{2})?")

Problems = list[tuple[str, Record]]  # (location of the row, its fields)


def require_task(benchmark: str) -> Task:
    """Returns the task with this name.

    Raises UserError if it is unknown or its grader is not installed.
    """
    if benchmark not in tasks.BENCHMARKS:
        known, hint = ", ".join(tasks.BENCHMARKS), suggest(benchmark, tasks.BENCHMARKS)
        raise UserError(f"--benchmark={benchmark}: known are {known}{hint}")
    task = tasks.BENCHMARKS[benchmark]
    task.require_installed()
    if line := task.describe_grader():
        _say_once(line)
    return task


@functools.cache
def _say_once(line: str) -> None:
    run_files.log_line(line)


def load_problems(benchmark: str, source: str, limit: int, window: str = "") -> Problems:
    """Loads the first `limit` problems (0: all); each row has id, question or messages, and answer.

    `window` FROM:UNTIL keeps those of these months or days, both included ("2024-10:2025-02").

    `source` is anything that `sources.open_rows` reads; a bare hf: or tfds: stands for the
    benchmark's own set.

    Raises:
      UserError: for an unknown benchmark, missing data, or a row without an answer.
    """
    task = require_task(benchmark)
    if task.make_problem and not source:
        if window:
            raise UserError(f"--window={window}: {benchmark} has no dates")
        rows = map(task.make_problem, range(limit or task.num_problems))
        return [(row["id"], row) for row in rows]
    if not source:
        raise UserError(
            f"--data: {benchmark} needs a jsonl file of question and answer, "
            "or hf:NAME:CONFIG:SPLIT"
        )
    own_sources = (source,)
    if source in ("hf:", "tfds:"):
        own_source = task.hf if source == "hf:" else task.tfds
        if not own_source:
            raise UserError(
                f"--data={source}: no set is named for {benchmark}: {source}NAME::SPLIT"
            )
        own_sources = (own_source,) if isinstance(own_source, str) else own_source
    problems, names, num_left_out = [], set(), 0
    located_rows = itertools.chain.from_iterable(map(sources.open_rows, own_sources))
    for number, (where, published_row) in enumerate(located_rows):
        row = _read_problem(task, {**published_row, ROW_NUMBER: number}, where)
        if row is None:
            num_left_out += 1
            continue
        name = str(row.setdefault("id", f"{benchmark}-{number}"))
        if name in names:
            raise UserError(f"{where}: repeats the id {name!r} of an earlier row")
        names.add(name)
        if not window or _is_within(row, window, where):
            problems.append((where, row))
    if num_left_out:
        run_files.log_line(
            f"{benchmark}: {num_left_out:,} rows of {source} are left out, as they have no right "
            f"answer, or several; {len(problems):,} problems"
        )
    if not problems:
        if window:
            raise UserError(f"--window={window}: no problem of {source} is of that time")
        raise UserError(f"{source}: no problem of {benchmark} among its rows")
    return problems[: limit or None]


def _is_within(row: Record, window: str, where: str) -> bool:
    """Returns True if a problem's date lies within a window. Raises UserError without a date."""
    first, colon, last = window.partition(":")
    if not colon or not all(_DATE.fullmatch(date) for date in (first, last)):
        raise UserError(f"--window={window}: is no FROM:UNTIL of months or days, 2024-10:2025-02")
    date = row.get("date")
    if not isinstance(date, str) or not _DATE.fullmatch(date):
        raise UserError(f"--window={window}: {where} has no date")
    return first <= date and date[: len(last)] <= last


def _read_problem(task: Task, row: Record, where: str) -> Record | None:
    """Reads a published row; None if the benchmark leaves it out.

    Raises UserError naming it if it cannot be read, or has no answer.
    """
    if task.adapt_row:
        return task.adapt_row(row, where)
    row.pop(ROW_NUMBER)
    row = canonical.canonicalize_row(row, "", where, False)
    return {**row, **find_id(row), "answer": answers.require_answer(row, where)}


def adapt_prompt_row(benchmark: str, row: Record, where: str) -> Record:
    """Returns a training row in the benchmark's published form with the question and the answer
    that its grader compares, beside its other columns; a row in another form as it is.

    Raises UserError naming the row if it cannot be read.
    """
    task = tasks.BENCHMARKS[benchmark]
    names = (task.answer_field, "answers", *columns.OPTIONS)
    if task.adapt_row is None or all(row.get(name) is None for name in names):
        return row
    adapted = task.adapt_row(row, where)
    if adapted is None:
        raise UserError(f"{where}: {benchmark} leaves this row out")
    stale = {*columns.PROMPTS, *columns.OPTIONS}
    return {k: v for k, v in row.items() if k not in stale} | adapted


def check_gradable(benchmark: str, problems: Problems) -> None:
    """Raises UserError if responses to some of the problems cannot be graded on this machine."""
    answers = [str(row["answer"]) for _, row in problems]
    if reason := tasks.BENCHMARKS[benchmark].explain_ungradable(answers):
        raise UserError(f"--benchmark={benchmark}: {reason}")


def render_question(benchmark: str, row: Record, template: str = "") -> Record:
    """Returns the row with its question rendered by `template`, or by the benchmark's own one.

    Rows without a question (messages, prompts, token ids) are returned unchanged; where a question
    is the last user's turn of messages, too, that is rendered.
    """
    return canonical.apply_template(row, template or tasks.BENCHMARKS[benchmark].prompt)


def _read_own_answer(task: Task, row: Record, where: str) -> str:
    """Reads the answer that a stored response brings; "" if it has none.

    Raises UserError naming the row if what it brings is none.
    """
    value = row.get(task.answer_field)
    if value is None or value != value:  # null or NaN
        return ""
    if task.adapt_row:
        adapted = task.adapt_row(row, where)
        return adapted["answer"] if adapted else ""
    return answers.require_answer({**row, "answer": canonical.find_answer(row) or value}, where)


def load_responses(benchmark: str, path: str, problems: Problems) -> list[Record]:
    """Loads stored responses, each with its own answer or the answer of the problem it names.

    Raises UserError for an unknown benchmark, or a row without a response or an answer.
    """
    task = require_task(benchmark)
    known_answers = {
        str(row.get(field)): row["answer"] for _, row in problems for field in ("id", "question")
    }
    responses = []
    for number, (where, row) in enumerate(sources.open_rows(path)):
        if not isinstance(row.get("response"), str):
            raise UserError(f"{where}: no response among its fields {sorted(row)}")
        names = [str(row[f]) for f in NAME_FIELDS if isinstance(row.get(f), str | int)]
        known = next((known_answers[name] for name in names if name in known_answers), "")
        answer = _read_own_answer(task, row, where) or known or canonical.find_answer(row)
        if not answer:
            raise UserError(f"{where}: has no answer, and matches no problem of --data")
        name = names[0] if names else f"row-{number}"
        values.require_characters(row["response"], f"{where}: response")
        responses.append({"id": name, "answer": str(answer), "response": row["response"]})
    return responses
