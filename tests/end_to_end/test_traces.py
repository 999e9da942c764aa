"""Tests traces from prompts to training rows: generate (stopped and resumed), verify, read back."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import base
from distill import generate, verify
from distill.data import arithmetic, chat, collate, dataset, sources
from distill.evaluation import rejection, tasks
from distill.rewards import graders
from distill.rollout import completions
from distill.runtime import run_files
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.verbs import call, write

STUDENT = ROOT / "assets" / "student"
SETTINGS = ("--limit=8", "--samples=2", "--max_new_tokens=30", "--batch_size=8", "--seed=3")


def read(path: Path) -> list[dict]:
    return [row for _, row in sources.open_rows(str(path))]


def prompts(path: Path, count: int = 9) -> Path:
    problems = [arithmetic.make_problem(1, i, "train", (3, 3)) for i in range(count)]
    return write(path, [{"question": p.question, "answer": p.answer} for p in problems])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two responses of the embedded student to each of eight problems."""
    folder = tmp_path_factory.mktemp("traces")
    path, out = prompts(folder / "prompts.jsonl"), folder / "out.jsonl"
    assert call(generate, f"--model={STUDENT}", f"--prompts={path}", f"--out={out}", *SETTINGS) == 0
    left = sorted(p.name for p in folder.iterdir())
    assert left == ["out.jsonl", "out.jsonl.about", "prompts.jsonl"]
    return out


def test_generate_reads_the_first_rows(traces: Path, tmp_path: Path, capsys: Any) -> None:
    assert traces.read_bytes().count(b"\n") == 8
    out = tmp_path / "out.jsonl"
    for name in (traces.name, f"{traces.name}.about"):
        (tmp_path / name).write_bytes(traces.with_name(name).read_bytes())
    flags = (f"--prompts={traces.with_name('prompts.jsonl')}", f"--out={out}", *SETTINGS)
    assert call(generate, f"--model={STUDENT}", *flags, "--limit=3") == 0
    assert "replaces what was made with --limit=8, which is 3 now" in capsys.readouterr().err
    assert out.read_bytes() == b"".join(traces.read_bytes().splitlines(keepends=True)[:3])


@pytest.mark.parametrize("done", [0, 3])
def test_a_stopped_generate_resumes(
    traces: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    done: int,
) -> None:
    """The file is the same in the end, and no finished row is sampled again."""
    path, out = shutil.copy(traces.with_name("prompts.jsonl"), tmp_path), tmp_path / "out.jsonl"
    student = shutil.copytree(STUDENT, tmp_path_factory.mktemp("models") / "student")
    shared = (f"--model={student}", f"--prompts={path}", f"--out={out}")
    lines = traces.read_text().splitlines(keepends=True)
    with monkeypatch.context() as patch:

        def killed(path: Path, rows: Any) -> None:
            run_files._get_partial_paths(path)[0].write_text(
                "".join(lines[:done]) + lines[done][:50]
            )
            raise KeyboardInterrupt

        patch.setattr(run_files, "extend_jsonl", killed)
        assert call(generate, *shared, *SETTINGS) == 130
    assert not out.exists()
    assert call(generate, *shared, *SETTINGS[:-1], "--seed=4") == 2
    assert "out.jsonl.partial is of another work: seed was 3, now 4" in capsys.readouterr().err
    weights = student / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\7")
    assert call(generate, *shared, *SETTINGS) == 2
    assert "out.jsonl.partial is of another work: model_files was " in capsys.readouterr().err
    weights.write_bytes(content)
    sampled: list[int] = []
    complete = completions.complete

    def counted(subject: Any, left: list, spec: completions.SampleSpec, **options: Any) -> Any:
        sampled.append(len(left))
        return complete(subject, left, spec, **options)

    monkeypatch.setattr(completions, "complete", counted)
    assert call(generate, *shared, *SETTINGS) == 0
    assert sampled == [8 - done]
    for row, whole in zip(read(out), read(traces), strict=True):
        for sample, expected in zip(row["samples"], whole["samples"], strict=True):
            assert sample["tokens"] == expected["tokens"]
            np.testing.assert_allclose(sample["logprobs"], expected["logprobs"], atol=1e-4)
    assert out.read_text().startswith("".join(lines[:done]))
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["out.jsonl", "out.jsonl.about", "prompts.jsonl"]


def test_generate_resumes_with_all_rows_written(traces: Path, tmp_path: Path) -> None:
    """The case of a kill between the last row and the rename."""
    about = {"a": 1}
    assert run_files.resume_jsonl(tmp_path / "x.jsonl", about) == 0
    (tmp_path / "x.jsonl.partial").write_text("{}\n{}\n")
    assert run_files.resume_jsonl(tmp_path / "x.jsonl", about) == 2
    run_files.extend_jsonl(tmp_path / "x.jsonl", [])
    assert (tmp_path / "x.jsonl").read_text() == "{}\n{}\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_verify_keeps_the_correct_samples(traces: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "verified.jsonl"
    flags = (f"--data={traces}", "--benchmark=arithmetic", f"--out={out}")
    assert call(verify, *flags) == 0
    expected = []
    for row in read(traces):
        good = [
            sample["tokens"]
            for sample in row["samples"]
            if sample["finish_reason"] == "stop"
            and graders.grade_arithmetic(sample["text"], row["answer"]) == "correct"
        ]
        expected += [good] if good else []
    actual = [[s["tokens"] for s in row["samples"]] for row in read(out)]
    assert actual == expected and 0 < sum(map(len, actual)) < 16
    count = sum(map(len, actual))
    assert f"{count} of 16 samples correct; {count} kept" in capsys.readouterr().err
    out.unlink()
    assert call(verify, *flags, "--keep=all", "--samples=1") == 0
    assert [len(row["samples"]) for row in read(out)] == [1] * 8
    assert all({"outcome", "correct"} <= row["samples"][0].keys() for row in read(out))


def test_traces_train_on_the_sampled_tokens(traces: Path, tmp_path: Path) -> None:
    """The token ids are the sampled ones, not the text encoded again; each sample is one
    example."""
    verified = tmp_path / "verified.jsonl"
    flags = ("--benchmark=arithmetic", f"--out={verified}", "--keep=all")
    assert call(verify, f"--data={traces}", *flags) == 0
    tokenizer = chat.load_tokenizer(STUDENT)
    kept: dict[str, list] = {}
    for keep in ("all", "finished", "correct"):
        c = base.make_stage("sft").data
        c.source, c.keep_samples = str(verified), keep
        source = dataset.load_source(c, tokenizer, 0, True)
        kept[keep] = [source.read_example(i) for i in range(source.size)]
    rows = read(verified)
    samples = [(row, sample) for row in rows for sample in row["samples"]]
    assert len(kept["all"]) == 16 > len(kept["finished"]) >= len(kept["correct"]) > 0
    for example, (row, sample) in zip(kept["all"], samples, strict=True):
        assert (example.prompt, example.response) == (row["prompt_tokens"], sample["tokens"])
        assert example.answer == row["answer"]
    assert [e.response for e in kept["correct"]] == [
        s["tokens"] for _, s in samples if s["correct"]
    ]
    assert kept["correct"][0].where.startswith(f"{verified}:")
    assert " sample " in kept["correct"][0].where


def test_stored_top_logprobs_reach_the_batch(tmp_path: Path) -> None:
    def top(token: int) -> list[list[float]]:
        return [[token, -0.1], [token + 1, -2.5], [0, -9.0]]

    samples = [
        {"tokens": ids, "finish_reason": "stop", "top_logprobs": [top(i) for i in ids]}
        for ids in ([5, 6, 7, 9], [8, 9])
    ]
    path = write(tmp_path / "t.jsonl", [{"prompt_tokens": [1, 2], "samples": samples}])
    c = base.make_stage("sft").data
    c.source = str(path)
    source = dataset.load_source(c, None, 0, True)
    batch = collate.collate_rows(
        [[source.read_example(0), source.read_example(1)]], collate.BatchLayout(10, 3, top_k=2)
    )
    assert batch.teacher_top_BTK is not None
    ids, logp = map(np.asarray, batch.teacher_top_BTK)
    mask = np.asarray(batch.mask_BT)
    assert (ids.dtype, logp.dtype, ids.shape) == (np.int32, np.float32, (1, 10, 2))
    assert (ids[mask][:, 0] == np.asarray(batch.tokens_BT)[mask]).all()
    np.testing.assert_allclose(logp[mask], [[-0.1, -2.5]] * 5)
    assert not ids[~mask].any() and mask.sum() == 5
    with pytest.raises(UserError, match=r"t\.jsonl:1 sample 0: top_logprobs has 3, not 4"):
        collate.collate_rows([[source.read_example(0)]], collate.BatchLayout(10, 3, top_k=4))
    del samples[1]["top_logprobs"]
    write(path, [{"prompt_tokens": [1, 2], "samples": samples}])
    with pytest.raises(UserError, match=r"t\.jsonl:1 sample 1: no top_logprobs"):
        collate.collate_rows(
            [[dataset.load_source(c, None, 0, True).read_example(1)]],
            collate.BatchLayout(10, 3, top_k=2),
        )
    samples[0]["top_logprobs"].pop()
    write(path, [{"prompt_tokens": [1, 2], "samples": samples}])
    with pytest.raises(UserError, match="top_logprobs of 3 tokens, response of 4"):
        dataset.load_source(c, None, 0, True)


SAMPLE = {"tokens": [1], "text": "It is 12.", "finish_reason": "stop"}
BAD = {
    "no answer": ({"samples": [SAMPLE]}, "needs samples and answer, has ['samples']"),
    "no samples": ({"answer": "12"}, "needs samples and answer, has ['answer']"),
    "no text": ({"answer": "1", "samples": [{**SAMPLE, "text": None}]}, "a sample has no text"),
    "unreadable": ({"answer": "\\frac{", "samples": [SAMPLE]}, "'\\\\frac{' cannot be parsed"),
}


@pytest.mark.parametrize("name", BAD)
def test_verify_refuses_or_skips_bad_rows(tmp_path: Path, capsys: Any, name: str) -> None:
    row, words = BAD[name]
    good = {"answer": "12", "samples": [SAMPLE, {**SAMPLE, "text": "It is 13."}]}
    path = write(tmp_path / "rows.jsonl", [good, row])
    benchmark = "gsm8k" if name == "unreadable" else "arithmetic"
    if benchmark == "arithmetic":
        good["samples"][0] = {**SAMPLE, "text": "12"}
        write(path, [good, row])
    flags = (f"--data={path}", f"--benchmark={benchmark}", f"--out={tmp_path / 'out.jsonl'}")
    assert call(verify, *flags) == 2
    assert f"{path}:2: " in (errors := capsys.readouterr().err) and words in errors
    assert not (tmp_path / "out.jsonl").exists()
    counts: Counter[str] = Counter()
    rows = sources.open_rows(str(path))
    verified = list(
        rejection.verify_rows(
            rows,
            tasks.BENCHMARKS[benchmark].grading,
            keep="correct",
            max_samples=0,
            skip_bad_rows=True,
            counts=counts,
        )
    )
    assert [len(row["samples"]) for row in verified] == [1]
    assert counts["bad rows"] == 1 and words in capsys.readouterr().err


def test_ungraded_samples_are_not_kept_as_correct(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt_tokens": [1], "samples": [SAMPLE]}])
    c = base.make_stage("sft").data
    c.source, c.keep_samples = str(path), "correct"
    with pytest.raises(
        UserError, match=r"t\.jsonl:1: config\.data\.keep_samples=correct, but its samples"
    ):
        dataset.load_source(c, None, 0, True)
    c.on_bad_row = "skip"
    right = {"prompt_tokens": [1], "samples": [{**SAMPLE, "correct": True}]}
    path.write_text("{\n" + path.read_text() + json.dumps(right) + "\n")
    source = dataset.load_source(c, None, 0, True)
    assert source.size == 1 and list(source.skip_reasons) == [f"{path}:1", f"{path}:2"]
    write(path, [{"prompt_tokens": [1], "samples": [{**SAMPLE, "correct": False}]}])
    with pytest.raises(UserError, match=r"keep_samples=correct leaves none of its samples"):
        dataset.load_source(c, None, 0, True)
    assert json.loads(path.read_text())["samples"]
