"""Tests the page of a study: a pure function of its files, with all they hold and nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from distill import report
from distill.reporting import figures, study_curves, study_page, study_read, writing
from tests.support.paths import ROOT
from tests.support.study_files import (
    CONTRAST,
    REACH,
    make_definition,
    make_result,
    make_results,
    write_study,
)
from tests.support.verbs import call

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> | $x$ \x1b[31m"


class Reader(HTMLParser):
    """Collects the texts of a page, its tags, and the rows of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.is_in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell = self.is_in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.is_in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def build(folder: Path) -> str:
    out = folder.parent / f"{folder.name}.html"
    writing.write_study(str(folder), out)
    return out.read_text("ascii")


def strip_drawings(page: str) -> str:
    """Returns a page without what another matplotlib may draw otherwise: paths of curves, and the
    limits of axes. The points of all curves stay, as numbers."""
    page = re.sub(r"<svg.*?</svg>\s*", "<svg>", page, flags=re.DOTALL)
    return re.sub(r"&quot;(box|limits)&quot;: \[[^]]*\]", "", page)


def check_page(folder: Path) -> None:
    """Fails if report.html in a study's directory is not what its files make."""
    with mock.patch.object(figures, "render", return_value=b"<svg></svg>"):
        made = study_page.render_page(study_page.make_report(study_read.read_study(str(folder))))
    page = (folder / "report.html").read_text("ascii")
    assert made.count("<svg") == page.count("<svg")
    command = f"python -m distill.report {folder} --out={folder}/report.html"
    assert strip_drawings(made) == strip_drawings(page), f"make it anew: {command}"


def test_committed_pages_are_what_their_files_make(tmp_path: Path) -> None:
    """Compares the pages of results/, and one of this test's own."""
    folder = write_study(tmp_path / "z")
    writing.write_study(str(folder), folder / "report.html")
    for path in [*sorted((ROOT / "results").glob("*/study.json")), folder / "study.json"]:
        check_page(path.parent)


def test_the_comparison_of_pages_sees_every_number(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "z")
    page = build(folder)
    redrawn = re.sub('<path d="M', '<path d="M 1', page)
    (folder / "report.html").write_text(redrawn)
    assert redrawn != page
    check_page(folder)  # by another matplotlib
    path = folder / "runs" / "grpo.seed2.json"
    text = path.read_text()
    for before, after in (('"seconds": 3600.0', '"seconds": 3700.0'), ("0.25", "0.26")):
        assert before in text
        path.write_text(text.replace(before, after))
        with pytest.raises(AssertionError, match="make it anew"):
            check_page(folder)


def test_the_page_is_a_pure_function_of_the_files(tmp_path: Path) -> None:
    """Wherever they are, and whatever their times: byte for byte."""
    first, second = write_study(tmp_path / "a"), write_study(tmp_path / "elsewhere" / "b")
    page = build(first)
    assert page.count("<svg") == 2 and build(second) == page


def test_the_page_shows_all_that_a_study_holds(tmp_path: Path) -> None:
    definition = make_definition()
    why = {"verdict_explained": "reproduced", "why": "Dense signals.", "settle": "Larger models."}
    definition["claims"][0] = CONTRAST | why | {"source": "a paper"}
    reader = Reader(build(write_study(tmp_path / "z", definition)))
    rows = {tuple(row[:2]): row for row in reader.rows}
    assert rows["opd", "3"][2:4] == ["85.0 [85.0, 85.0]", "0.5 [0.5, 0.5]"]
    assert rows["grpo", "3"][2] == "36.0 [33.5, 38.5]" and rows["start", "1"][2] == "25.0"
    assert rows["grpo", "1"][2:] == ["36.0", "0.5"]
    difference = next(row for row in reader.rows if row[0] == "opd \N{MINUS SIGN} grpo")
    assert difference[1:3] == ["+49.0 [+46.5, +51.5]", "+50.0, +49.0, +48.0"]
    assert ["opd", "1", "rate=0.1", "70.0", "used"] in reader.rows
    assert ["opd", "0", "rate=0.0", "60.0", ""] in reader.rows
    run = next(row for row in reader.rows if row[:2] == ["sft 400", "seed 2"])
    assert run[2:] == ["a" * 10, "2026-11-30T14:00:00", "a processor", "3,600", "1,800"]
    assert ["time of all runs", "15.0 h"] in reader.rows
    for words in (
        "Study z: A small study",
        "Does it work?",
        "python -m studies.run --study=z",
        "OPD is better (a paper)",
        "opd \N{MINUS SIGN} grpo: +49.0 [+46.5, +51.5] points, greedy accuracy",
        "Dense signals.",
        "Larger models.",
        "200 problems, which are not the test's",
        "opd.seed0.json: run opd 0",
    ):
        assert words in reader.text, words
    assert "Notes" not in [x.get("aria-label") for _, x in reader.tags]


def test_a_sentence_about_another_verdict_is_marked(tmp_path: Path) -> None:
    claim = CONTRAST | {"verdict_explained": "reversed", "why": "GRPO won."}
    definition = make_definition(claims=[claim])
    page = build(write_study(tmp_path / "z", definition))
    assert "explains another verdict, 'reversed', and must be written anew" in Reader(page).text
    assert 'class="claim notes"' in page
    claim["verdict_explained"] = "reproduced"
    page = build(write_study(tmp_path / "y", definition))
    assert "another verdict" not in page and 'class="claim notes"' not in page
    assert "GRPO won." in page


def test_what_is_missing_is_said_in_its_place(tmp_path: Path) -> None:
    results = [x for x in make_results() if x["arm"] != "grpo" and x["seed"] != 1]
    results[-1]["final"]["greedy"] = results[1]["final"]["kl"] = None
    reader = Reader(build(write_study(tmp_path / "z", None, results)))
    rows = {row[0]: row for row in reader.rows[::-1] if len(row) == 5 and row[-1][:5] == "about"}
    assert rows["grpo"][1:4] == ["0 of 3, without 0, 1, 2", "\N{EN DASH}", "\N{EN DASH}"]
    assert rows["opd"][1] == "2 of 3, without 1" and "(1 of 2 seeds)" in rows["opd"][3]
    assert "no result yet" in reader.text and "the study goes on, or was stopped" in reader.text
    assert "grpo: no result yet" in reader.text and "opd: no result of seed 1" in reader.text


def test_a_study_without_results_has_a_page(tmp_path: Path) -> None:
    reader = Reader(build(write_study(tmp_path / "z", None, [])))
    assert "0 of 13 runs are there" in reader.text
    assert not any(tag == "svg" for tag, _ in reader.tags)


def test_tuning_says_when_the_runs_have_not_the_best_trial(tmp_path: Path) -> None:
    results = make_results()
    for x in results:
        if x["arm"] == "opd" and x["trial"] is None:
            x["changes"] = {"rate": 0.0, "steps": 100}
    text = Reader(build(write_study(tmp_path / "z", None, results))).text
    assert "opd: the runs have the changes of trial 0, though trial 1 is better." in text
    for x in results:
        if x["arm"] == "opd" and x["trial"] is None:
            x["changes"] = {"rate": 0.7}
    text = Reader(build(write_study(tmp_path / "y", None, results))).text
    assert "opd: the runs have the changes of no trial." in text


def test_trials_of_an_arm_of_another_study_are_shown(tmp_path: Path) -> None:
    results = [make_result("sft 100", 0, [0.5], changes={"rate": 0.1})]
    results += [
        make_result("sft 8000", 9, [0.5], phase="tuning", trial=i, changes={"rate": i / 10})
        for i in range(2)
    ]
    reader = Reader(build(write_study(tmp_path / "z", None, results)))
    assert ["sft 8000", "1", "rate=0.1", "50.0", "used"] in reader.rows
    assert ["sft 8000", "0", "rate=0.0", "50.0", ""] in reader.rows
    assert "left out" not in reader.text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    definition = json.loads(json.dumps(make_definition()).replace("grpo", "GRPO"))
    for key in ("title", "question", "command"):
        definition[key] = HOSTILE
    definition["arms"][1] |= {"about": HOSTILE}
    definition["figures"][0]["title"] = definition["curves"][0]["title"] = HOSTILE
    definition["claims"][0] |= {"claimed": HOSTILE, "why": HOSTILE, "unit": HOSTILE}
    definition["claims"][0] |= {"name": HOSTILE, "verdict_explained": HOSTILE}
    results = make_results()
    for x in results:
        x["arm"] = x["arm"].replace("grpo", "GRPO")
        x |= {"command": HOSTILE, "time": HOSTILE, "revision": "<img>" * 9}
        x["machine"]["processor"] = HOSTILE
    folder = write_study(tmp_path / "z", definition, results)
    renamed = folder / "study.json"
    renamed.write_text(renamed.read_text().replace('"GRPO"', json.dumps(HOSTILE)))
    for path in (folder / "runs").glob("GRPO*"):
        path.write_text(path.read_text().replace('"GRPO"', json.dumps(HOSTILE)))
    (folder / "runs" / "<img src=x>.json").write_text("{}")
    page = build(folder)
    assert "<img" not in page and "alert(1)</script>" not in page and "\x1b" not in page
    reader = Reader(page)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "transcripts-data"}, {}]
    assert not any(name.startswith("on") for _, x in reader.tags for name in x)
    assert reader.text.count("alert(2)") > 20
    (points,) = (json.loads(x["data-points"] or "") for t, x in reader.tags if t == "figure"
                 and x["aria-label"] and x["aria-label"].startswith("<"))  # fmt: skip
    assert HOSTILE in [curve["name"] for curve in points["curves"]]


def read_points(page: str) -> list[dict[str, Any]]:
    tags = Reader(page).tags
    return [json.loads(x["data-points"] or "") for tag, x in tags if tag == "figure"]


def test_curves_are_means_with_bands(tmp_path: Path) -> None:
    steps, flops = read_points(build(write_study(tmp_path / "z")))
    assert steps["axis"] == "step" and not steps["log"]
    assert flops["axis"] == "FLOPs" and flops["log"]
    start, opd, *_ = steps["curves"]
    assert start["level"] and start["mean"] == [25.0] and "low" not in start
    assert opd["steps"] == [0, 10, 20] and opd["mean"] == [25, 81, 85]
    assert opd["low"] == [25, 80, 85] and opd["high"] == [25, 82, 85] and not opd["level"]
    # Of seeds with other FLOPs: 30, 30.1 and 30.2, 60, 60.2 and 60.4; the start is at 0.
    logged = flops["curves"][2]
    assert logged["name"] == "grpo" and logged["steps"] == [30.2, 60.0]
    slopes = [(30.2 - 10 * x) / (10 * x) for x in (3.0, 3.01, 3.02)]
    ends = (0.35, 0.36, 0.37)
    values = [100 * (0.3 + s * (end - 0.3)) for s, end in zip(slopes, ends, strict=True)]
    assert logged["mean"][0] == pytest.approx(np.mean(values), abs=0.01)
    assert logged["low"][0] == pytest.approx(min(values), abs=0.01)
    assert logged["high"][0] == pytest.approx(max(values), abs=0.01)


def test_a_curve_over_k_is_of_figures_of_the_finished_models(tmp_path: Path) -> None:
    entry = {"x": "k", "y": "many/pass@", "title": "pass@k by k", "log_x": True}
    shown = [{"key": f"many/pass@{k}", "format": "percent"} for k in (1, 4)]
    definition = make_definition(curves=[entry], figures=shown, claims=[])
    results = [
        make_result("opd", seed, [], final={"many/pass@4": 0.5 + seed / 10, "many/pass@1": 0.25})
        for seed in range(2)
    ]
    results.append(make_result("start", 0, [], final={"many/pass@1": 0.1, "many/pass@4": 0.2}))
    results[0]["final"] |= {"many/pass@": 1.0, "many/pass@x": 1.0, "many": 1.0}
    (points,) = read_points(build(write_study(tmp_path / "z", definition, results)))
    start, opd = points["curves"]
    assert points["axis"] == "k" and points["log"]
    assert opd["steps"] == [1, 4] and opd["mean"] == [25, 55] and opd["high"] == [25, 60]
    assert start["mean"] == [10, 20] and not start["level"]


def test_a_model_without_training_is_a_level_line(tmp_path: Path) -> None:
    results = [x | ({"points": []} if x["arm"] == "start" else {}) for x in make_results()]
    steps, flops = read_points(build(write_study(tmp_path / "z", None, results)))
    for chart in (steps, flops):
        assert chart["curves"][0]["level"] and chart["curves"][0]["mean"] == [25.0]


def test_interpolation_is_on_what_all_curves_cover() -> None:
    grid_N, values_RN = study_curves.interpolate_curves(
        [[(0, 0), (10, 10)], [(2, 0), (4, 4), (12, 4)]]
    )
    assert grid_N.tolist() == [2, 4, 10]
    assert values_RN.tolist() == [[2, 4, 10], [0, 4, 4]]
    grid_N, values_RN = study_curves.interpolate_curves([[(0, 0), (1, 1)], [(2, 0), (3, 4)]])
    assert grid_N.size == 0
    many = [(float(x), float(x)) for x in range(10_000)]
    grid_N, values_RN = study_curves.interpolate_curves([many, many])
    assert len(grid_N) <= figures.MAX_POINTS + 1 and grid_N[[0, -1]].tolist() == [0, 9999]
    assert (values_RN == grid_N).all()


def test_more_arms_than_colours_have_other_dashes(tmp_path: Path) -> None:
    names = [f"arm {i}" for i in range(2 * len(figures.COLOURS))]
    definition = make_definition(arms=[{"name": name} for name in names], claims=[])
    results = [make_result(name, 0, [0.1, 0.2]) for name in names]
    folder = write_study(tmp_path / "z", definition, results)
    shown = study_page.make_report(study_read.read_study(str(folder)))
    svg = figures.render(figures.draw(shown.charts[0]), "svg").decode()
    lines = re.findall(r'style="fill: none; (stroke[^"]*stroke-width: 1.4[^"]*)"', svg)
    assert len(lines) == len(names) == len(set(lines))


def test_figures_and_markdown_are_written(tmp_path: Path, capsys: Any) -> None:
    folder = write_study(tmp_path / "z", make_definition(claims=[CONTRAST, REACH]))
    flags = [f"--out={folder}/report.html", f"--figures={tmp_path}/figures"]
    assert call(report, str(folder), *flags) == 0
    assert "report.md" in capsys.readouterr().out
    made = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    names = ["curve_0.png", "curve_0.svg", "curve_1.png", "curve_1.svg", "report.md"]
    assert sorted(made) == names
    text = made["report.md"].decode()
    assert "| opd | 3 | 85.0 [85.0, 85.0] | 0.5 [0.5, 0.5] | about opd |" in text
    assert "| quality | OPD is better | opd \N{MINUS SIGN} grpo: +49.0" in text
    assert "![Accuracy by step, %](curve_0.svg)" in text
    assert call(report, str(folder), *flags) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == made
    check_page(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/z", "{tmp}/y"], "z: a study has a page of its own: name it alone"),
        (["{tmp}/z", "--watch"], "z: a study has a page of its own: --watch follows runs only"),
        (["{tmp}/z", "--out={tmp}/z/study.json"], "is also read or written"),
        (["{tmp}/z", "--out={tmp}/z/runs/opd.seed0.json"], "exists and is not a report"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: Any, arguments: list[str], words: str
) -> None:
    write_study(tmp_path / "z")
    (tmp_path / "y").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert call(report, *(x.format(tmp=tmp_path) for x in arguments)) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
