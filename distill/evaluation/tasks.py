"""The problems that a model is judged by, the protocols by which, and responses somebody stored."""

from typing import Any

from distill.data import arithmetic, sources
from distill.rewards import graders, ifeval
from models.errors import UserError

PROBLEM_SEED = 20_000  # of the generated test problems: the same ones in every evaluation
ARITHMETIC_PROBLEMS = 1000

Record = dict[str, object]

# What Qwen3's model card asks users to append to a mathematical problem.
_BOXED_PROMPT = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)

# `prompt`: how the question is put; `hf`, `tfds`: what --data=hf: and --data=tfds: stand for;
# `qwen3`: what Qwen3's protocols do otherwise there. The grader is the row of graders.GRADERS.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "arithmetic": {"prompt": "{question}"},
    "gsm8k": {
        "prompt": _BOXED_PROMPT,
        "hf": "hf:openai/gsm8k:main:test",
        "tfds": "tfds:gsm8k::test",  # question and answer, as on the hub
    },
    "math500": {"prompt": _BOXED_PROMPT, "hf": "hf:HuggingFaceH4/MATH-500::test"},
    "aime24": {
        "prompt": _BOXED_PROMPT,
        "hf": "hf:HuggingFaceH4/aime_2024",
        "qwen3": {"samples": 64, "max_new_tokens": 38_912},
    },
    "aime25": {
        "prompt": _BOXED_PROMPT,
        "hf": "hf:math-ai/aime25::test",
        "qwen3": {"samples": 64, "max_new_tokens": 38_912},
    },
    "amc": {"prompt": _BOXED_PROMPT, "hf": "hf:math-ai/amc23::test"},
    "math": {"prompt": _BOXED_PROMPT},  # any rows of question and answer
    "ifeval": {"prompt": "{question}", "hf": "hf:google/IFEval"},
}

_ID_FIELDS = ("id", "unique_id", "key")
_QUESTION_FIELDS = ("question", "problem")


def require_benchmark(benchmark: str) -> None:
    """Raises UserError for an unknown benchmark, or one whose grader is not installed."""
    if benchmark not in BENCHMARKS:
        raise UserError(f"--benchmark={benchmark}: known are {', '.join(BENCHMARKS)}")
    if graders.GRADERS[benchmark] is ifeval.grade_instructions:
        ifeval.require_checkers()


def load_problems(benchmark: str, source: str, limit: int) -> list[tuple[str, Record]]:
    """(name, row) of each problem; a row has id, question (or messages) and answer.

    `path` is whatever `sources.open_rows` reads; hf: and tfds: alone are the benchmark's own set.

    Raises:
      UserError: for an unknown benchmark, no data where it needs some, or a row without an answer.
    """
    require_benchmark(benchmark)
    if benchmark == "arithmetic" and not source:
        return [_make_arithmetic_problem(i) for i in range(limit or ARITHMETIC_PROBLEMS)]
    if not source:
        raise UserError(
            f"--data: {benchmark} needs a jsonl file of question and answer, "
            "or hf:NAME:CONFIG:SPLIT"
        )
    if source in ("hf:", "tfds:"):
        own_source = BENCHMARKS[benchmark].get(source[:-1])
        if own_source is None:
            raise UserError(
                f"--data={source}: no set is named for {benchmark}: {source}NAME::SPLIT"
            )
        source = own_source
    rows, names = [], set()
    for number, (where, row) in enumerate(_read_rows(source)):
        row = _normalise_row(benchmark, row, where)
        name = str(row.setdefault("id", f"{benchmark}-{number}"))
        if name in names:
            raise UserError(f"{where}: id {name!r} is that of an earlier row")
        names.add(name)
        rows.append((where, row))
    return rows[: limit or None]


def _normalise_row(benchmark: str, row: dict, where: str) -> Record:
    """A row of any of the published forms as id (where it has one), question and answer."""
    name = next((row[n] for n in _ID_FIELDS if row.get(n) is not None), None)
    id_fields = {} if name is None else {"id": name}
    if graders.GRADERS[benchmark] is ifeval.grade_instructions:
        return {
            **id_fields,
            "question": row.get("prompt"),
            "answer": ifeval.make_answer(row, where),
        }
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: no answer among its fields {sorted(row)}")
    question = next((row[q] for q in _QUESTION_FIELDS if q in row), None)
    question_fields = {} if question is None else {"question": question}
    return {**row, **id_fields, **question_fields, "answer": _extract_final_answer(answer)}


def _extract_final_answer(answer: str | int | float) -> str:
    """GSM8K is published with the solution before its answer, AMC with answers such as 27.0."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    _, marked, tail = str(answer).rpartition("####")
    return tail.strip().replace(",", "") if marked else str(answer)


def _read_rows(path: str) -> list[tuple[str, dict]]:
    """Rows with their names. Raises UserError where there is no such file or set."""
    rows = sources.open_rows(path)
    return [(rows.locate_row(i), rows.read_row(i)) for i in range(rows.size)]


def check_gradable(benchmark: str, rows: list[tuple[str, Record]]) -> None:
    """Raises UserError if responses to some of these problems could not be graded here."""
    if graders.GRADERS[benchmark] is ifeval.grade_instructions:
        count = ifeval.count_unchecked([str(row["answer"]) for _, row in rows])
        if count:
            raise UserError(
                f"--benchmark={benchmark}: {count} of the problems are checked with nltk's data, "
                f"which is not here: {ifeval.PUNKT_COMMAND}"
            )


def render_question(benchmark: str, row: Record, template: str = "") -> Record:
    """The row with its question as the model is asked it: by `template`, or the benchmark's own;
    messages, prompts and ids stay as given."""
    template = template or BENCHMARKS[benchmark]["prompt"]
    if "question" not in row:
        return row
    return {**row, "question": template.replace("{question}", str(row["question"]))}


def _make_arithmetic_problem(index: int) -> tuple[str, Record]:
    p = arithmetic.make_problem(PROBLEM_SEED, index, "test", (3, 5))
    name = f"arithmetic-test-{index}"
    return name, {"id": name, "question": p.question, "answer": p.answer, "level": p.operations}


def load_responses(
    benchmark: str, path: str, known_problems: list[tuple[str, Record]]
) -> list[Record]:
    """Responses from a file, each with its answer: its own, or that of the problem it names.

    Raises UserError for an unknown benchmark, or a row without response or answer.
    """
    require_benchmark(benchmark)
    answers = {
        str(row.get(field)): row["answer"]
        for _, row in known_problems
        for field in ("id", "question")
    }
    responses = []
    for number, (where, row) in enumerate(_read_rows(path)):
        if not isinstance(row.get("response"), str):
            raise UserError(f"{where}: no response among its fields {sorted(row)}")
        fields = (*_ID_FIELDS, *_QUESTION_FIELDS, "prompt")
        names = [str(row[f]) for f in fields if isinstance(row.get(f), str | int)]
        answer = next((answers[name] for name in names if name in answers), None)
        if row.get("answer") is not None or "instruction_id_list" in row:
            answer = _normalise_row(benchmark, row, where)["answer"]
        if answer is None:
            raise UserError(f"{where}: no answer, and no problem of --data matches it")
        name = names[0] if names else f"row-{number}"
        responses.append({"id": name, "answer": str(answer), "response": row["response"]})
    return responses
