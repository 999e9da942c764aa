"""Tests problems from files, hub sets and TFDS in their published formats, and named protocols."""

import json
import math
import random
import re
from pathlib import Path

import pytest

from distill import rollout
from distill.data import canonical, sources
from distill.evaluation import problems, protocols, rejection, tasks
from distill.rewards import graders
from models.errors import UserError
from tests.support.verbs import write


def test_every_benchmark_has_a_grader_and_a_prompt() -> None:
    files = {path.stem for path in Path(tasks.__path__[0]).glob("*.py")}
    assert tasks.BENCHMARKS.keys() == files - {"__init__", "task"}
    for name, task in tasks.BENCHMARKS.items():
        assert "{question}" in task.prompt and callable(task.grading.grade), name
    fields = {frozenset(settings) for settings in protocols.PROTOCOLS.values()}
    assert len(fields) == 1  # each sets every field


@pytest.mark.parametrize(
    ("benchmark", "row", "expected"),
    [
        (
            "gsm8k",
            {"question": "q", "answer": "2 * 500 = <<1000>>\n#### 1,000"},
            {"id": "gsm8k-0", "question": "q", "answer": "1000"},
        ),
        (
            "math500",
            {"unique_id": "test/a/1.json", "problem": "q", "answer": r"\frac{1}{2}", "level": 3},
            {"id": "test/a/1.json", "question": "q", "answer": r"\frac{1}{2}", "level": 3},
        ),
        ("aime24", {"id": 60, "problem": "q", "answer": "033"}, {"id": 60, "answer": "033"}),
        ("aime25", {"id": "0", "problem": "q", "answer": 70}, {"id": "0", "answer": "70"}),
        ("amc", {"id": 3, "question": "q", "answer": 27.0}, {"id": 3, "answer": "27"}),
        ("amc", {"id": 3, "question": "q", "answer": 2.5}, {"answer": "2.5"}),
        ("math", {"question": "q", "answer": "x^2, 1,000"}, {"answer": "x^2, 1,000"}),
    ],
)
def test_published_forms(tmp_path: Path, benchmark: str, row: dict, expected: dict) -> None:
    ((where, problem),) = problems.load_problems(
        benchmark, str(write(tmp_path / "x.jsonl", [row])), 0
    )
    assert problem.items() >= expected.items() and where == f"{tmp_path / 'x.jsonl'}:1"


def test_reference_answers_of_real_sets_are_correct(shared_data: Path) -> None:
    """Loads the local copies; each reference answer is correct by its own grader."""
    sizes = {"gsm8k": 1319, "math500": 500, "aime24": 30}
    with graders.Grader() as grader:
        for name, size in sizes.items():
            rows = problems.load_problems(name, str(shared_data / name / "test.jsonl"), 0)
            assert len(rows) == size
            answers = [str(row["answer"]) for _, row in rows][::9]
            outcomes = grader.grade(
                tasks.BENCHMARKS[name].grading, [rf"So \boxed{{{a}}}." for a in answers], answers
            )
            assert set(outcomes) == {"correct"}, name


def test_a_hub_dataset_is_loaded(tmp_path: Path) -> None:
    """`datasets` reads it from a folder in the hub's layout."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"question": f"{i}?", "answer": f"is\n#### {i}"} for i in range(3)]
    write(folder / "test.jsonl", rows)
    rows_read = problems.load_problems("gsm8k", f"hf:{folder}::test", 2)
    assert [(where, row["answer"]) for where, row in rows_read] == [
        (f"hf:{folder}::test row 0", "0"),
        (f"hf:{folder}::test row 1", "1"),
    ]
    with pytest.raises(UserError, match=r"^hf:.*::dev: cannot be read: "):
        problems.load_problems("gsm8k", f"hf:{folder}::dev", 0)


def test_benchmarks_name_their_hub_and_tfds_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def read(source: str) -> sources.Rows:
        requested.append(source)
        return sources.Rows(source, 1, lambda i: {"question": "q", "answer": "#### 1"}, str)

    monkeypatch.setattr(sources, "open_rows", read)
    problems.load_problems("gsm8k", "hf:", 0)
    problems.load_problems("gsm8k", "tfds:", 0)
    problems.load_problems("math", "tfds:some/set", 0)
    assert requested == ["hf:openai/gsm8k:main:test", "tfds:gsm8k::test", "tfds:some/set"]
    with pytest.raises(UserError, match="no set is named for math"):
        problems.load_problems("math", "hf:", 0)


def test_tfds_rows_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    rows = [{"question": "größer?".encode(), "answer": b"#### 7", "n": 3}]
    monkeypatch.setattr(tfds, "data_source", lambda name, split: rows)
    ((_, row),) = problems.load_problems("gsm8k", "tfds:gsm8k::test", 0)
    assert (row["question"], row["answer"]) == ("größer?", "7")


def test_questions_are_rendered_by_their_template() -> None:
    row: problems.Record = {"id": 1, "question": "1 {x} + 1?", "answer": "2"}
    assert problems.render_question("arithmetic", row) == row
    boxed = str(problems.render_question("math500", row)["question"])
    assert boxed.startswith("1 {x} + 1?\n\n") and boxed.endswith(r"within \boxed{}.")
    assert (
        problems.render_question("math500", row, "Q: {question} A:")["question"]
        == "Q: 1 {x} + 1? A:"
    )
    chat_row: problems.Record = {"id": 1, "messages": [{"role": "user", "content": "1?"}]}
    assert problems.render_question("math500", chat_row) == chat_row


def test_protocols_equal_the_technical_report() -> None:
    """arXiv 2505.09388: sampling, token limits, and 64 samples on AIME."""
    thinking = protocols.resolve_settings("qwen3-thinking", "math500", {})
    assert thinking == {
        "thinking": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "presence_penalty": 0.0,
        "max_new_tokens": 32_768,
        "samples": 1,
    }
    plain = protocols.resolve_settings("qwen3-nonthinking", "aime25", {"samples": 8, "top_k": None})
    assert plain == {
        "thinking": False,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "presence_penalty": 1.5,
        "max_new_tokens": 38_912,
        "samples": 8,
    }
    assert protocols.resolve_settings("greedy", "aime24", {})["samples"] == 1
    with pytest.raises(
        UserError, match="--protocol=guess: known are greedy, sampled, qwen3-thinking"
    ):
        protocols.resolve_settings("guess", "gsm8k", {})
    assert rollout.make_sample_spec(thinking).sampling.top_p == 0.95


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(UserError, match="--benchmark=gsm9k: known are arithmetic, gsm8k"):
        problems.require_task("gsm9k")


def test_rows_without_a_usable_answer_are_refused(tmp_path: Path) -> None:
    for answer in (None, True, ["1"], {"a": 1}, math.nan, math.inf, "", "So\nfour."):
        path = write(tmp_path / "x.jsonl", [{"question": "q", "answer": answer}])
        with pytest.raises(UserError, match=r"x.jsonl:1: no answer among its fields"):
            problems.load_problems("math", str(path), 0)


CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
BOXED = "2+2?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": CHAT, "answer": "4"}, CHAT[:1]),
        ({"problem": "2+2?", "solution": r"\boxed{4}", "messages": CHAT}, [BOXED]),
        ({"prompt": CHAT[:1], "reward_model": {"ground_truth": 4, "style": "rule"}}, CHAT[:1]),
        ({"conversations": [{"from": "human", "value": "2+2?"}], "answer": 4.0}, CHAT[:1]),
        ({"question": "2+2?", "system": "s", "answer": "4"}, ["s", BOXED]),
        ({"messages": CHAT[:1], "tools": json.dumps([ADD["function"]]), "answer": "4"}, CHAT[:1]),
    ],
)
def test_rows_are_read_as_in_training(tmp_path: Path, row: dict, messages: list) -> None:
    path = write(tmp_path / "x.jsonl", [row])
    ((_, problem),) = problems.load_problems("math", str(path), 0)
    rendered = problems.render_question("math", problem)
    texts = [message["content"] for message in rendered["messages"]]
    assert texts == [m if isinstance(m, str) else m["content"] for m in messages]
    assert problem["answer"] == "4" and rendered.get("tools") == ([ADD] if "tools" in row else None)


def test_a_row_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": "3+3?", "messages": CHAT, "answer": "4"}])
    with pytest.raises(UserError, match=r"x.jsonl:1: messages and question are two prompts"):
        problems.load_problems("math", str(path), 0)


def test_stored_responses_are_matched_to_problems(tmp_path: Path) -> None:
    known = problems.load_problems(
        "math",
        str(write(tmp_path / "k.jsonl", [{"unique_id": "a", "problem": "q", "answer": 3}])),
        0,
    )
    rows = [
        {"unique_id": "a", "response": "3"},
        {"problem": "q", "response": "3"},
        {"id": "own", "answer": 4.0, "response": "4"},
        {"unique_id": "a", "answer": math.nan, "response": "3"},
        {"id": "b", "reward_model": {"ground_truth": "5"}, "response": "3"},
    ]
    stored = problems.load_responses("math", str(write(tmp_path / "s.jsonl", rows)), known)
    assert [(r["id"], r["answer"]) for r in stored] == [
        *(("a", "3"), ("q", "3"), ("own", "4"), ("a", "3"), ("b", "5")),
    ]
    for answer in (["3"], True, math.inf):
        path = write(tmp_path / "s.jsonl", [{"unique_id": "a", "answer": answer, "response": "3"}])
        with pytest.raises(UserError, match=r"s.jsonl:1: no answer among its fields"):
            problems.load_responses("math", str(path), known)


def load_one(directory: Path, benchmark: str, row: dict) -> problems.Record:
    ((_, problem),) = problems.load_problems(benchmark, str(write(directory / "x.jsonl", [row])), 0)
    return problem


def read_choice(problem: problems.Record) -> tuple[str, list[str]]:
    fields = json.loads(problem["answer"])
    return fields["letter"], fields["options"]


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"options": ["w", "x", "y"], "answer": "C"}, "C"),
        ({"choices": ["w", "x", "y"], "answer": 2}, "C"),
        ({"choices": ["w", "x", "y"], "answer": "y"}, "C"),
        ({"options": ["A) w", "B) x", "C) y"], "answer": "(c)"}, "C"),
        ({"options": {"A": "w", "B": "x", "C": "y"}, "answer": "y", "answer_idx": "C"}, "C"),
        ({"choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}, "answerKey": "3"}, "C"),
        ({"options": ["w", "x", "y"], "answer": "C", "answer_index": 2}, "C"),
        ({"A": "w", "B": "x", "C": "y", "answer": "C"}, "C"),
    ],
)
def test_options_and_answers_are_read_in_every_form(tmp_path: Path, row: dict, letter: str) -> None:
    problem = load_one(tmp_path, "choice", {"id": "q1", "question": "Which?", **row})
    assert read_choice(problem) == (letter, ["w", "x", "y"]) and problem["id"] == "q1"
    assert problem["question"] == "Which?\n\n(A) w\n(B) x\n(C) y"
    again = load_one(tmp_path, "choice", problem)  # what was read is read as itself
    assert (again["question"], again["answer"]) == (problem["question"], problem["answer"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": ["w", "x"], "answer": "D"}, "answer='D' is none of its 2 options"),
        ({"options": ["w", "x"], "answer": 2}, "answer='2' is none of its 2 options"),
        ({"options": ["w", "x"], "answer": True}, "answer='True' is none"),
        ({"options": ["w", "w"], "answer": "w"}, "answer='w' is none"),  # which one?
        ({"options": ["B", "A"], "answer": "A"}, "answer='A' is none"),  # the letter or the text?
        ({"options": ["w", "x"], "answer": "A", "answer_index": 1}, "are different options"),
        ({"options": ["w", "x"]}, "none of answer, answerKey, answer_index, answer_idx among"),
        ({"answer": "the first"}, "none of options, choices among its fields"),
        ({"options": ["w"], "answer": 0}, "1 options; there must be 2 to 26"),
        ({"options": "wx", "answer": 0}, "its options are not a list of texts"),
    ],
)
def test_an_answer_that_is_no_option_is_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*" + re.escape(message)):
        load_one(tmp_path, "choice", {"question": "Which?", **row})


def test_gpqa_shuffles_its_options_as_its_authors_do(tmp_path: Path) -> None:
    """The reference is their procedure: one generator, seeded with 0, over the rows in order."""
    wrong = [f"Incorrect Answer {i}" for i in (1, 2, 3)]
    rows = [
        {"Record ID": f"rec{i}", "Question": f"q{i}", "Correct Answer": f"right {i}\n"}
        | {name: f"wrong {i} {name[-1]}" for name in wrong}
        for i in range(50)
    ]
    loaded = problems.load_problems("gpqa", str(write(tmp_path / "x.jsonl", rows)), 0)
    generator = random.Random(0)
    for (_, problem), row in zip(loaded, rows, strict=True):
        texts = [row[name] for name in (*wrong, "Correct Answer")]
        generator.shuffle(texts)
        letter, options = read_choice(problem)
        assert options == [text.strip() for text in texts] and problem["id"] == row["Record ID"]
        assert options["ABCD".index(letter)] == row["Correct Answer"].strip()
    assert len({read_choice(problem)[0] for _, problem in loaded}) == 4
    stored = write(tmp_path / "s.jsonl", [{**rows[3], "response": "A"}])
    with pytest.raises(UserError, match=r"s\.jsonl:1: options are shuffled, so a response"):
        problems.load_responses("gpqa", str(stored), loaded)
    stored = write(tmp_path / "s.jsonl", [{"id": "rec3", "response": "A"}])
    assert (
        problems.load_responses("gpqa", str(stored), loaded)[0]["answer"] == loaded[3][1]["answer"]
    )
    with pytest.raises(UserError, match=r"x\.jsonl:1: not all of Incorrect Answer 1, "):
        load_one(tmp_path, "gpqa", {**rows[0], "Incorrect Answer 2": None})


def test_mmlu_redux_keeps_rows_with_one_right_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 0}
    kinds = [("ok", None), ("wrong_groundtruth", "C"), ("wrong_groundtruth", "1")]
    kinds += [("wrong_groundtruth", "none of them"), ("expert", None), ("no_correct_answer", "v")]
    kinds += [("multiple_correct_answers", "A and B"), ("bad_question_clarity", None)]
    rows = [fields | {"error_type": kind, "correct_answer": answer} for kind, answer in kinds]
    loaded = problems.load_problems("mmlu_redux", str(write(tmp_path / "x.jsonl", rows)), 0)
    assert [(p["id"], read_choice(p)[0]) for _, p in loaded] == [
        *(("mmlu_redux-0", "A"), ("mmlu_redux-1", "C"), ("mmlu_redux-2", "B"))
    ]
    assert "5 rows of" in " ".join(capsys.readouterr())
    with pytest.raises(UserError, match=r"x\.jsonl:1: error_type='odd' is none of MMLU-Redux's"):
        load_one(tmp_path, "mmlu_redux", {**fields, "error_type": "odd"})
    with pytest.raises(UserError, match="no problem of mmlu_redux among its rows"):
        load_one(tmp_path, "mmlu_redux", rows[4])


def test_a_benchmark_of_many_sets_reads_them_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def read(source: str) -> sources.Rows:
        requested.append(source)
        row = {"question": source, "choices": ["a", "b"], "answer": 1, "error_type": "ok"}
        return sources.Rows(source, 1, lambda i: row, lambda i: f"{source} row {i}")

    monkeypatch.setattr(sources, "open_rows", read)
    loaded = problems.load_problems("mmlu_redux", "hf:", 0)
    assert (
        len(loaded) == 57
        and requested[0] == "hf:edinburgh-dawg/mmlu-redux-2.0:abstract_algebra:test"
    )
    assert [problem["id"] for _, problem in loaded[:2]] == ["mmlu_redux-0", "mmlu_redux-1"]


def test_training_reads_multiple_choice_as_evaluation_does() -> None:
    row = {"question": "Which?", "choices": ["w", "x"], "answer": 1, "subject": "s"}
    adapted = problems.adapt_prompt_row("choice", row, "f:1")
    assert adapted["question"] == "Which?\n\n(A) w\n(B) x" and adapted["subject"] == "s"
    assert "choices" not in adapted
    canonical_row = canonical.canonicalize_row(adapted, "", "f:1", False)
    assert canonical_row["answer"] == adapted["answer"]
    with pytest.raises(UserError, match="f:1: mmlu_redux leaves this row out"):
        problems.adapt_prompt_row("mmlu_redux", {**row, "error_type": "expert"}, "f:1")


def test_samples_of_structured_answers_are_verified() -> None:
    """`verify` needs no response that gives the answer where its form does not say one."""
    answer = json.dumps({"letter": "B", "options": ["w", "x"]})
    samples = [{"text": text, "finish_reason": "stop"} for text in ("B", "The answer is (A).")]
    row = {"question": "Which?", "answer": answer, "samples": samples}
    rule = tasks.BENCHMARKS["choice"].grading
    with graders.Grader() as grader:
        verified = rejection.grade_samples(row, "f:1", rule, grader)
        assert [x["correct"] for x in verified] == [True, False]
        with pytest.raises(UserError, match="f:1: answer 'neither' cannot be parsed"):
            rejection.grade_samples({**row, "answer": "neither"}, "f:1", rule, grader)
