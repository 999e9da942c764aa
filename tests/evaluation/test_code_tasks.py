"""Tests sets of programming problems in their published forms: tests survive, faults are named."""

import base64
import json
import pickle
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs import base
from distill.data import chat, dataset
from distill.evaluation import problems, tasks
from distill.rewards import programs
from distill.rewards.program_tests import ProgramTests
from distill.training import graded_rows, setup, stages
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.programs import skip_without_sandbox
from tests.support.small_problems import make_rows
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")


@pytest.fixture(autouse=True)
def require_a_sandbox() -> None:
    skip_without_sandbox()


def pack(cases: list) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def contest_row(name: str = "abc1_a", **changes: Any) -> dict:
    """A row of LiveCodeBench's form: a program that reads two numbers and prints their sum."""
    row = {
        "question_title": "Sum",
        "question_content": "Print the sum of two numbers.",
        "platform": "atcoder",
        "question_id": name,
        "contest_id": "abc1",
        "contest_date": "2024-10-12T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": pack([{"input": "2 5\n", "output": "7\n", "testtype": "stdin"}]),
        "metadata": "{}",
    }
    return {**row, **changes}


METHOD = contest_row(
    "3600",
    platform="leetcode",
    contest_date="2025-02-28T00:00:00",
    difficulty="hard",
    starter_code="class Solution:\n    def total(self, xs: List[int]) -> int:\n        ",
    public_test_cases=json.dumps([{"input": "[1, 2]", "output": "3", "testtype": "functional"}]),
    private_test_cases=pack([{"input": "[]", "output": "0", "testtype": "functional"}]),
    metadata='{"func_name": "total"}',
)
MBPP = {
    "task_id": 11,
    "text": "Write a function to find the depth of a list of nodes.",
    "code": "class Node:\n    def __init__(self, x):\n        self.x, self.next = x, None\n\n"
    "def depth(n):\n    return 1 + depth(n.next) if n else 0",
    "test_list": ["assert depth(root) == 2", "assert depth(None) == 0"],
    "test_setup_code": "root = Node(1)\nroot.next = Node(2)",
    "challenge_test_list": [],
}
MBPP_PLUS = {
    "task_id": 2,
    "prompt": "Write a function to halve numbers.",
    "code": "def halve(xs):\n    return [x / 2 for x in xs]",
    "source_file": "x",
    "test_imports": ["import math"],
    "test_list": ["assert halve([2]) == [1]"],
    "test": "import numpy as np\n\ninputs = [[[2.0, 3.0]], [[]]]\nresults = [[1.0, 1.5], []]\n"
    "for inp, exp in zip(inputs, results):\n    out = halve(*inp)\n"
    "    assert type(out) == type(exp) and np.allclose(out, exp)\n",
}
SUM = "print(sum(map(int, input().split())))"
TOTAL = "class Solution:\n    def total(self, xs: List[int]) -> int:\n        return sum(xs)"


def load(benchmark: str, row: dict, folder: Path) -> dict:
    ((_, problem),) = problems.load_problems(benchmark, str(write(folder / "x.jsonl", [row])), 0)
    return problem


def grade(problem: dict, benchmark: str, program: str) -> dict:
    rule = tasks.BENCHMARKS[benchmark].grading
    return dict(rule.grade(f"```python\n{program}\n```", problem["answer"]))  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(
    ("benchmark", "row", "name", "program", "count"),
    [
        ("livecodebench", contest_row(), "abc1_a", SUM, 2),
        ("livecodebench", METHOD, "3600", TOTAL, 2),
        ("humaneval", make_rows()[0], "Small/0", "def add_all(xs):\n    return sum(xs)", 1),
        ("mbpp", MBPP, "11", MBPP["code"], 2),
        ("mbpp", {k: v for k, v in MBPP.items() if k != "code"}, "11", MBPP["code"], 2),
        ("mbpp", MBPP_PLUS, "2", MBPP_PLUS["code"], 1),
    ],
)
def test_published_rows_load_and_their_solutions_are_right(
    benchmark: str, row: dict, name: str, program: str, count: int, tmp_path: Path
) -> None:
    problem = load(benchmark, row, tmp_path)
    assert problem["id"] == name
    problems.check_gradable(benchmark, [("x", problem)])
    right = grade(problem, benchmark, program)
    assert (right["outcome"], right["passed"], right["tests"]) == ("correct", count, count), right
    wrong = program.replace("return ", "return None and ").replace("print(", "print(1 + ")
    assert grade(problem, benchmark, wrong)["outcome"] == "wrong"


def test_prompts_hold_what_a_solution_needs(tmp_path: Path) -> None:
    reads = load("livecodebench", contest_row(), tmp_path)
    system, user = problems.render_question("livecodebench", reads)["messages"]
    assert system["content"].startswith("You are an expert Python programmer.")
    assert "two numbers" in user["content"] and "# YOUR CODE HERE" in user["content"]
    assert "read the inputs" not in user["content"] and "Read the inputs from" in user["content"]
    method = load("livecodebench", METHOD, tmp_path)["question"]
    assert METHOD["starter_code"] in method and "stdin" not in method
    function = load("humaneval", make_rows()[0], tmp_path)
    shown = problems.render_question("humaneval", function)["question"]
    assert "self-contained" in shown and "```python\nimport math\n\n\ndef add_all(xs):" in shown
    listed = problems.render_question("mbpp", load("mbpp", MBPP, tmp_path))["question"]
    assert "assert depth(root) == 2\nassert depth(None) == 0" in listed


def test_a_hub_set_loads_and_a_window_selects_its_months(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [contest_row(f"p{i}", contest_date=f"2024-{9 + i:02}-30T00:00:00") for i in range(3)]
    write(folder / "test.jsonl", rows)
    source = f"hf:{folder}::test"

    def ids(window: str) -> list[str]:
        return [row["id"] for _, row in problems.load_problems("livecodebench", source, 0, window)]

    assert ids("") == ["p0", "p1", "p2"] and ids("2024-10:2025-02") == ["p1", "p2"]
    assert ids("2024-09-30:2024-10-29") == ["p0"]
    for window, message in (("2024", "is no FROM:UNTIL"), ("2023-01:2023-02", "of that time")):
        with pytest.raises(UserError, match=message):
            ids(window)
    path = str(write(tmp_path / "mbpp.jsonl", [MBPP]))
    with pytest.raises(UserError, match="has no date"):
        problems.load_problems("mbpp", path, 0, "2024-01:2024-02")
    with pytest.raises(UserError, match="arithmetic has no dates"):
        problems.load_problems("arithmetic", "", 0, "2024-01:2024-02")


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("livecodebench", {"question_content": "q"}, "no text in public_test_cases, private_"),
        ("livecodebench", contest_row(public_test_cases="x"), "public_test_cases: no JSON list"),
        ("livecodebench", contest_row(metadata="["), "metadata is no JSON"),
        ("livecodebench", contest_row(metadata='{"func_name": "a b"}'), "is no name of a function"),
        ("humaneval", {"prompt": "def f():\n", "test": ""}, "no text in test, entry_point; it has"),
        ("humaneval", {**make_rows()[0], "entry_point": "a; b"}, "is no name of a function"),
        ("mbpp", {"text": "q", "code": "x"}, "no text or prompt, and test_list, among"),
        ("mbpp", {**MBPP, "test_list": [1]}, "test_list is no list of texts"),
    ],
)
def test_rows_of_another_form_are_named(
    benchmark: str, row: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"x\.jsonl:1: .*{message}"):
        load(benchmark, row, tmp_path)


def test_tests_that_cannot_be_decoded_are_counted_and_never_graded_wrong(tmp_path: Path) -> None:
    bad = ["????", pack([{"input": 1, "output": ""}]), pack([])[:-4]]
    rows = [contest_row(f"p{i}", private_test_cases=text) for i, text in enumerate([*bad, "[]"])]
    source = str(write(tmp_path / "x.jsonl", rows))
    loaded = problems.load_problems("livecodebench", source, 0)
    with pytest.raises(UserError, match="3 of 4 problems have tests that cannot be run: p0: not b"):
        problems.check_gradable("livecodebench", loaded)
    assert [grade(row, "livecodebench", SUM)["outcome"] for _, row in loaded] == [
        *["error"] * 3,
        "correct",
    ]
    broken = {**make_rows()[0], "test": "def check(candidate:\n"}
    with pytest.raises(UserError, match=r"1 of 1 problems .*: Small/0: no Python"):
        problems.check_gradable("humaneval", [("x", load("humaneval", broken, tmp_path))])
    values = {**METHOD, "public_test_cases": '[{"input": "x", "output": "1"}]'}
    with pytest.raises(UserError, match="are no JSON"):
        problems.check_gradable("livecodebench", [("x", load("livecodebench", values, tmp_path))])


def test_stored_responses_are_graded_and_results_do_not_repeat_the_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write(tmp_path / "data.jsonl", [contest_row(), METHOD])
    responses = [
        {"question_id": "abc1_a", "response": f"<think>\n</think>\n```python\n{SUM}\n```"},
        {"question_id": "3600", "response": f"```python\n{TOTAL.replace('sum(xs)', '3')}\n```"},
    ]
    flags = [f"--data={data}", f"--responses={write(tmp_path / 'responses.jsonl', responses)}"]
    out = tmp_path / "out"
    problems._say_once.cache_clear()  # as in a new process
    assert call(evaluate, "--benchmark=livecodebench", *flags, f"--out={out}") == 0
    assert capsys.readouterr().err.count("sandbox: ") == 1
    first, second = read(out / "examples.jsonl")
    assert (first["outcome"], first["answer"]) == ("correct", "tests of abc1_a")
    assert (second["outcome"], second["passed"], second["tests"]) == ("wrong", 1, 2)
    assert second["failure"] == "wrong value" and second["difficulty"] == "hard"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"] == 0.5
    assert summary["accuracy_by_difficulty"] == {"easy": 1.0, "hard": 0.0}


def test_published_rows_are_prompts_of_a_reward(tmp_path: Path) -> None:
    s = base.get_config().opd
    s.objective, s.samples, s.reward.grader = "grpo", 2, "livecodebench"
    s.max_prompt_tokens = 1000
    s.data.source = str(write(tmp_path / "rows.jsonl", [contest_row(), METHOD]))
    loss, _ = stages.resolve_objective("opd", s)
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "student")
    check = partial(setup._check_example, "opd", s, loss, 1000, 1000)
    adapt_row = graded_rows.make_row_adapter("opd", s)
    source = dataset.load_source(s.data, tokenizer, 0, False, check, adapt_row=adapt_row)
    answers = [source.read_example(i).answer for i in range(2)]
    assert [ProgramTests.from_answer(a).problem for a in answers] == ["abc1_a", "3600"]
    graded = programs.grade_contest("```python\nprint(3)\n```", answers[0])
    assert (graded["outcome"], graded["score"]) == ("wrong", 0.5)
    write(tmp_path / "rows.jsonl", [contest_row(private_test_cases="????")])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*cannot compare .*abc1_a"):
        dataset.load_source(s.data, tokenizer, 0, False, check, adapt_row=adapt_row)
