"""lm-eval's client for OpenAI-compatible servers gets the numbers of the model in this process."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from distill.evaluation import lm_eval_model
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from tests.support.lm_eval_tasks import TASKS, list_numbers, list_samples, write_tasks
from tests.support.paths import TOKENIZER
from tests.support.serving import TOKEN, serve
from tests.support.tiny_models import tiny_qwen3

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]  # warnings of lm-eval


def test_lm_eval_gets_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's client needs it")
    model, tasks = tmp_path / "tiny", write_tasks(tmp_path, sums_per_row=1)
    tiny_qwen3(model, tokenizer=TOKENIZER, vocab_size=512, hidden_size=32, eos_token_id=384)
    described = policy.make_abstract_for_inference(
        str(model), "float32", mesh_lib.make_mesh(1, 1, 1)
    )
    with policy.use(described):
        subject = policy.load(described, "float32")
    ours = lm_eval_model.run_tasks(subject, [*TASKS], batch_size=4, include_path=str(tasks))
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    with serve(model, slots=8) as running:
        arguments = {
            "model": "tiny",
            "base_url": f"{running.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(model),
            "max_length": 128,
            "num_concurrent": 2,
        }
        theirs: Any = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=[*TASKS],
            task_manager=TaskManager(include_path=str(tasks)),
        )
    for task, metrics in ours["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert theirs["results"][task][name] == pytest.approx(value, rel=1e-5), name
    for task in ("tiny_choice", "tiny_read"):
        flat = [list_numbers(list_samples(results, task)) for results in (ours, theirs)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4, rel=1e-5) and len(flat[0]) >= 7
    assert list_samples(ours, "tiny_write") == list_samples(theirs, "tiny_write")
