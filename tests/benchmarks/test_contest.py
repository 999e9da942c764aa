"""The shared parts of the side-by-side benchmarks: worker processes, medians and tables."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = (
    "1"  # silences the warning that experimental APIs may change
)

from benchmarks import contest, loss, score, train_step, trainers
from models.qwen3.config import SIZES

FAKE = """
import sys
from benchmarks import workers

def begin():
    if sys.argv[1] == "absent":
        import nothing_of_this_name
    return answer

def answer(job):
    if job["tokens"] < 2:
        raise MemoryError("no room\\nat all")
    print("noise")
    with open(sys.argv[1], "a+") as log:
        log.seek(0)
        turn = len(log.read())
        log.write("x")
    return {"seconds": [1.0 + turn, 2.0 + turn], "first_call_seconds": turn, "peak_bytes": turn}

workers.serve_jobs(begin)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_worker.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{contest.ROOT}")
    return tmp_path


def test_each_turn_is_a_process_and_medians_are_taken(fake: Path) -> None:
    def make_contender(python: str, name: str):
        return lambda: contest.Worker(python, "fake_worker", name)

    contenders = {
        "a": make_contender(sys.executable, str(fake / "a")),
        "absent": make_contender(sys.executable, "absent"),
        "no python": make_contender("/no/such/python", "a"),
    }
    results, _ = contest.run_turns(contenders, 3, {"tokens": 5})
    # Each turn is a new process: seconds 1 2, then 2 3, then 3 4.
    assert results["a"]["all_seconds"] == [1, 2, 2, 3, 3, 4]
    assert results["a"]["seconds"] == 2.5
    assert results["a"]["first_call_seconds"] == 1 and results["a"]["peak_bytes"] == 2
    assert "not installed" in results["absent"]["absent"]
    assert "not installed (/no/such/python" in results["no python"]["absent"]
    results, _ = contest.run_turns({"a": contenders["a"]}, 1, {"tokens": 1})
    assert results["a"] == {"absent": "MemoryError: no room"}


def test_table_shows_rates_and_shares_of_the_limits() -> None:
    limits = {"float32": 1e12, "copy": 1e10}
    row = {"case": "c", "tokens": 100, "flop": 5e11, "bytes": 5e9, "first_call_seconds": 3.0}
    rows = [
        {**row, "name": "ours", "seconds": 1.0, "peak_bytes": 2**30},
        {**row, "name": "theirs", "seconds": 2.0, "peak_bytes": 2**31},
        {"case": "c", "name": "gone", "absent": "ended (-9)"},
    ]
    lines = contest.render_table(rows, limits, "float32")[2:]
    assert lines[0] == "| c | ours | 100 | 1.00 | 1 | 0.5 | 50% | 5 | 50% | 1.00 | 3.0 |"
    assert lines[1] == "| c | theirs | 50 | 2.00 | 2 | 0.25 | 25% | 2.5 | 25% | 2.00 | 3.0 |"
    assert lines[2].startswith("| c | gone | ended (-9) |")


def test_counted_costs_agree_with_formulas() -> None:
    """Formulas by hand: per token, 6 FLOPs for each weight of the student and 2 for each of the
    teacher, plus attention."""
    for benchmark in (train_step, score, loss):
        benchmark.OPTIONS.mark_as_parsed()
        benchmark.OPTIONS.rows, benchmark.OPTIONS.tokens = 2, 64
    M, V, D, E, L = 128, 151_936, 1024, 2048, 28
    student = L * (2 * D * 2048 + 2 * D * 1024 + 3 * D * 3072) + V * D
    attention = 4 * M * L * 2048 * 65 / 2
    sft = train_step.count_costs("sft")
    assert sft["flop"] == pytest.approx(6 * M * student + 3 * attention)
    assert sft["bytes"] == pytest.approx(student * (2 * 4 + 8 * 4))
    teacher = 28 * (2 * E * 2048 + 2 * E * 1024 + 3 * E * 6144) + V * E
    extra = train_step.count_costs("reverse_kl")["flop"] - sft["flop"]
    assert extra == pytest.approx(2 * M * teacher + attention)
    assert score.count_costs("logp")["flop"] == pytest.approx(2 * M * student + attention)
    assert score.count_costs("hidden")["flop"] == pytest.approx(
        2 * M * (student - V * D) + attention
    )
    assert loss.count_costs()["flop"] == pytest.approx(2 * M * V * (3 * D + E))
    train_step.OPTIONS.layers = 2
    assert contest.make_config(train_step.OPTIONS, "teacher") == dataclasses.replace(
        SIZES["1.7b"], num_hidden_layers=2
    )


def test_contenders_follow_the_dtype() -> None:
    train_step.OPTIONS.mark_as_parsed()
    assert list(contest.list_contenders(train_step.OPTIONS, "reverse_kl")) == [
        "ours",
        "trl",
        "tunix",
    ]
    train_step.OPTIONS.dtype = "bfloat16"
    assert "trl, autocast" in contest.list_contenders(train_step.OPTIONS, "reverse_kl")
    train_step.OPTIONS.dtype = "float32"


@pytest.mark.parametrize("what", [pytest.param("loss", marks=pytest.mark.long), "logp"])
def test_ours_and_torch_answer_jobs(what: str) -> None:
    """This project's and torch's implementations, at tiny shapes, in this process."""
    size = dataclasses.replace(
        SIZES["0.6b"],
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    )
    job = {"what": what, "rows": 8, "tokens": 4, "dtype": "float32", "steps": 2}
    job |= {"student": size.to_hf(), "teacher": dataclasses.replace(size, hidden_size=24).to_hf()}
    torch = trainers.run_torch_loss if what == "loss" else trainers.run_torch_score
    ours = trainers.run_our_loss if what == "loss" else trainers.run_our_score
    for answer in (ours(job), torch(job)):
        assert len(answer["seconds"]) == 2 and min(answer["seconds"]) > 0
        assert answer["peak_bytes"] > 2**20
