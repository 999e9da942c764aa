"""The manuals: responses keep their rules, which a request alone does not tell."""

import collections

import pytest

from models.errors import UserError
from studies import instructions, manual

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lm-eval and its imports

SEEDS = range(20)


@pytest.fixture(scope="module")
def installed() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def split_prompt(prompt: str) -> tuple[str, str]:
    """Splits a prompt with a manual into that and the request."""
    rules, request = prompt.split("\n\n")
    return rules, request


@pytest.mark.parametrize("split", manual.SPLITS)
def test_responses_keep_the_rules_and_the_request(installed: None, split: str) -> None:
    for seed in SEEDS:
        for fixed in (None, manual.make_manual(seed)):
            for i in range(10):
                row = manual.make_row(seed, i, split, fixed)
                verdicts = instructions.check(row, row["response"])
                assert verdicts == [True] * (manual.LENGTH + row["level"]), row


def test_a_manual_cannot_be_guessed_from_a_request(installed: None) -> None:
    kept = []
    for seed in SEEDS:
        fixed, other = manual.make_manual(seed), manual.make_manual(seed + len(SEEDS))
        if set(fixed) & set(other):
            continue
        for i in range(20):
            row = manual.make_row(0, i, "test", fixed)
            kept.append(all(instructions.check(row, manual.make_row(0, i, "test")["response"])))
    assert len(kept) > 100 and sum(kept) / len(kept) < 0.1


def test_a_row_shows_a_manual_of_its_own(installed: None) -> None:
    shown = collections.Counter()
    for i in range(500):
        row = manual.make_row(0, i, "train")
        rules, request = split_prompt(row["prompt"])
        shown[rules] += 1
        assert row["question"] == row["prompt"]
        for text, names in (
            (rules, row["instruction_id_list"][: manual.LENGTH]),
            (request, row["instruction_id_list"][manual.LENGTH :]),
        ):
            for name in names:
                starts = [way.split("{")[0] for way in instructions.CONSTRAINTS[name]]
                assert any(start in text for start in starts), (name, text)
    assert len(shown) > 200


def test_a_fixed_manual_is_shown_on_demand_and_changes_nothing_else() -> None:
    for seed in SEEDS:
        fixed = manual.make_manual(seed)
        assert len(fixed) == manual.LENGTH and set(fixed) <= set(manual.RULES)
        row = manual.make_row(1, seed, "test", fixed)
        shown = manual.make_row(1, seed, "test", fixed, is_shown=True)
        written = manual.write_manual(fixed)
        assert "\n\n" not in row["prompt"] and written not in row["prompt"]
        assert shown.pop("prompt") == shown.pop("question") == f"{written}\n\n{row.pop('prompt')}"
        assert shown.pop("response") == row.pop("response")
        del row["question"]
        assert shown == row
        assert not set(row["instruction_id_list"][manual.LENGTH :]) & set(fixed)


def test_splits_share_no_request() -> None:
    fixed = manual.make_manual(0)
    requests = {
        split: {manual.make_row(9, i, split, fixed)["prompt"] for i in range(1500)}
        for split in manual.SPLITS
    }
    assert not requests["train"] & requests["test"]
    assert not requests["valid"] & (requests["train"] | requests["test"])
    assert all(len(found) > 100 for found in requests.values())
    own = {split_prompt(manual.make_row(8, i, "test")["prompt"])[1] for i in range(500)}
    assert not own & requests["train"]


def test_levels_are_equally_frequent_in_training() -> None:
    counts = collections.Counter(manual.make_row(1, i, "train")["level"] for i in range(1500))
    assert counts.keys() == set(range(manual.MAX_OWN + 1))
    assert all(abs(n - 500) < 120 for n in counts.values()), counts


def test_a_row_is_a_function_of_its_arguments() -> None:
    row = manual.make_row(7, 3, "train")
    assert row == manual.make_row(7, 3, "train")
    for arguments in [(8, 3, "train"), (7, 4, "train"), (7, 3, "test")]:
        assert manual.make_row(*arguments)["prompt"] != row["prompt"]
    assert manual.make_manual(1) == manual.make_manual(1) != manual.make_manual(2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="split: 'dev' is none of train, valid, test"):
        manual.make_row(0, 0, "dev")
    with pytest.raises(UserError, match="index -1 must not be negative"):
        manual.make_row(0, -1, "train")
    with pytest.raises(UserError, match="seed: -2"):
        manual.make_manual(-2)
