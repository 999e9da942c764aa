"""A model's responses to problems, and what graders and the text itself say of them, as rows.

A row is one response, as examples.jsonl keeps it; a problem's samples come together, in order.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax

from distill import rollout
from distill.data import dataset
from distill.evaluation import statistics
from distill.policy.policy import Policy
from distill.rewards import graders, terms
from distill.runtime import run_files
from models.errors import UserError

Row = dict[str, Any]

MOST_WAITING = 256  # problems that graders are behind the sampler, which then waits

_LONGEST = graders.MAX_ANSWER_CHARACTERS


def judged(row: Row, grade: graders.Grade) -> Row:
    """The row with what a grader said of its `response`, and what the text alone shows."""
    text, outcome = str(row["response"]), grade["outcome"]
    found = None if outcome == "no_answer" else graders.find_answer(text)
    return {
        **row,
        "correct": outcome == "correct",
        # Of instructions there is no one answer to vote for.
        **({} if "strict" in grade else {"found": found and found[:_LONGEST]}),
        **grade,
        "formatted": graders.final_text(text) is not None and outcome != "no_answer",
        "repeats": statistics.repeats(text),
    }


def graded(grader: graders.Grader, benchmark: str, rows: list[Row]) -> list[Row]:
    """Rows with `response` and `answer`, plus outcome, correct, formatted, repeats and found."""
    futures = [grader.submit(benchmark, str(r["response"]), str(r["answer"])) for r in rows]
    return [judged(row, graders.outcome(f)) for row, f in zip(rows, futures, strict=True)]


def sample(
    subject: Policy,
    rows: list[tuple[str, Row]],
    prompts: dataset.TokenLists,
    *,
    first: int,
    samples: int,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    seed: int,
    batch_size: int,
) -> Iterator[list[Row]]:
    """The sampled responses of each problem from number `first` on, `samples` rows a problem."""
    assert subject.tokenizer is not None
    done = rollout.complete(
        subject,
        prompts[first:],
        samples=samples,
        key=jax.random.key(seed),
        limits=[max_new_tokens] * (len(prompts) - first),
        sampling=sampling,
        batch_size=batch_size,
        first=first,
    )
    for number, completions in enumerate(done, start=first):
        where, row = rows[number]
        if any(c.reason == "error" for c in completions):
            raise UserError(f"{where}: the model's logits are NaN")
        yield [
            {
                "id": row["id"],
                "sample": sample,
                "answer": row["answer"],
                "response": subject.tokenizer.decode(c.tokens, skip_special_tokens=True),
                "length": len(c.tokens),
                "finish_reason": c.reason,
                "prompt_tokens": prompts[number],
                "tokens": c.tokens,
            }
            for sample, c in enumerate(completions)
        ]


def graded_as_they_come(
    groups: Iterator[list[Row]],
    grader: graders.Grader,
    benchmark: str,
    rows: list[tuple[str, Row]],
    keys: list[list[str]],
    thinking: bool,
) -> Iterator[list[Row]]:
    """Groups of sampled responses, graded, in order. The next are sampled while graders work, and
    nothing waits for a slow one but what comes after it in the file, of which MOST_WAITING groups
    may."""
    waiting: deque[tuple[list[Row], list[Future]]] = deque()

    def finished(most: int) -> Iterator[list[Row]]:
        while waiting and (len(waiting) > most or all(f.done() for f in waiting[0][1])):
            group, futures = waiting.popleft()
            yield [judged(r, graders.outcome(f)) for r, f in zip(group, futures, strict=True)]

    for group, (_, problem), names in zip(groups, rows, keys, strict=True):
        asked = run_files.dumps([problem.get("question"), problem.get("messages")])
        for row, name in zip(group, names, strict=True):
            text = str(row["response"])
            row |= {
                "well_formed": terms.well_formed(text, thinking),
                "mixed": statistics.mixes_languages(text, asked),
                "key": name,
            }
        answers = [(str(row["response"]), str(row["answer"])) for row in group]
        waiting.append((group, [grader.submit(benchmark, *pair) for pair in answers]))
        yield from finished(MOST_WAITING)
    yield from finished(0)
