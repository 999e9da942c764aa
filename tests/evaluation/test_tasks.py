"""Tests problems from files, hub sets and TFDS in their published formats, and named protocols."""

import json
import math
from pathlib import Path

import pytest

from distill import rollout
from distill.data import sources
from distill.evaluation import problems, protocols, tasks
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
    with pytest.raises(UserError, match="--protocol=guess: known are greedy, qwen3-thinking"):
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
