"""Chooses among the options of a problem by their log-likelihood, without sampling.

"letter": the prompt lists the options, and the model continues it with the letter of each. "text":
the prompt is the question alone, and the continuations are the options' texts. The likeliest one is
the choice; by lm-eval's acc_norm, the one with the greatest log-likelihood for each character.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from distill.data import dataset
from distill.evaluation import scoring
from distill.evaluation.protocols import EvalSpec
from distill.policy.policy import Policy
from distill.rewards import choices
from models.errors import UserError

Record = dict[str, Any]

CHOICE_BY = ("response", "letter", "text")  # response: by sampling


def render_row(row: Record, where: str, spec: EvalSpec) -> tuple[Record, EvalSpec]:
    """Returns the row, and the spec, of which a problem's prompt is rendered.

    Raises UserError if the problem has no options to choose among.
    """
    if spec.choice_by == "response":
        return row, spec
    if "stem" not in row:
        raise UserError(
            f"{where}: --choice_by={spec.choice_by}: has no options beside its question; rows need "
            "options and an answer, as --benchmark=choice reads them"
        )
    if spec.choice_by == "letter":
        return row, spec
    return {**row, "question": row["stem"]}, dataclasses.replace(spec, template=_get_template(spec))


def _get_template(spec: EvalSpec) -> str:
    """Returns the template of the question alone."""
    return spec.template or "{question}"


def describe_choice(spec: EvalSpec) -> Record:
    """Returns what the protocol of an evaluation says of how options are chosen."""
    if spec.choice_by == "response":
        return {}
    template = {"template": _get_template(spec)} if spec.choice_by == "text" else {}
    return {"choice_by": spec.choice_by, **template}


def choose_options(
    subject: Policy,
    rows: list[tuple[str, Record]],
    prompts: dataset.TokenLists,
    spec: EvalSpec,
    first_problem: int,
) -> Iterator[list[Record]]:
    """Yields a row for each problem from number `first_problem` on: the letter of the likeliest
    option as its response, and the log-likelihood of each.

    Problems are read in chunks that do not depend on `first_problem`, so that a resumed evaluation
    has the bits of one that was never stopped.

    Raises UserError naming a problem that is longer than the model's positions.
    """
    size = max(1, spec.sample.batch_size // 4)  # problems, most of which have four options
    for start in range(first_problem // size * size, len(rows), size):
        chunk = range(start, min(start + size, len(rows)))
        continuations = [_encode_options(subject, rows[i], spec) for i in chunk]
        pairs = []
        for number, encoded in zip(chunk, continuations, strict=True):
            length = len(prompts[number]) + max(len(ids) for _, ids in encoded)
            if length > subject.config.context_length:
                raise UserError(
                    f"{rows[number][0]}: prompt and option of {length} tokens exceed the model's "
                    f"{subject.config.context_length} positions"
                )
            pairs += [(prompts[number], ids) for _, ids in encoded]
        scores = scoring.score_responses(subject, pairs, batch_size=len(pairs))
        sums = [float(np.sum(np.asarray(x.logp, np.float64))) for x in scores]
        for number, encoded in zip(chunk, continuations, strict=True):
            own, sums = sums[: len(encoded)], sums[len(encoded) :]
            if number >= first_problem:
                row = _make_row(rows[number], own, encoded, prompts[number])
                if spec.choice_by == "text":
                    by_character = [
                        x / len(text) for x, (text, _) in zip(own, encoded, strict=True)
                    ]
                    row["found_normalised"] = choices.LETTERS[int(np.argmax(by_character))]
                yield [row]


def _encode_options(
    subject: Policy, located_row: tuple[str, Record], spec: EvalSpec
) -> list[tuple[str, list[int]]]:
    """Returns the text and the token ids of each continuation."""
    where, row = located_row
    read = choices.read_answer(str(row["answer"]))
    assert read is not None and subject.tokenizer is not None
    texts = read[1] if spec.choice_by == "text" else choices.LETTERS[: len(read[1])]
    encoded = [(x, subject.tokenizer.encode(x, add_special_tokens=False)) for x in texts]
    if any(not ids for _, ids in encoded):
        raise UserError(f"{where}: one of its options is empty, and has no likelihood")
    return encoded


def _make_row(
    located_row: tuple[str, Record],
    sums: list[float],
    encoded: list[tuple[str, list[int]]],
    prompt: list[int],
) -> Record:
    where, row = located_row
    if not np.all(np.isfinite(sums)):
        raise UserError(f"{where}: the model's logits are NaN")
    best = int(np.argmax(sums))
    return {
        "id": row["id"],
        "sample": 0,
        "answer": row["answer"],
        "response": choices.LETTERS[best],
        "length": len(encoded[best][1]),
        "finish_reason": "stop",
        "prompt_tokens": prompt,
        "tokens": encoded[best][1],
        "option_logprobs": sums,
    }
