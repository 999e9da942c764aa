"""Packs transcripts for the page: per token its text, a few numbers, and the likeliest tokens.

A page may hold hundreds of long transcripts. So numbers are whole thousandths, of a nat
or of 1, and each transcript is compressed by itself: the page unpacks
the one that is looked at.
"""

import base64
import json
import math
import zlib
from typing import Any

from distill.reporting.read import Evaluation, Record, Run, is_number

# Statistics of a token that the page shows, by their names in rollouts/*.jsonl.
STATS = ("reverse_kl", "divergence", "logp", "teacher_logp", "entropy", "teacher_entropy")
STATS += ("advantage",)
MAX_TOP = 10  # likeliest tokens of a position


def pack_run(run: Run) -> Record:
    """Returns the transcripts of a run, by step, for the page."""
    steps = [
        {"step": step, "rows": [_pack_row(row) for row in rows]}
        for step, rows in run.rollouts.items()
    ]
    return {"name": run.name, "steps": steps}


def pack_evaluation(evaluation: Evaluation) -> Record:
    """Returns the examples of an evaluation in the form of a step's transcripts."""
    rows = [_pack_row(row) for row in evaluation.examples]
    return {"name": evaluation.name, "steps": [{"step": evaluation.step, "rows": rows}]}


def _pack_row(row: Record) -> Record:
    """Returns what filters read, and `data`: the transcript, compressed."""
    tokens = row.get("tokens") if _is_list_of(row.get("tokens"), int) else []
    assert isinstance(tokens, list)
    texts: Any = row.get("token_texts")
    content: Record = {"prompt": _find_prompt(row)}
    if _is_list_of(texts, str) and len(texts) == len(tokens):
        content |= {"texts": texts, "tokens": tokens, "stats": _pack_stats(row, len(tokens))}
        content |= _pack_tops(row, len(tokens))
    elif isinstance(row.get("response"), str):
        # Nothing says which token is which part of the text.
        content["texts"] = [row["response"]]
    else:
        texts = [f"⟨{token}⟩" for token in tokens]
        content |= {"texts": texts, "tokens": tokens, "stats": _pack_stats(row, len(tokens))}
    kl = [x for x in row.get("reverse_kl") or [] if is_number(x)] if "stats" in content else []
    facts = {
        "finish": row.get("finish_reason"),
        "thinking": row.get("thinking"),
        "reward": row.get("reward"),
        "correct": row.get("correct"),
        "outcome": row.get("outcome"),
        "answer": row.get("answer"),
        "id": row.get("id"),
        "length": len(tokens) or row.get("length"),
        "kl": round(sum(kl) / len(kl), 4) if kl else None,
    }
    packed = zlib.compress(to_script(content).encode(), 6)
    facts = {name: x for name, x in facts.items() if isinstance(x, str | bool) or is_number(x)}
    return {**facts, "data": base64.b64encode(packed).decode()}


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(x) is kind for x in value)


def _find_prompt(row: Record) -> str:
    for name in ("prompt", "question"):
        if isinstance(row.get(name), str):
            return row[name]
    return ""


def _pack_stats(row: Record, length: int) -> dict[str, list[int | None]]:
    """Returns the statistics of each token in thousandths."""
    stats = {}
    for name in STATS:
        values = row.get(name)
        if not isinstance(values, list) or len(values) != length or not length:
            continue
        if name == "divergence" and values == row.get("reverse_kl"):
            continue
        stats[name] = [round(1000 * x) if is_number(x) else None for x in values]
    return stats


def _pack_tops(row: Record, length: int) -> Record:
    """Returns the likeliest tokens of each position, those of less than a thousandth left out:
    their ids, their probabilities in thousandths, and the texts of ids."""
    packed, used = {}, set()
    for name in ("student_top", "teacher_top"):
        tops = row.get(name)
        if not isinstance(tops, list) or len(tops) != length:
            continue
        pairs = [_read_top(top) for top in tops]
        packed[name] = [
            [[x for x, _ in top] for top in pairs],
            [[p for _, p in top] for top in pairs],
        ]
        used |= {x for top in pairs for x, _ in top}
    texts = row.get("top_texts")
    if packed and isinstance(texts, dict):
        known = {str(x): texts.get(str(x)) for x in sorted(used)}
        packed["top_texts"] = {x: text for x, text in known.items() if isinstance(text, str)}
    return packed


def _read_top(top: Any) -> list[tuple[int, int]]:
    found = []
    for pair in (top if isinstance(top, list) else [])[:MAX_TOP]:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
            continue
        if is_number(pair[1]) and -8 < pair[1] < 1e-3:
            probability = round(1000 * math.exp(pair[1]))
            found += [(pair[0], probability)] if probability else []
    return found


def to_script(value: Any) -> str:
    """Returns `value` as JSON that cannot end the script element around it, all in ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")
