"""lm-eval's client for OpenAI-compatible servers gets the numbers of the model in this process."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from distill.evaluation import lm_eval_model
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from tests.support.paths import TOKENIZER
from tests.support.serving import TOKEN, serve
from tests.support.tiny_models import tiny_qwen3

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]  # warnings of lm-eval

TASKS = {
    "served_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "served_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "7"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "served_read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def write_tasks(root: Path) -> Path:
    rows = [
        {
            "question": f"Ann has {i} eggs and buys {i * i}. How many has she?",
            "choices": [f"{i + i * i}", f" {i}{i}", "none at all", f"{i} eggs "],
            "label": i % 4,
            "answer": str(i + i * i),
            "text": " ".join(f"{i} + {j} = {i + j}." for j in range(3 + i)),
        }
        for i in range(7)
    ]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test"}
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (root / f"{name}.yaml").write_text(json.dumps(common | files | task))
    return root


def list_samples(results: dict[str, Any], task: str) -> list[Any]:
    return [s["resps"] for s in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def list_numbers(x: Any) -> list[float]:
    """Returns all numbers, and truth values, in nested lists."""
    if isinstance(x, list | tuple):
        return [number for inner in x for number in list_numbers(inner)]
    return [] if isinstance(x, str) else [float(x)]


def test_lm_eval_gets_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's client needs it")
    model, tasks = tmp_path / "tiny", write_tasks(tmp_path)
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
    for task in ("served_choice", "served_read"):
        flat = [list_numbers(list_samples(results, task)) for results in (ours, theirs)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4, rel=1e-5) and len(flat[0]) >= 7
    assert list_samples(ours, "served_write") == list_samples(theirs, "served_write")
