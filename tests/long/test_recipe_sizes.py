"""Every student of the strong-to-weak recipe, with either teacher, on the slice that it names."""

from pathlib import Path

import pytest

from tests.support.recipes import at_home, check_recipe, offline, published  # noqa: F401  (fixtures)

STUDENTS = ("0.6b", "1.7b", "4b", "8b", "14b", "30b-a3b")


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(("teacher", "chips"), [("32b", "v5p:4x4x2"), ("235b-a22b", "v5p:4x4x4")])
@pytest.mark.usefixtures("offline")
def test_full_size_passes_all_checks(
    student: str,
    teacher: str,
    chips: str,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = f"strong_to_weak:student={student},teacher={teacher}"
    check_recipe(recipe, chips, shared_data, monkeypatch)
