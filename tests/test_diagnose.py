"""Is a run worth its price? The figures on models of which the answer is known."""

import json
import re
from pathlib import Path

import pytest
from test_verbs import call

from distill import diagnose

ROOT = Path(__file__).parents[1]
STUDENT, TEACHER = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")


def asked(student: str, teacher: str, out: Path, *more: str) -> int:
    for name in [name for name in diagnose.OPTIONS if name.startswith("config.")]:
        delattr(diagnose.OPTIONS, name)  # those that --config made of an earlier call
    return call(
        diagnose,
        f"--config={ROOT}/configs/quickstart.py:tiny",
        f"--config.student.path={student}",
        f"--config.teacher.path={teacher}",
        "--config.mesh.fsdp=1",
        f"--out={out}",
        "--prompts=16",
        *more,
    )


def test_a_better_teacher_that_thinks_alike(tmp_path, capsys):
    assert asked(STUDENT, TEACHER, tmp_path / "out.json", "--samples=2") == 0
    shown, f = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert f["student"]["pass_rate"] < 0.7 < 0.9 < f["teacher"]["pass_rate"]
    assert f["gain"][1] > 0 and "it is better" in shown
    d = f["distances"]
    assert 0.1 < d["reverse_kl"] < 1 and d["forward_kl"] > 0
    assert d["top_overlap"] > 0.3 and d["outside_top"] < 0.05
    assert d["teacher_stop_logp"] <= 0 and d["teacher_entropy"] < d["entropy"]
    assert f["agreement"]["templates_agree"]
    assert "stop ids agree" in shown and "chat templates agree" in shown
    assert shown.splitlines()[-1] == f["verdict"]
    assert f["verdict"].startswith("verdict: worth its price")


def test_mistakes(tmp_path, capsys):
    assert asked(STUDENT, TEACHER, tmp_path / "out.json", "--stage=sft") == 2
    assert "--stage=sft: config.stages has opd" in capsys.readouterr().err
    assert asked(STUDENT, str(tmp_path), tmp_path / "out.json") == 2
    assert asked(STUDENT, TEACHER, tmp_path / "out.json", "--config.student.random_init") == 2
    assert "random weights" in capsys.readouterr().err


WELL = {
    "reverse_kl": 0.3,
    "forward_kl": 0.4,
    "entropy": 0.5,
    "teacher_entropy": 0.4,
    "top_overlap": 0.7,
    "outside_top": 0.02,
    "teacher_stop_logp": -0.1,
}
ALIKE = {"student_stop_ids": [1], "teacher_stop_ids": [1], "templates_agree": True}
RATES = {"pass_rate": 0.5, "constant_groups": 0.3, "truncated": 0.0, "mean_length": 40.0}


def figures(**changes) -> diagnose.Figures:
    f: diagnose.Figures = {
        "rewarded": False,
        "student": RATES,
        "teacher": RATES | {"pass_rate": 0.9},
        "gain": (0.4, 0.2, 0.6),
        "distances": WELL,
        "agreement": ALIKE,
    }
    return f | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distances": WELL | {"outside_top": 0.4}}, "begin with the teacher's traces"),
        ({"agreement": ALIKE | {"teacher_stop_ids": [1, 2]}}, r"teacher ends at \[2\] too"),
        ({"agreement": ALIKE | {"templates_agree": False}}, "chat templates differ"),
        ({"gain": (0.1, -0.1, 0.3)}, "not surely better"),
        ({"gain": (-0.4, -0.6, -0.2)}, "it is worse: the student would unlearn"),
        ({"distances": WELL | {"reverse_kl": 1e-9}}, "the teacher is the student, nothing"),
        ({"rewarded": True, "student": RATES | {"constant_groups": 0.9}}, "teach nothing"),
        ({"student": RATES | {"pass_rate": 0.0}, "teacher": RATES | {"pass_rate": 0.0}}, "grader"),
    ],
)
def test_what_speaks_against_a_run(changes, words):
    assert not [line for bad, line in diagnose.findings(figures()) if bad]
    (line,) = [line for bad, line in diagnose.findings(figures(**changes)) if bad]
    assert re.search(words, line)
    assert "not yet; 1 against it" in diagnose.verdict([(True, line)])


def test_what_is_not_known_speaks_neither_way():
    silent = {name: x for name, x in RATES.items() if name in ("truncated", "mean_length")}
    lines = diagnose.findings(figures(student=silent, teacher=silent))
    assert any("the data has no answers" in line for bad, line in lines if bad is None)
    cut = diagnose.findings(figures(student=RATES | {"truncated": 0.5}))
    assert any("raise max_response_tokens" in line for _, line in cut)
    alone = diagnose.findings({"rewarded": True, "student": RATES})
    assert any("the student's pass rate is 50.0%" in line for _, line in alone)
    assert diagnose.difference([1, 1, 1, 1], [0, 0, 0, 0]) == (1, 0.25, 1.75)
