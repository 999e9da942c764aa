"""Tasks of lm-eval over local rows, one of each kind of request, and what their samples hold."""

import json
from pathlib import Path
from typing import Any

TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "7"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(root: Path, sums_per_row: int) -> Path:
    """Writes the tasks as yaml (JSON is yaml) and their seven rows; row i's text has 3 sums and
    i · sums_per_row more."""
    rows = [
        {
            "question": f"Ann has {i} eggs and buys {i * i}. How many has she?",
            "choices": [f"{i + i * i}", f" {i}{i}", "none at all", f"{i} eggs "],
            "label": i % 4,
            "answer": str(i + i * i),
            "text": " ".join(f"{i} + {j} = {i + j}." for j in range(3 + sums_per_row * i)),
        }
        for i in range(7)
    ]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(data)}}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": files}
        text = json.dumps(common | {"test_split": "test", **task})
        (root / f"{name}.yaml").write_text(text)
    return root


def list_samples(results: dict[str, Any], task: str) -> list[Any]:
    """Returns the responses of a task, in the order of its rows."""
    return [s["resps"] for s in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def list_numbers(x: Any) -> list[float]:
    """Returns all numbers, and truth values, in nested lists."""
    if isinstance(x, list | tuple):
        return [number for inner in x for number in list_numbers(inner)]
    return [] if isinstance(x, str) else [float(x)]
