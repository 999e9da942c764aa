"""The requests with constraints: their responses keep them, others do not, pairs are held out."""

import collections
import re

import pytest

from distill.data.chat import encode, load_tokenizer
from models.errors import UserError
from studies import instructions
from tests.support.paths import TOKENIZER

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lm-eval and its imports


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    counts = {"train": 2000, "test": 1000, "valid": 300, "seen": 300}
    return {s: [instructions.make_row(0, i, s) for i in range(n)] for s, n in counts.items()}


@pytest.fixture(scope="module")
def installed() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def test_reference_responses_keep_all_constraints(installed: None, rows: dict) -> None:
    for row in [row for split in rows.values() for row in split]:
        verdicts = instructions.check(row, row["response"])
        assert verdicts == [True] * row["level"], row


def test_responses_to_other_requests_mostly_fail(installed: None, rows: dict) -> None:
    kept = collections.defaultdict(list)
    whole = []
    for row, other in zip(rows["train"], rows["train"][1:], strict=False):
        verdicts = instructions.check(row, other["response"])
        whole.append(all(verdicts))
        for name, verdict in zip(row["instruction_id_list"], verdicts, strict=True):
            kept[name].append(verdict)
    assert sum(whole) / len(whole) < 0.2
    assert kept.keys() == instructions.CONSTRAINTS.keys()
    for name, verdicts in kept.items():  # no constraint is kept whatever one says
        assert sum(verdicts) / len(verdicts) < 0.95, name


@pytest.mark.parametrize(
    ("asked", "response", "verdicts"),
    [
        ("No commas.", "cat dog", [True]),
        ("No commas.", "cat, dog", [False]),
        ("No commas.", "", [False]),
        ("Use quotes.", '"cat"', [True]),
        ("Use quotes.", "<think>\ncat\n</think>\n\ncat", [False]),
        ("Use quotes.", '<think>\ncat\n</think>\n\n"cat"', [True]),
    ],
)
def test_checks_say_no(installed: None, asked: str, response: str, verdicts: list) -> None:
    name = next(n for n, ways in instructions.CONSTRAINTS.items() if asked in ways)
    row = {"id": "x", "prompt": asked, "instruction_id_list": [name], "kwargs": [{}]}
    assert instructions.check(row, response) == verdicts


def test_prompts_name_what_is_checked(rows: dict) -> None:
    for row in rows["train"]:
        topic = re.match(r"(?:Name|List) (\w+)\.", row["prompt"])[1]  # pyright: ignore[reportOptionalSubscript]
        assert topic in instructions.TOPICS
        assert len(row["kwargs"]) == len(row["instruction_id_list"]) == row["level"]
        for values in row["kwargs"]:
            for key, value in values.items():
                for text in value if isinstance(value, list) else [value]:
                    assert key == "relation" or f"{text}" in row["prompt"], row
        words = set(re.findall(r"[a-z]+", row["response"]))
        assert words & set(instructions.TOPICS[topic])  # and the response is on the topic


def test_pairs_of_constraints_are_held_out(rows: dict) -> None:
    pairs = {
        split: {frozenset(row["instruction_id_list"]) for row in rows[split] if row["level"] == 2}
        for split in rows
    }
    assert (len(pairs["train"]), len(pairs["valid"]), len(pairs["test"])) == (48, 6, 12)
    assert not pairs["test"] & (pairs["train"] | pairs["valid"] | pairs["seen"])
    assert not pairs["valid"] & (pairs["train"] | pairs["seen"])
    assert {row["level"] for row in rows["test"]} == {2}
    share = sum(row["level"] == 1 for row in rows["train"]) / 2000
    assert 0.45 < share < 0.55
    # Each constraint is learned in other pairs and alone, and tested in two pairs.
    alone = {row["instruction_id_list"][0] for row in rows["train"] if row["level"] == 1}
    assert alone == instructions.CONSTRAINTS.keys()
    for name in instructions.CONSTRAINTS:
        assert sum(name in pair for pair in pairs["test"]) == 2, name
        assert sum(name in pair for pair in pairs["train"]) == 8, name


def test_no_prompt_of_training_is_in_another_split(rows: dict) -> None:
    train = {row["prompt"] for row in rows["train"]}
    for split in ("valid", "test", "seen"):
        assert not train & {row["prompt"] for row in rows[split]}
    assert len(train) > 500


def test_a_request_has_many_responses(rows: dict) -> None:
    responses = collections.defaultdict(set)
    for row in rows["train"]:
        responses[row["prompt"]].add(row["response"])
    common = collections.Counter(row["prompt"] for row in rows["train"]).most_common(20)
    for prompt, count in common:
        assert len(responses[prompt]) > count / 2, prompt


def test_rows_are_short(rows: dict) -> None:
    tokenizer = load_tokenizer(TOKENIZER)  # of other words, so these are of many tokens
    assert tokenizer is not None
    words = [len(re.findall(r"\w+|[^\w\s]", row["response"])) for row in rows["train"]]
    assert max(words) <= 25
    assert max(len(encode(tokenizer, row["response"])) for row in rows["train"]) <= 64


def test_a_row_is_a_function_of_its_arguments() -> None:
    row = instructions.make_row(7, 3, "train")
    assert row == instructions.make_row(7, 3, "train")
    others = [(8, 3, "train"), (7, 4, "train"), (7, 3, "test"), (7, 3, "seen")]
    assert len({row["id"], *(instructions.make_row(*x)["id"] for x in others)}) == 5
    assert len({row["response"], *(instructions.make_row(*x)["response"] for x in others)}) == 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 0, "dev"), "split: 'dev'"), ((-1, 0, "train"), "seed"), ((0, -1, "train"), "index")],
)
def test_bad_arguments_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(UserError, match=named):
        instructions.make_row(*arguments)
