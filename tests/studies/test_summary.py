"""README's table and pictures of studies are those of results/."""

from pathlib import Path

import pytest

from benchmarks import figures
from distill.reporting import study_claims
from studies import summary
from tests.support.paths import ROOT
from tests.support.pictures import read_texts, require_same
from tests.support.verbs import call

IMAGES = ROOT / "docs/images"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command prints, and the pictures that it draws."""
    out = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *parts: lines.append(" ".join(parts)))
        assert call(summary, f"--results={ROOT}/results", f"--out={out}") == 0
    return "\n".join(lines), out


def test_readme_has_the_table(printed: tuple[str, Path]) -> None:
    table, _ = printed
    assert table.count("\n") >= 3  # a head and some claims
    assert table in (ROOT / "README.md").read_text()


def test_each_row_has_its_command_seeds_and_time(printed: tuple[str, Path]) -> None:
    for line in printed[0].splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert cells[3].startswith("[`make study NAME=") and int(cells[4]) >= 1
        assert cells[5].endswith((" s", "min", "h"))
        page = cells[3].partition("(")[2].rstrip(")")
        assert (ROOT / page).is_file()


def test_rows_are_findings_of_the_studies() -> None:
    studies = summary.read_studies(ROOT / "results")
    assert studies
    found = {x.found for study in studies for x in study_claims.judge(study)}
    rows = summary.list_rows(studies)
    assert rows and all(row[1] in found for row in rows)


def test_pictures_are_those_of_the_results(printed: tuple[str, Path]) -> None:
    _, out = printed
    names = {f"{name}{suffix}.svg" for name in summary.PICTURES for suffix in figures.THEMES}
    assert {file.name for file in out.iterdir()} == names
    for name in names:
        require_same(IMAGES / name, out / name)


def test_a_picture_shows_each_arm_that_has_results(printed: tuple[str, Path]) -> None:
    texts = read_texts(printed[1] / "study-curves.svg")
    assert {"on-policy distillation", "GRPO", "teacher"} <= set(texts)
