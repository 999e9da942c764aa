"""HumanEval (arXiv 2107.03374), and HumanEval+ of EvalPlus (arXiv 2305.01210), whose rows have the
same form: --data=hf:evalplus/humanevalplus::test."""

from distill.evaluation.tasks.task import PROGRAM_PROMPT, ROW_NUMBER, Record, Task
from distill.rewards import programs, sandbox
from distill.rewards.program_tests import ProgramTests
from models.errors import UserError


def adapt_row(row: Record, where: str) -> Record:
    """Converts a published row (task_id, prompt, test, entry_point) to question and answer.

    Raises UserError naming the row if it has another form.
    """
    fields = {name: row.get(name) for name in ("prompt", "test", "entry_point")}
    missing = [name for name, text in fields.items() if not (isinstance(text, str) and text)]
    if missing:
        columns = sorted(row.keys() - {ROW_NUMBER})
        raise UserError(f"{where}: no text in {', '.join(missing)}; it has {columns}")
    prompt, name = str(fields["prompt"]), str(fields["entry_point"])
    if not name.isidentifier():
        raise UserError(f"{where}: entry_point {name[:60]!r} is no name of a function")
    problem = str(row.get("task_id", row.get("id", where)))
    tests = ProgramTests(
        problem,
        checks=[f"{fields['test']}\n\ncheck({name})\n"],
        names=[name],
        setup=prompt,
        prompt=prompt,
    )
    return {
        "id": problem,
        "question": f"```python\n{prompt.strip()}\n```",
        "answer": tests.to_answer(),
    }


TASK = Task(
    programs.FUNCTIONS,
    PROGRAM_PROMPT,
    hf="hf:openai/openai_humaneval::test",
    adapt_row=adapt_row,
    answer_field="test",
    require_installed=sandbox.require_isolation,
    explain_ungradable=programs.explain_ungradable,
    describe_grader=sandbox.describe_isolation,
)
