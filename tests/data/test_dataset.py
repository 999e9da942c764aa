"""A step reads the right rows, which become the right tokens; bad rows are refused."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from configs import base
from distill.data import arithmetic, chat, collate, dataset, sources
from distill.data.dataset import Example, Source
from distill.data.examples import encode_prompt
from models.errors import UserError
from tests.support.paths import ROOT

QUESTION = [{"role": "user", "content": "What is 3 * 4?"}]
EMPTY_THINK = "<think>\n\n</think>\n\n"


def load(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer = chat.load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return load(ROOT / "assets" / "teacher")


@pytest.fixture(scope="module")
def qwen3(shared_data: Path) -> PreTrainedTokenizerBase:
    return load(shared_data / "qwen3_tokenizer")


@pytest.fixture(scope="module", params=["tiny", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def config(source: Path | str, **fields: Any) -> ConfigDict:
    c = base.make_stage("sft").data
    c.source = str(source)
    c.update(fields)
    return c


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(size: int) -> Source:
    """A source whose examples are their own numbers."""
    return Source(size, lambda i: Example([i], [], "", f"row {i}"))


def numbers(source: Source, step: int, count: int, seed: int = 0) -> list[int]:
    return [example.prompt[0] for example in dataset.get_step_examples(source, step, count, seed)]


# Order


@pytest.mark.parametrize(("size", "count"), [(7, 3), (7, 7), (6, 4), (3, 8), (1, 2)])
def test_each_example_comes_once_an_epoch(size: int, count: int) -> None:
    source, epochs = numbered(size), 5
    read = [n for step in range(-(-epochs * size // count)) for n in numbers(source, step, count)]
    for epoch in range(epochs):
        assert sorted(read[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_each_epoch_has_its_own_order() -> None:
    orders = [tuple(numbers(numbered(50), epoch, 50, seed)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(range(50)) not in orders


def test_a_step_reads_the_same_whatever_was_read_before() -> None:
    forward = numbered(11)
    read = [numbers(forward, step, 4, seed=3) for step in range(20)]
    backward = numbered(11)
    assert [numbers(backward, step, 4, seed=3) for step in reversed(range(20))] == read[::-1]
    assert numbers(numbered(11), 17, 4, seed=3) == read[17]


def test_an_endless_source_is_read_in_order() -> None:
    read = [n for step in range(5) for n in numbers(numbered(0), step, 6, seed=step)]
    assert read == list(range(30))


def test_the_generated_task_is_endless_or_cut_to_size(tiny: PreTrainedTokenizerBase) -> None:
    endless = dataset.load_source(config("arithmetic"), tiny, 5, with_responses=True)
    assert endless.size == 0
    for i, example in enumerate(dataset.get_step_examples(endless, 40, 3, 5), start=120):
        problem = arithmetic.make_problem(5, i, "train", (3, 5))
        assert f"user\n{problem.question}<|im_end|>" in tiny.decode(example.prompt)
        assert tiny.decode(example.response) == f"{arithmetic.to_response(problem)}<|im_end|>"
        assert example.answer == problem.answer
    cut = dataset.load_source(config("arithmetic", max_rows=4), tiny, 5, with_responses=True)
    epoch = [e.where for e in dataset.get_step_examples(cut, 9, 4, 5)]
    assert sorted(epoch) == [f"arithmetic problem {i}" for i in range(4)]


def test_max_rows_takes_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"tokens": [i + 1]} for i in range(9)))
    for size, expected in ((0, 9), (4, 4), (50, 9)):
        source = dataset.load_source(config(path, max_rows=size), None, 0, with_responses=False)
        assert source.size == expected
        read = sorted(e.prompt[0] for e in dataset.get_step_examples(source, 0, expected, 0))
        assert read == list(range(1, expected + 1))


# Layout


def test_responses_are_trained_and_cut_to_length() -> None:
    """Trains responses with their stop token 9, not prompts; nothing follows the stop token. The
    last response is cut, and so has none."""
    examples = [
        Example([1, 2], [3, 9], "", ""),
        Example([1], [9], "", ""),
        Example([1, 2, 3], [4, 5, 6, 7, 9], "", ""),
    ]
    batch = collate.collate_padded(examples, max_prompt=3, max_response=4)
    T, F = True, False
    tokens, mask = np.asarray(batch.tokens_BT), np.asarray(batch.mask_BT)
    assert tokens.tolist() == [
        [1, 2, 3, 9, 0, 0, 0],
        [1, 9, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7],
    ]
    assert mask.tolist() == [
        [F, F, T, T, F, F, F],
        [F, T, F, F, F, F, F],
        [F, F, F, T, T, T, T],
    ]
    assert np.asarray(batch.segments_BT).tolist() == (tokens > 0).astype(int).tolist()
    assert np.asarray(batch.positions_BT).tolist() == [list(range(7))] * 3
    assert 9 not in tokens[2] and batch.finished_BT is None


# Rows


def test_every_form_of_a_prompt_has_the_same_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    def prompt(row: dict) -> list[int]:
        return encode_prompt(row, "row", tokenizer, True)

    asked = chat.render_messages(tokenizer, QUESTION, thinking=True)
    text = "<|im_start|>user\nWhat is 3 * 4?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked) == text
    assert prompt({"messages": QUESTION}) == asked
    assert prompt({"question": QUESTION[0]["content"], "answer": "12"}) == asked
    assert prompt({"prompt": text}) == asked
    assert prompt({"tokens": asked}) == asked
    assert prompt({"prompt": "3 * 4 ="}) == tokenizer.encode("3 * 4 =")
    assert encode_prompt({"tokens": [4, 2]}, "row", None, True) == [4, 2]


def test_every_form_of_a_trace_has_the_same_ids(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    asked = chat.render_messages(tokenizer, QUESTION, thinking=True)
    stop = tokenizer.eos_token_id
    answered = [*tokenizer.encode("It is 12."), stop]
    assistant = {"role": "assistant", "content": "It is 12."}
    rows = [
        {"question": QUESTION[0]["content"], "response": "It is 12.", "answer": 12},
        {"question": QUESTION[0]["content"], "solution": "It is 12."},
        {"question": QUESTION[0]["content"], "solution": "It is 13.", "response": "It is 12."},
        {"messages": QUESTION, "response": "It is 12."},
        {"messages": [*QUESTION, assistant]},
        {"messages": [*QUESTION, assistant], "solution": "It is 13."},
        {"prompt": tokenizer.decode(asked), "response": "It is 12."},
        {"tokens": asked, "response": "It is 12."},
        {"tokens": asked, "response_tokens": answered},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    source = dataset.load_source(config(path), tokenizer, 0, with_responses=True)
    assert source.size == len(rows)
    for i in range(source.size):
        example = source.read_example(i)
        assert (example.prompt, example.response) == (asked, answered), rows[i]
        assert example.where == f"{path}:{i + 1}"
    assert [source.read_example(i).answer for i in (0, 1)] == ["12", ""]


def test_only_the_last_answer_of_a_conversation_is_learned(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "12"}, {"role": "user", "content": "+ 1"}]
    path = write(
        tmp_path / "rows.jsonl", {"messages": [*turns, {"role": "assistant", "content": "13"}]}
    )
    example = dataset.load_source(config(path), tiny, 0, with_responses=True).read_example(0)
    assert tiny.decode(example.response) == "13<|im_end|>"
    assert "12<|im_end|>" in tiny.decode(example.prompt)


def test_the_empty_think_block_is_prompt_and_not_trained(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    thought = "<think>\n3*4\n</think>\n\n12"
    rows = [
        {"question": QUESTION[0]["content"], "response": "12"},
        {"messages": [*QUESTION, {"role": "assistant", "content": "12"}]},
        {"messages": QUESTION, "response": thought},
    ]
    for thinking in (True, False):
        path = write(tmp_path / "rows.jsonl", *rows[: 3 if thinking else 2])
        source = dataset.load_source(
            config(path, thinking=thinking), tokenizer, 0, with_responses=True
        )
        examples = [source.read_example(i) for i in range(source.size)]
        for example in examples:
            assert example.prompt == examples[0].prompt
            assert str(tokenizer.decode(example.prompt)).endswith(EMPTY_THINK) != thinking
        batch = collate.collate_padded(examples, 64, 64)
        for i, response in enumerate(("12", "12", thought)[: source.size]):
            trained = np.asarray(batch.tokens_BT)[i][np.asarray(batch.mask_BT)[i]]
            assert tokenizer.decode(trained) == response + "<|im_end|>"
    path = write(tmp_path / "rows.jsonl", rows[2])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: its response has a think block, but"):
        dataset.load_source(config(path, thinking=False), tokenizer, 0, with_responses=True)


def check_solutions(path: Path, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> int:
    """Asserts that a file's questions are the prompts and its solutions what is trained."""
    source = dataset.load_source(config(path, thinking=thinking), tokenizer, 0, with_responses=True)
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    assert source.size == len(rows)
    examples = [source.read_example(i) for i in range(source.size)]
    longest = (max(len(e.prompt) for e in examples), max(len(e.response) for e in examples))
    batch = collate.collate_padded(examples, *longest)
    tokens, mask, segments = map(np.asarray, (batch.tokens_BT, batch.mask_BT, batch.segments_BT))
    end = "" if thinking else EMPTY_THINK
    for i, row in enumerate(rows):
        assert tokenizer.decode(tokens[i][mask[i]]) == row["solution"] + "<|im_end|>"
        asked = tokenizer.decode(tokens[i][(segments[i] == 1) & ~mask[i]])
        turn = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert asked == turn + end
        assert examples[i].answer == row["answer"]
    return len(rows)


@pytest.mark.parametrize(
    ("thinking", "every"), [(True, 1), (False, 10), pytest.param(False, 1, marks=pytest.mark.long)]
)
def test_gsm8k_decodes_to_its_own_text(
    shared_data: Path,
    qwen3: PreTrainedTokenizerBase,
    tmp_path: Path,
    thinking: bool,
    every: int,
) -> None:
    """Reads all rows, and some of them again with the empty think block."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text("utf-8").split("\n")
    lines = [line for line in lines if line]
    assert len(lines) == 7473
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines[::every]), "utf-8")
    assert check_solutions(path, qwen3, thinking) == len(lines[::every])


def test_solutions_decode_to_their_own_text(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {
            "question": "Janet’s 3 ducks\tlay £4?",
            "solution": "a = <<3*4=12>>12\n",
            "answer": "1",
        },
        {"question": " 数学 🦆\n\n", "solution": " #### 72 ", "answer": "72"},
        {"question": "x", "solution": "<think>\ny\n</think>\n\n5", "answer": "5"},
    ]
    path = tmp_path / "rows.jsonl"
    for count, thinking in ((3, True), (2, False)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:count])
        path.write_text("".join(lines), "utf-8")
        assert check_solutions(path, tiny, thinking) == count


# Refusals

GOOD = '{"question": "q", "response": "r"}\n'
USER, ASSISTANT = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "r"}'
BAD_TRACES = [
    ("", "rows.jsonl: no rows"),
    ("\n  \n", "rows.jsonl: no rows"),
    (GOOD + "\n\n{", "rows.jsonl:4: not JSON"),
    (GOOD + "null\n", "rows.jsonl:2: not a JSON object"),
    (GOOD + "[1]\n", "rows.jsonl:2: not a JSON object"),
    ("[" * 100_000, "rows.jsonl:1: not JSON"),
    ('{"response": "r"}', "rows.jsonl:1: none of tokens, prompt, messages, question"),
    ('{"question": "q"}', "rows.jsonl:1: neither response nor solution"),
    ('{"question": "q", "response": ""}', "rows.jsonl:1: the response is empty"),
    ('{"question": "q", "solution": ""}', "rows.jsonl:1: the response is empty"),
    ('{"question": "q", "response": null}', "rows.jsonl:1: response is not a text"),
    ('{"question": 3, "response": "r"}', "rows.jsonl:1: question is not a text"),
    ('{"prompt": "", "response": "r"}', "rows.jsonl:1: the prompt is empty"),
    ('{"tokens": [], "response_tokens": [1]}', "rows.jsonl:1: the prompt is empty"),
    ('{"tokens": [1], "response_tokens": []}', "rows.jsonl:1: the response is empty"),
    ('{"tokens": [1], "response_tokens": [2.0]}', "rows.jsonl:1: response_tokens is not a list"),
    ('{"tokens": [-1], "response_tokens": [2]}', "rows.jsonl:1: tokens is not a list"),
    ('{"tokens": [true], "response": "r"}', "rows.jsonl:1: tokens is not a list"),
    ('{"messages": []}', "rows.jsonl:1: messages is not a list of at least one"),
    (f'{{"messages": [{USER}]}}', "rows.jsonl:1: messages: the last role must be assistant"),
    (f'{{"messages": [{ASSISTANT}]}}', "rows.jsonl:1: messages: nothing before the assistant"),
    (f'{{"messages": [{USER}, {{"role": "ai", "content": ""}}]}}', "messages[1].role 'ai'"),
    (f'{{"messages": [{USER}, 5]}}', "rows.jsonl:1: messages[1] is not an object"),
    (
        f'{{"messages": [{USER}, {{"role": "assistant", "tool_calls": [{{}}]}}]}}',
        "rows.jsonl:1: messages[1].tool_calls[0] has no name of a function",
    ),
]


@pytest.mark.parametrize(("text", "words"), BAD_TRACES)
def test_a_bad_trace_is_named(
    tiny: PreTrainedTokenizerBase, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        dataset.load_source(config(path), tiny, 0, with_responses=True)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "hi"}, "['input']; config.data.columns=question=input reads it"),
        ({"questions": "hi"}, "['questions']; did you mean 'question' by 'questions'? config."),
        ({"id": 3}, "['id']; config.data.columns=question=COLUMN reads it"),
    ],
)
def test_a_row_without_a_prompt_is_told_the_way(
    tiny: PreTrainedTokenizerBase, tmp_path: Path, row: dict, words: str
) -> None:
    with pytest.raises(UserError) as error:
        source = write(tmp_path / "rows.jsonl", row)
        dataset.load_source(config(source), tiny, 0, with_responses=False)
    assert words in str(error.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "caf\xc3\xa9"}\n{"question": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not UTF-8 .*0xe9"):
        list(sources.open_rows(str(path)))


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n\t \n\n{"a": "\xe2\x80\xa8"}')
    found = list(sources.open_rows(str(path)))
    assert found == [(f"{path}:2", {"a": 1}), (f"{path}:5", {"a": "\u2028"})]


def test_text_needs_a_tokenizer_and_ids_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"tokens": [1], "response_tokens": [2]}, {"prompt": "q"})
    for traces in (False, True):
        with pytest.raises(UserError, match=r"rows\.jsonl:2: the model has no tokenizer"):
            dataset.load_source(config(path), None, 0, traces)
        source = dataset.load_source(config(path, max_rows=1), None, 0, traces)
        assert source.read_example(0).prompt == [1]
        assert source.read_example(0).response == ([2] if traces else [])
    with pytest.raises(UserError, match="arithmetic needs a model with a tokenizer"):
        dataset.load_source(config("arithmetic"), None, 0, with_responses=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": "no/such.jsonl"}, "no/such.jsonl: no such file"),
        ({"max_rows": -1}, "config.data.max_rows=-1"),
        ({"split": "dev"}, "'dev'"),
        ({"operations": (4, 2)}, "(4, 2)"),
    ],
)
def test_a_bad_setting_is_named(tiny: PreTrainedTokenizerBase, fields: dict, words: str) -> None:
    c = config(**{"source": "arithmetic", **fields})
    with pytest.raises(UserError) as error:
        dataset.load_source(c, tiny, 0, with_responses=True)
    assert words in str(error.value)


def test_a_prompt_must_fit_and_ids_must_exist(tmp_path: Path) -> None:
    rows = [{"tokens": [1] * 4, "response_tokens": [2]}, {"tokens": [3], "response_tokens": [4, 7]}]
    c = config(write(tmp_path / "rows.jsonl", *rows))

    def check(limit: int, vocab_size: int) -> Source:
        require = functools.partial(
            dataset.require_valid_example,
            limit=limit,
            field="config.sft.max_prompt_tokens",
            vocab_size=vocab_size,
        )
        return dataset.load_source(c, None, 0, True, require)

    assert check(4, 8).size == 2
    with pytest.raises(UserError, match=r"rows\.jsonl:1: prompt of 4 tokens, config\.sft\.max_pro"):
        check(3, 8)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: token id 7 is outside the vocab"):
        check(4, 7)
