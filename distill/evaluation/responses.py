"""Samples responses to problems and grades them, as rows.

A row is one response, as examples.jsonl stores it. The samples of a problem are adjacent, in order.
`response` begins with the think tag that the prompt opened, if it did, so that it can be graded
again without its prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from distill import rollout
from distill.data import chat, dataset
from distill.evaluation import statistics
from distill.policy.policy import Policy
from distill.rewards import graders, terms
from distill.rewards.graders import GradingRule
from distill.runtime import run_files
from models.errors import UserError

Record = dict[str, Any]

MAX_WAITING_GROUPS = 256  # problems; the sampler waits when graders are this far behind


def add_grade(row: Record, rule: GradingRule, grade: graders.Grade) -> Record:
    """Returns the row with its grade, its extracted answer, and properties of its text."""
    text, outcome = str(row["response"]), grade["outcome"]
    extracted = {}
    if rule.extract:
        answer = None if outcome == "no_answer" else rule.extract(text)
        extracted = {"found": answer and answer[: graders.MAX_ANSWER_CHARACTERS]}
    return {
        **row,
        **({"answer": rule.shorten(row["answer"])} if "answer" in row else {}),
        "correct": outcome == "correct",
        **extracted,
        **grade,
        "formatted": graders.strip_thinking(text) is not None and outcome != "no_answer",
        "repeats": statistics.is_repetitive(text),
    }


def grade_rows(grader: graders.Grader, rule: GradingRule, rows: list[Record]) -> list[Record]:
    """Grades rows that have `response` and `answer`."""
    futures = [grader.submit(rule, str(r["response"]), str(r["answer"])) for r in rows]
    return [
        add_grade(row, rule, graders.wait_for_grade(f))
        for row, f in zip(rows, futures, strict=True)
    ]


def sample(
    subject: Policy,
    rows: list[tuple[str, Record]],
    prompts: dataset.TokenLists,
    spec: rollout.SampleSpec,
    first_problem: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[list[Record]]:
    """Yields the sampled responses of each problem from number `first_problem` on.

    For `check_stop` see `rollout.sample`.
    """
    assert subject.tokenizer is not None
    completion_groups = rollout.complete(
        subject, prompts[first_problem:], spec, first=first_problem, check_stop=check_stop
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
                "response": chat.decode_response(subject.tokenizer, c.prompt, c.tokens),
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
    rule: GradingRule,
    rows: list[tuple[str, Record]],
    keys: list[list[str]],
    thinking: bool,
) -> Iterator[list[Record]]:
    """Yields groups of sampled responses, graded, in order.

    `rows` and `keys` belong to the same problems as `groups`. The next groups are sampled while
    graders work. A slow grade delays only the groups behind it, of which at most MAX_WAITING_GROUPS
    wait in memory.
    """
    waiting: deque[tuple[list[Record], list[Future]]] = deque()

    def pop_graded_groups(max_waiting: int) -> Iterator[list[Record]]:
        while waiting and (len(waiting) > max_waiting or all(f.done() for f in waiting[0][1])):
            group, futures = waiting.popleft()
            yield [
                add_grade(row, rule, graders.wait_for_grade(f))
                for row, f in zip(group, futures, strict=True)
            ]

    for group, (_, problem), row_keys in zip(groups, rows, keys, strict=True):
        prompt_text = run_files.to_json([problem.get("question"), problem.get("messages")])
        for row, key in zip(group, row_keys, strict=True):
            text = str(row["response"])
            row |= {
                "well_formed": terms.is_well_formed(text, thinking),
                "mixed": statistics.has_mixed_languages(text, prompt_text),
                "key": key,
            }
        pairs = [(str(row["response"]), str(row["answer"])) for row in group]
        waiting.append((group, [grader.submit(rule, *pair) for pair in pairs]))
        yield from pop_graded_groups(MAX_WAITING_GROUPS)
    yield from pop_graded_groups(0)
