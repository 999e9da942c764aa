"""n-grams of tokens, near duplicates by MinHash, and scripts."""

from pathlib import Path

import numpy as np
import pytest

from distill.data import dedup, sources


def test_ngrams_are_those_of_the_tokens() -> None:
    """Equal runs have equal hashes, others do not: by brute force on a long text."""
    words = dedup.split_tokens("The cat, the CAT_1 and $x^2$: " * 3 + "the dog")
    assert words[:7] == ["the", "cat", ",", "the", "cat", "_", "1"]
    for n in (1, 3, 8):
        hashes = dedup.hash_ngrams(words, n)
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert len(hashes) == len(runs)
        assert len(set(hashes.tolist())) == len(set(runs))
        for i in range(len(runs)):
            assert (hashes == hashes[i]).tolist() == [run == runs[i] for run in runs]
    assert len(dedup.hash_ngrams(["a", "b"], 8)) == 1 and not len(dedup.hash_ngrams([], 8))


def test_a_match_names_the_problem_and_the_run() -> None:
    found = dedup.NgramIndex(["one two three four five", "two three", "six"], 3)
    assert found.find_matches("So: two  THREE four five!") == {0: (2, "two three four", 2 / 3)}
    # A problem shorter than n is found whole.
    assert found.find_matches("two three") == {1: (1, "two three", 1.0)}
    assert found.find_matches("") == {}


def test_few_rows_of_gsm8k_are_false_alarms(shared_data: Path) -> None:
    """Train and test share no problem. The strict default drops 40 rows of 7,473 for their
    phrasing, 13 tokens 5."""
    train, test = (
        [row["question"] for _, row in sources.open_rows(str(shared_data / f"gsm8k/{split}.jsonl"))]
        for split in ("train", "test")
    )
    evaluation = {n: dedup.NgramIndex(test, n) for n in (8, 13)}
    alarms = {8: 0, 13: 0}
    for question in train:
        for n, least in ((8, 3), (13, 1)):
            hits = evaluation[n].find_matches(question).values()
            alarms[n] += any(count >= least for count, *_ in hits)
    assert alarms == {8: 40, 13: 5}


def test_minhash_finds_what_jaccard_says() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    texts, base = [], [" ".join(rng.choice(words, 60)) for _ in range(60)]
    for text in base:
        changed = text.split()
        changed[30] = "other"
        texts += [text, " ".join(changed), " ".join(rng.choice(words, 60))]
    alike = [dedup.compute_jaccard(texts[3 * i], texts[3 * i + 1]) for i in range(60)]
    assert min(alike) > 0.8 and dedup.compute_jaccard(texts[0], texts[2]) < 0.1
    assert dedup.compute_jaccard("", " ") == 1 and dedup.compute_jaccard("a", "") == 0
    signatures = [dedup.compute_signature(dedup.split_tokens(text)) for text in texts]
    pairs = list(dedup.find_candidates(np.array(signatures).T))
    assert {(3 * i, 3 * i + 1) for i in range(60)} <= set(pairs)
    assert len(pairs) <= 62


def test_script_shares_count_letters_only() -> None:
    assert dedup.compute_script_share("Find x² + 1 = 2?", ("latin",)) == 1
    assert dedup.compute_script_share("12 + 1", ("latin",)) == 1
    assert dedup.compute_script_share("求 x", ("latin",)) == 0.5
    assert dedup.compute_script_share("求 x", ("latin", "cjk")) == 1


def test_a_short_problem_is_found_whole() -> None:
    evaluation = dedup.NgramIndex(["What is 5 + 7 now?", "one two three four"], 6)
    ((owner, (count, *_)),) = evaluation.find_matches("what is 5+7 now ?").items()
    assert owner == 0 and count == evaluation.ngram_counts[0] == 2
    assert (
        evaluation.ngram_counts[1] == 1 and evaluation.find_matches("One two three four")[1][0] == 1
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("他买了3个苹果，", ["他", "买", "了", "3", "个", "苹", "果", ","]),
        ("リンゴを2個。𠮷野", ["リ", "ン", "ゴ", "を", "2", "個", "。", "𠮷", "野"]),
        ("データ々〇", ["デ", "ー", "タ", "々", "〇"]),
        ("ที่นี่ 12", ["ที่", "นี่", "12"]),  # marks stay with their consonant
        ("ພາສາ", ["ພ", "າ", "ສ", "າ"]),
        ("ភាសា", ["ភា", "សា"]),
        ("मैंने हिन्दी सीखी", ["मैंने", "हिन्दी", "सीखी"]),  # spaces: words, marks included
        ("사과를 샀다", ["사과를", "샀다"]),
        ("求$x^2$的值", ["求", "$", "x", "^", "2", "$", "的", "值"]),
        ("👨‍👩‍👧 ❤️", ["👨", "👩", "👧", "❤"]),
        ("\ud800 half", ["\ud800", "half"]),
    ],
)
def test_characters_are_tokens_where_words_have_no_spaces(text: str, tokens: list[str]) -> None:
    assert dedup.split_tokens(text) == tokens
    assert len(dedup.hash_ngrams(tokens, 1)) == len(tokens)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Ａ１２＋Ｂ（ｘ）？", "a12+b(x)?", True),  # full width
        ("ﾊﾞﾅﾅ", "バナナ", True),  # half width
        ("été", "e\u0301te\u0301", True),
        ("ไทย\u200bแลนด์", "ไทยแลนด์", True),  # a space of no width
        ("10² + x₁", "102 + x1", False),
        ("1½ cups", "11/2 cups", False),
        ("ที่", "ที", False),  # another tone
    ],
)
def test_encodings_of_the_same_text_are_equal(a: str, b: str, same: bool) -> None:
    tokens = [dedup.split_tokens(text) for text in (a, b)]
    assert (tokens[0] == tokens[1]) is same
    assert (dedup.compute_digest(tokens[0]) == dedup.compute_digest(tokens[1])) is same


@pytest.mark.parametrize(
    ("problem", "text", "found"),
    [
        ("2+2?", "What is 2+2?", True),
        ("What is 2+2?", "2+2?", True),  # the larger part of the problem
        ("2+2?", "What is 2+2? Please reason step by step, and box the answer.", True),
        ("2+2?", "What is 12+2?", False),
        ("2+2?", "A page of text. " * 8 + "Is it 2+2?", False),
        ("Why?", "Tom has 3 apples and Ann has 5. Who has more? Why?", False),
        ("7", "What is 3 + 7?", False),
        ("1+1=？", "请问1+1=？", True),
        ("你是谁？", "请问，你是谁？", True),
        ("Compute $\\arcsin 1$.", "Compute \\arcsin{1}. Answer in radians.", True),
        ("", "What is 2+2?", False),
    ],
)
def test_a_problem_shorter_than_the_ngram(problem: str, text: str, found: bool) -> None:
    others = ["What is the sum of all the primes that are below one hundred?", "3+9?"]
    matches = dedup.NgramIndex([*others, problem], 8).find_matches(text)
    assert (2 in matches) is found
    assert set(matches) <= {2}


def test_exact_repeats_name_the_first() -> None:
    digests = [dedup.compute_digest([word]) for word in ["a", "b", "a", "c", "b", "a", "d"]]
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, dedup.DIGEST_BYTES)
    assert dedup.find_firsts(rows).tolist() == [0, 1, 0, 3, 1, 0, 6]
    assert dedup.find_firsts(rows[:0]).tolist() == []
