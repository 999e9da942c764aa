"""README's figures are drawn from the committed results: the same files give the same figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import figures
from benchmarks import quickstart as benchmark
from tests.support.paths import ROOT
from tests.support.pictures import read_texts, require_same
from tests.support.verbs import call

IMAGES = ROOT / "docs/images"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    assert call(figures, f"--out={out}") == 0
    return out


def test_committed_figures_are_those_of_the_results(drawn: Path) -> None:
    names = {f"{name}{suffix}.svg" for name in figures.FIGURES for suffix in figures.THEMES}
    assert {file.name for file in drawn.iterdir()} == names
    for name in names:
        require_same(IMAGES / name, drawn / name)


def test_figures_show_the_numbers_of_the_files(drawn: Path) -> None:
    rates = [
        f"{row['decode_tokens_per_second']:.0f}"
        for row in figures.read_results("rollout-float32.json")["decode"]
        if row["sampler"] in ("ours", "transformers", "tunix")
    ]
    assert len(rates) == 9 and set(rates) <= set(read_texts(drawn / "decoding.svg"))
    steps = [f"{row['step']:.1f} s" for row in figures.read_results("packing.json")["rows"]]
    assert set(steps) <= set(read_texts(drawn / "packing.svg"))


def test_curves_are_those_of_the_runs() -> None:
    results = figures.read_results("quickstart.json")
    figure = figures.draw_figure("quickstart", figures.THEMES[""])
    left, right = figure.axes
    for run, line in zip(results["runs"], left.lines, strict=False):
        assert (np.asarray(line.get_ydata()) / 100).round(6).tolist() == run["accuracy"]["value"]
    for run, line in zip(results["runs"], right.lines, strict=True):
        assert np.asarray(line.get_xdata()).tolist() == run["reverse_kl"]["step"]
        assert np.asarray(line.get_ydata()).tolist() == run["reverse_kl"]["value"]
    for run in results["runs"]:
        assert run["accuracy"]["value"][0] == run["models"]["student_before"]["accuracy"]
        assert run["accuracy"]["value"][-1] == run["models"]["student_after"]["accuracy"]


def write_run(workdir: Path) -> None:
    """Writes what `read_run` reads of a quick start of 20 steps, evaluated after 10 and 20."""
    model: dict[str, Any] = {
        **{"parameters": 1000, "accuracy": 0.5, "interval": [0.4, 0.6], "mean_length": 9.0},
        **{"accuracy_sampled": 0.25, "interval_sampled": [0.2, 0.3], "reverse_kl": 0.125},
    }
    summary = {
        **{"student_before": model, "student_after": model | {"accuracy": 0.75}},
        **{"teacher": model | {"reverse_kl": -1e-9}, "distillation_seconds": 12.34},
    }
    workdir.mkdir()
    (workdir / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": i, "train/reverse_kl": i / 10} for i in range(20)]
    rows[9]["eval/accuracy"] = 0.0
    rows[19]["eval/accuracy"] = 0.7
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "seed3")
    run = benchmark.read_run(3, tmp_path / "seed3")
    assert run["accuracy"] == {"step": [0, 10, 20], "value": [0.5, 0.0, 0.75]}
    assert run["reverse_kl"] == {"step": [10, 20], "value": [0.45, 1.45]}
    lines = benchmark.render_table([run])
    assert lines[3] == (
        "| student after, seed 3 | 1,000 | 75.0% [40.0, 60.0] | 25.0% [20.0, 30.0] | 0.125 |"
    )
    assert lines[-1].endswith("| 0.000 |")
