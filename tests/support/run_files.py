"""Writes the files of runs and evaluations without training, for what reads them."""

import json
import math
import random
from pathlib import Path
from typing import Any

from configs import base
from distill.evaluation import statistics
from tests.support.verbs import write

WORDS = ["the", " answer", " is", "\n", " 4", "2", " because", "\u00e9", "", " x"]


def make_transcript(seed: int, length: int, top: int = 0, **fields: Any) -> dict[str, Any]:
    """Makes a transcript of random tokens, in the form of rollouts/*.jsonl."""
    draw = random.Random(seed)
    tokens = [draw.randrange(len(WORDS)) for _ in range(length)]
    texts = [WORDS[x] for x in tokens]
    kl = [round(draw.expovariate(1.0) ** 3 / 4, 6) for _ in tokens]
    row: dict[str, Any] = {
        "prompt": f"question {seed}",
        "response": "".join(texts),
        "prompt_tokens": [1, 2],
        "tokens": tokens,
        "token_texts": texts,
        "reverse_kl": kl,
        "logp": [-x for x in kl],
        "teacher_logp": [-2 * x for x in kl],
        "entropy": [x / 2 for x in kl],
        "teacher_entropy": [x / 3 for x in kl],
        "finish_reason": "length" if seed % 3 == 0 else "stop",
        "thinking": seed % 2 == 0,
        "reward": float(seed % 2),
    }
    if top:
        for side in ("student", "teacher"):
            row[f"{side}_top"] = [
                [
                    [x, round(math.log(first * 0.3**place), 5)]
                    for place, x in enumerate(draw.sample(range(len(WORDS)), top))
                ]
                for first in (draw.uniform(0.4, 0.7) for _ in tokens)
            ]
        row["top_texts"] = {str(x): text for x, text in enumerate(WORDS)}
    return row | fields


def write_run(path: Path, seed: int = 0, steps: int = 6, **changes: Any) -> Path:
    """Writes a run of two stages, with transcripts of its first and its last step.

    Args:
      changes: values of config keys, with __ for dots.
    """
    (path / "rollouts").mkdir(parents=True)
    c = base.get_config()
    c.seed, c.stages = seed, ("sft", "opd")
    c.sft.steps, c.opd.steps = 2, 4
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    (path / "config.json").write_text(c.to_json_best_effort())
    environment = {
        "devices": {"count": 4, "kind": "TPU v5e"},
        "git": {"revision": "abcdef123456"},
        "models": {"student": {"flops_per_token": 1e6}, "teacher": {"flops_per_token": 1e7}},
    }
    (path / "environment.json").write_text(json.dumps(environment))
    rows = [
        {
            "step": step,
            "stage": "sft" if step < 2 else "opd",
            "train/loss": 1 / (1 + step) + seed / 10,
            "train/reverse_kl": None if step < 2 else 0.5 / step,
            "train/trained_tokens": 100.0,
            "rollout/mean_length": 0.0 if step < 2 else 25.0,
            "rollout/rows/think": 4,
            "time/step": 900.0,
            "time/compile": 0.0,
        }
        for step in range(steps)
    ]
    write(path / "metrics.jsonl", rows)
    for step in (0, 5):
        transcripts = [make_transcript(i, 12, top=3) for i in range(4)]
        write(path / "rollouts" / f"{step:06d}.jsonl", transcripts)
    return path


def write_evaluation(path: Path, hits: list[bool], benchmark: str = "gsm8k") -> Path:
    """Writes the files that evaluate leaves for answers that were right or wrong."""
    path.mkdir(parents=True)
    rows = [
        {
            "id": f"p{i}",
            "sample": 0,
            "answer": str(i),
            "response": f"It is {i if hit else -1}.",
            "correct": hit,
            "outcome": "correct" if hit else "wrong",
            "length": 5,
            "finish_reason": "stop",
        }
        for i, hit in enumerate(hits)
    ]
    write(path / "examples.jsonl", rows)
    summary: dict[str, Any] = dict(statistics.summarise_rows(rows, [1]))
    summary["protocol"] = {"benchmark": benchmark, "protocol": "greedy"}
    (path / "summary.json").write_text(json.dumps(summary))
    return path
