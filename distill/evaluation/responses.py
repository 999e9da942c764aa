"""A model's responses to problems, and what graders and the text itself say of them, as rows.

A row is one response, as examples.jsonl keeps it; a problem's samples come together, in order.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from distill import rollout
from distill.data import dataset
from distill.evaluation import statistics
from distill.policy.policy import Policy
from distill.rewards import graders, terms
from distill.runtime import run_files
from models.errors import UserError

Record = dict[str, Any]

MAX_WAITING_GROUPS = 256  # problems that graders are behind the sampler, which then waits

_MAX_ANSWER_CHARACTERS = graders.MAX_ANSWER_CHARACTERS


def add_grade(row: Record, grade: graders.Grade) -> Record:
    """The row with what a grader said of its `response`, and what the text alone shows."""
    text, outcome = str(row["response"]), grade["outcome"]
    answer = None if outcome == "no_answer" else graders.extract_answer(text)
    return {
        **row,
        "correct": outcome == "correct",
        # Of instructions there is no one answer to vote for.
        **({} if "strict" in grade else {"found": answer and answer[:_MAX_ANSWER_CHARACTERS]}),
        **grade,
        "formatted": graders.strip_thinking(text) is not None and outcome != "no_answer",
        "repeats": statistics.is_repetitive(text),
    }


def grade_rows(grader: graders.Grader, benchmark: str, rows: list[Record]) -> list[Record]:
    """Rows with `response` and `answer`, plus outcome, correct, formatted, repeats and found."""
    futures = [grader.submit(benchmark, str(r["response"]), str(r["answer"])) for r in rows]
    return [add_grade(row, graders.wait_for_grade(f)) for row, f in zip(rows, futures, strict=True)]


def sample(
    subject: Policy,
    rows: list[tuple[str, Record]],
    prompts: dataset.TokenLists,
    spec: rollout.SampleSpec,
    first_problem: int,
) -> Iterator[list[Record]]:
    """Yields the sampled responses of each problem from number `first_problem` on."""
    assert subject.tokenizer is not None
    completion_groups = rollout.complete(
        subject, prompts[first_problem:], spec, first=first_problem
    )
    for number, completions in enumerate(completion_groups, start=first_problem):
        where, row = rows[number]
        if any(c.finish_reason == "error" for c in completions):
            raise UserError(f"{where}: the model's logits are NaN")
        yield [
            {
                "id": row["id"],
                "sample": sample,
                "answer": row["answer"],
                "response": subject.tokenizer.decode(c.tokens, skip_special_tokens=True),
                "length": len(c.tokens),
                "finish_reason": c.finish_reason,
                "prompt_tokens": prompts[number],
                "tokens": c.tokens,
            }
            for sample, c in enumerate(completions)
        ]


def grade_while_sampling(
    groups: Iterator[list[Record]],
    grader: graders.Grader,
    benchmark: str,
    rows: list[tuple[str, Record]],
    keys: list[list[str]],
    thinking: bool,
) -> Iterator[list[Record]]:
    """Groups of sampled responses, graded, in order. The next are sampled while graders work, and
    nothing waits for a slow one but what comes after it in the file, of which MOST_WAITING groups
    may."""
    waiting: deque[tuple[list[Record], list[Future]]] = deque()

    def pop_graded_groups(max_waiting: int) -> Iterator[list[Record]]:
        while waiting and (len(waiting) > max_waiting or all(f.done() for f in waiting[0][1])):
            group, futures = waiting.popleft()
            yield [
                add_grade(r, graders.wait_for_grade(f)) for r, f in zip(group, futures, strict=True)
            ]

    for group, (_, problem), names in zip(groups, rows, keys, strict=True):
        prompt_text = run_files.to_json([problem.get("question"), problem.get("messages")])
        for row, name in zip(group, names, strict=True):
            text = str(row["response"])
            row |= {
                "well_formed": terms.is_well_formed(text, thinking),
                "mixed": statistics.has_mixed_languages(text, prompt_text),
                "key": name,
            }
        answers = [(str(row["response"]), str(row["answer"])) for row in group]
        waiting.append((group, [grader.submit(benchmark, *pair) for pair in answers]))
        yield from pop_graded_groups(MAX_WAITING_GROUPS)
    yield from pop_graded_groups(0)
