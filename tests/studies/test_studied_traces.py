"""Sampled responses under other prompts."""

import pytest

from models.errors import UserError
from studies import traces


def make_sample(name: str, *ended: str) -> tuple[str, dict]:
    samples = [{"text": f"{name} {x}", "finish_reason": x} for x in ended]
    return f"s.jsonl:{name}", {"id": name, "messages": [], "prompt_tokens": [1], "samples": samples}


def test_finished_samples_become_responses_to_the_rows_of_their_ids() -> None:
    rows = [(f"r.jsonl:{x}", {"id": x, "question": f"{x}?", "answer": "7"}) for x in "abc"]
    samples = [make_sample("b", "stop", "length", "stop"), make_sample("a", "stop")]
    samples[1][1]["samples"].append({"text": "\n", "finish_reason": "stop"})  # says nothing
    assert traces.pair_rows(samples, rows) == [
        {"id": "b", "question": "b?", "answer": "7", "response": "b stop"},
        {"id": "b", "question": "b?", "answer": "7", "response": "b stop"},
        {"id": "a", "question": "a?", "answer": "7", "response": "a stop"},
    ]


def test_a_think_block_is_left_out_where_a_row_asks_for_none() -> None:
    sample = make_sample("a", "stop")
    sample[1]["samples"][0]["text"] = "4</think> 5"
    rows: list[tuple[str, dict]] = [("r.jsonl:1", {"id": "a", "question": "a?"})]
    assert len(traces.pair_rows([sample], rows)) == 1
    rows[0][1]["thinking"] = False
    assert not traces.pair_rows([sample], rows)


def test_a_sample_of_no_row_is_refused() -> None:
    with pytest.raises(UserError, match=r"s.jsonl:b: id 'b' is that of no row of --rows"):
        traces.pair_rows([make_sample("b", "stop")], [("r.jsonl:1", {"id": "a"})])
