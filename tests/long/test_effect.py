"""The quick start's claim, for three seeds: most of the gap to the teacher is closed.

Five minutes a seed on two cores.
"""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_policy_distillation_closes_the_gap(tmp_path, seed):
    command = [sys.executable, "-m", "distill.quickstart", f"--workdir={tmp_path}"]
    subprocess.run([*command, f"--config.seed={seed}"], cwd=ROOT, check=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    before, after, teacher = (
        summary[name] for name in ("student_before", "student_after", "teacher")
    )
    assert before["accuracy"] <= 0.60
    assert teacher["accuracy"] >= 0.95
    assert before["parameters"] <= teacher["parameters"] / 2

    def closed(kind):
        return (after[kind] - before[kind]) / (teacher[kind] - before[kind])

    print({kind: closed(kind) for kind in ("accuracy", "accuracy_sampled")})
    assert closed("accuracy") >= 0.70
    assert closed("accuracy_sampled") >= 0.80
    assert after["reverse_kl"] < before["reverse_kl"] / 5
