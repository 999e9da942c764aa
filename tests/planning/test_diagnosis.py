"""Is a run worth its price? The figures on models of which the answer is known."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill import diagnose
from distill.planning import diagnosis
from distill.policy import policy
from tests.support.paths import ROOT
from tests.support.verbs import call

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
    assert f["gain"][1] > 0 and "the teacher is better" in shown
    d = f["distances"]
    assert 0.1 < d["reverse_kl"] < 1 and d["forward_kl"] > 0
    assert d["top_overlap"] > 0.3 and d["outside_top"] < 0.05
    assert d["teacher_stop_logp"] <= 0 and d["teacher_entropy"] < d["entropy"]
    assert f["agreement"]["templates_agree"]
    assert "stop ids agree" in shown and "chat templates agree" in shown
    assert shown.splitlines()[-1] == f["verdict"]
    assert f["verdict"] == "verdict: go; nothing here speaks against the run"


def copy(of: str, to: Path, file: str = "", **changes) -> str:
    """A model's directory with other values in one of its JSON files."""
    shutil.copytree(of, to)
    if file:
        read = json.loads((to / file).read_text())
        (to / file).write_text(json.dumps({**read, **changes}))
    return str(to)


def swapped(to: Path) -> str:
    """The teacher with two tokens' ids exchanged."""
    path = copy(TEACHER, to)
    read = json.loads((to / "tokenizer.json").read_text())
    known = read["model"]["vocab"]
    one, other = list(known)[300:302]
    known[one], known[other] = known[other], known[one]
    (to / "tokenizer.json").write_text(json.dumps(read))
    return path


def strayed(to: Path) -> str:
    """The student with noise on its weights: it writes what no teacher would."""
    path, rng = copy(STUDENT, to), np.random.default_rng(0)
    weights = load_file(to / "model.safetensors")
    noisy = {n: x + np.float32(0.05) * rng.normal(size=x.shape) for n, x in weights.items()}
    noisy = {n: x.astype(np.float32) for n, x in noisy.items()}
    save_file(noisy, to / "model.safetensors", {"format": "pt"})
    return path


CASES = {
    "worse": (lambda to: (TEACHER, STUDENT), ["the teacher is worse"]),
    "itself": (
        lambda to: (STUDENT, STUDENT),
        ["the teacher is the student", "the teacher is not surely better"],
    ),
    "stops": (
        lambda to: (
            STUDENT,
            copy(TEACHER, to, "generation_config.json", eos_token_id=[382, 384, 10]),
        ),
        ["the teacher ends where the student writes on", "the teacher is worse"],
    ),
    "template": (
        lambda to: (STUDENT, copy(TEACHER, to, "tokenizer_config.json", chat_template="{{ 1 }}")),
        ["chat templates differ"],
    ),
    "strayed": (
        lambda to: (strayed(to), TEACHER),
        [
            "the student does not think in the teacher's way",
            "the teacher would write on where the student stops",
            "the student has no room",
        ],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_verdict_in_words(case, tmp_path, capsys):
    models, words = CASES[case]
    assert asked(*models(tmp_path / "m"), tmp_path / "out.json", "--prompts=24", "--samples=2") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"verdict: not yet; {len(words)} against it: " + "; ".join(words)


def test_models_that_share_no_vocabulary_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(policy, "load", None)  # before any weight is read
    assert asked(STUDENT, swapped(tmp_path / "swapped"), tmp_path / "out.json") == 2
    assert re.search(r"tokenizers of .* differ: .* is 300 and 301", capsys.readouterr().err)
    other = copy(TEACHER, tmp_path / "wide", "config.json", vocab_size=528)
    assert asked(STUDENT, other, tmp_path / "out.json") == 2
    assert "vocab_size=528, but" in capsys.readouterr().err
    assert asked(STUDENT, "ema", tmp_path / "out.json", "--config.student.ema_decay=0.9") == 2
    assert "before step 0 it is the student itself" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


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
ALIKE = {
    "student_stop_ids": [1],
    "teacher_stop_ids": [1],
    "templates_agree": True,
    "further_stop_ids": [],
}
RATES = {"pass_rate": 0.5, "zero_variance_groups": 0.3, "truncated": 0.0, "mean_length": 40.0}


def figures(**changes) -> diagnosis.Statistics:
    f: diagnosis.Statistics = {
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
        (
            {"agreement": ALIKE | {"further_stop_ids": [2]}},
            r"where the student writes on: at \[2\]",
        ),
        ({"agreement": ALIKE | {"templates_agree": False}}, "chat templates differ"),
        ({"gain": (0.1, -0.1, 0.3)}, "not surely better: "),
        ({"gain": (-0.4, -0.6, -0.2)}, "the teacher is worse: .*unlearn"),
        ({"distances": WELL | {"reverse_kl": 1e-9}}, "the teacher is the student: "),
        (
            {"rewarded": True, "student": RATES | {"zero_variance_groups": 0.9}},
            "most groups teach nothing",
        ),
        (
            {"student": RATES | {"pass_rate": 0.0}, "teacher": RATES | {"pass_rate": 0.0}},
            "is reward.grader theirs",
        ),
    ],
)
def test_what_speaks_against_a_run(changes, words):
    assert not [line for bad, line in diagnosis.make_findings(figures()) if bad]
    found = diagnosis.make_findings(figures(**changes))
    (line,) = [line for bad, line in found if bad]
    assert re.search(words, line)
    assert (
        diagnosis.render_verdict(found)
        == f"verdict: not yet; 1 against it: {line.partition(':')[0]}"
    )


def test_what_is_not_known_speaks_neither_way():
    silent = {name: x for name, x in RATES.items() if name in ("truncated", "mean_length")}
    lines = diagnosis.make_findings(figures(student=silent, teacher=silent))
    assert any("the data has no answers" in line for bad, line in lines if bad is None)
    cut = diagnosis.make_findings(figures(student=RATES | {"truncated": 0.5}))
    assert any("raise max_response_tokens" in line for _, line in cut)
    alone = diagnosis.make_findings({"rewarded": True, "student": RATES})
    assert any("the student's pass rate is 50.0%" in line for _, line in alone)
    assert diagnosis.compare_pass_rates([1, 1, 1, 1], [0, 0, 0, 0]) == (1, 0.25, 1)
