"""The three kinds of chat template, by who writes the think tags, in one table."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from configs import base
from distill.data import canonical, chat, dataset
from distill.data.examples import Encoding, Example, encode_prompt, make_example
from distill.data.template import describe_template
from distill.evaluation import tasks
from distill.rewards import graders, terms
from models.errors import UserError
from tests.support.paths import DATA, ROOT
from tests.support.templates import INSTRUCT, OPENING_HYBRID, THINKING_ONLY
from tests.support.verbs import write

HEADER, EMPTY = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
OPENED = HEADER + "<think>\n"
USER = {"role": "user", "content": "2+2?"}
PUBLISHED = ("qwen3", "qwen3_2025-04")  # hybrid, where the shared data are at hand
HYBRIDS = ("hybrid", *PUBLISHED)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """The tiny tokenizer with each template; the published ones if they are at hand."""
    templates = {"hybrid": None, "thinking": THINKING_ONLY, "instruct": INSTRUCT}
    templates |= {"opening": OPENING_HYBRID}
    for name in PUBLISHED:
        path = DATA / "qwen3_chat_templates" / f"{name}.jinja"
        templates |= {name: path.read_text("utf-8")} if path.is_file() else {}
    loaded = {}
    for name, template in templates.items():
        tokenizer = loaded[name] = chat.load_tokenizer(ROOT / "assets" / "student")
        assert tokenizer is not None
        tokenizer.chat_template = template or tokenizer.chat_template
    return loaded


def list_names(tokenizers: dict, kind: str) -> list[str]:
    return [name for name in HYBRIDS if name in tokenizers] if kind == "hybrid" else [kind]


def encode(tokenizer, row: dict, **settings) -> Example:
    settings = {"thinking_share": 1.0, **settings}
    with_responses = settings.get("with_responses", True)
    row = canonical.canonicalize_row(row, "", "f.jsonl:1", with_responses)
    return make_example(row, "f.jsonl:1", Encoding(tokenizer, **settings))


# Traces: each in the form in which people store it.
THOUGHT = "<think>\nhm\n</think>\n\n4"
ASK = {"question": "2+2?"}
TRACES = {
    "block": {**ASK, "response": THOUGHT},
    "block without its opening tag": {**ASK, "response": "hm\n</think>\n\n4"},
    "block in a message": {"messages": [USER, {"role": "assistant", "content": THOUGHT}]},
    "block in a field of a message": {
        "messages": [USER, {"role": "assistant", "content": "4", "reasoning": "hm"}]
    },
    "block in a column": {**ASK, "response": "4", "thinking": "hm"},
    "block and stop token": {**ASK, "response": THOUGHT + "<|im_end|>\n"},
    "empty block": {**ASK, "response": EMPTY + "4"},
    "empty block in a message": {"messages": [USER, {"role": "assistant", "content": EMPTY + "4"}]},
    "no block": {**ASK, "solution": "4"},
    "no block, stop token": {**ASK, "response": "4<|im_end|><|endoftext|>"},
}
# kind of template, data.thinking, kind of trace ->
# end of the prompt, what is trained, mode; or why the row is refused
TABLE = [
    ("hybrid", 1, "block", (HEADER, THOUGHT, True)),
    ("hybrid", 1, "empty", (HEADER + EMPTY, "4", False)),
    ("hybrid", 1, "no block", (HEADER, "4", True)),
    ("hybrid", 0, "block", "but it is not to think"),
    ("hybrid", 0, "empty", (HEADER + EMPTY, "4", False)),
    ("hybrid", 0, "no block", (HEADER + EMPTY, "4", False)),
    ("hybrid", 0.5, "block", (HEADER, THOUGHT, True)),
    ("hybrid", 0.5, "no block", (HEADER + EMPTY, "4", False)),
    ("thinking", 1, "block", (OPENED, "hm\n</think>\n\n4", True)),
    ("thinking", 1, "empty", (HEADER + EMPTY, "4", False)),
    ("thinking", 1, "no block", "opens a think block, but the response does not close one"),
    ("opening", 1, "block", (OPENED, "hm\n</think>\n\n4", True)),
    ("opening", 1, "empty", (HEADER + EMPTY, "4", False)),
    ("opening", 1, "no block", "opens a think block, but the response does not close one"),
    ("opening", 0, "block", "but it is not to think"),
    ("opening", 0.5, "no block", (HEADER + EMPTY, "4", False)),
    ("instruct", 1, "block", (HEADER, THOUGHT, True)),
    ("instruct", 1, "empty", (HEADER, "4", False)),
    ("instruct", 1, "no block", (HEADER, "4", False)),
    ("instruct", 0, "block", "but it is not to think"),
    ("instruct", 0, "empty", (HEADER, "4", False)),
    ("instruct", 0, "no block", (HEADER, "4", False)),
]


@pytest.mark.parametrize(("kind", "share", "trace", "expected"), TABLE)
def test_traces_under_each_kind_of_template(
    tokenizers: dict, kind: str, share: float, trace: str, expected: tuple | str
) -> None:
    for name in list_names(tokenizers, kind):
        tokenizer = tokenizers[name]
        for form in (form for form in TRACES if form.startswith(trace)):
            if isinstance(expected, str):
                with pytest.raises(UserError, match=rf"^f\.jsonl:1: .*{expected}"):
                    encode(tokenizer, TRACES[form], thinking_share=share)
                continue
            end, trained, thinking = expected
            example = encode(tokenizer, TRACES[form], thinking_share=share)
            prompt = "<|im_start|>user\n2+2?<|im_end|>\n" + end
            assert tokenizer.decode(example.prompt) == prompt, (name, form)
            assert tokenizer.decode(example.response) == trained + "<|im_end|>", (name, form)
            assert example.prompt == chat.encode(tokenizer, prompt)
            assert (example.thinking, example.trained_mask) == (thinking, None), (name, form)


# kind of template, data.thinking, what a row adds -> end of the prompt, mode; or why not
PROMPTS = [
    ("hybrid", 1, {}, (HEADER, True)),
    ("hybrid", 0, {}, (HEADER + EMPTY, False)),
    ("hybrid", 1, {"thinking": False}, (HEADER + EMPTY, False)),
    ("hybrid", 1, {"question": "/no_think"}, (HEADER + EMPTY, False)),
    ("thinking", 1, {}, (OPENED, True)),
    ("thinking", 1, {"thinking": False}, "opens a think block in every prompt"),
    ("thinking", 1, {"question": "/no_think"}, (OPENED, True)),  # mere words to this model
    ("opening", 1, {}, (OPENED, True)),
    ("opening", 0, {}, (HEADER + EMPTY, False)),
    ("opening", 1, {"question": "/no_think"}, (HEADER + EMPTY, False)),
    ("instruct", 1, {}, (HEADER, False)),
    ("instruct", 0, {}, (HEADER, False)),
    ("instruct", 1, {"question": "/think"}, (HEADER, False)),
    ("instruct", 1, {"thinking": True}, (HEADER, True)),  # asked for in some other way
]


@pytest.mark.parametrize(("kind", "share", "fields", "expected"), PROMPTS)
def test_prompts_under_each_kind_of_template(
    tokenizers: dict, kind: str, share: float, fields: dict, expected: tuple | str
) -> None:
    for name in list_names(tokenizers, kind):
        settings = {"thinking_share": share, "with_responses": False}
        if isinstance(expected, str):
            with pytest.raises(UserError, match=rf"^f\.jsonl:1: .*{expected}"):
                encode(tokenizers[name], {**ASK, **fields}, **settings)
            continue
        example = encode(tokenizers[name], {**ASK, **fields}, **settings)
        assert str(tokenizers[name].decode(example.prompt)).endswith("<|im_end|>\n" + expected[0])
        assert example.thinking == expected[1]


def test_a_thinking_template_has_no_prompts_without_thoughts(tokenizers: dict, tmp_path: Path):
    c = base.make_data()
    c.source, c.thinking = str(write(tmp_path / "f.jsonl", [ASK])), 0.0
    with pytest.raises(UserError, match=r"^config\.data\.thinking=0: .* opens a think block in ev"):
        dataset.load_source(c, tokenizers["thinking"], 0, with_responses=False)
    for kind in ("thinking", "instruct"):
        c.thinking = 0.5
        with pytest.raises(UserError, match=r"^config\.data\.thinking=0\.5: .* no switch"):
            dataset.load_source(c, tokenizers[kind], 0, with_responses=False)


# kind of template, thinking asked for, text that is sampled -> outcome, well formed
RESPONSES = [
    ("hybrid", True, THOUGHT, "correct", True),
    ("hybrid", True, "4", "correct", False),
    ("hybrid", True, "hm\n</think>\n\n4", "correct", False),
    ("hybrid", True, "<think>\nso it is 4", "no_answer", False),
    ("hybrid", False, "4", "correct", True),
    ("thinking", True, "hm 5\n</think>\n\n4", "correct", True),
    ("thinking", True, "hm 4\n</think>\n\n5", "wrong", True),
    ("thinking", True, "so it is 4", "no_answer", False),  # cut within the thoughts
    ("thinking", True, "<think>\nhm\n</think>\n\n4", "correct", False),
    ("opening", True, "so it is 4", "no_answer", False),
    ("opening", False, "4", "correct", True),
    ("instruct", True, "4", "correct", True),
    ("instruct", False, "4", "correct", True),
    ("instruct", True, THOUGHT, "correct", False),
]


@pytest.mark.parametrize(("kind", "thinking", "sampled", "outcome", "well_formed"), RESPONSES)
def test_responses_under_each_kind_of_template(
    tokenizers: dict, kind: str, thinking: bool, sampled: str, outcome: str, well_formed: bool
) -> None:
    rule = tasks.BENCHMARKS["math"].grading
    for name in list_names(tokenizers, kind):
        tokenizer = tokenizers[name]
        example = encode(tokenizer, ASK, thinking_share=float(thinking), with_responses=False)
        ids = chat.encode_response(tokenizer, sampled)
        text = chat.decode_response(tokenizer, example.prompt, ids)
        opened = kind == "thinking" or (kind == "opening" and thinking)
        assert text == ("<think>\n" if opened else "") + sampled
        assert rule.grade(text, "4") == outcome, (name, text)
        assert example.thinking == describe_template(tokenizer).find_mode(thinking)
        response = terms.Response(text, ids, True, outcome, example.thinking, 100, 0)
        assert terms.is_well_formed(text, example.thinking) == well_formed
        assert terms.format_reward(response) == float(well_formed and outcome != "no_answer")


TURNS = [
    {"role": "system", "content": "be brief"},
    USER,
    {"role": "assistant", "content": "4<|im_end|>", "reasoning_content": "first"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": THOUGHT.replace("4", "6")},
]


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        ("hybrid", ["4", "<think>\nhm\n</think>\n\n6"]),
        ("thinking", ["4", "hm\n</think>\n\n6"]),
        ("opening", ["4", "hm\n</think>\n\n6"]),
        ("instruct", ["4", "<think>\nhm\n</think>\n\n6"]),
    ],
)
def test_masks_of_all_turns_under_each_kind_of_template(
    tokenizers: dict, kind: str, trained: list[str]
) -> None:
    for name in list_names(tokenizers, kind):
        tokenizer = tokenizers[name]
        example = encode(tokenizer, {"messages": TURNS}, turns="all")
        mask = example.trained_mask
        assert mask is not None and len(mask) == len(example.response)
        pairs = zip(example.response, mask, strict=True)
        assert tokenizer.decode([i for i, m in pairs if m]) == "".join(
            text + "<|im_end|>" for text in trained
        )
        text = str(tokenizer.decode(example.prompt + example.response))
        assert "<|im_end|><|im_end|>" not in text and text.count("<think>") == 1
        # A turn may say that it is not to be trained.
        turns = [{**m, "weight": 0} if i == 2 else m for i, m in enumerate(TURNS)]
        example = encode(tokenizer, {"messages": turns}, turns="all")
        assert tokenizer.decode(example.response) == trained[1] + "<|im_end|>"


def test_all_turns_without_thoughts_train_no_empty_block(tokenizers: dict) -> None:
    turns = [*TURNS[:4], {"role": "assistant", "content": "6"}]
    for name, tokenizer in tokenizers.items():
        example = encode(tokenizer, {"messages": turns}, turns="all")
        pairs = zip(example.response, example.trained_mask or [], strict=True)
        assert tokenizer.decode([i for i, m in pairs if m]) == "4<|im_end|>6<|im_end|>", name


def test_dropped_thoughts_of_the_last_turn_are_refused(tokenizers: dict) -> None:
    turns = [USER, {"role": "assistant", "content": "4", "thinking": "hm"}]
    with pytest.raises(UserError, match=r"^f\.jsonl:1: messages: the chat template drops the tho"):
        encode(tokenizers["instruct"], {"messages": turns}, turns="all")
    assert encode(tokenizers["instruct"], {"messages": turns}).thinking


def test_a_last_turn_with_text_before_its_thoughts_is_refused_where_that_is_dropped(
    tokenizers: dict,
) -> None:
    turns = [USER, {"role": "assistant", "content": "Sure. <think>hm</think> 4"}]
    with pytest.raises(UserError, match="the chat template drops text of the last turn"):
        encode(tokenizers["thinking"], {"messages": turns}, turns="all")
    encode(tokenizers["instruct"], {"messages": turns}, turns="all")


def test_an_empty_turn_is_not_trained(tokenizers: dict) -> None:
    turns = [
        USER,
        {"role": "assistant", "content": " "},
        USER,
        {"role": "assistant", "content": "4"},
    ]
    with pytest.raises(UserError, match=r"^f\.jsonl:1: messages\[1\] is empty"):
        encode(tokenizers["instruct"], {"messages": turns}, turns="all")
    skipped = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
    assert encode(tokenizers["instruct"], {"messages": skipped}, turns="all").response


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("Q:<think>\n", "<think>\nhm\n</think>4", ("Q:<think>\n", "hm\n</think>4", True)),
        ("Q:<think>\n", "hm\n</think>4", ("Q:<think>\n", "hm\n</think>4", True)),
        ("Q:<think>", "<think>hm</think>4", ("Q:<think>", "hm</think>4", True)),
        ("Q:<think>\n", EMPTY + "4", ("Q:" + EMPTY, "4", False)),
        ("Q:" + EMPTY, "4", ("Q:" + EMPTY, "4", False)),
        ("Q:" + EMPTY, EMPTY + "4", ("Q:" + EMPTY, "4", False)),
        ("Q:", "hm</think>4", ("Q:", "<think>\nhm</think>4", True)),
        ("Q:", EMPTY + "4", ("Q:" + EMPTY, "4", False)),
        ("Q:" + EMPTY, THOUGHT, "has a think block, but it is not to think"),
        ("Q:<think>\n", "4", "does not close one"),
        ("Q:", "<think>\nhm", "never closed"),
    ],
)
def test_prompts_of_text_or_ids_show_their_mode_themselves(
    tokenizers: dict, prompt: str, response: str, expected: tuple | str
) -> None:
    for name, tokenizer in tokenizers.items():
        for row in ({"prompt": prompt}, {"tokens": chat.encode(tokenizer, prompt)}):
            row = {**row, "response": response}
            if isinstance(expected, str):
                with pytest.raises(UserError, match=expected):
                    encode(tokenizer, row)
                continue
            example = encode(tokenizer, row)
            texts = (tokenizer.decode(example.prompt), tokenizer.decode(example.response))
            assert (*texts, example.thinking) == (
                expected[0],
                expected[1] + "<|im_end|>",
                expected[2],
            ), name


def test_stop_tokens_end_a_response_once(tokenizers: dict) -> None:
    tokenizer = tokenizers["hybrid"]
    end = tokenizer.eos_token_id
    for text, trained in [
        ("4<|im_end|>", "4"),
        ("4<|im_end|>\n", "4"),
        ("4<|endoftext|>", "4"),
        ("4<|im_end|>\n<|endoftext|> \n", "4"),
        ("4\n<|im_end|>", "4\n"),
        ("4\n", "4\n"),
        ("a <|im_end|> b", "a <|im_end|> b"),
        ("4<|im_start|>", "4<|im_start|>"),
    ]:
        ids = [*chat.encode(tokenizer, trained), end]
        assert chat.encode_response(tokenizer, text) == ids, text
        assistant = {"role": "assistant", "content": text}
        rows = [{**ASK, "response": text}, {"messages": [USER, assistant]}]
        assert [encode(tokenizer, row).response for row in rows] == [ids, ids]
        asked = {"messages": [USER, assistant, USER]}
        once = {"messages": [USER, {**assistant, "content": trained}, USER]}
        assert encode_prompt(asked, "", tokenizer, True) == encode_prompt(once, "", tokenizer, True)
    document = encode(tokenizer, {"text": "A page.<|endoftext|>"})
    assert document.prompt + document.response == [*chat.encode(tokenizer, "A page."), end]
    stored = {"tokens": [1], "response_tokens": [2, end, end]}
    assert encode(tokenizer, stored).response == [2, end, end]
    with pytest.raises(UserError, match="the response is empty"):
        encode(tokenizer, {**ASK, "response": "<|im_end|>"})


def test_a_response_that_speaks_for_itself_is_graded_alike_when_stored(tokenizers: dict) -> None:
    tokenizer = tokenizers["thinking"]
    prompt = encode(tokenizer, ASK, with_responses=False).prompt
    text = chat.decode_response(tokenizer, prompt, chat.encode(tokenizer, "so it is 4"))
    assert text == "<think>\nso it is 4" and graders.strip_thinking(text) is None
    assert chat.decode_response(tokenizer, [], []) == ""


def test_a_template_is_described_by_what_it_renders(tokenizers: dict) -> None:
    about = {name: describe_template(tokenizer) for name, tokenizer in tokenizers.items()}
    for name, template in about.items():
        assert template.header == HEADER and template.end_token == "<|im_end|>", name
        assert template.renders_tools and template.renders_calls and template.renders_results
        assert template.opened == ("<think>\n" if name in ("thinking", "opening") else "")
        assert template.has_switch == (name in (*HYBRIDS, "opening"))
        assert template.has_modes == (name != "instruct")
    assert describe_template(None).has_switch
    assert about["thinking"].always_thinks and not about["opening"].always_thinks
