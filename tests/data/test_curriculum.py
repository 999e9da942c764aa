"""Modes are drawn by a share and prompts by difficulty, as functions of (seed, step)."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from configs import base
from distill.data import chat, curriculum, dataset
from models.errors import UserError
from tests.support.paths import ROOT

EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    tokenizer = chat.load_tokenizer(ROOT / "assets/student")
    assert tokenizer is not None
    return tokenizer


def config(source: object = "arithmetic", **changes: object) -> ConfigDict:
    c = base.make_data()
    c.source = str(source)
    for name, value in changes.items():
        c[name] = value
    return c


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Modes


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_the_modes_have_their_shares(share):
    drawn = [curriculum.is_thinking(share, i, 3) for i in range(32 * 50)]
    assert sum(drawn) == round(share * len(drawn))
    for block in range(50):
        assert abs(sum(drawn[32 * block : 32 * block + 32]) - 32 * share) < 1
    assert drawn == [curriculum.is_thinking(share, i, 3) for i in range(32 * 50)]
    if 0 < share < 1:
        assert drawn != [curriculum.is_thinking(share, i, 4) for i in range(32 * 50)]
        assert drawn[:32] != drawn[32:64] or drawn[32:64] != drawn[64:96]


@pytest.mark.parametrize("traces", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_prompts_and_traces_mix_the_modes(tiny, traces, share):
    source = dataset.load_source(config(thinking=share, max_rows=40), tiny, 0, traces)
    examples = dataset.get_step_examples(source, 0, 32, 0)
    assert sum(e.thinking for e in examples) == 32 * share
    for e in examples:
        assert str(tiny.decode(e.prompt)).endswith(EMPTY) != e.thinking
        assert ("<think>" in str(tiny.decode(e.response))) == (traces and e.thinking)
    # Two processes that read half of the places each read the same examples.
    halves = [
        dataset.get_step_examples(source, 0, 32, 0, range(16 * p, 16 * p + 16)) for p in (0, 1)
    ]
    assert halves[0] + halves[1] == examples
    # A prompt comes in the other mode too, in another epoch.
    if share == 0.5:
        modes = {
            (e.where, e.thinking)
            for step in range(20)
            for e in dataset.get_step_examples(source, step, 32, 0)
        }
        assert len(modes) == 80


THOUGHT = "<think>\n1+1\n</think>\n\n2"
ASK = {"question": "1+1?"}
# rows, and what they are at a ratio between 0 and 1: in thinking mode, and what is learned
OWN = [
    ({**ASK, "response": THOUGHT}, True, THOUGHT),
    ({**ASK, "response": "2"}, False, "2"),
    ({**ASK, "response": EMPTY + "2"}, False, "2"),
    ({**ASK, "solution": "<think></think>2"}, False, "2"),
    ({**ASK, "response": THOUGHT, "thinking": True}, True, THOUGHT),
    ({**ASK, "response": "2", "thinking": True}, True, "2"),
    ({"question": "1+1? /no_think", "response": "2"}, False, "2"),
    ({"question": "1+1? /no_think or /think", "response": "2"}, True, "2"),
    ({"question": "see /thinking", "response": THOUGHT}, True, THOUGHT),
    (
        {
            "messages": [
                {"role": "system", "content": "/no_think"},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": EMPTY + "2"},
            ]
        },
        False,
        "2",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2", "reasoning_content": "1+1"},
            ]
        },
        True,
        THOUGHT,
    ),
    ({"prompt": "1+1=", "response": "2"}, False, "2"),
]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_traces_keep_their_own_mode(tiny, tmp_path, share):
    refused = [OWN[i] for i in (0, 8, 10)] if share == 0 else []  # they think, but are not to
    kept = [case for case in OWN if case not in refused]
    for row, _, _ in refused:
        path = write(tmp_path / "rows.jsonl", row)
        with pytest.raises(UserError, match=r"its response has a think block, but it is not to"):
            dataset.load_source(config(path, thinking=share), tiny, 0, True)
    path = write(tmp_path / "rows.jsonl", *(row for row, _, _ in kept))
    source = dataset.load_source(config(path, thinking=share), tiny, 0, True)
    for i, (row, thinking, learned) in enumerate(kept):
        example = source.read_example(i)
        assert example.non_thinking_example is None
        asked, told = (str(tiny.decode(x)) for x in (example.prompt, example.response))
        assert told == learned + "<|im_end|>", row  # an empty block is never learned
        assert asked.count(EMPTY) <= 1
        says = "thinking" in row or "/no_think" in str(row) or "<think></think>" in str(row)
        if says or EMPTY in str(row.get("response")) or share == 0.5:
            assert example.thinking == thinking, (row, share)
        if "prompt" not in row:
            assert asked.endswith(EMPTY) != example.thinking, (row, share)


def test_prompts_keep_their_own_mode(tiny, tmp_path):
    rows = [
        ({**ASK, "thinking": False}, False),
        ({**ASK, "thinking": True}, True),
        ({"question": "1+1? /no_think"}, False),
        ({"messages": [{"role": "user", "content": "/think 1+1?"}]}, True),
        ({"prompt": "1+1?" + EMPTY}, False),
        ({"prompt": "1+1?"}, True),
    ]
    path = write(tmp_path / "rows.jsonl", *(row for row, _ in rows))
    for share in (0.0, 0.5, 1.0):
        source = dataset.load_source(config(path, thinking=share), tiny, 0, False)
        for i, (row, thinking) in enumerate(rows):
            example = source.read_example(i)
            assert example.non_thinking_example is None
            if not (share == 0 and row == {"prompt": "1+1?"}):
                assert example.thinking == thinking, (row, share)


def test_a_row_that_contradicts_itself_is_refused(tiny, tmp_path):
    for row in ({"thinking": False, "response": THOUGHT}, {"thinking": True, "response": EMPTY}):
        path = write(tmp_path / "rows.jsonl", {**ASK, **row})
        with pytest.raises(UserError, match=r"rows\.jsonl:1: thinking=.* think block"):
            dataset.load_source(config(path), tiny, 0, True)


def test_a_template_without_modes_has_nothing_to_mix(tiny, tmp_path):
    plain = chat.load_tokenizer(ROOT / "assets/student")
    assert plain is not None
    plain.chat_template = "{{ messages[-1].content }}:"
    for share in (0.0, 1.0):
        source = dataset.load_source(config(thinking=share), plain, 0, False)
        assert not source.read_example(0).thinking  # nothing in its prompts asks for thoughts
    with pytest.raises(UserError, match=r"config\.data\.thinking=0\.5: the chat template of"):
        dataset.load_source(config(thinking=0.5), plain, 0, False)
    with pytest.raises(
        UserError, match=r"config\.data\.thinking=1\.5: must be at least 0 and at m"
    ):
        dataset.load_source(config(thinking=1.5), tiny, 0, False)
    # Token ids need neither template nor tokenizer, and count as thinking.
    path = write(tmp_path / "rows.jsonl", {"tokens": [5, 6]})
    assert dataset.load_source(config(path, thinking=0.5), None, 0, False).read_example(0).thinking


# Difficulty


def rows_of(count: int) -> list[dict]:
    return [{"question": f"{i}+1?", "answer": str(i + 1), "level": i} for i in range(count)]


def source_of(tiny, path: Path, steps: int = 10, **changes):
    c = config(path, **changes)
    source = dataset.load_source(c, tiny, 0, False)
    return curriculum.make_stage_order(c, source.size, source.read_example, steps, 0), source


@pytest.mark.parametrize("kind", ["ordered", "widening"])
def test_easy_prompts_come_first(tiny, tmp_path, kind):
    rows = rows_of(40)
    np.random.default_rng(0).shuffle(rows)
    path = write(tmp_path / "rows.jsonl", *rows)
    order, source = source_of(tiny, path, difficulty="level", curriculum=kind)
    assert order is not None
    levels = np.array([source.read_example(i).difficulty for i in range(40)], float)
    steps = [levels[order(s, s, 4)] for s in range(10)]
    for step in steps:
        assert len(set(step)) == 4
    means = [step.mean() for step in steps]
    if kind == "ordered":
        assert sorted(np.concatenate(steps)) == list(range(40))
        assert means == sorted(means)
    else:
        assert steps[0].max() < 40 * np.sqrt(1 / 10) + 1
        assert np.mean(means[5:]) > np.mean(means[:5]) and np.max(steps) > 30
    assert order(3, 3, 4) == order(3, 3, 4) != order(4, 3, 4)
    assert set(order(0, 0, 50)) == set(range(40))  # more than there are: some twice


def test_weights_are_p_times_1_minus_p(tiny, tmp_path):
    rates = [0.0, 0.1, 0.5, 0.9, 1.0]
    rows = [{"question": f"{i}?", "failed": p} for i, p in enumerate(rates)]
    order, _ = source_of(
        tiny, write(tmp_path / "r.jsonl", *rows), difficulty="failed", curriculum="weighted"
    )
    assert order is not None
    drawn = np.bincount([order(s, s, 1)[0] for s in range(4000)], minlength=5) / 4000
    weights = np.array([p * (1 - p) for p in rates])
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.03)
    assert sorted(order(0, 0, 3)) == [1, 2, 3]


def test_pass_rates_of_verify_and_evaluate_become_difficulties(tiny, tmp_path):
    """`verify --keep=all` and `evaluate` write them in different rows."""
    path = write(tmp_path / "rows.jsonl", *rows_of(3))
    prompts = [
        dataset.load_source(config(path), tiny, 0, False).read_example(i).prompt for i in range(3)
    ]
    graded = [[True, True], [True, False], [False, False]]
    verified = [
        {**row, "prompt_tokens": [0], "samples": [{"correct": x} for x in right]}
        for row, right in zip(reversed(rows_of(3)), reversed(graded), strict=True)
    ]
    evaluated = [
        {"id": "x", "prompt_tokens": prompt, "correct": x}
        for prompt, right in zip(prompts, graded, strict=True)
        for x in right
    ]
    for name, rows in (("verified", verified), ("evaluated", evaluated)):
        rates = write(tmp_path / f"{name}.jsonl", *rows)
        for share in (1.0, 0.5):
            c = config(path, difficulty=str(rates), thinking=share)
            source = dataset.load_source(c, tiny, 0, False)
            assert [source.read_example(i).difficulty for i in range(3)] == [0, 0.5, 1]
    other = write(tmp_path / "other.jsonl", *rows_of(5))
    with pytest.raises(UserError, match=r"other\.jsonl:4: no pass rate of this prompt in"):
        dataset.load_source(
            config(other, difficulty=str(tmp_path / "verified.jsonl")), tiny, 0, False
        )
    c = config(other, difficulty=str(tmp_path / "verified.jsonl"), on_bad_row="skip")
    assert dataset.load_source(c, tiny, 0, False).size == 3


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (rows_of(2), {"difficulty": "hard"}, r"rows.jsonl:1: config.data.difficulty=hard: its col"),
        ([{**ASK, "level": "?"}], {"difficulty": "level"}, "'\\?' is not a number"),
        ([{**ASK, "level": True}], {"difficulty": "level"}, "True is not a number"),
        (
            rows_of(2),
            {"curriculum": "ordered"},
            "needs config.data.difficulty, which says what is easy",
        ),
        (rows_of(2), {"curriculum": "random"}, "config.data.curriculum='random': must be one of"),
        (rows_of(3), {"difficulty": "level", "curriculum": "weighted"}, "3: difficulty 2: .* rate"),
        (rows_of(2), {"difficulty": "level", "curriculum": "weighted"}, "every difficulty is 0 or"),
        (rows_of(2), {"difficulty": "/no/file.jsonl"}, "/no/file.jsonl: no such file"),
    ],
)
def test_a_bad_curriculum_is_named(tiny, tmp_path, rows, changes, words):
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError, match=words):
        source_of(tiny, path, **changes)


def test_pass_rates_need_failures_and_grades(tmp_path):
    path = write(tmp_path / "rates.jsonl", {**ASK, "samples": [{"correct": True}]})
    with pytest.raises(UserError, match="every sample is correct; verify --keep=all"):
        curriculum.load_pass_rates(str(path))
    write(path, {**ASK, "samples": [{"text": "2"}]})
    with pytest.raises(UserError, match=r"rates\.jsonl:1: samples that were not graded"):
        curriculum.load_pass_rates(str(path))


def test_difficulty_is_read_from_words_and_of_the_generated_task(tiny, tmp_path):
    path = write(tmp_path / "rows.jsonl", {**ASK, "level": "Level 5"})
    assert (
        dataset.load_source(config(path, difficulty="level"), tiny, 0, False)
        .read_example(0)
        .difficulty
        == 5
    )
    with pytest.raises(UserError, match=r"takes a source with an end \(config\.data\.max_rows\)"):
        source_of(tiny, Path("arithmetic"), difficulty="operations", curriculum="ordered")
    order, source = source_of(
        tiny, Path("arithmetic"), difficulty="operations", curriculum="ordered", max_rows=20
    )
    assert order is not None
    assert source.read_example(order(0, 0, 1)[0]).difficulty == 3
    assert source.read_example(order(9, 9, 1)[0]).difficulty == 5
