"""Tests that a stack tells what a thread does."""

import pytest

from distill.runtime import phases


@pytest.mark.parametrize(
    ("files", "phase"),
    [
        (["jax/x.py", "/a/distill/rollout/engine.py", "/a/distill/training/loop.py"], "sampling"),
        (["/a/distill/rollout/engine.py", "/a/distill/training/eval_hook.py"], "evaluating"),
        (["/a/distill/teachers/local.py", "/a/distill/training/update.py"], "scoring"),
    ],
)
def test_phases_are_found_on_the_stack(files, phase):
    assert phases.find_phase(files) == phase
