"""The made-up company: documents and questions agree with its facts, splits ask on other people."""

import re

import pytest

from models.errors import UserError
from studies import facts

# What a sentence says, from its words alone: (name, fact, value).
READERS = (
    (r"(?P<name>\w+) sits at desk (?P<value>\d+)\.", "desk"),
    (r"The desk of (?P<name>\w+) is (?P<value>\d+)\.", "desk"),
    (r"(?P<name>\w+) has desk (?P<value>\d+)\.", "desk"),
    (r"Desk (?P<value>\d+) belongs to (?P<name>\w+)\.", "desk"),
    (r"(?P<name>\w+) is (?P<value>\d+) years old\.", "age"),
    (r"The age of (?P<name>\w+) is (?P<value>\d+)\.", "age"),
    (r"(?P<name>\w+) has the age of (?P<value>\d+)\.", "age"),
    (r"At (?P<value>\d+) years, (?P<name>\w+) works here\.", "age"),
    (r"(?P<name>\w+) works on floor (?P<value>\d+)\.", "floor"),
    (r"The floor of (?P<name>\w+) is (?P<value>\d+)\.", "floor"),
    (r"(?P<name>\w+) is on floor (?P<value>\d+)\.", "floor"),
    (r"Floor (?P<value>\d+) is where (?P<name>\w+) works\.", "floor"),
)


def read_sentence(sentence: str) -> tuple[str, str, int, int]:
    """The name, fact and value that a sentence states, and the number of its phrasing."""
    found = [
        (m, fact, i) for i, (p, fact) in enumerate(READERS) if (m := re.fullmatch(p, sentence))
    ]
    assert len(found) == 1, sentence
    match, fact, phrasing = found[0]
    return match["name"], fact, int(match["value"]), phrasing


def read_question(question: str) -> tuple[str, str]:
    """The name and the fact that a question asks for."""
    (name,) = set(re.findall(r"\w+", question)) & set(facts.NAMES)
    (fact,) = [f for f, word in (("desk", "desk"), ("floor", "floor"), ("age", "age|old")) if
               re.search(rf"\b({word})\b", question)]  # fmt: skip
    return name, fact


@pytest.mark.parametrize("seed", [0, 5])
def test_documents_state_every_fact_in_several_phrasings(seed: int) -> None:
    company = facts.make_company(seed)
    phrasings: dict[tuple[str, str], set[int]] = {}
    orders = set()
    rows = facts.make_documents(seed)
    for row in rows:
        said = [read_sentence(x) for x in re.findall(r"[^.]+\.", row["text"].replace(". ", "."))]
        assert len({name for name, *_ in said}) == 1
        orders.add(tuple(fact for _, fact, *_ in said))
        for name, fact, value, phrasing in said:
            assert company[name][fact] == value
            phrasings.setdefault((name, fact), set()).add(phrasing)
    assert len(rows) == facts.PEOPLE * facts.VERSIONS == len({row["id"] for row in rows})
    assert len(phrasings) == 3 * facts.PEOPLE == 120
    assert min(map(len, phrasings.values())) >= 2
    assert sum(map(len, phrasings.values())) / len(phrasings) > 3.5  # of four
    assert len(orders) == 6


def test_answers_are_the_companys_facts() -> None:
    company = facts.make_company(2)
    for split in facts.SPLITS:
        for row in facts.make_questions(2, split):
            name, fact = read_question(row["question"])
            assert row["answer"] == row["response"] == str(company[name][fact]), row
            assert row["fact"] == fact and row["thinking"] is False


def test_splits_ask_on_different_people_and_the_reworded_in_other_words() -> None:
    rows = {split: facts.make_questions(0, split) for split in facts.SPLITS}
    people = {s: {read_question(row["question"])[0] for row in rows[s]} for s in rows}
    assert [len(people[s]) for s in facts.SPLITS] == [20, 4, 16, 20]
    assert people["train"] == people["reworded"]
    assert not people["train"] & people["test"]
    assert not people["valid"] & (people["train"] | people["test"])
    assert set().union(*people.values()) == facts.make_company(0).keys()
    assert [len(rows[s]) for s in facts.SPLITS] == [120, 24, 96, 60]  # three facts, two wordings

    def find_wordings(split: str) -> set[str]:
        names = "|".join(facts.NAMES)
        return {re.sub(names, "NAME", row["question"]) for row in rows[split]}

    assert find_wordings("train") == find_wordings("test")
    assert len(find_wordings("train")) == 6 and len(find_wordings("reworded")) == 3
    assert not find_wordings("train") & find_wordings("reworded")


def test_guessing_the_commonest_answer_is_seldom_right() -> None:
    answers = [row["answer"] for row in facts.make_questions(0, "test")]
    assert max(answers.count(x) for x in set(answers)) / len(answers) < 0.15


def test_rows_are_a_function_of_seed_split_and_people() -> None:
    assert facts.make_documents(1) == facts.make_documents(1)
    assert facts.make_questions(1, "test") == facts.make_questions(1, "test")
    assert facts.make_company(1) != facts.make_company(2)
    assert len(facts.make_company(1, people=150)) == 150
    assert len(facts.make_documents(1, people=10, versions=3)) == 30
    names = [read_question(row["question"])[0] for row in facts.make_questions(1, "train")]
    assert names != sorted(names, key=names.index)  # shuffled


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="split: 'dev' is none of train"):
        facts.make_questions(0, "dev")
    with pytest.raises(UserError, match="people: 9 is not 10 to 150"):
        facts.make_documents(0, people=9)
    with pytest.raises(UserError, match="people: 151"):
        facts.make_company(0, people=151)
    with pytest.raises(UserError, match="versions: 0"):
        facts.make_documents(0, versions=0)
    with pytest.raises(UserError, match="seed: -1"):
        facts.make_company(-1)
