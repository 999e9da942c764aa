"""`python -m studies.tasks`: its rows train and are graded as they are, mistakes are one line."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from distill.data import canonical, teacher_context
from distill.data.chat import load_tokenizer
from distill.data.examples import Encoding, make_example
from distill.evaluation import problems
from distill.rewards import graders
from studies import manual, tasks
from tests.support.paths import TOKENIZER
from tests.support.verbs import call, read

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lm-eval and its imports


def encode(row: dict) -> tuple[str, str]:
    """A row's prompt and response as a model reads them."""
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None
    example = make_example(
        canonical.canonicalize_row(row, "", "here", True), "here", Encoding(tokenizer)
    )
    return str(tokenizer.decode(example.prompt)), str(tokenizer.decode(example.response))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_are_written_and_can_be_trained_on(task: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert call(tasks, f"--task={task}", "--count=20", "--seed=3", f"--out={out}") == 0
    rows = read(out)
    assert rows == json.loads(json.dumps(tasks.make_rows(task, "train", 20, 3)))
    assert len(rows) == 20 and len({row["id"] for row in rows}) == 20
    for row in rows:
        prompt, response = encode(row)
        assert response.endswith("<|im_end|>")
        if task == "documents":
            assert prompt + response == row["text"] + "<|im_end|>"
            continue
        without_thoughts = task in ("facts", "instructions", "manual")
        assert prompt.endswith("</think>\n\n") == without_thoughts
        assert response == row["response"] + "<|im_end|>"
        assert row["question"] in prompt


@pytest.mark.parametrize("task", ["graphs", "facts"])
def test_the_benchmark_arithmetic_grades_rows(task: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert call(tasks, f"--task={task}", "--split=test", "--count=30", f"--out={out}") == 0
    loaded = problems.load_problems("arithmetic", str(out), 0)
    assert len(loaded) == 30
    for (_, row), written in zip(loaded, read(out), strict=True):
        assert graders.grade_arithmetic(written["response"], row["answer"]) == "correct"
        wrong = str(int(row["answer"]) + 1)
        assert graders.grade_arithmetic(wrong, row["answer"]) == "wrong"


@pytest.mark.parametrize("task", ["instructions", "manual"])
def test_the_benchmark_ifeval_reads_instructions(task: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    out = tmp_path / "rows.jsonl"
    assert call(tasks, f"--task={task}", "--split=test", "--count=30", f"--out={out}") == 0
    loaded = problems.load_problems("ifeval", str(out), 0)
    problems.check_gradable("ifeval", loaded)  # none needs data that nltk downloads
    for (_, row), written in zip(loaded, read(out), strict=True):
        assert row["question"] == written["prompt"]


def test_a_teacher_reads_the_fixed_manual_as_it_learned_to(tmp_path: Path) -> None:
    """With the file of --manual_out as context, a student's row is to its teacher what the row of
    --show_manual is."""
    out, text = tmp_path / "rows.jsonl", tmp_path / "manual.md"
    flags = ("--task=manual", "--manual=5", f"--out={out}")
    assert call(tasks, *flags, "--show_manual") == 0
    shown = read(out)
    assert call(tasks, *flags, f"--manual_out={text}") == 0
    rows = read(out)
    assert len(rows) == len(shown) == tasks.COUNT
    context = teacher_context.load_context(
        ConfigDict({"text": str(text), "column": "", "place": "question", "max_tokens": 64}), "c"
    )
    assert context is not None
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer is not None
    encoding = Encoding(tokenizer, with_responses=False)
    for row, shown_row in zip(rows[:50], shown, strict=False):
        canonical_row = canonical.canonicalize_row(row, "", "here", False)
        example = make_example(canonical_row, "here", encoding)
        read_by_teacher = teacher_context.add_context(context, canonical_row, example, encoding)
        assert tokenizer.decode(read_by_teacher.teacher_prompt or []) == encode(shown_row)[0]
        assert tokenizer.decode(example.prompt) == encode(row)[0] != encode(shown_row)[0]
    assert text.read_text().strip() == manual.write_manual(manual.make_manual(5))


def test_options_reach_their_tasks(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert call(tasks, "--task=graphs", "--operations=5,5", "--count=5", f"--out={out}") == 0
    assert {row["level"] for row in read(out)} == {5}
    assert call(tasks, "--task=documents", "--people=12", "--versions=2", f"--out={out}") == 0
    assert len(read(out)) == 24
    assert call(tasks, "--task=facts", "--people=12", "--split=test", f"--out={out}") == 0
    assert len(read(out)) == 5 * 3 * 2


def test_the_corpus_has_the_words_of_all_tasks_and_of_the_template() -> None:
    corpus = tasks.make_corpus(count=50)
    text = "\n".join(corpus)
    for word in ("How many in", "years old", "Say ", "<think>", "<<", "assistant"):
        assert word in text, word
    assert len(tasks.make_corpus(["graphs"], count=50)) == 50 * 6
    assert "Say " not in "".join(tasks.make_corpus(["graphs", "facts"], count=50))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task=graphs", "--split=seen"), "graphs: no split 'seen'"),
        (("--task=graphs", "--operations=2,40"), "graphs: "),
        (("--task=graphs", "--operations=2"), "--operations=2: is not two numbers"),
        (("--task=facts", "--split=dev"), "split: 'dev' is none of train, valid, test, reworded"),
        (("--task=facts", "--people=3"), "people: 3 is not 10 to 150"),
        (("--task=manual", "--manual_out=m.md"), "--manual_out: needs --task=manual"),
        (("--task=riddles",), "--task"),
        (("--task=graphs", "--count=0"), "--count"),
        (("--task=graphs", "--seed=-1"), "--seed"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert call(tasks, *arguments, f"--out={out}") == 2
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()
