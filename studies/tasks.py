"""python -m studies.tasks: writes the rows of a generated task, for training or for evaluation.

    python -m studies.tasks --task=graphs --split=test --count=500 --out=problems.jsonl

graphs        reasoning problems, each with its solution (studies/graphs.py)
documents     text that states the facts of a made-up company; has no splits (studies/facts.py)
facts         questions on those facts
instructions  requests with constraints in IFEval's form (studies/instructions.py)
manual        such requests, with a manual of more constraints before each; with --manual=SEED the
              fixed manual of that seed, which stands there only with --show_manual
              (studies/manual.py)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from absl import flags

from distill.runtime import cli, paths, run_files
from models.errors import UserError
from studies import facts, graphs, instructions, manual

TASKS = ("graphs", "documents", "facts", "instructions", "manual")
COUNT = 1000  # rows of a task without an end

OPTIONS = flags.FlagValues()
TASK = flags.DEFINE_enum("task", None, TASKS, "Which task.", flag_values=OPTIONS, required=True)
SPLIT = flags.DEFINE_string(
    "split",
    "train",
    "train, valid or test; facts also reworded, instructions also seen.",
    flag_values=OPTIONS,
)
NUM_ROWS = flags.DEFINE_integer(
    "count",
    None,
    f"Rows; default: all of documents and facts, {COUNT} of the others.",
    lower_bound=1,
    flag_values=OPTIONS,
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the rows; of documents and facts: of the company.", 0, flag_values=OPTIONS
)
OUT = flags.DEFINE_string("out", None, "File of rows to write.", OPTIONS, required=True)
OPERATIONS = flags.DEFINE_list(
    "operations", ["2", "4"], "graphs: fewest and most operations.", flag_values=OPTIONS
)
PEOPLE = flags.DEFINE_integer(
    "people", facts.PEOPLE, "documents, facts: people, of three facts each.", flag_values=OPTIONS
)
VERSIONS = flags.DEFINE_integer(
    "versions", facts.VERSIONS, "documents: documents on each person.", flag_values=OPTIONS
)
MANUAL = flags.DEFINE_integer(
    "manual", None, "manual: seed of a fixed manual, not shown in the rows.", 0, None, OPTIONS
)
SHOW_MANUAL = flags.DEFINE_bool(
    "show_manual", False, "manual: show the fixed one before the requests.", OPTIONS
)
MANUAL_OUT = flags.DEFINE_string(
    "manual_out", "", "manual: also write the fixed one, for config context.text.", OPTIONS
)


@dataclass(frozen=True)
class Settings:
    """What the tasks have of their own."""

    operations: tuple[int, int] = (2, 4)  # graphs
    people: int = facts.PEOPLE  # documents, facts
    versions: int = facts.VERSIONS  # documents
    manual: int | None = None  # manual: seed of the fixed one; None: each row has its own
    is_shown: bool = False  # manual: the fixed one stands before the requests


def make_rows(
    task: str, split: str, count: int | None = None, seed: int = 0, settings: Settings | None = None
) -> list[dict[str, Any]]:
    """Makes the first `count` rows of a split of a task.

    count: None: all of documents and facts, COUNT of the others.

    Raises:
      UserError: for an unknown task or split, or settings that the task cannot have.
    """
    s = settings or Settings()
    if task == "documents":
        return facts.make_documents(seed, s.people, s.versions)[:count]
    if task == "facts":
        return facts.make_questions(seed, split, s.people)[:count]
    indices = range(count or COUNT)
    if task == "instructions":
        return [instructions.make_row(seed, i, split) for i in indices]
    if task == "manual":
        fixed = None if s.manual is None else manual.make_manual(s.manual)
        return [manual.make_row(seed, i, split, fixed, s.is_shown) for i in indices]
    if task != "graphs":
        raise UserError(f"task: {task!r} is none of {', '.join(TASKS)}")
    try:
        return [graphs.make_row(seed, i, split, s.operations) for i in indices]
    except ValueError as error:
        raise UserError(f"graphs: {error}") from None


def make_corpus(names: Iterable[str] = TASKS, count: int = 500) -> list[str]:
    """Returns text of tasks in which their words, and those of the chat template, are frequent:
    what a tokenizer for them is trained on. Of each task the first `count` rows of training."""
    texts = []
    for name in names:
        for row in make_rows(name, "train", count):
            read = [row[key] for key in ("text", "question", "response") if key in row]
            texts += [*read, "user", "assistant", "system", "\n\n"]
    return texts


def main() -> None:
    if len(OPERATIONS.value) != 2 or not all(x.isdecimal() for x in OPERATIONS.value):
        raise UserError(f"--operations={','.join(OPERATIONS.value)}: is not two numbers, as in 2,4")
    fixed = MANUAL.value if TASK.value == "manual" else None
    if MANUAL_OUT.value and fixed is None:
        raise UserError("--manual_out: needs --task=manual and the --manual=SEED that it is of")
    if SHOW_MANUAL.value and fixed is None:
        raise UserError("--show_manual: needs --task=manual and the --manual=SEED to show")
    low, high = map(int, OPERATIONS.value)
    settings = Settings((low, high), PEOPLE.value, VERSIONS.value, fixed, SHOW_MANUAL.value)
    out = paths.check_output(OUT.value)
    rows = make_rows(TASK.value, SPLIT.value, NUM_ROWS.value, SEED.value, settings)
    run_files.write_jsonl(out, rows)
    print(f"{out}: {len(rows):,} rows of {TASK.value}, {SPLIT.value}, seed {SEED.value}")
    if fixed is not None and MANUAL_OUT.value:
        text = paths.check_output(MANUAL_OUT.value, OUT.value, flag="--manual_out")
        run_files.write_text(text, manual.write_manual(manual.make_manual(fixed)) + "\n")
        print(f"{text}: the manual of seed {fixed}")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
