"""Tests the compare verb: the table of runs, and the sentence about two of them."""

import json
import re
from pathlib import Path

import pytest

from distill import compare
from distill.evaluation import comparison, statistics
from models.errors import UserError
from tests.support.verbs import call, write


def write_evaluation(
    path: Path, shares: list[list[int]], benchmark: str = "gsm8k", **fields
) -> str:
    """Writes the files that evaluate leaves for samples that were right (1) or wrong (0)."""
    path.mkdir()
    rows: list[comparison.Record] = [
        {"id": f"p{i}", "answer": str(i), "sample": n, "correct": bool(hit), "outcome": "correct"}
        | ({"outcome": "wrong"} if not hit else {})
        for i, hits in enumerate(shares)
        for n, hit in enumerate(hits)
    ]
    write(path / "examples.jsonl", rows)
    summary = statistics.summarise_rows(rows, [1]) | {"parameters": 596_049_920} | fields
    summary["protocol"] = {"benchmark": benchmark, "protocol": "greedy"}
    (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


def run_compare(*runs: str, out: Path | None = None) -> int:
    return call(compare, f"--runs={','.join(runs)}", *([f"--out={out}"] if out else []))


def test_two_runs_are_compared_in_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    base = [[1]] * 50 + [[0]] * 50
    write_evaluation(Path("A"), base)
    write_evaluation(Path("B"), [[1]] * 48 + [[0]] * 2 + [[1]] * 20 + [[0]] * 30)
    write_evaluation(Path("C"), base[::-1])
    assert run_compare("A", "B", out=Path("out.json")) == 0
    shown = capsys.readouterr().out
    sentence = shown.splitlines()[-1]
    size = re.fullmatch(
        r"B is better than A by 18\.0 ± (\S+) points \(95% interval (\S+) to (\S+), 100 problems: "
        r"better on 20, worse on 2; p = 0\.00012\)",
        sentence,
    )
    assert size, sentence
    half, low, high = map(float, size.groups())
    assert 6 < half < 10 and low > 0 and high - low == pytest.approx(2 * half, abs=0.11)
    output = json.loads(Path("out.json").read_text())
    assert output["paired"][0]["sentence"] == sentence and set(output["runs"]) == {"A", "B"}
    assert "596,049,920" in shown and "50.0 [40.4, 59.6]" in shown
    for runs in (("A", "B"), ("--runs=A", "B")):  # as one types them
        assert call(compare, *runs) == 0
        assert capsys.readouterr().out == shown
    assert run_compare("B", "A") == 0
    assert "A is worse than B by 18.0 ± " in capsys.readouterr().out
    assert run_compare("A", "C") == 0  # the same accuracy, on other problems
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"the data show no difference between A and C \(the latter: 0\.0 points, 95% interval "
        r"-\S+ to \+\S+, 100 problems: better on 50, worse on 50; p = 1\)",
        sentence,
    ), sentence


def test_sentences_have_short_names_and_the_table_full_ones(tmp_path: Path, capsys) -> None:
    runs = [tmp_path / name for name in ("x", "y")]
    for run in runs:
        (run / "eval").mkdir(parents=True)
    folders = [write_evaluation(run / "eval" / "000100", [[1], [0]]) for run in runs]
    assert run_compare(*folders, out=tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    assert "no difference between x/eval/000100 and y/eval/000100 (" in shown
    assert all(shown.count(folder) == 1 for folder in folders)
    assert json.loads((tmp_path / "out.json").read_text())["paired"][0]["runs"] == folders
    short = comparison.shorten_names(["a/b", "a/c/", "gs://x/b", "b", "y/c/"])
    assert list(short.values()) == ["a/b", "a/c", "x/b", "b", "y/c"]


def test_the_table_says_how_many_samples_a_problem_has(tmp_path: Path, capsys) -> None:
    folder = write_evaluation(tmp_path / "A", [[1, 0], [1, 1], [0, 0]])
    assert run_compare(folder) == 0
    head, row = (re.split(r"\s{2,}", x) for x in capsys.readouterr().out.splitlines())
    cells = dict(zip(head[1:], row[1:], strict=False))
    assert (cells["problems"], cells["samples a problem"]) == ("3", "2")


def test_several_runs_and_benchmarks_share_a_table(tmp_path: Path, monkeypatch, capsys) -> None:
    """Each benchmark has its own row, and runs on different benchmarks are not paired."""
    monkeypatch.chdir(tmp_path)
    write_evaluation(Path("A"), [[1, 0], [1, 1]], mean_length=7.25, truncation_rate=0.5)
    write_evaluation(Path("B"), [[1, 0], [0, 1], [0, 0]], benchmark="math500")
    write_evaluation(Path("C"), [[0, 0], [1, 1]])
    assert run_compare("A", "B", "C") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["A", "gsm8k"],
        ["B", "math500"],
        ["C", "gsm8k"],
    ]
    assert "7.2" in lines[1] and "50.0" in lines[1]
    assert sum("95% interval" in line for line in lines) == 1
    assert "B is of another benchmark than A: no difference is computed" in lines


def test_a_single_run_is_shown_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_evaluation(Path("A"), [[1], [0]])
    assert run_compare("A") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:2] == ["A", "gsm8k"]
    assert len(captured.out.splitlines()) == 2
    assert captured.err == "next:\n  python -m distill.compare --runs=A,OTHER\n"


def test_evaluations_that_were_sampled_otherwise_are_warned_of(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tokens in (("A", 16), ("B", 1024), ("C", 16)):
        write_evaluation(Path(name), [[1], [0]])
        path = Path(name) / "summary.json"
        summary = json.loads(path.read_text())
        summary["protocol"] |= {"max_new_tokens": tokens, "thinking": tokens > 16, "seed": tokens}
        path.write_text(json.dumps(summary))
    assert run_compare("A", "B", "C") == 0
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert line == (
        "warning: A and B were not sampled alike: thinking False and True; "
        "max_new_tokens 16 and 1024"
    )


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_evaluation(Path("A"), [[1], [0]])
    write_evaluation(Path("B"), [[1], [0], [1]])
    Path("empty").mkdir()
    Path("run").mkdir()
    (Path("run") / "metrics.jsonl").write_text("")
    write_evaluation(Path("cut"), [[1]])
    (Path("cut") / "examples.jsonl").write_text("")
    for runs, words in (
        (("A", "B"), "A and B: 1 of the 3 problems of B, such as 'p2', are absent from A, which "),
        (("A", "empty"), "empty: no finished evaluation"),
        (("A", "nowhere"), "nowhere: no finished evaluation: no such folder"),
        (("A", "run"), "run: is a run; evaluate it first"),
        (("A", "cut"), "cut: examples.jsonl holds no response"),
        (("A", "A"), "name different folders"),
    ):
        assert run_compare(*runs) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    with pytest.raises(UserError, match="has the answer '0' in one and 'another' in the other"):
        other = write_evaluation(Path("other"), [[1], [0]])
        rows = [json.loads(r) for r in (Path(other) / "examples.jsonl").read_text().splitlines()]
        rows[0]["answer"] = "another"
        comparison.compare_pair(("A", "other"), comparison.read_evaluation("A")[1], rows)
