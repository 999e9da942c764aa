"""IFEval (arXiv 2311.07911): following instructions that a program can check."""

from collections.abc import Sequence

import numpy as np

from distill.evaluation.tasks.task import Record, Task, find_id
from distill.rewards import ifeval


def adapt_row(row: Record, where: str) -> Record:
    """Converts a published row (prompt, instruction_id_list, kwargs) to question and answer.

    Raises UserError naming the row if it has another form.
    """
    answer = ifeval.make_answer(row, where)
    return {**find_id(row), "question": row.get("prompt"), "answer": answer}


def explain_ungradable(answers: Sequence[str]) -> str:
    """Returns how many problems need missing nltk data, and how to install it; "" if none."""
    count = ifeval.count_unchecked(answers)
    if not count:
        return ""
    return (
        f"{count} of the problems are checked with nltk's data, which is not installed: "
        f"{ifeval.PUNKT_COMMAND}"
    )


def summarise(rows: Sequence[Record]) -> Record:
    """Computes IFEval's four accuracies, each over the instructions that could be checked.

    Returns {} if a row has no verdicts because its grader gave up.
    """
    if not all("strict" in row for row in rows):
        return {}
    rates: Record = {}
    for mode in ("strict", "loose"):
        verdicts: list[list[bool | None]] = [row[mode] for row in rows]
        prompts = [all(labels) for labels in verdicts if None not in labels]
        instructions = [label for labels in verdicts for label in labels if label is not None]
        rates[f"prompt_{mode}"] = float(np.mean(prompts)) if prompts else None
        rates[f"instruction_{mode}"] = float(np.mean(instructions)) if instructions else None
        rates["unchecked"] = sum(labels.count(None) for labels in verdicts)
    return {"ifeval": rates}


TASK = Task(
    ifeval.INSTRUCTIONS,
    hf="hf:google/IFEval",
    adapt_row=adapt_row,
    answer_field="instruction_id_list",
    require_installed=ifeval.require_checkers,
    explain_ungradable=explain_ungradable,
    summarise=summarise,
)
