"""Cleaning a set: decontamination against published pairs, duplicates, filters."""

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from distill import clean
from distill.data import cleaning, dedup, sources
from tests.support.verbs import call, write


def read(path: Path) -> list[dict]:
    return [row for _, row in sources.open_rows(str(path))]


def found_pairs(report: list[dict]) -> set[tuple[int, int]]:
    return {
        tuple(int(str(f[k]).rpartition(":")[2]) - 1 for k in ("row", "of"))  # type: ignore[misc]
        for f in report
        if f["why"] == "contaminated"
    }


def test_the_published_pairs_are_found(shared_data: Path, tmp_path: Path) -> None:
    """Any 3 shared runs of 8 tokens find 36 of 36, most of which are phrases; 13 tokens find fewer.
    The defaults drop a twelfth of that, among them the pairs that are one problem."""
    path, report, out = shared_data / "s1k" / "questions.jsonl", tmp_path / "r", tmp_path / "out"
    flags = [f"--data={path}", f"--against={shared_data / 'math500' / 'test.jsonl'}"]
    flags += [f"--out={out}", f"--report={report}"]
    assert call(clean, *flags, "--min_share=0") == 0
    ids = {row["id"]: i for i, row in enumerate(read(path))}
    known = {
        (ids[row["train_id"]], row["math500_index"])
        for row in read(shared_data / "s1k" / "math500_overlap.jsonl")
    }
    found = found_pairs(read(report))
    assert len(known) == 36 and known <= found
    dropped = {row for row, _ in found}
    assert len(read(out)) == 1000 - len(dropped) == 774
    # The n-gram of each finding is in both texts.
    texts = [row["question"] for row in read(path)]
    problems = [row["question"] for row in read(shared_data / "math500" / "test.jsonl")]
    for finding in read(report):
        row, of = (int(finding[k].rpartition(":")[2]) - 1 for k in ("row", "of"))
        for text in (texts[row], problems[of]):
            assert any(finding["ngram"] in " ".join(form(text)) for form in dedup.TOKENIZERS)
    for file in (out, report):
        file.unlink()
    assert call(clean, *flags) == 0
    leaks = found_pairs(read(report))
    assert len(read(out)) == 982 and len(known & leaks) == 10
    same = (
        "closed interval $[-500,500]$",
        "thinking of a polynomial whose roots",
        "F(z)=\\frac{z+i}",
    )
    for text in same:
        assert any(text in texts[row] and text in problems[of] for row, of in leaks)
    assert not any(finding["ngram"] == "$ , where $ m $ and $" for finding in read(report))
    for file in (out, report):
        file.unlink()
    assert call(clean, *flags, "--min_share=0", "--ngram=13", "--shared=1") == 0
    assert len(known & found_pairs(read(report))) == 26


PROMPT = (
    "A farmer has seven red hens and every hen lays two eggs a day, and he sells each dozen of "
    "them in town for three coins; how many coins does he bring home at the end of four weeks?"
)


def rows() -> list[Any]:
    return [
        {"question": PROMPT, "response": "98", "id": 0},
        {"question": PROMPT.upper(), "response": " 98 ", "id": 1},  # the same
        {"question": PROMPT.replace("red", "brown"), "response": "98", "id": 2},  # nearly
        {
            "question": PROMPT,
            "response": "Step by step. " + " ".join(f"{i} and" for i in range(60)),
            "id": 3,
        },
        {"messages": [{"role": "user", "content": "Сколько будет два плюс два?"}], "id": 4},
        {"question": "Short?", "id": 5},
        {
            "prompt": "What is the largest of all numbers below one hundred that are primes?",
            "id": 6,
        },
        {"query": "x", "id": 7},
    ]


def test_each_row_left_out_is_reported_with_its_reason(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "rows.jsonl", rows())
    write(
        tmp_path / "eval.jsonl",
        [
            {
                "problem": "the largest of all numbers below one hundred that are primes",
                "answer": "97",
            }
        ],
    )
    flags = [f"--data={path}", f"--against={tmp_path / 'eval.jsonl'}", "--min_characters=10"]
    flags += [f"--out={tmp_path / 'out'}", f"--report={tmp_path / 'report'}", "--scripts=latin"]
    assert call(clean, *flags, "--near=0.6") == 2
    assert f"{path}:8: no messages, question, prompt or text among" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "report").exists()
    assert call(clean, *flags, "--near=0.6", "--on_bad_row=skip") == 0
    assert read(tmp_path / "out") == [rows()[0], rows()[3]]
    why = {f["row"].rpartition(":")[2]: (f["why"], f.get("of")) for f in read(tmp_path / "report")}
    assert why == {
        "2": ("duplicate", f"{path}:1"),
        "3": ("near duplicate", f"{path}:1"),
        "5": ("script", None),
        "6": ("length", None),
        "7": ("contaminated", f"{tmp_path / 'eval.jsonl'}:1"),
        "8": ("bad row", None),
    }
    assert "2 of 8 rows stay; " in capsys.readouterr().err
    for name in ("out", "report"):
        (tmp_path / name).unlink()
    assert call(clean, *flags, "--near=1.1", "--on_bad_row=skip") == 0
    assert [row["id"] for row in read(tmp_path / "out")] == [0, 2, 3]


JAPANESE = "太郎君は鉛筆を十二本持っています。妹に四本あげると、太郎君の鉛筆は何本残りますか。"
THAI = "แม่ค้ามีส้มอยู่สามสิบผลขายไปแล้วสิบสองผลตอนนี้แม่ค้าเหลือส้มกี่ผล"
CHINESE = "一列火车以每小时八十公里的速度行驶，三个半小时以后，这列火车一共行驶了多少公里？"


@pytest.mark.parametrize("problem", [JAPANESE, THAI, CHINESE])
def test_text_without_spaces(tmp_path: Path, problem: str) -> None:
    """A problem is found within an instruction, and a row that differs by one character."""
    other = {JAPANESE: CHINESE, CHINESE: THAI, THAI: JAPANESE}[problem]
    third = "".join(sorted(problem))
    rows = [f"1. {problem}", f"{third[:9]}{problem}{third[:5]}", other, other + other[-2], third]
    path = write(tmp_path / "rows.jsonl", [{"question": x, "response": "8"} for x in rows])
    write(tmp_path / "eval.jsonl", [{"question": problem, "answer": "8"}])
    flags = [f"--data={path}", f"--against={tmp_path / 'eval.jsonl'}", f"--out={tmp_path / 'out'}"]
    assert call(clean, *flags, f"--report={tmp_path / 'report'}") == 0
    assert [row["question"] for row in read(tmp_path / "out")] == [other, third]
    why = [(f["row"].rpartition(":")[2], f["why"]) for f in read(tmp_path / "report")]
    assert why == [("1", "contaminated"), ("2", "contaminated"), ("4", "near duplicate")]


def test_texts_are_not_held(tmp_path: Path) -> None:
    """Memory grows by a small part of the file, of which all rows stay."""
    rows = [
        {"question": " ".join(f"{i + j:0>100}" for j in range(30))} for i in range(0, 60000, 60)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cleaning.clean_file(str(path), [], cleaning.Rules(), str(tmp_path / "out"), "")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(read(tmp_path / "out")) == len(rows)
    assert peak - before < path.stat().st_size / 5


@pytest.mark.parametrize("flag", ["--data=no.jsonl", "--against=no.jsonl"])
def test_a_missing_set_is_named(tmp_path: Path, capsys: Any, flag: str) -> None:
    path = write(tmp_path / "rows.jsonl", rows()[:1])
    assert call(clean, f"--data={path}", f"--out={tmp_path / 'out'}", flag) == 2
    assert "no.jsonl: no such file" in capsys.readouterr().err


def rewrite(text: str, draw: random.Random) -> str:
    """Rewrites a problem as another set might: spaces, case, LaTeX, a word here and there."""
    text = text.replace("\\frac", "\\dfrac").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\$([^$]+)\$", r"\\(\1\\)", text).replace("^\\circ", "^{\\circ}")
    text = re.sub(r"\^(\w)", r"^{\1}", text)
    words = text.upper().split(" ") if draw.random() < 0.5 else text.split(" ")
    for _ in range(1 + len(words) // 20):
        words.insert(draw.randrange(len(words)), draw.choice(["given", "now", "some"]))
    return f"Solve this problem.{draw.choice('  ' + chr(10))}" + "  ".join(words)


def test_rewritten_problems_are_found_among_others(shared_data: Path, tmp_path: Path) -> None:
    """None of these rows were used to choose 8 tokens and 3 runs."""
    draw, problems = random.Random(1), read(shared_data / "math500" / "test.jsonl")[:150]
    others = read(shared_data / "gsm8k" / "train.jsonl")[:450]
    rows = [{"question": rewrite(row["question"], draw)} for row in problems]
    mixed = [{"question": row["question"]} for row in others] + rows
    path, report = tmp_path / "mixed.jsonl", tmp_path / "report.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    flags = [f"--data={path}", f"--against={shared_data / 'math500' / 'test.jsonl'}", "--near=2"]
    assert call(clean, *flags, f"--out={tmp_path / 'out'}", f"--report={report}") == 0
    found = found_pairs(read(report))
    hits = {row for row, of in found if row == 450 + of}
    assert len(hits) >= 0.94 * len(problems)
    assert len({row for row, _ in found if row < 450}) <= 5
