"""The generated task: pure, split without overlap, right; and the tokenizer made for it."""

import json
import re
from pathlib import Path

import pytest

from distill.data import arithmetic
from distill.data.chat import encode, load_tokenizer, render_messages
from models.errors import UserError
from tests.support.paths import DATA, ROOT

QWEN3 = DATA / "qwen3_tokenizer"
OPERATIONS = (3, 5)
needs_qwen3 = pytest.mark.skipif(not QWEN3.exists(), reason="no Qwen3 tokenizer beside the project")


@pytest.fixture(scope="module")
def train() -> list[arithmetic.Problem]:
    return [arithmetic.make_problem(0, i, "train", OPERATIONS) for i in range(20_000)]


@pytest.fixture(scope="module")
def test() -> list[arithmetic.Problem]:
    return [arithmetic.make_problem(0, i, "test", OPERATIONS) for i in range(5_000)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "assets" / "teacher")


def solve(question: str) -> int:
    """The answer, from the question's words alone."""
    value = int(re.match(r"\w+ has (\d+) ", question)[1])  # pyright: ignore[reportOptionalSubscript]
    for clause in question.split(". How")[0].split(", ")[1:]:
        number = int(re.search(r"\d+", clause)[0])  # pyright: ignore[reportOptionalSubscript]
        if "more" in clause or "buys" in clause:
            value += number
        elif "loses" in clause or "away" in clause:
            value -= number
        elif "times" in clause or "multiplies" in clause:
            value *= number
        else:
            assert value % number == 0, question
            value //= number
        assert 1 <= value <= 99, question
    return value


def test_a_problem_is_a_function_of_seed_index_and_split() -> None:
    assert arithmetic.make_problem(7, 3, "train", (3, 5)) == arithmetic.make_problem(
        7, 3, "train", (3, 5)
    )
    others = [(8, 3, "train"), (7, 4, "train"), (7, 3, "test")]
    assert len({arithmetic.make_problem(*key, (3, 5)) for key in [(7, 3, "train"), *others]}) == 4


def test_splits_share_no_skeleton(
    train: list[arithmetic.Problem], test: list[arithmetic.Problem]
) -> None:
    assert {arithmetic.assign_split(p.skeleton) for p in train} == {"train"}
    assert {arithmetic.assign_split(p.skeleton) for p in test} == {"test"}
    assert not {p.skeleton for p in train} & {p.skeleton for p in test}
    assert len({p.skeleton for p in train}) > 19_000  # the task is not a handful of problems


def test_answers_are_right(test: list[arithmetic.Problem]) -> None:
    for p in test:
        lines = p.solution.split("\n")
        for line in lines:
            left, right = line.replace("/", "//").split("=")
            assert eval(left) == int(right), line
        assert lines[-1].split("=")[1] == p.answer
        assert solve(p.question) == int(p.answer), p.question
        assert arithmetic.to_response(p) == f"<think>\n{p.solution}\n</think>\n\n{p.answer}"
        assert arithmetic.to_messages(p) == [{"role": "user", "content": p.question}]


def test_difficulty_is_the_number_of_operations(test: list[arithmetic.Problem]) -> None:
    counts = [p.operations for p in test]
    assert all(p.operations == len(p.skeleton[1]) == p.solution.count("=") for p in test)
    assert all(counts.count(n) > len(test) / 3 * 0.9 for n in (3, 4, 5))
    assert arithmetic.make_problem(0, 0, "test", (8, 8)).operations == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0, "dev", (3, 5)), "split"),
        ((0, 0, "train", (0, 5)), "operations"),
        ((0, 0, "train", (5, 3)), "operations"),
        ((0, 0, "train", (5,)), "operations: .* is not two whole numbers"),
        ((0, 0, "train", (3, 5.5)), "operations: .* is not two whole numbers"),
        ((-1, 0, "train", (3, 5)), "seed"),
    ],
)
def test_odd_arguments_are_the_users_mistake(arguments: tuple, named: str) -> None:
    with pytest.raises(UserError, match=named):
        arithmetic.make_problem(*arguments)


def test_digits_operators_and_newlines_are_one_token_each(tokenizer) -> None:
    for text in [*"0123456789+-*/=\n", "\n\n", "<think>", "</think>", "<|im_end|>"]:
        assert len(encode(tokenizer, text)) == 1, text
    regular = [encode(tokenizer, c)[0] for c in "67-3=64\n64/4=16\n16*5=80\n80+19=99"]
    assert encode(tokenizer, "67-3=64\n64/4=16\n16*5=80\n80+19=99") == regular


def test_every_word_of_the_task_is_one_token(tokenizer, train: list[arithmetic.Problem]) -> None:
    words = {word for p in train for word in re.findall(r"(?<!^) [A-Za-z]+|^\w+", p.question)}
    assert len(words) > 30
    assert not [word for word in words if len(encode(tokenizer, word)) != 1]
    for p in train[:1000]:  # what sizes the quick start's caches
        assert len(render_messages(tokenizer, arithmetic.to_messages(p))) <= 64
        assert len(encode(tokenizer, arithmetic.to_response(p))) <= 56


@pytest.mark.parametrize(
    "text",
    ["Grüße, y'all!  9² — 中文 🦙\r\n\t x", "\x00\x7f\ufeff", "مرحبا ͏", " ", "a" * 300, "'re I'M"],
)
def test_any_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_the_two_directories_agree_and_fit_their_configs(tokenizer) -> None:
    for name in ("teacher", "student"):
        config = json.loads((ROOT / "assets" / name / "config.json").read_text())
        assert len(tokenizer) <= config["vocab_size"] == 512
        assert (
            config["eos_token_id"] == tokenizer.eos_token_id == encode(tokenizer, "<|im_end|>")[0]
        )
        assert config["pad_token_id"] == tokenizer.pad_token_id
    files = [
        (ROOT / "assets" / name / "tokenizer.json").read_bytes() for name in ("teacher", "student")
    ]
    assert files[0] == files[1]


@needs_qwen3
def test_tokenizer_is_qwen3s_in_small(tokenizer) -> None:
    ours = json.loads((ROOT / "assets" / "teacher" / "tokenizer.json").read_text())
    qwen3 = json.loads((QWEN3 / "tokenizer.json").read_text())
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        assert ours[part] == qwen3[part], part
    assert ours["decoder"]["type"] == qwen3["decoder"]["type"]  # a decoder ignores its options
    drop_id = [[{**t, "id": 0} for t in one["added_tokens"]] for one in (ours, qwen3)]
    assert drop_id[0] == drop_id[1]
    published = load_tokenizer(QWEN3)
    assert published is not None
    assert tokenizer.chat_template == published.chat_template
    assert tokenizer.all_special_tokens == published.all_special_tokens


@needs_qwen3
def test_the_script_makes_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "assets"))
    import make_tokenizer  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(make_tokenizer, "ASSETS", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_tokenizer.py", f"--template_from={QWEN3}"])
    make_tokenizer.main()
    for path in tmp_path.glob("*/*.json"):
        kept = ROOT / "assets" / path.parent.name / path.name
        assert path.read_text() == kept.read_text(), path.name
    assert len(list(tmp_path.glob("*/*.json"))) == 8
