"""What was sampled is let go as it is yielded: whoever asks for responses holds none of them."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from distill import rollout
from distill.data import chat, dataset, sources
from distill.evaluation import responses
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.rollout import completions
from models.errors import UserError
from tests.support.paths import ROOT

COUNT = 600


class Subject:
    """Of a policy what these functions look at."""

    path = "model"
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "teacher")


SUBJECT: Any = Subject()


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """References to all responses that a sampler in place of the real one has made."""
    made: list[weakref.ref] = []

    def complete(_: Policy, prompts: Any, spec: rollout.SampleSpec, **__: Any) -> Iterator:
        assert len(prompts) == COUNT
        for prompt in prompts:
            group = [rollout.Sequence(prompt, (0, i), 3) for i in range(spec.samples)]
            for row in group:
                row.tokens, row.logprobs, row.finish_reason = [1, 2, 3], [-1.0] * 3, "length"
                made.append(weakref.ref(row))
            del row
            yield group
            del group

    monkeypatch.setattr(rollout, "complete", complete)  # as evaluations call it
    monkeypatch.setattr(completions, "complete", complete)  # as generate does
    return made


def most_alive(done: Iterator, made: list[weakref.ref]) -> int:
    """How many there were at a time while one after the other was written; counts all."""
    most = 0
    for number, row in enumerate(done, start=1):
        assert row
        del row
        if number % 50 == 0:
            gc.collect()
            most = max(most, sum(ref() is not None for ref in made))
    assert len(made) == 2 * COUNT
    return most


def test_generate(alive: list[weakref.ref]) -> None:
    rows = sources.Rows("rows", COUNT, lambda i: {"number": i}, lambda i: f"row {i}")
    done = completions.generate_rows(
        SUBJECT,
        rows,
        dataset.TokenLists([7, i] for i in range(COUNT)),
        rollout.SampleSpec(2, 3, batch_size=4, stop_strings=("x",)),
        limits=[3] * COUNT,
        errors={},
    )
    assert most_alive(done, alive) <= 4


class Slow(graders.Grader):
    """It is behind by more and more."""

    def submit(self, rule: graders.GradingRule, response: str, answer: str) -> Any:
        return Late()


class Late:
    def done(self) -> bool:
        return False

    def result(self) -> str:
        return "wrong"


def test_evaluate(alive: list[weakref.ref], monkeypatch: pytest.MonkeyPatch) -> None:
    """Graders that are slow are waited for: rows do not pile up before them either."""
    monkeypatch.setattr(responses, "MAX_WAITING_GROUPS", 8)
    problems = [(f"row {i}", {"id": i, "answer": "1", "question": "q"}) for i in range(COUNT)]
    sampled = responses.sample(
        SUBJECT,
        problems,
        dataset.TokenLists([7, i] for i in range(COUNT)),
        rollout.SampleSpec(2, 3, batch_size=4),
        first_problem=0,
    )
    begun = 0

    def counted() -> Iterator[list[dict]]:
        nonlocal begun
        for group in sampled:
            begun += 1
            yield group

    keys = [["a", "b"]] * COUNT
    done = responses.grade_while_sampling(
        counted(), Slow(), graders.ARITHMETIC, problems, keys, False
    )
    for number in range(1, 101):
        (first, _) = next(done)
        assert first["id"] == number - 1 and first["prompt_tokens"] == [7, number - 1]
        assert begun - number <= 8
    assert most_alive(done, alive) <= 4


def test_stop_strings_are_found_with_bounded_memory() -> None:
    """Across the pieces in which rows come, in any order; also where rows are many more than what
    is remembered, and where one has the place in memory that another had."""
    assert SUBJECT.tokenizer is not None
    ended = completions._make_stop_check(
        SUBJECT.tokenizer, rollout.SampleSpec(batch_size=2, stop_strings=("12",))
    )
    assert ended is not None
    ids = {c: SUBJECT.tokenizer.encode(c, add_special_tokens=False) for c in "123"}
    rows = [rollout.Sequence([1], (0, i), 9) for i in range(20)]
    for row in rows:
        row.tokens += ids["1"]
        assert not ended(row)
    for i, row in enumerate(rows):
        row.tokens += ids["2"] if i % 2 else ids["3"]
        assert ended(row) == bool(i % 2)
    del rows, row
    for i in range(50):  # most have the identity of the one before
        row = rollout.Sequence([1], (1, i), 9)
        row.tokens += ids["1"] if i % 2 else ids["2"]
        assert not ended(row)
        del row
    (held,) = [c.cell_contents for c in ended.__closure__ or () if type(c.cell_contents) is dict]
    assert len(held) == 4


def test_token_lists() -> None:
    lists = dataset.TokenLists([[1, 2], [], [3]])
    lists.append([4, 5, 6])
    assert list(lists) == [[1, 2], [], [3], [4, 5, 6]] and len(lists) == 4
    assert list(lists[1:3]) == [[], [3]] and list(lists[4:]) == [] and lists[-1] == [4, 5, 6]
    with pytest.raises(IndexError):
        lists[4]
    assert len(dataset.TokenLists()) == 0


def test_rows_get_what_the_positions_leave_unless_a_limit_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    subject = policy.make_abstract_for_inference(str(ROOT / "assets/student"), "float32")
    file = tmp_path / "prompts.jsonl"
    prompts = [{"tokens": [1] * 12}, {"tokens": [1] * 500}, {"tokens": [1], "max_new_tokens": 600}]
    file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rows = dataset.open_canonical_rows(str(file))
    seen: dict[str, Any] = {}

    def generate_rows(*args: Any, limits: Any, errors: dict, **options: Any) -> Iterator[dict]:
        seen.update(limits=list(limits), errors=dict(errors))
        return iter([{}] * len(prompts))

    monkeypatch.setattr(completions, "generate_rows", generate_rows)
    monkeypatch.setattr(completions.policy, "load", lambda subject, dtype: subject)
    spec = completions.SampleSpec()
    generate = completions.generate_file
    generate(subject, rows, spec, True, epath.Path(tmp_path / "a"), fits=True)
    assert seen["limits"] == [500, 12, 600]
    assert list(seen["errors"]) == [2]  # its own limit is not a default
    assert "2 of 3 rows have less than 1,024 new tokens, the shortest 12" in capsys.readouterr().err
    with pytest.raises(UserError, match="exceed the model's 512 positions"):
        generate(subject, rows, spec, True, epath.Path(tmp_path / "b"))
