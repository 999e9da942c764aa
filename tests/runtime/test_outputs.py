"""Files that verbs write do not replace what the same verb did not make."""

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from etils import epath

from configs import quickstart
from distill import clean, compare, diagnose, generate, score, verify
from distill.evaluation import example_rows
from distill.runtime import outputs, run_files
from tests.support.paths import ROOT
from tests.support.verbs import call, verb_module, write

ROW = {"question": "2+2?", "answer": "4", "tokens": [5, 6]}
ROW |= {"samples": [{"text": "4", "finish_reason": "stop"}]}
MODEL = f"--model={ROOT}/assets/student"
CONFIG = f"--config={ROOT}/configs/quickstart.py:tiny"
VERBS = {
    "clean": (clean, "--data=rows.jsonl"),
    "verify": (verify, "--data=rows.jsonl", "--benchmark=arithmetic"),
    "score": (score, "--tokens=rows.jsonl", MODEL),
    "generate": (generate, "--prompts=rows.jsonl", MODEL, "--max_new_tokens=2"),
    "diagnose": (diagnose, CONFIG, "--config.opd.steps=4"),
    "compare": (compare, "a"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [ROW])
    return tmp_path


def refuse(capsys: pytest.CaptureFixture[str], verb: ModuleType, *flags: str) -> str:
    """Returns the line with which a verb refuses its flags."""
    capsys.readouterr()
    assert call(verb, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; name another file, or move this one away")
    return line


@pytest.mark.parametrize("name", VERBS)
def test_rows_of_another_origin_are_kept(name: str, folder: Path, capsys) -> None:
    out = write(folder / "out.jsonl", [{"question": "my own", "answer": "1"}])
    before, (verb, *flags) = out.read_bytes(), VERBS[name]
    line = refuse(capsys, verb, *flags, "--out=out.jsonl")
    assert line.startswith(f"error: --out={out}: was not made by {name};")
    assert out.read_bytes() == before
    assert sorted(os.listdir()) == ["out.jsonl", "rows.jsonl"]


def test_a_verb_may_replace_its_own_file(folder: Path, capsys) -> None:
    verb, *flags = VERBS["verify"]
    out = folder / "out.jsonl"
    out.touch()  # as mktemp leaves it
    flags.append(f"--out={out}")
    for _ in range(2):
        assert call(verb, *flags) == 0
    made = out.read_bytes()
    capsys.readouterr()
    assert call(verb, *flags, "--keep=all") == 0
    said = f"--out={out}: replaces what was made with --keep='correct', which is 'all' now"
    assert said in capsys.readouterr().err
    assert call(verb, *flags) == 0 and out.read_bytes() == made
    line = refuse(capsys, clean, "--data=rows.jsonl", f"--out={out}")
    assert f"--out={out}: was made by verify" in line
    out.write_bytes(made + b'{"mine": 1}\n')
    assert "was changed after verify had made it" in refuse(capsys, verb, *flags)
    out.write_bytes(made)
    about = folder / "out.jsonl.about"
    record = json.loads(about.read_text())
    del record["command"]["keep"]  # a flag that an earlier version did not have
    about.write_text(json.dumps(record))
    assert call(verb, *flags) == 0
    for broken in (b"", b"[]", b"{", b'{"command": {}}', b"\xff", b"[" * 99999):
        about.write_bytes(broken)
        assert "was not made by verify" in refuse(capsys, verb, *flags)
    out.unlink()
    assert call(verb, *flags) == 0 and out.read_bytes() == made


def test_configs_and_arguments_belong_to_the_command(folder: Path, capsys) -> None:
    out = epath.Path(folder / "out.json")

    def make(verb: ModuleType, *words: str, arguments: tuple[str, ...] = ()) -> None:
        verb.OPTIONS.unparse_flags()
        verb.OPTIONS(["verb", *words])
        with outputs.own_output(out, "name", verb.OPTIONS, arguments=arguments):
            out.write_text("{}")

    for arguments in (("a", "b"), ("a", "b"), ("a",)):
        capsys.readouterr()
        make(compare, arguments=arguments)
    assert "was made with arguments=['a', 'b'], which is ['a'] now" in capsys.readouterr().err
    out.unlink()
    make(diagnose, CONFIG, "--config.opd.steps=4")
    make(diagnose, CONFIG, "--config.opd.steps=4")
    assert "replaces" not in capsys.readouterr().err
    make(diagnose, CONFIG, "--config.opd.steps=5")
    assert "was made with --config.opd.steps=4, which is 5 now" in capsys.readouterr().err


def test_the_report_of_clean_is_kept_too(folder: Path, capsys) -> None:
    mine = write(folder / "report.jsonl", [{"row": "mine"}])
    before = mine.read_bytes()
    line = refuse(capsys, clean, "--data=rows.jsonl", "--out=out.jsonl", f"--report={mine}")
    assert line.startswith(f"error: --report={mine}: was not made") and mine.read_bytes() == before
    assert not (folder / "out.jsonl").exists()


def test_a_summary_that_no_evaluation_made_is_kept(folder: Path, capsys) -> None:
    """Such as that of the quick start."""
    (folder / "run").mkdir()
    (folder / "run" / "summary.json").write_text("{}")
    rows = write(folder / "stored.jsonl", [{"id": 1, "response": "4", "answer": "4"}])
    evaluate, flags = verb_module("evaluate"), ("--benchmark=arithmetic", "--out=run")
    for more in (f"--responses={rows}", MODEL):
        assert call(evaluate, *flags, more) == 2
        assert "--out=run: has a summary.json that no evaluation made" in capsys.readouterr().err
    assert (folder / "run" / "summary.json").read_text() == "{}" and len(os.listdir("run")) == 1


@pytest.mark.parametrize(
    ("texts", "benchmark"),
    [
        (["<think>\n2+2=4\n</think>\n4", "5"], "arithmetic"),
        (["It is 4.", "4"], "math"),
        ([None], ""),
        ([], "math"),
    ],
)
def test_the_grader_that_generate_proposes_reads_the_responses(texts, benchmark, folder) -> None:
    samples = [{"text": text, "finish_reason": "stop"} for text in texts]
    cut = {"text": "<think>\n2", "finish_reason": "length"}
    out = write(folder / "out.jsonl", [{"samples": [*samples, cut]}])
    assert generate.choose_benchmark(epath.Path(out), "4") == benchmark
    assert generate.choose_benchmark(epath.Path(out), "4", "gsm8k") == (
        "gsm8k" if benchmark else ""
    )


def test_the_benchmark_is_that_of_the_run(tmp_path: Path) -> None:
    assert not generate.find_benchmark(str(tmp_path))
    c = quickstart.get_config("tiny")

    def find() -> str:
        (tmp_path / "config.json").write_text(c.to_json_best_effort())
        return generate.find_benchmark(str(tmp_path))

    assert not find()
    c.opd.objective, c.opd.reward.grader = "grpo", "math"
    assert find() == "math"
    c.eval.every, c.eval.benchmark = 2, "gsm8k"
    assert find() == "gsm8k"


def test_an_interrupted_verb_says_only_what_is_there(tmp_path: Path) -> None:
    out = epath.Path(tmp_path) / "out.jsonl"
    assert run_files.describe_finished(out).startswith("no row was finished")
    for content, words in (("", "no row was finished"), ("{}\n", "the rows that were")):
        out.with_name("out.jsonl.partial").write_text(content)
        assert run_files.describe_finished(out).startswith(words)
    assert example_rows.describe_graded(out.parent).startswith("no response was graded")
    (out.parent / "examples.jsonl").write_text("{}\n")
    assert example_rows.describe_graded(out.parent).startswith("the responses that were graded")
