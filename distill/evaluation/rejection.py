"""Rejection sampling: keeps the sampled responses that a benchmark's grader finds correct."""

import collections
from collections.abc import Iterator

from distill.data import answers, sources, values
from distill.rewards import graders
from distill.rewards.graders import GradingRule
from distill.runtime import run_files
from distill.runtime.progress import show_progress
from models.errors import UserError


def grade_samples(row: dict, where: str, rule: GradingRule, grader: graders.Grader) -> list[dict]:
    """Returns the samples of a row, each with `outcome` and `correct`.

    Raises:
      UserError: naming the row if it lacks a field or the grader cannot read its answer.
    """
    if not isinstance(row.get("samples"), list) or "answer" not in row:
        raise UserError(f"{where}: needs samples and answer, has {sorted(row)}")
    samples, answer = row["samples"], answers.require_answer(row, where)
    if any(not (isinstance(x, dict) and isinstance(x.get("text"), str)) for x in samples):
        raise UserError(f"{where}: a sample has no text to grade")
    texts = [sample["text"] for sample in samples]
    values.require_characters(texts, f"{where}: samples")
    # To check that the grader can read the answer, it also grades a response that gives the answer.
    own_texts = [rule.right_response.replace("answer", answer)] if rule.right_response else []
    outcomes = grader.grade(rule, texts + own_texts, [answer] * len(texts + own_texts))
    if not rule.is_gradable(answer) or outcomes[len(texts) :] != ["correct"] * len(own_texts):
        raise UserError(f"{where}: answer {answer[:60]!r} cannot be parsed")
    return [
        {
            **sample,
            "outcome": outcome,
            "correct": outcome == "correct" and sample.get("finish_reason") == "stop",
        }
        for sample, outcome in zip(samples, outcomes[: len(samples)], strict=True)
    ]


def _is_kept(sample: dict, keep: str) -> bool:
    if keep == "correct":
        return sample["correct"]
    return keep == "all" or sample.get("finish_reason") == "stop"


def verify_rows(
    rows: sources.Rows,
    rule: GradingRule,
    *,
    keep: str,
    max_samples: int,
    skip_bad_rows: bool,
    counts: collections.Counter[str],
) -> Iterator[dict]:
    """Yields the rows with the samples that are kept, at most `max_samples` each (0: all).

    Adds to `counts`: rows, samples, correct, kept, rows kept and bad rows.
    """
    with graders.Grader() as grader, show_progress(rows.size, 0, "verify", is_minor=True) as bar:
        for index in range(rows.size):
            bar.update(index + 1, f"kept {counts['kept']:,}")
            counts["rows"] += 1
            try:
                row = rows.read_row(index)
                samples = grade_samples(row, rows.locate_row(index), rule, grader)
            except UserError as error:
                if not skip_bad_rows:
                    raise
                counts["bad rows"] += 1
                run_files.log_skipped(error, counts["bad rows"])
                continue
            kept = [sample for sample in samples if _is_kept(sample, keep)][: max_samples or None]
            counts["samples"] += len(samples)
            counts["correct"] += sum(sample["correct"] for sample in samples)
            counts["kept"] += len(kept)
            if kept:
                counts["rows kept"] += 1
                yield {**row, "samples": kept}
