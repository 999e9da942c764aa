"""Tests the report of runs and evaluations: what it shows, whatever state their files are in."""

import base64
import json
import math
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import report
from distill.reporting import figures, read, tables, writing
from tests.support.run_files import make_transcript, write_evaluation, write_run
from tests.support.verbs import call, write

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Reader(HTMLParser):
    """Collects the texts of a page, and its tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def build(tmp_path: Path, *folders: Path, **options: Any) -> str:
    out = tmp_path / "out.html"
    writing.write_report([str(folder) for folder in folders], out, **options)
    return out.read_text("ascii")


def read_transcripts(page: str) -> list[dict[str, Any]]:
    """Returns what the page's script reads, with the transcripts unpacked."""
    data = re.search(r'<script type="application/json" id="transcripts-data">(.*?)</script>', page)
    assert data
    sources = json.loads(data[1])
    for source in sources:
        for step in source["steps"]:
            for row in step["rows"]:
                row["data"] = json.loads(zlib.decompress(base64.b64decode(row["data"])))
    return sources


def test_the_page_is_a_pure_function_of_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_evaluation(run / "eval" / "000002", [True, False])
    first = build(tmp_path, run)
    assert build(tmp_path, run) == first
    (run / "metrics.jsonl").touch()
    assert build(tmp_path, run) == first


def test_seeds_are_a_band_and_other_configs_a_curve_of_their_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed) for seed in (0, 1)]
    other = write_run(tmp_path / "o", opd__optim__learning_rate=0.5)
    page = Reader(build(tmp_path, *runs, other))
    charts = [x["data-points"] for tag, x in page.tags if tag == "figure"]
    points = json.loads(next(x for x in charts if x and "0.1" in x))
    band, single = points["curves"]
    assert band["name"] == f"{runs[0]} and 1 more of other seeds" and single["name"] == str(other)
    assert band["low"][0] == 1 and band["high"][0] == 1.1 and band["mean"][0] == 1.05
    assert "low" not in single
    place = page.texts.index("opd.optim.learning_rate")
    values = [text for text in page.texts[place : place + 4] if text.strip()]
    assert values == ["opd.optim.learning_rate", "1e-05", "1e-05", "0.5"]


def test_tables_have_results_differences_and_cost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_evaluation(run / "eval" / "000002", [False] * 40 + [True] * 10)
    write_evaluation(run / "eval" / "000006", [True] * 40 + [False] * 10)
    write_evaluation(run / "eval" / "other" / "sampled", [True], benchmark="math500")
    alone = write_evaluation(tmp_path / "e", [False] * 50)
    text = Reader(build(tmp_path, run, alone)).text
    assert "80.0 [67.0, 88.8]" in text
    assert "a/eval/000002" not in text.replace(f"{run}/eval/000002", "")  # one model's training
    assert f"{run}/eval/other/sampled math500" in " ".join(text.split())
    assert "e is worse than a/eval/000006 by 80.0" in text and text.count("95% interval") == 1
    # 600 tokens trained at three passes and 400 sampled; a teacher reads 400.
    assert "6.2e+09" in text
    # Six steps of 15 minutes on four devices.
    assert " 1 h 30 min " in text and " 6 h 0 min " in text and "4 TPU v5e" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, ""), (1.29, "1.3 s"), (24, "24 s"), (400_000, "111 h")]
)
def test_durations_are_written_as_people_say_them(seconds: float, words: str) -> None:
    rows = [{"step": 0, "stage": "opd", "time/step": seconds, "time/compile": seconds / 2}]
    (row,) = tables.tabulate_cost([read.Run("a", {}, {}, rows, {}, 0, [])]).rows
    assert row[4] == words


def test_evaluations_that_the_user_names_are_paired(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for step in (2, 4, 6):
        write_evaluation(run / "eval" / f"{step:06d}", [step == 6] * 50)
    folders = [run / "eval" / name for name in ("000002", "000006")]
    text = Reader(build(tmp_path, *folders)).text
    assert "000006 is better than 000002 by 100.0" in text
    assert "95% interval" not in Reader(build(tmp_path, run)).text
    for name in ("before", "after"):  # other models, such as those of the quick start
        write_evaluation(run / "eval" / name, [name == "after"] * 50, benchmark="math500")
    text = Reader(build(tmp_path, run)).text
    assert "a/eval/after is better than a/eval/before by 100.0" in text


def test_a_runs_evaluations_are_in_the_order_of_training(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    names = ("student_before", "000002", "student_after", "teacher")
    for name in names:
        write_evaluation(run / "eval" / name / "greedy", [True, False])
    _, evaluations = read.read_directories([str(run)], 0)
    assert [Path(x.name).parent.name for x in evaluations] == [*names]


def test_a_single_evaluation_has_whole_steps_and_shares() -> None:
    rows = [{"step": i, "stage": "opd"} for i in range(2)]
    rows[1] |= {"eval/accuracy": 0.0}
    groups = [figures.Group("a", [read.Run("a", {}, {}, rows, {}, 0, [])])]
    chart = figures.make_chart(groups, "eval/accuracy")
    assert chart and chart.curves[0].steps_N.tolist() == [2]  # after two steps
    axes = figures.draw(chart, groups).axes[0]
    assert axes.get_ylim() == (0, 1) and axes.get_xlim() == (1, 3)
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_the_teachers_listed_are_those_that_were_loaded(tmp_path: Path) -> None:
    config = {"teacher": {"path": "T"}, "grpo": {"teachers": ["teacher"]}, "stages": ["grpo"]}
    student, teacher = {"student": {}}, {"student": {}, "teacher": {}}
    plain = [{"step": 0, "stage": "grpo"}]
    scored = [{"step": 0, "stage": "grpo", "train/reverse_kl": 0.1}]
    for models, rows, listed in (
        (student, plain, ""),
        (teacher, plain, "T"),
        (student, scored, "T"),  # resumed in a stage without a teacher
        (None, plain, "T"),
    ):
        run = read.Run("a", config, {"models": models}, rows, {}, 0, [])
        assert tables.tabulate_runs([run]).rows[0][3] == listed


def test_curves_are_broken_where_another_stage_begins(tmp_path: Path) -> None:
    """No line, and no mean, joins what two stages measured."""
    stages, starts = ["sft"] * 601 + ["opd"] * 602 + ["grpo"], [601, 1203]
    losses = [{"sft": 11.0, "opd": 0.5, "grpo": 3.0}[stage] for stage in stages]
    for stride in (1, 100):
        rows = [
            {"step": i, "stage": stages[i]}
            | ({"train/loss": losses[i]} if i % stride == 0 or i == 1203 else {})
            for i in range(len(stages))
        ]
        groups = [figures.Group("a", [read.Run("a", {}, {}, rows, {}, 0, [])])]
        chart = figures.make_chart(groups, "train/loss")
        assert chart and chart.mean_of > 1 and chart.boundaries == starts
        (curve,) = chart.curves
        assert [set(curve.mean_N[part].tolist()) for part in curve.parts] == [{11.0}, {0.5}, {3.0}]
        lines = figures.draw(chart, groups).axes[0].get_lines()[len(starts) :]
        assert [set(np.asarray(line.get_ydata()).tolist()) for line in lines] == [
            {11.0},
            {0.5},
            {3.0},
        ]
        assert lines[-1].get_marker() == "o"  # a single point is seen


def test_transcripts_keep_their_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (source,) = read_transcripts(build(tmp_path, run))
    assert [step["step"] for step in source["steps"]] == [0, 5]
    row, expected = source["steps"][1]["rows"][3], make_transcript(3, 12, top=3)
    assert row["finish"] == "length" and row["thinking"] is False and row["reward"] == 1.0
    content = row["data"]
    assert content["texts"] == expected["token_texts"] and content["prompt"] == "question 3"
    for name in ("reverse_kl", "logp", "teacher_logp", "entropy", "teacher_entropy"):
        assert content["stats"][name] == pytest.approx([1000 * x for x in expected[name]], abs=0.5)
    for name in ("student_top", "teacher_top"):
        ids = [[x for x, _ in top] for top in expected[name]]
        assert content[name][0] == ids
        for top, pairs in zip(content[name][1], expected[name], strict=True):
            assert top == pytest.approx([1e3 * math.exp(x) for _, x in pairs], abs=0.5)
    assert content["top_texts"]["4"] == " 4"


def test_only_so_many_transcripts_are_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for step in range(10, 30):
        write(run / "rollouts" / f"{step:06d}.jsonl", [make_transcript(i, 3) for i in range(4)])
    (source,) = read_transcripts(build(tmp_path, run, max_transcripts=16))
    steps = [step["step"] for step in source["steps"]]
    assert len(steps) == 4 and steps[0] == 0 and steps[-1] == 29
    assert sum(len(step["rows"]) for step in source["steps"]) == 16
    assert read_transcripts(build(tmp_path, run, max_transcripts=0)) == []


def break_rows(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"step": 9, "sta\n[]\n{"stage": "opd"}\n')


ODD_NUMBERS = [
    {"step": 10**30, "stage": "opd", "train/loss": 1.0},
    {"step": 0, "stage": "opd", "train/loss": 10**400, "time/step": "x", "train/entropy": 1e308},
    {"step": 1, "stage": "opd", "train/loss": [1], "train/reverse_kl": 1e-300},
]
BROKEN = [
    ("config.json", lambda p: p.unlink(), "no config.json"),
    ("config.json", lambda p: p.write_text("[1]"), "config.json holds no object"),
    ("config.json", lambda p: p.write_text('{"stages": 7, "student": 3}'), "Curves"),
    ("environment.json", lambda p: p.write_text("{"), "environment.json cannot be read"),
    ("environment.json", lambda p: p.write_text('{"devices": {"count": "x"}}'), "Curves"),
    ("metrics.jsonl", lambda p: p.unlink(), "no metrics.jsonl; no step is done yet"),
    ("metrics.jsonl", lambda p: p.write_text(""), "no step is done yet"),
    ("metrics.jsonl", break_rows, "2 broken line(s), left out: 7, 8"),
    ("metrics.jsonl", lambda p: write(p, ODD_NUMBERS), "Curves"),
    ("metrics.jsonl", break_rows, "1 row(s) without step and stage"),
    ("rollouts/000000.jsonl", break_rows, "rollouts/000000.jsonl:7: no transcript, left out"),
    ("rollouts/000000.jsonl", lambda p: p.write_bytes(b"\xff\x00\n"), "1 broken line(s)"),
    ("rollouts/000000.jsonl", lambda p: p.write_text("[" * 100_000), "1 broken line(s)"),
    ("eval/000002/summary.json", lambda p: p.unlink(), "no summary.json"),
    ("eval/000002/summary.json", lambda p: p.write_text('{"accuracy": 1}'), "no accuracy"),
    ("eval/000002/examples.jsonl", break_rows, "no graded response, left out"),
]


@pytest.mark.parametrize(("name", "damage", "words"), BROKEN, ids=[x[2] for x in BROKEN])
def test_what_is_broken_is_said_and_the_rest_shown(
    tmp_path: Path, name: str, damage: Any, words: str
) -> None:
    bad, good = write_run(tmp_path / "bad"), write_run(tmp_path / "good")
    write_evaluation(bad / "eval" / "000002", [True, False])
    damage(bad / name)
    page = build(tmp_path, bad, good)
    assert words in Reader(page).text
    assert any(source["name"] == str(good) for source in read_transcripts(page))


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    text = Reader(build(tmp_path, write_run(tmp_path / "a", steps=3))).text
    assert "3 of 6 steps: it goes on, or was stopped" in text


def test_alerts_of_the_runs_own_rules_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    rows = [
        {"step": i, "stage": "opd", "rollout/mean_length": 100.0 if i < 12 else 3.0}
        for i in range(20)
    ]
    write(run / "metrics.jsonl", rows)
    text = Reader(build(tmp_path, run)).text
    assert re.search(r"step 1\d: responses have \d+ tokens, 100 at the stage's start", text)


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """Nothing of a file becomes markup, and odd characters break nothing."""
    run = write_run(tmp_path / "a", student__path=HOSTILE)
    odd = [HOSTILE, "\ud800", "\u202e\u05e9\u05dc", "x" * 100_000, "\x00\x1b[31m", "]]>", "<!--"]
    fields = {"prompt": HOSTILE, "response": "".join(odd), "token_texts": odd, "outcome": HOSTILE}
    row = make_transcript(0, len(odd)) | fields
    row["top_texts"] = {"0": HOSTILE}
    row["student_top"] = [[[0, -0.1], ["x", 1], 7, [0, 900], [True, -1]]] * len(odd)
    write(run / "rollouts" / "000000.jsonl", [row, {"response": HOSTILE}, {"tokens": [1, 2]}])
    write(run / "metrics.jsonl", [{"step": 0, "stage": HOSTILE, f"train/{HOSTILE}": 1.0}])
    page = build(tmp_path, run)
    assert "alert(1)</script>" not in page and "<img" not in page
    reader = Reader(page)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "transcripts-data"}, {}]
    assert not any(name.startswith("on") for _, x in reader.tags for name in x)
    assert not any(
        name in ("src", "href") and not (x[name] or "").startswith(("#", "data:"))
        for tag, x in reader.tags
        for name in x
        if tag != "use"
    )
    (source,) = read_transcripts(page)
    full, plain, ids = (x["data"] for x in source["steps"][0]["rows"])
    assert full["texts"] == odd and full["top_texts"] == {"0": HOSTILE}
    assert [part[0] for part in full["student_top"]] == [[0], [905]]
    assert plain["texts"] == [HOSTILE] and ids["texts"] == ["\u27e81\u27e9", "\u27e82\u27e9"]


def test_figures_and_markdown_are_written(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "a|b$x$")
    write_run(tmp_path / "_other", opd__samples=2)
    flags = [f"--out={tmp_path}/r.html", f"--figures={tmp_path}/figures"]
    assert call(report, str(run), str(tmp_path / "_other"), *flags) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/r.html" in shown and f"{tmp_path}/figures" in shown
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    stems = ("train_loss", "train_reverse_kl", "rollout_mean_length")
    assert names == sorted(
        ["report.md", *(f"{x}.{kind}" for x in stems for kind in ("svg", "png"))]
    )
    text = (tmp_path / "figures" / "report.md").read_text()
    assert "![Loss](train_loss.svg)" in text and "a\\|b" in text
    before = {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert call(report, str(run), str(tmp_path / "_other"), *flags) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a run"),
        (["{tmp}/none"], "none: no such directory"),
        (["{tmp}"], "no config.json or metrics.jsonl of a run"),
        (["{tmp}/a", "--out={tmp}"], "is not a regular file"),
        (["{tmp}/a", "--out={tmp}/a/config.json/x.html"], "--out="),
        (["{tmp}/a", "--out={tmp}/a/config.json"], "is also read or written"),
        (["{tmp}/a", "--out={tmp}/rows.jsonl"], "rows.jsonl: exists and is not a report"),
        (["{tmp}/a", "--figures={tmp}/a/config.json"], "--figures="),
        (["{tmp}/a", "--transcripts=-1"], "--transcripts"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, arguments: list[str], words: str) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    assert call(report, *(x.format(tmp=tmp_path) for x in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
