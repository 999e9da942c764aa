"""Tests what a run says of itself: where it begins, a step's figures, and its end."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from configs import quickstart
from distill.objectives import losses
from distill.training import metrics_log, run_summary

ROW = {
    "stage": "opd",
    "train/loss": 0.25,
    "train/reverse_kl": 0.25,
    "train/trained_tokens": 400.0,
    "rollout/mean_length": 40.4,
    "rollout/truncated": 0.0,
    "time/step": 0.5,
}


def make_stage(objective: str, **fields: Any) -> Any:
    """Makes what the summary reads of a stage."""
    c = quickstart.get_config("tiny")
    c.opd.steps = 8
    stage = {"name": "opd", "c": c.opd, "loss": losses.OBJECTIVES[objective], "end_step": 8}
    return types.SimpleNamespace(**{**stage, **fields})


@pytest.mark.parametrize(
    ("objective", "row", "text"),
    [
        ("opd", {}, "reverse KL 0.2500, length 40, 800 tokens/s, 0.5 s/step"),
        ("sft", {}, "loss 0.2500, length 40, 800 tokens/s, 0.5 s/step"),
        (
            "grpo",
            {"train/loss": 0.0, "reward/mean": 0.125},
            "reward 0.125, length 40, 800 tokens/s, 0.5 s/step",
        ),
        ("opd_sampled", {}, "loss 0.2500, reverse KL 0.2500, length 40, 800 tokens/s, 0.5 s/step"),
        (
            "opd",
            {"rollout/truncated": 0.25, "eval/accuracy": 0.5, "time/eval": 0.1},
            "reverse KL 0.2500, length 40, cut 25%, accuracy 50.0%, 1,000 tokens/s, 0.4 s/step",
        ),
        # A step that compiled has no pace, and one without trained tokens no loss.
        ("opd", {"time/compile": 0.4}, "reverse KL 0.2500, length 40"),
        (
            "opd",
            {"train/reverse_kl": float("nan"), "rollout/mean_length": None},
            "800 tokens/s, 0.5 s/step",
        ),
    ],
)
def test_a_step_shows_the_figures_of_its_objective(
    objective: str, row: dict[str, Any], text: str
) -> None:
    hidden = run_summary.find_hidden_figures(make_stage(objective))
    assert run_summary.format_figures({**ROW, **row}, hidden) == text


def test_a_finished_run_has_a_table_its_place_and_the_next_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    c, run = quickstart.get_config("tiny"), tmp_path / "a run"
    run.mkdir()
    kls = [0.8, 0.6, 0.5, 0.5, 0.4, None, 0.3, 0.1]  # means of the first and last two
    rows = [{**ROW, "step": i, "train/reverse_kl": kl} for i, kl in enumerate(kls)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_summary.print_end(c, [make_stage("opd")], epath.Path(run))
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.splitlines() == [
        "stage  steps  time  reverse KL       length",
        "opd    8      4 s   0.8000 → 0.1000  40 → 40",
        f"wrote {run}: metrics.jsonl, rollouts/, checkpoints/",
        "next:",
        f"  python -m distill.evaluate '--model={run}' --benchmark=arithmetic "
        f"'--out={run}/evaluation'",
        f"  python -m distill.export '--run={run}' '--out={run}/export'",
        f"  python -m distill.report '{run}' '--out={run}/report.html'",
        f"  tensorboard --logdir='{run}/tensorboard'",
    ]
    c.log.to = ()
    c.eval.every, c.eval.benchmark, c.eval.data = 2, "gsm8k", "test.jsonl"
    run_summary.print_end(c, [make_stage("opd")], epath.Path(run))
    said = capsys.readouterr().err
    assert " --benchmark=gsm8k --data=test.jsonl " in said and "tensorboard --logdir" not in said


def test_the_next_command_asks_as_the_run_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    c, stage = quickstart.get_config("tiny"), make_stage("opd")
    data = stage.c.data
    data.source, data.template, data.thinking = "rows.jsonl", "Q: {question}", 0.0
    run_summary.print_end(c, [stage], epath.Path(tmp_path))
    said = capsys.readouterr().err
    assert " '--template=Q: {question}' --thinking=off --max_new_tokens=52 " in said


def test_the_table_says_how_much_of_the_time_was_compiling() -> None:
    rows = [{**ROW, "time/step": 4.0, "time/compile": compiling} for compiling in (3.0, None, 0.0)]
    assert "12 s, 3 s compiling" in run_summary.render_stages([make_stage("opd")], rows)
    rows[0]["time/compile"] = 0.9
    assert "compiling" not in run_summary.render_stages([make_stage("opd")], rows)


@pytest.mark.parametrize(
    ("steps_done", "line"),
    [
        (0, "run W: opd (8 steps)"),
        (3, "run W: goes on from step 3 of 8"),
        (8, "run W: all of its 8 steps are done"),
    ],
)
def test_a_run_says_from_where_it_goes_on(
    steps_done: int, line: str, capsys: pytest.CaptureFixture
) -> None:
    c = quickstart.get_config("tiny")
    run_summary.print_start(c, [make_stage("opd")], epath.Path("W"), steps_done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == line
    assert lines[1:] == (
        [
            "files: metrics.jsonl (each step), rollouts/ (every 2 steps), "
            "checkpoints/ (every 2 steps or 10 min)"
        ]
        if steps_done < 8
        else []
    )


def test_transcripts_are_printed_on_request_only() -> None:
    log = quickstart.get_config("tiny").log
    log.transcripts, log.transcripts_every = 8, 4
    assert [metrics_log.count_transcripts(log, step) for step in range(5)] == [8, 0, 0, 0, 8]
    log.print_every = 3
    assert [metrics_log.count_transcripts(log, step) for step in range(5)] == [8, 0, 0, 1, 8]


def test_a_transcript_shows_prompt_response_and_end() -> None:
    row = {
        "prompt": "2+2?" + "x" * 3000,
        "response": "4",
        "prompt_tokens": [1],
        "tokens": [2, 3],
        "reverse_kl": [0.1, 0.3],
        "finish_reason": "length",
    }
    text = run_summary.render_transcript(7, row)
    assert "step 7" in text and "2 tokens, finish_reason length, reverse KL 0.2000 a token" in text
    assert "2+2?xxx" in text and " … 2,004 more characters … " in text and ">>>4\n" in text
    assert ">>>[2, 3]" in run_summary.render_transcript(7, {**row, "response": None})
