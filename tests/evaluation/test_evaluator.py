"""Tests evaluations: grading, stored responses, interruptions, reverse KL and the verb."""

import dataclasses
import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from configs import base
from distill import rollout
from distill.data import chat
from distill.evaluation import (
    divergence,
    evaluator,
    problems,
    protocols,
    records,
    responses,
    statistics,
)
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.rollout import completions
from distill.runtime import run_files
from distill.runtime.checkpoint import Checkpoints
from distill.runtime.paths import escape_controls
from distill.training import optim, update
from models.errors import UserError
from tests.support.evaluations import STOPS, killed, strict, summary_of, untimed
from tests.support.paths import ROOT, TOKENIZER
from tests.support.tiny_models import tiny_qwen3
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")

ROWS = problems.load_problems("arithmetic", "", 5)
SAMPLE_FIELDS = {field.name for field in dataclasses.fields(rollout.SampleSpec)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Qwen3ForCausalLM]:
    """Maps directory to network for a student and a wider teacher, whose rows eight devices
    share."""
    root = tmp_path_factory.mktemp("models")
    shapes = {"student": {"hidden_size": 33}, "teacher": {"hidden_size": 45, "seed": 1}}
    return {
        str(root / name): tiny_qwen3(
            root / name, tokenizer=TOKENIZER, vocab_size=512, eos_token_id=STOPS, **fields
        )
        for name, fields in shapes.items()
    }


@pytest.fixture(scope="module")
def paths(models) -> tuple[str, str]:
    return tuple(models)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def loaded(paths) -> tuple[Policy, Policy]:
    student, teacher = (
        policy.load(policy.make_abstract_for_inference(path, "float32"), "float32")
        for path in paths
    )
    return student, teacher


def run(subject: Policy, out: Path, **changes: Any) -> dict[str, Any]:
    """Evaluates five generated problems with two samples each."""
    rows, teacher = changes.pop("rows", ROWS), changes.pop("teacher", None)
    sample = rollout.SampleSpec(2, 12, rollout.Sampling(1.0), seed=3, batch_size=4)
    spec = protocols.EvalSpec("arithmetic", sample, ks=(1, 2))
    sample_changes = {k: changes.pop(k) for k in SAMPLE_FIELDS & changes.keys()}
    spec = dataclasses.replace(
        spec, **changes, sample=dataclasses.replace(sample, **sample_changes)
    )
    with policy.use(subject):
        return evaluator.evaluate_benchmark(subject, rows, spec, out, teacher)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(loaded[0], out, teacher=loaded[1])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Grading


@pytest.mark.parametrize(
    ("response", "formatted", "repeats"),
    [
        ("<think>\n3*4=12\n</think>\n\n12", True, False),
        ("<think>\n3*4=12", False, False),
        ("twelve", False, False),
        ("so it is 12 and then some " * 12 + "12", False, True),
        (" ".join(map(str, range(200))), False, False),
        ("again " * 9, False, False),  # too short to count as a loop
        ("again " * 90, False, True),
    ],
)
def test_format_and_repetition_are_detected(response: str, formatted: bool, repeats: bool) -> None:
    with graders.Grader() as grader:
        row: evaluator.Record = {"response": response, "answer": "12", "id": "a"}
        (graded,) = responses.grade_rows(grader, graders.ARITHMETIC, [row])
    assert (graded["formatted"], graded["repeats"]) == (formatted, repeats)
    assert graded["correct"] == (graded["outcome"] == "correct") == formatted
    assert graded.items() >= row.items()


# Stored responses


def test_stored_gsm8k_completions_have_their_published_labels(
    shared_data: Path, tmp_path: Path
) -> None:
    """Uses OpenAI's labels of GSM8K completions; half of the rows find their answer in --data."""
    labelled = read(shared_data / "gsm8k" / "graded_completions.jsonl")[::37]
    rows = [{"question": r["question"], "response": r["completion"]} for r in labelled]
    rows[::2] = [
        row | {"answer": r["answer"]} for row, r in zip(rows[::2], labelled[::2], strict=True)
    ]
    stored = write(tmp_path / "stored.jsonl", rows)
    test = shared_data / "gsm8k" / "test.jsonl"
    flags = ("--benchmark=gsm8k", f"--responses={stored}", f"--data={test}")
    assert call(evaluate, *flags, f"--out={tmp_path / 'out'}", "--k=1,2") == 0
    graded, labels = read(tmp_path / "out" / "examples.jsonl"), [r["is_correct"] for r in labelled]
    assert [row["correct"] for row in graded] == labels and 0 < sum(labels) < len(labels)
    summary = summary_of(tmp_path / "out")
    assert summary["responses"] == len(labels) == sum(summary["outcomes"].values())
    problems = {r["question"] for r in labelled}
    assert summary["problems"] == len(problems)


def test_transcripts_keep_their_lines_and_no_control_codes(tmp_path: Path) -> None:
    row = {"id": 7, "sample": 0, "answer": "4", "length": 5, "finish_reason": "stop"}
    row |= {"outcome": "correct", "correct": True, "response": "2+2\r\n\n=\x1b[31m4\n"}
    path = write(tmp_path / "examples.jsonl", [row])
    text = records.render_transcripts([("f:1", {"id": 7, "question": "What\nis 2+2?"})], path)  # pyright: ignore[reportArgumentType]
    assert text.splitlines() == [
        "--- 7, sample 0: correct (wanted 4; 5 tokens, stop)",
        *("Q  What", "   is 2+2?", "A  2+2", "   ", "   =\\x1b[31m4"),
    ]


def test_answers_are_graded_by_their_value(tmp_path: Path) -> None:
    """Marks, markers and minuses of stored responses, and a vote that they share."""
    forms = {
        "-1000": {"\\boxed{−1\\,000.}": True, "**Answer:** −1,000 (5 times 200)": True},
        "BCA": {"\\boxed{ABC}": False, "The answer is:\nBCA": True},
        "\\frac{1}{2004!}": {"\\boxed{\\frac{1}{2006!}}": False},
        "1,2": {"$\\boxed{1}$ and $\\boxed{2}$": True, "no: \\boxed{2}": False},
        "60": {"\\boxed{61°}": False, "\\boxed{61}": False, "\\boxed{60^\\circ}": True},
    }
    rows = [
        {"question": f"what is {answer}?", "answer": answer, "response": response}
        for answer, responses in forms.items()
        for response in responses
    ]
    stored = write(tmp_path / "stored.jsonl", rows)
    flags = ("--benchmark=math", f"--responses={stored}", f"--out={tmp_path / 'out'}")
    assert call(evaluate, *flags) == 0
    graded = read(tmp_path / "out" / "examples.jsonl")
    expected = [right for responses in forms.values() for right in responses.values()]
    assert [row["correct"] for row in graded] == expected
    votes = statistics._count_votes([row for row in graded if row["answer"] == "60"])
    assert votes == ([1, 2], 0)


def test_stored_responses_are_graded_and_counted_by_problem(tmp_path: Path) -> None:
    stored = write(
        tmp_path / "stored.jsonl",
        [
            {"id": 7, "answer": "12", "response": "<think>\n</think>\n\n12", "note": "left out"},
            {"id": 7, "answer": 12, "response": "12"},
            {"question": "1 + 1?", "answer": 2, "response": "3"},
            {"question": "1 + 1?", "response": "2"},
            {"answer": "5", "response": "<think>"},
        ],
    )
    known = write(tmp_path / "known.jsonl", [{"question": "1 + 1?", "answer": 2}])
    out = tmp_path / "new" / "out"
    flags = ("--benchmark=arithmetic", f"--responses={stored}", f"--out={out}")
    assert call(evaluate, *flags, f"--data={known}", "--k=1,2") == 0
    rows = read(out / "examples.jsonl")
    assert [(r["id"], r["correct"], r["outcome"]) for r in rows] == [
        ("7", True, "correct"),
        ("7", True, "correct"),
        ("1 + 1?", False, "wrong"),
        ("1 + 1?", True, "correct"),
        ("row-4", False, "no_answer"),
    ]
    summary = summary_of(out)
    assert (summary["problems_in_data"], summary["coverage"]) == (1, 1.0)
    assert summary["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert (summary["problems"], summary["responses"]) == (3, 5)
    assert "pass@1" in summary and "pass@2" not in summary  # one problem has a single response
    # The same file may be graded again; --limit takes its first rows.
    assert call(evaluate, *flags, f"--data={known}", "--k=1,2", "--limit=4") == 0
    assert summary_of(out)["pass@2"] == 1.0


def test_responses_to_a_few_problems_are_no_result_over_all(tmp_path: Path, capsys) -> None:
    stored = write(tmp_path / "stored.jsonl", [{"id": i, "response": "1"} for i in (3, 5)])
    problems = [{"id": i, "question": f"{i}?", "answer": "1"} for i in range(40)]
    known, out = write(tmp_path / "known.jsonl", problems), tmp_path / "out"
    flags = ("--benchmark=math", f"--responses={stored}", f"--out={out}", f"--data={known}")
    assert call(evaluate, *flags) == 0
    shown = capsys.readouterr()
    assert "warning: only 2 of the 40 problems of --data have a response (5.0%)" in shown.err
    assert re.search(r"problems +2 of 40 \(5\.0%\): the others have no response", shown.out)
    assert (summary_of(out)["problems_in_data"], summary_of(out)["coverage"]) == (40, 0.05)
    # It is compared with evaluations of the same benchmark only, like one of a model.
    assert summary_of(out)["protocol"]["benchmark"] == "math"


def test_the_result_is_printed_with_what_may_follow(tmp_path: Path, capsys) -> None:
    rows = [{"id": i, "response": "1", "answer": str(1 + i % 2)} for i in range(40)]
    stored = write(tmp_path / "stored.jsonl", rows)
    for name in ("first", "second"):
        flags = ("--benchmark=math", f"--responses={stored}", f"--out={tmp_path / name}")
        assert call(evaluate, *flags) == 0
    shown = capsys.readouterr()
    assert re.search(r"accuracy +50\.0% \[35\.2, 64\.8\] \(95% interval\)", shown.out)
    assert re.search(r"format +100\.0%", shown.out)
    assert shown.err.splitlines()[-3:] == [
        f"wrote {tmp_path}/second: summary.json, examples.jsonl",
        "next:",
        f"  python -m distill.compare --runs={tmp_path}/first,{tmp_path}/second",
    ]


def test_a_default_limit_fits_the_positions_and_a_chosen_one_must(capsys) -> None:
    subject = policy.make_abstract_for_inference(str(ROOT / "assets/student"), "float32")
    spec = protocols.EvalSpec("arithmetic", rollout.SampleSpec(max_new_tokens=1024))
    fitted = evaluator.fit_limit(subject, ROWS, spec)
    assert fitted.sample.max_new_tokens == 448  # 7 eighths of 512 positions
    said = capsys.readouterr().err
    assert "max_new_tokens=448 and not 1,024: the model has 512 positions, and the longest" in said
    assert dataclasses.replace(fitted, sample=spec.sample) == spec
    assert evaluator.fit_limit(subject, ROWS, fitted) == fitted and not capsys.readouterr().err
    long_row = [("row", {"question": "1+" * 220 + "1?", "answer": "1"})]
    assert 0 < evaluator.fit_limit(subject, long_row, spec).sample.max_new_tokens < 64
    with pytest.raises(UserError, match="exceed the model's 512 positions"):
        evaluator.encode_prompts(subject, ROWS, spec)


def test_a_finished_evaluation_keeps_its_timings(whole: Path, loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    summary = summary_of(out) | {"seconds": 1234.5, "tokens_per_second": 67.5}
    (out / "summary.json").write_text(json.dumps(summary))
    again = run(loaded[0], out)
    assert (again["seconds"], again["tokens_per_second"]) == (1234.5, 67.5)
    assert again["memory"] == summary["memory"] and again["accuracy"] == summary["accuracy"]


# Interruptions


@pytest.mark.parametrize(
    ("keep", "first"),
    [
        (lambda text: text[: text.index("\n") // 2], 0),  # in the first line
        (lambda text: "".join(text.splitlines(True)[:3]), 1),  # half of a problem's samples
        (lambda text: "".join(text.splitlines(True)[:8]) + text.splitlines()[8][:-5], 4),
        (lambda text: text.rstrip("\n"), 5),  # all but the newline of the last line
    ],
)
def test_an_interrupted_evaluation_resumes(
    whole: Path, loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep, first: int
) -> None:
    """It samples what is missing and ends with the files of an uninterrupted one."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    examples = tmp_path / "examples.jsonl"
    examples.write_text(keep(examples.read_text()))
    begun = []

    def complete(*args: Any, **options: Any):
        begun.append(options["first"])
        return sample(*args, **options)

    sample = rollout.complete
    monkeypatch.setattr(rollout, "complete", complete)
    run(loaded[0], tmp_path, teacher=loaded[1])
    assert begun == ([first] if first < len(ROWS) else [])
    assert examples.read_bytes() == (whole / "examples.jsonl").read_bytes()
    actual, expected = (untimed(summary_of(out)) for out in (tmp_path, whole))
    assert actual.pop("reverse_kl") == pytest.approx(expected.pop("reverse_kl"), rel=1e-5)
    assert actual == expected
    assert (summary_of(tmp_path)["tokens_per_second"] is None) == (first == len(ROWS))


@pytest.mark.long
def test_an_evaluation_killed_twice_ends_the_same(paths, tmp_path: Path) -> None:
    killed(paths[0], tmp_path, kills=2, problems=12, seed=0)


def test_an_evaluation_may_be_extended_by_more_problems(loaded, tmp_path: Path) -> None:
    """An evaluation of the first problems is the beginning of the whole."""
    run(loaded[0], tmp_path / "out", rows=ROWS[:2])
    run(loaded[0], tmp_path / "out")
    run(loaded[0], tmp_path / "whole")
    actual, expected = (contents(tmp_path / name) for name in ("out", "whole"))
    assert actual["examples.jsonl"] == expected["examples.jsonl"]
    assert actual["protocol.json"] == expected["protocol.json"]


def test_a_row_of_another_problem_is_refused(whole: Path, loaded, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    examples = tmp_path / "examples.jsonl"
    lines = examples.read_text().splitlines(True)
    examples.write_text("".join([*lines[:2], *lines[4:6], *lines[2:4], *lines[6:]]))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"examples.jsonl:3: not a row of this evaluation"):
        run(loaded[0], tmp_path)
    assert contents(tmp_path) == before


def test_graders_never_stall_sampling() -> None:
    """All responses are sampled while none is graded yet; the written rows keep their order."""

    class Slow(graders.Grader):
        def submit(self, rule: graders.GradingRule, response: str, answer: str) -> Future:
            futures.append(Future())
            return futures[-1]

    futures: list[Future] = []

    def sampled():
        for i in range(5):
            yield [{"id": i, "sample": s, "response": "1", "answer": "1"} for s in range(2)]
        assert len(futures) == 10 and not any(f.done() for f in futures)
        for number in (9, 0, 4, 1, 8, 2, 3, 7, 5, 6):
            futures[number].set_result("correct")

    rows = [("", {"id": i, "question": "1?"}) for i in range(5)]
    keys = [["a", "b"]] * 5
    graded = responses.grade_while_sampling(sampled(), Slow(), graders.MATH, rows, keys, False)
    groups = list(graded)
    assert [[(r["id"], r["sample"]) for r in group] for group in groups] == [
        [(i, 0), (i, 1)] for i in range(5)
    ]


CHANGES = {
    "model": lambda teacher: {},
    "samples": lambda _: {"samples": 1, "ks": (1,)},
    "thinking": lambda _: {"thinking": False},
    "max_new_tokens": lambda _: {"max_new_tokens": 11},
    "temperature": lambda _: {"sampling": rollout.Sampling(0.5)},
    "top_k": lambda _: {"sampling": rollout.Sampling(1.0, top_k=3)},
    "top_p": lambda _: {"sampling": rollout.Sampling(1.0, top_p=0.9)},
    "template": lambda _: {"template": "{question}?"},
    "protocol": lambda _: {"protocol": "qwen3-thinking"},
    "seed": lambda _: {"seed": 4},
    "problems": lambda _: {"rows": ROWS[:4]},
    "problems_sha256": lambda _: {"rows": [(w, r | {"answer": "0"}) for w, r in ROWS]},
}


@pytest.mark.parametrize("field", CHANGES)
def test_resuming_with_another_protocol_is_refused(whole: Path, loaded, field: str) -> None:
    before = contents(whole)
    subject = loaded[1] if field == "model" else loaded[0]
    with pytest.raises(UserError) as error:
        run(subject, whole, **CHANGES[field](loaded[1]))
    assert f"{whole} holds another evaluation: {field} was " in str(error.value)
    assert len(str(error.value)) < 500
    assert contents(whole) == before


def test_resuming_with_another_chat_template_is_refused(
    whole: Path, loaded, tmp_path: Path
) -> None:
    subject = loaded[0]
    shutil.copytree(subject.tokenizer_dir, tmp_path / "moved")
    moved = dataclasses.replace(subject, tokenizer_dir=tmp_path / "moved")
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    run(moved, out)
    path = tmp_path / "moved/tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    after = contents(out)
    with pytest.raises(UserError, match="holds another evaluation: tokenizer was"):
        run(moved, out)
    assert contents(out) == after
    assert after.keys() == before.keys()


def test_settings_that_leave_responses_alone_may_change(
    whole: Path, loaded, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    summary = run(loaded[0], tmp_path, ks=(2,), batch_size=64)
    assert "pass@1" not in summary and "reverse_kl" not in summary
    assert (tmp_path / "examples.jsonl").read_bytes() == (whole / "examples.jsonl").read_bytes()


def test_stored_and_sampled_responses_do_not_mix(
    whole: Path, loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = write(tmp_path / "stored.jsonl", [{"id": "a", "answer": "1", "response": "1"}])
    flags = ("--benchmark=arithmetic", f"--responses={stored}")
    before = contents(whole)
    assert call(evaluate, *flags, f"--out={whole}") == 2
    assert "holds the evaluation of a model" in capsys.readouterr().err
    assert contents(whole) == before
    out = tmp_path / "out"
    assert call(evaluate, *flags, f"--out={out}") == 0
    before = contents(out)
    with pytest.raises(UserError, match="holds stored responses"):
        run(loaded[0], out)
    assert contents(out) == before


def test_a_later_checkpoint_needs_another_evaluation(paths, tmp_path: Path) -> None:
    """Samples of two checkpoints are not mixed in one evaluation."""
    workdir, out = tmp_path / "run", tmp_path / "out"
    c = base.get_config()
    c.student.path = paths[0]
    run_files.write_text(workdir / "config.json", c.to_json_best_effort())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "check_files", lambda _: None)  # there is no checkpoint yet
        abstract = policy.make_abstract_for_inference(str(workdir), "float32")

    def train(step: int) -> Policy:
        random = policy.init_random_policy(abstract, jax.random.key(step))
        with Checkpoints(workdir / "checkpoints", save_interval_steps=1, max_to_keep=None) as saved:
            state = update.init_train_state(
                optim.make_optimizer(c.opd.optim, 10), random.params, step
            )
            saved.save(step, state, {"stage": "opd"})
        return dataclasses.replace(random, step=step)

    assert run(train(3), out)["protocol"]["step"] == 3  # type: ignore[index]
    before = contents(out)
    later = train(7)
    with pytest.raises(UserError, match="holds another evaluation: step was 3, now 7"):
        run(later, out)
    assert contents(out) == before


# Reverse KL


def dense_kl(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, rows: list[dict]) -> float:
    """Computes the KL with transformers, in float64 over the whole vocabulary, one row at a
    time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
        with torch.no_grad():
            logp, logq = (m(ids).logits[0].double().log_softmax(-1) for m in (student, teacher))
        kl = (logp.exp() * (logp - logq)).sum(-1)[len(row["prompt_tokens"]) - 1 : -1]
        assert len(kl) == len(row["tokens"])
        total, count = total + float(kl.sum()), count + len(kl)
    return total / count


def test_reverse_kl_equals_a_dense_computation(whole: Path, loaded, models) -> None:
    """Covers response tokens only, for any batch size and its padding."""
    rows, (student, teacher) = read(whole / "examples.jsonl"), loaded
    assert len({row["length"] for row in rows}) > 1
    expected = dense_kl(models[student.path], models[teacher.path], rows)
    assert expected > 0.1
    with policy.use(student):
        for batch_size in (3, 16):
            actual = divergence.compute_reverse_kl(student, teacher, rows, batch_size)
            assert actual == pytest.approx(expected, rel=1e-4)
        assert abs(divergence.compute_reverse_kl(student, student, rows, 8)) < 1e-6
        assert divergence.compute_reverse_kl(teacher, student, rows, 8) != pytest.approx(
            expected, rel=0.01
        )
    assert summary_of(whole)["reverse_kl"] == pytest.approx(expected, rel=1e-4)


# The verb

QUESTIONS = ["What is 3 * 4?", "Ann has 5 eggs, buys 2.", "1 + 1?", "How many are 6 / 2?"]


def test_gsm8k_responses_are_graded_by_their_own_answers(paths, loaded, tmp_path: Path) -> None:
    """Most reference answers here are those the model will give, the others are not."""
    spec = rollout.SampleSpec(2, 24, rollout.Sampling(1.0), seed=5, batch_size=8)
    rows = [{"question": q, "answer": "1", "level": i} for i, q in enumerate(QUESTIONS)]
    problem_rows = problems.load_problems("gsm8k", str(write(tmp_path / "asked.jsonl", rows)), 0)
    with policy.use(loaded[0]):
        prompts = completions.encode_row_prompts(loaded[0], problem_rows, False, 24)
        replies = responses.sample(loaded[0], problem_rows, prompts, spec, 0)
        generated = [[str(row["response"]) for row in group] for group in replies]
    found = [graders.extract_answer(second) or "" for _, second in generated]
    expected = [answer if answer.isdecimal() else "0" for answer in found]
    for row, number in zip(rows, expected, strict=True):
        row["answer"] = int(number)
    known = write(tmp_path / "known.jsonl", [*rows, {"question": "never asked", "answer": 1}])
    flags = (f"--model={paths[0]}", "--benchmark=gsm8k", f"--data={known}", "--limit=4")
    sampling = (
        "--samples=2",
        "--k=1,2",
        "--temperature=1",
        "--seed=5",
        "--thinking=off",
        "--template={question}",
    )
    out = tmp_path / "out"
    limits = ("--max_new_tokens=24", "--batch_size=8")
    assert call(evaluate, *flags, *sampling, *limits, f"--out={out}") == 0
    graded = read(out / "examples.jsonl")
    assert [[r["response"] for r in graded[i : i + 2]] for i in range(0, 8, 2)] == generated
    check_summary(out, graded, samples=2)
    tokenizer = chat.load_tokenizer(paths[0])
    assert tokenizer is not None
    for i, row in enumerate(graded):
        assert (row["id"], row["sample"]) == (f"gsm8k-{i // 2}", i % 2)
        assert row["answer"] == str(int(expected[i // 2]))
        assert row["correct"] == (graders.grade_math(row["response"], row["answer"]) == "correct")
        asked_text = str(tokenizer.decode(row["prompt_tokens"]))
        assert asked_text.endswith("</think>\n\n") and QUESTIONS[i // 2] in asked_text
        assert row["finish_reason"] == ("stop" if row["tokens"][-1] in STOPS else "length")
        assert not set(row["tokens"][:-1]) & set(STOPS)
    assert 0 < summary_of(out)["accuracy"] < 1


def check_summary(out: Path, rows: list[dict], samples: int) -> None:
    """Checks the contract of summary.json, and its numbers against examples.jsonl."""
    summary = summary_of(out)
    assert rows == [strict(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert summary["responses"] == len(rows) == samples * summary["problems"]
    assert summary["accuracy"] == pytest.approx(np.mean([row["correct"] for row in rows]))
    low, high = summary["interval"]
    assert 0 <= low <= summary["accuracy"] <= high <= 1
    assert summary["pass@1"] == pytest.approx(summary["accuracy"])
    best = [any(r["correct"] for r in rows[i : i + samples]) for i in range(0, len(rows), samples)]
    assert summary[f"pass@{samples}"] == pytest.approx(np.mean(best))
    for rate, hits in (
        ("format_rate", [row["formatted"] for row in rows]),
        ("repetition_rate", [row["repeats"] for row in rows]),
        ("truncation_rate", [row["finish_reason"] == "length" for row in rows]),
    ):
        assert summary[rate] == pytest.approx(np.mean(hits)), rate
    assert summary["mean_length"] == pytest.approx(np.mean([len(row["tokens"]) for row in rows]))
    written = sum(row["length"] for row in rows)
    assert summary["tokens_per_second"] * summary["seconds"] == pytest.approx(written)
    assert 0.01 < summary["memory"]["host_gib"] < 1000


def test_arithmetic_evaluation_with_a_teacher(paths, models, tmp_path: Path, capsys) -> None:
    """Greedy decoding of the generated problems, with the divergence from a teacher."""
    out = tmp_path / "out"
    flags = (f"--model={paths[0]}", f"--teacher={paths[1]}", "--benchmark=arithmetic")
    assert call(evaluate, *flags, f"--out={out}", "--limit=3", "--max_new_tokens=12") == 0
    rows = read(out / "examples.jsonl")
    check_summary(out, rows, samples=1)
    assert [row["id"] for row in rows] == [f"arithmetic-test-{i}" for i in range(3)]
    assert [row["answer"] for row in rows] == [row["answer"] for _, row in ROWS[:3]]
    summary = summary_of(out)
    expected = dense_kl(models[paths[0]], models[paths[1]], rows)
    assert summary["reverse_kl"] == pytest.approx(expected, rel=1e-4)
    protocol = summary["protocol"]
    assert protocol["model"] == paths[0] and protocol["temperature"] == 0 and protocol["thinking"]
    assert protocol["protocol"] == "greedy" and protocol["template"] == "{question}"
    assert (protocol["samples"], protocol["max_new_tokens"], protocol["seed"]) == (1, 12, 0)
    assert {"jax", "math-verify"} <= summary["versions"].keys()
    network = models[paths[0]]
    assert summary["parameters"] == sum(p.numel() for p in network.parameters())
    assert summary["parameter_bytes"] == 4 * summary["parameters"]
    shown = capsys.readouterr().out  # --limit takes the first problems
    for (_, problem), row in zip(ROWS, rows, strict=False):
        assert f"--- {row['id']}, sample 0: {row['outcome']} (wanted {row['answer']}" in shown
        assert str(problem["question"]) in shown
        assert escape_controls("\n   ".join(row["response"].splitlines())) in shown
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
            best = models[paths[0]](ids).logits[0].argmax(-1).tolist()
            assert best[len(row["prompt_tokens"]) - 1 : -1] == row["tokens"]


BAD = [
    (("--benchmark=trivia",), "--benchmark=trivia: known are arithmetic, gsm8k, math500"),
    (("--benchmark=gsm8k",), "--data: gsm8k needs a jsonl file"),
    (("--benchmark=gsm8k", "--data=none.jsonl"), "none.jsonl: no such file"),
    (("--benchmark=gsm8k", "--data=unanswered.jsonl"), "unanswered.jsonl:2: no answer among"),
    (
        ("--benchmark=gsm8k", "--data=twice.jsonl"),
        "twice.jsonl:2: repeats the id 'a' of an earlier row",
    ),
    (("--benchmark=gsm8k", "--data=ids.jsonl"), "ids.jsonl:1: token id 600 is outside"),
    (("--benchmark=gsm8k", "--data=unasked.jsonl"), "unasked.jsonl:1: none of tokens, prompt"),
    (
        ("--benchmark=arithmetic", "--k=1,4", "--samples=2"),
        "--k=1,4: each must be 1 to",
    ),
    (("--benchmark=arithmetic", "--k=0"), "--k=0: each must be"),
    (("--benchmark=arithmetic", "--k=one"), "--k=one: each must be"),
    (("--benchmark=arithmetic", "--model="), "--model: name a model directory"),
    (("--benchmark=arithmetic", "--model=no/such/place"), "no/such/place: no model directory"),
    (("--benchmark=arithmetic", "--model=other"), "other: no tokenizer, so responses cannot be"),
    (
        ("--benchmark=arithmetic", "--max_new_tokens=100"),
        "tokens and 100 new ones (max_new_tokens) exceed",
    ),
    (("--benchmark=arithmetic", "--temperature=nan"), "--temperature"),
    (("--benchmark=arithmetic", "--top_p=nan"), "--top_p"),
    (("--benchmark=arithmetic", "--limit=-1"), "limit"),
    (("--benchmark=arithmetic", "--teacher=other"), "other: vocab_size=131"),
    (("--benchmark=arithmetic", "--out=unasked.jsonl"), "--out=unasked.jsonl"),
    (("--benchmark=arithmetic", "--responses=fine.jsonl", "--out=twice.jsonl"), "--out=twice"),
    (("--benchmark=arithmetic", "--responses=unasked.jsonl"), "unasked.jsonl:1: no response among"),
    (
        ("--benchmark=arithmetic", "--responses=said.jsonl"),
        "said.jsonl:1: has no answer, and matches no problem",
    ),
    ((), "--benchmark is required"),
    (("--benchmark=arithmetic", "--protocol=guess"), "--protocol=guess: known are greedy"),
    (("--benchmark=arithmetic", "--template=hello"), "--template: no {question} in it"),
    (("--benchmark=arithmetic", "--k=2"), "--k=2: each must be 1 to --samples=1"),
    (("--benchmark=aime24", "--data=hf:"), "hf:HuggingFaceH4/aime_2024: cannot be read: "),
]


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    good = {"question": "q", "answer": "1", "id": "a"}
    write(folder / "unanswered.jsonl", [good, {"question": "q", "answer": None}])
    write(folder / "twice.jsonl", [good, good])
    write(folder / "ids.jsonl", [{"tokens": [5, 600], "answer": "1"}])
    write(folder / "unasked.jsonl", [{"answer": "1"}])
    write(folder / "fine.jsonl", [{"response": "1", "answer": "1"}])
    write(folder / "said.jsonl", [{"response": "1", "id": "x"}])
    tiny_qwen3(folder / "other")
    return folder


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_evaluate_reports_user_errors_in_one_line(
    bad_inputs: Path,
    paths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(bad_inputs)
    before = contents(bad_inputs)
    assert call(evaluate, f"--model={paths[0]}", f"--out={tmp_path / 'out'}", *flags) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and words in line, line
    assert captured.out == "" and contents(tmp_path) == {} and contents(bad_inputs) == before


def test_a_reference_answer_that_is_no_integer_is_refused(tmp_path: Path) -> None:
    row = {"id": "a", "answer": "twelve", "response": "12"}
    stored = write(tmp_path / "stored.jsonl", [row])
    flags = ("--benchmark=arithmetic", f"--responses={stored}", f"--out={tmp_path / 'out'}")
    assert call(evaluate, *flags, "--k=") == 0
    assert [row["outcome"] for row in read(tmp_path / "out" / "examples.jsonl")] == ["error"]
    assert not [name for name in summary_of(tmp_path / "out") if name.startswith("pass@")]
