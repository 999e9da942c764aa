"""MMLU-Redux 2.0 (arXiv 2406.04127): 5,700 questions of MMLU's 57 subjects, checked by hand.

Rows whose `error_type` is "ok" are kept; "wrong_groundtruth" with the corrected answer, where that
is an option; others have no single right option and are left out, as ZeroEval does it
(github.com/WildEval/ZeroEval, data_prep/mmlu-redux.py), and after it NeMo-Skills and SEA-HELM. The
Qwen3 report does not say which rows it uses.
"""

from distill.evaluation.tasks import choice
from distill.evaluation.tasks.task import CHOICE_PROMPT, Record, Task
from distill.rewards import choices
from models.errors import UserError

SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge"),
    *("college_biology", "college_chemistry", "college_computer_science", "college_mathematics"),
    *("college_medicine", "college_physics", "computer_security", "conceptual_physics"),
    *("econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic"),
    *("global_facts", "high_school_biology", "high_school_chemistry"),
    *("high_school_computer_science", "high_school_european_history", "high_school_geography"),
    *("high_school_government_and_politics", "high_school_macroeconomics"),
    *("high_school_mathematics", "high_school_microeconomics", "high_school_physics"),
    *("high_school_psychology", "high_school_statistics", "high_school_us_history"),
    *("high_school_world_history", "human_aging", "human_sexuality", "international_law"),
    *("jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing"),
    *("medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition"),
    *("philosophy", "prehistory", "professional_accounting", "professional_law"),
    *("professional_medicine", "professional_psychology", "public_relations"),
    *("security_studies", "sociology", "us_foreign_policy", "virology", "world_religions"),
)
_ERROR_TYPES = (
    *("ok", "bad_question_clarity", "bad_options_clarity", "no_correct_answer"),
    *("multiple_correct_answers", "wrong_groundtruth", "expert"),
)


def adapt_row(row: Record, where: str) -> Record | None:
    """Reads a published row; None if it is left out.

    Raises UserError naming the row if it has another form.
    """
    kind = row.get("error_type")
    if kind is None and "choices" not in row:  # of a file of one's own
        return choice.adapt_row(row, where)
    if kind not in _ERROR_TYPES:
        raise UserError(f"{where}: error_type={str(kind)[:60]!r} is none of MMLU-Redux's")
    if kind == "ok":
        return choice.adapt_row(row, where)
    corrected, options = row.get("correct_answer"), row.get("choices")
    if kind != "wrong_groundtruth" or not isinstance(options, list):
        return None
    texts = [str(x) for x in options]
    letter = choice.find_letter(corrected, texts, [])
    if letter is None and isinstance(corrected, str) and corrected.strip().isdecimal():
        letter = choice.find_letter(int(corrected), texts, [])  # an index, as `answer` is one
    return None if letter is None else choice.adapt_row({**row, "answer": letter}, where)


TASK = Task(
    choices.CHOICES,
    CHOICE_PROMPT,
    hf=tuple(f"hf:edinburgh-dawg/mmlu-redux-2.0:{name}:test" for name in SUBJECTS),
    adapt_row=adapt_row,
    answer_field="choices",
)
