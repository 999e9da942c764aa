"""Compares lm-eval's numbers for a policy here and for its Hugging Face backend on the same
weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill import harness
from distill.policy import policy
from models.errors import UserError
from tests.support.lm_eval_tasks import TASKS, list_numbers, list_samples, write_tasks
from tests.support.paths import ROOT, TOKENIZER
from tests.support.templates import THINKING_ONLY
from tests.support.tiny_models import tiny_qwen3
from tests.support.verbs import call

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lm-eval and its imports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, with texts longer than the model's 128 positions."""
    return write_tasks(tmp_path_factory.mktemp("tasks"), sums_per_row=9)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_qwen3(path, tokenizer=TOKENIZER, vocab_size=512, hidden_size=33, eos_token_id=384)
    return path


@pytest.mark.long
def test_lm_eval_numbers_equal_the_hugging_face_backend(folder: Path, model_dir: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from distill.evaluation import lm_eval_model

    subject = policy.load(policy.make_abstract_for_inference(str(model_dir), "float32"), "float32")
    ours = lm_eval_model.run_tasks(subject, list(TASKS), batch_size=4, include_path=str(folder))
    reference = HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=1)
    theirs = lm_eval.simple_evaluate(
        model=reference,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
    )
    assert theirs is not None
    for task in ("tiny_choice", "tiny_read"):
        flat = [list_numbers(list_samples(results, task)) for results in (ours, theirs)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4, rel=1e-5) and len(flat[0]) >= 7
    written = list_samples(ours, "tiny_write")
    assert written == list_samples(theirs, "tiny_write")
    assert len({str(text) for text in written}) > 3  # not all empty
    for task, figures in theirs["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


@pytest.mark.long
def test_harness_verb_writes_lm_eval_results(
    folder: Path, model_dir: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    flags = (f"--model={model_dir}", f"--include={folder}", f"--out={tmp_path / 'out.json'}")
    assert call(harness, *flags, "--tasks=tiny_choice", "--limit=2", "--num_fewshot=0") == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["n-samples"]["tiny_choice"]["effective"] == 2
    assert "tiny_choice" in capsys.readouterr().out
    assert call(harness, *flags, "--tasks=no_such_task") == 2
    assert "lm-eval knows no 'no_such_task'" in capsys.readouterr().err


def test_unsupported_lm_eval_requests_are_refused(model_dir: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from distill.evaluation import lm_eval_model

    subject = policy.make_abstract_for_inference(str(model_dir), "float32")
    model = lm_eval_model.PolicyLM(subject, 4, False)
    for manner, words in (
        ({"num_beams": 4}, "no num_beams here"),
        ({"max_gen_toks": 128}, "max_gen_toks=128, but the model has 128"),
    ):
        request = Instance("generate_until", {}, ("a", manner), 0)
        with pytest.raises(UserError, match=words):
            model.generate_until([request])


def test_prompts_of_a_thinking_template_are_not_asked_for_without_thoughts(model_dir: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from distill.evaluation import lm_eval_model

    subject = policy.make_abstract_for_inference(str(model_dir), "float32")
    assert subject.tokenizer is not None
    subject.tokenizer.chat_template = THINKING_ONLY
    turns = [{"role": "user", "content": "2+2?"}]
    asked = lm_eval_model.PolicyLM(subject, 4, True).apply_chat_template(turns)
    assert asked.endswith("<|im_start|>assistant\n<think>\n")
    with pytest.raises(UserError, match="opens a think block in every prompt"):
        lm_eval_model.PolicyLM(subject, 4, False).apply_chat_template(turns)


def test_missing_lm_eval_is_one_line(tmp_path: Path) -> None:
    """Runs in a process that cannot import lm_eval."""
    program = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'lm_eval' else real(name, *a)\n"
        "from distill import harness; from distill.runtime import cli;"
        "cli.run(harness.main, harness.OPTIONS)"
    )
    flags = ["--model=x", "--tasks=y", f"--out={tmp_path / 'z'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install -r requirements-eval.txt"), done.stderr
    assert len(done.stderr.splitlines()) == 1
