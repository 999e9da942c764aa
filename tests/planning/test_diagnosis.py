"""Diagnoses of models for which the right verdict is known."""

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


def run_diagnose(student: str, teacher: str, out: Path, *more: str) -> int:
    for name in [name for name in diagnose.OPTIONS if name.startswith("config.")]:
        delattr(diagnose.OPTIONS, name)  # flags that --config defined in an earlier call
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


def test_a_better_teacher_close_to_the_student_passes(tmp_path, capsys):
    assert run_diagnose(STUDENT, TEACHER, tmp_path / "out.json", "--samples=2") == 0
    shown, said = capsys.readouterr()
    f = json.loads((tmp_path / "out.json").read_text())
    *_, made, head, command = said.splitlines()
    assert (made, head) == (f"wrote {tmp_path / 'out.json'}: all numbers", "next:")
    train = f"  python -m distill.train --config={ROOT}/configs/quickstart.py:tiny "
    assert command.startswith(f"{train}--config.student.path={STUDENT} ")
    assert command.endswith("--config.mesh.fsdp=1 --workdir=runs/x")
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


def copy_model(source: str, to: Path, file: str = "", **changes) -> str:
    """Copies a model's directory, with changed values in one of its JSON files."""
    shutil.copytree(source, to)
    if file:
        fields = json.loads((to / file).read_text())
        (to / file).write_text(json.dumps({**fields, **changes}))
    return str(to)


def copy_with_swapped_tokens(to: Path) -> str:
    """Copies the teacher with the ids of two tokens exchanged."""
    path = copy_model(TEACHER, to)
    fields = json.loads((to / "tokenizer.json").read_text())
    vocab = fields["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (to / "tokenizer.json").write_text(json.dumps(fields))
    return path


def copy_with_noise(to: Path) -> str:
    """Copies the student with noise on its weights, so that no teacher would write as it does."""
    path, rng = copy_model(STUDENT, to), np.random.default_rng(0)
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
            copy_model(TEACHER, to, "generation_config.json", eos_token_id=[382, 384, 10]),
        ),
        ["the teacher ends where the student writes on", "the teacher is worse"],
    ),
    "template": (
        lambda to: (
            STUDENT,
            copy_model(TEACHER, to, "tokenizer_config.json", chat_template="{{ 1 }}"),
        ),
        ["chat templates differ"],
    ),
    "strayed": (
        lambda to: (copy_with_noise(to), TEACHER),
        [
            "the student does not think in the teacher's way",
            "the teacher would write on where the student stops",
            "the student has no room",
        ],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_unsuitable_models_get_a_verdict_that_names_why(case, tmp_path, capsys):
    models, words = CASES[case]
    flags = "--prompts=24", "--samples=2"
    assert run_diagnose(*models(tmp_path / "m"), tmp_path / "out.json", *flags) == 0
    shown, said = capsys.readouterr()
    last = shown.splitlines()[-1]
    assert "next:" not in said and "distill.train" not in said
    assert last == f"verdict: not yet; {len(words)} against it: " + "; ".join(words)


def test_models_that_share_no_vocabulary_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(policy, "load", None)  # before any weight is read
    assert (
        run_diagnose(STUDENT, copy_with_swapped_tokens(tmp_path / "swapped"), tmp_path / "out.json")
        == 2
    )
    assert re.search(r"tokenizers of .* differ: .* is 300 and 301", capsys.readouterr().err)
    other = copy_model(TEACHER, tmp_path / "wide", "config.json", vocab_size=528)
    assert run_diagnose(STUDENT, other, tmp_path / "out.json") == 2
    assert "vocab_size=528, but" in capsys.readouterr().err
    assert (
        run_diagnose(STUDENT, "ema", tmp_path / "out.json", "--config.student.ema_decay=0.9") == 2
    )
    assert "before step 0 it is the student itself" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_unknown_stages_and_unsuitable_paths_are_refused(tmp_path, capsys):
    assert run_diagnose(STUDENT, TEACHER, tmp_path / "out.json", "--stage=sft") == 2
    assert "--stage=sft: config.stages has opd" in capsys.readouterr().err
    assert run_diagnose(STUDENT, str(tmp_path), tmp_path / "out.json") == 2
    assert (
        run_diagnose(STUDENT, TEACHER, tmp_path / "out.json", "--config.student.random_init") == 2
    )
    assert "random weights" in capsys.readouterr().err


GOOD_DISTANCES = {
    "reverse_kl": 0.3,
    "forward_kl": 0.4,
    "entropy": 0.5,
    "teacher_entropy": 0.4,
    "top_overlap": 0.7,
    "outside_top": 0.02,
    "teacher_stop_logp": -0.1,
}
SAME_FORMATS = {
    "student_stop_ids": [1],
    "teacher_stop_ids": [1],
    "templates_agree": True,
    "further_stop_ids": [],
}
RATES = {"pass_rate": 0.5, "zero_variance_groups": 0.3, "truncated": 0.0, "mean_length": 40.0}


def make_statistics(**changes) -> diagnosis.Statistics:
    """Makes the statistics of a run that nothing speaks against, with `changes`."""
    statistics: diagnosis.Statistics = {
        "rewarded": False,
        "student": RATES,
        "teacher": RATES | {"pass_rate": 0.9},
        "gain": (0.4, 0.2, 0.6),
        "distances": GOOD_DISTANCES,
        "agreement": SAME_FORMATS,
    }
    return statistics | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distances": GOOD_DISTANCES | {"outside_top": 0.4}}, "begin with the teacher's traces"),
        (
            {"agreement": SAME_FORMATS | {"further_stop_ids": [2]}},
            r"where the student writes on: at \[2\]",
        ),
        ({"agreement": SAME_FORMATS | {"templates_agree": False}}, "chat templates differ"),
        ({"gain": (0.1, -0.1, 0.3)}, "not surely better: "),
        ({"gain": (-0.4, -0.6, -0.2)}, "the teacher is worse: .*unlearn"),
        ({"distances": GOOD_DISTANCES | {"reverse_kl": 1e-9}}, "the teacher is the student: "),
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
def test_each_unfavourable_statistic_is_a_finding(changes, words):
    assert not [line for bad, line in diagnosis.make_findings(make_statistics()) if bad]
    findings = diagnosis.make_findings(make_statistics(**changes))
    (line,) = [line for bad, line in findings if bad]
    assert re.search(words, line)
    assert (
        diagnosis.render_verdict(findings)
        == f"verdict: not yet; 1 against it: {line.partition(':')[0]}"
    )


def test_unknown_pass_rates_speak_neither_way():
    ungraded = {name: x for name, x in RATES.items() if name in ("truncated", "mean_length")}
    lines = diagnosis.make_findings(make_statistics(student=ungraded, teacher=ungraded))
    assert any("the data has no answers" in line for bad, line in lines if bad is None)
    cut = diagnosis.make_findings(make_statistics(student=RATES | {"truncated": 0.5}))
    assert any("raise max_response_tokens" in line for _, line in cut)
    alone = diagnosis.make_findings({"rewarded": True, "student": RATES})
    assert any("the student's pass rate is 50.0%" in line for _, line in alone)
    assert diagnosis.compare_pass_rates([1, 1, 1, 1], [0, 0, 0, 0]) == (1, 0.25, 1)
