"""Rows of well-known sets and of other libraries become canonical rows, or are refused by name."""

import copy
import json
import math
from decimal import Decimal
from typing import Any

import pytest

from distill.data import answers, canonical
from models.errors import UserError

THOUGHT = "<think>\nhm\n</think>\n\n4"
Q, A, T = "2+2?", "4", {"question": "2+2?"}
USER = {"role": "user", "content": Q}
ANSWER = {"role": "assistant", "content": A}
HUMAN, GPT = {"from": "human", "value": Q}, {"from": "gpt", "value": THOUGHT}
SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": ADD}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ASKED = [("user", Q)]
SYSTEM_ASKED = [("system", "Be brief."), ("user", Q)]


def read(row: dict, use: str, columns: str = "") -> tuple[Any, Any]:
    """Returns (prompt as pairs of role and text, or a plain text; response) of a row. A second
    reading must change nothing."""
    before = copy.deepcopy(row)
    found = canonical.canonicalize_row(row, columns, "row", use == "trace")
    assert str(row) == str(before)  # NaN differs from itself
    if not columns:
        assert canonical.canonicalize_row(found, "", "row", use == "trace") == found
    response = found.get("response", found.get("solution")) if use == "trace" else None
    if "messages" in found:
        *before_last, last = found["messages"]
        if use == "trace" and "response" not in found:
            reasoning = last.get("reasoning_content")
            response = (reasoning, last["content"]) if reasoning else last["content"]
            return [(m["role"], m["content"]) for m in before_last], response
        return [(m["role"], m["content"]) for m in found["messages"]], response
    if "question" in found and "prompt" not in found:
        return [("user", found["question"])], response
    return found.get("prompt", found.get("tokens")), response


# Rows as they are published, with all their columns: name -> (row, prompt, response, answer)
PUBLISHED: dict[str, tuple[dict, Any, Any, str]] = {
    "GSM8K": (
        {**T, "answer": "2+2=<<2+2=4>>4\n#### 1,004"},
        *(ASKED, "2+2=<<2+2=4>>4\n#### 1,004", "1004"),
    ),
    "MATH": (
        {"problem": Q, "level": "Level 1", "type": "Algebra", "solution": r"so \boxed{4}"},
        *(ASKED, r"so \boxed{4}", "4"),
    ),
    "MATH with an empty answer": (
        {"problem": Q, "solution": r"so \boxed{4}", "answer": None},
        *(ASKED, r"so \boxed{4}", "4"),
    ),
    "MATH-500": (
        {
            "problem": Q,
            "solution": "s",
            "answer": "4",
            "subject": "a",
            "level": 1,
            "unique_id": "x",
        },
        *(ASKED, "s", "4"),
    ),
    "DeepMath": (
        {
            **T,
            "final_answer": "4",
            "difficulty": 1.0,
            "topic": "sums",
            "r1_solution_1": "hm\n</think>\n\n4",
            "r1_solution_2": "",
            "r1_solution_3": "",
        },
        *(ASKED, THOUGHT, "4"),
    ),
    "s1K-1.1": (
        {
            "solution": "four",
            **T,
            "cot_type": "math",
            "source_type": "s",
            "metadata": "{}",
            "gemini_thinking_trajectory": "g",
            "gemini_attempt": "g",
            "deepseek_thinking_trajectory": "hm\n",
            "deepseek_attempt": "4",
            "gemini_grade": "Yes",
            "gemini_grade_reason": "r",
            "deepseek_grade": "Yes",
            "deepseek_grade_reason": "r",
        },
        *(ASKED, THOUGHT, ""),
    ),
    "s1K": (
        {
            "solution": "four",
            **T,
            "cot_type": "math",
            "source_type": "s",
            "metadata": "{}",
            "cot": None,
            "thinking_trajectories": ["hm"],
            "attempt": "4",
        },
        *(ASKED, THOUGHT, ""),
    ),
    "OpenR1-Math": (
        {
            "problem": Q,
            "solution": "s",
            "answer": "4",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "s",
            "uuid": "u",
            "is_reasoning_complete": [False, True, True],
            "generations": ["<think>no", "<think>5", "hm\n</think>\n\n4"],
            "correctness_math_verify": [True, False, True],
            "correctness_llama": None,
            "finish_reasons": None,
            "correctness_count": 1,
            "messages": [USER, {"role": "assistant", "content": "<think>no"}],
        },
        *(ASKED, THOUGHT, "4"),
    ),
    "OpenThoughts3": (
        {"difficulty": 3, "source": "s", "domain": "math", "conversations": [HUMAN, GPT]},
        *(ASKED, THOUGHT, ""),
    ),
    "OpenThoughts-114k": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": Q},
                {"from": "assistant", "value": THOUGHT},
            ],
        },
        *(SYSTEM_ASKED, THOUGHT, ""),
    ),
    "OpenThoughts-114k, metadata": (
        {
            "problem": Q,
            "deepseek_reasoning": "hm",
            "deepseek_solution": "4",
            "ground_truth_solution": "4",
            "domain": "math",
            "source": "s",
            "test_cases": None,
            "starter_code": None,
        },
        *(ASKED, THOUGHT, ""),
    ),
    "Tulu 3": ({"id": "x", "messages": [USER, ANSWER], "source": "s"}, ASKED, "4", ""),
    "UltraChat": (
        {"prompt": Q, "prompt_id": "x", "messages": [USER, ANSWER, USER, ANSWER]},
        *([*ASKED, ("assistant", "4"), *ASKED], "4", ""),
    ),
    "UltraFeedback": (
        {
            "prompt": Q,
            "prompt_id": "x",
            "chosen": [USER, ANSWER],
            "rejected": [USER, {"role": "assistant", "content": "5"}],
            "messages": [USER, ANSWER],
            "score_chosen": 8.0,
            "score_rejected": 1.0,
        },
        *(ASKED, "4", ""),
    ),
    "NuminaMath-CoT": (
        {
            "source": "s",
            "problem": Q,
            "solution": r"so \boxed{4}",
            "messages": [USER, {"role": "assistant", "content": r"so \boxed{4}"}],
        },
        *(ASKED, r"so \boxed{4}", "4"),
    ),
    "OpenMathReasoning": (
        {
            "expected_answer": "4",
            "problem_type": "has_answer_extracted",
            "problem_source": "s",
            "generation_model": "m",
            "pass_rate_72b_tir": "0.5",
            "problem": Q,
            "generated_solution": THOUGHT,
            "inference_mode": "cot",
            "used_in_kaggle": True,
        },
        *(ASKED, THOUGHT, "4"),
    ),
    "DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": [USER],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "i"},
        },
        *(ASKED, None, "34"),
    ),
    "OpenOrca": (
        {"id": "x", "system_prompt": "Be brief.", **T, "response": "4"},
        *(SYSTEM_ASKED, "4", ""),
    ),
    "Dolly": (
        {"instruction": "Add.", "context": Q, "response": "4", "category": "c"},
        *([("user", f"Add.\n{Q}")], "4", ""),
    ),
    "Magpie": (
        {
            "uuid": "x",
            "instruction": Q,
            "response": "4",
            "conversations": [HUMAN, {"from": "gpt", "value": "4"}],
        },
        *(ASKED, "4", ""),
    ),
    "WildChat": (
        {"model": "m", "conversation": [{**USER, "language": "en"}, ANSWER], "turn": 1},
        *(ASKED, "4", ""),
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {**HUMAN, "weight": 0.0},
                {"from": "gpt", "value": "4", "weight": 1.0},
            ]
        },
        *(SYSTEM_ASKED, "4", ""),
    ),
    "DeepSeek-R1 traces": (
        {**T, "answer": "4", "thinking": "hm", "content": "4", "teacher": "t"},
        *(ASKED, THOUGHT, "4"),
    ),
}

# Usual forms of other libraries: (row, use, prompt, response or the words of the refusal)
TURN = {"system": "Be brief.", "history": [["1+1?", "2"]]}
FORMS: dict[str, tuple[dict, str, Any, Any]] = {
    # TRL
    "trl prompt of messages": ({"prompt": [USER], "answer": A}, "prompt", ASKED, None),
    "trl prompt ends with answer": ({"prompt": [USER, ANSWER]}, "prompt", ASKED, None),
    "trl prompt, question": ({"prompt": [SYSTEM, USER], **T}, "prompt", SYSTEM_ASKED, None),
    "trl completion": ({"prompt": "2+2=", "completion": A}, "trace", "2+2=", A),
    "trl completion of turns": ({"prompt": [USER], "completion": [ANSWER]}, "trace", ASKED, A),
    "trl completion as prompt": ({"prompt": [USER], "completion": [ANSWER]}, "prompt", ASKED, None),
    "trl mixed": (
        {"prompt": "2+2=", "completion": [ANSWER]},
        *("trace", None, "completion is a chat and prompt a text"),
    ),
    "trl preference": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        *("trace", None, "chosen: a preference: config.data.columns=response=chosen"),
    ),
    "trl preference as prompt": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        *("prompt", ASKED, None),
    ),
    "trl implicit preference": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        *("prompt", None, "chosen: a preference"),
    ),
    "trl unpaired": ({"prompt": [USER], "completion": A, "label": True}, "trace", ASKED, A),
    "trl unwanted": (
        {"prompt": [USER], "completion": A, "label": False},
        *("trace", None, "label=False: a response that is not to be learned"),
    ),
    "trl steps": (
        {"prompt": Q, "completions": ["2", "4"], "labels": [True, True]},
        *("trace", None, "completions: several completions"),
    ),
    "trl template": (
        {"messages": [USER], "chat_template_kwargs": {"documents": []}},
        *("prompt", None, "chat_template_kwargs: only enable_thinking is read"),
    ),
    "trl images": ({"prompt": [USER], "images": ["x"]}, "prompt", None, "images: only text"),
    "trl no images": ({"prompt": [USER], "images": []}, "prompt", ASKED, None),
    # verl
    "verl without reward": ({"prompt": [USER], "reward_model": None}, "prompt", ASKED, None),
    "verl sft": (
        {"messages": [USER, ANSWER], "tools": [TOOL], "enable_thinking": False},
        *("trace", ASKED, A),
    ),
    # Axolotl
    "axolotl alpaca": (
        {"instruction": "Add.", "input": Q, "output": A, "text": "### Instruction:"},
        *("trace", [("user", f"Add.\n{Q}")], A),
    ),
    "axolotl turns": (
        {"conversations": [{"role": "human", "value": Q}, {"role": "gpt", "value": A}]},
        *("trace", ASKED, A),
    ),
    "axolotl input_output": (
        {"segments": [{"label": False, "text": Q}, {"label": True, "text": A}]},
        *("trace", None, "segments: Axolotl's input_output: write prompt and response"),
    ),
    "axolotl tokens": (
        {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]},
        *("trace", None, "input_ids: tokenised: write tokens"),
    ),
    "axolotl two prompts": (
        {"instruction": "Add.", **T, "response": A},
        *("trace", None, "question and instruction are two prompts that differ"),
    ),
    # LLaMA-Factory
    "llama-factory alpaca": (
        {"instruction": "Add.", "input": Q, "output": A, **TURN},
        "trace",
        [*SYSTEM_ASKED[:1], ("user", "1+1?"), ("assistant", "2"), ("user", f"Add.\n{Q}")],
        A,
    ),
    "llama-factory empty": (
        {"instruction": Q, "input": "", "output": A, "system": "", "history": [], "tools": "[]"},
        *("trace", ASKED, A),
    ),
    "llama-factory tools": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": A},
            ],
            "system": "Be brief.",
            "tools": '[{"name": "add", "description": "adds", "parameters": {"x": null}}]',
        },
        *("trace", [*SYSTEM_ASKED, ("assistant", ""), ("tool", "4")], A),
    ),
    "llama-factory call": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "add 2"}]},
        *("trace", None, "conversations[1]: a function call is no JSON object"),
    ),
    "llama-factory preference": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
        *("trace", None, "chosen: a preference"),
    ),
    "llama-factory kto": (
        {"messages": [USER, ANSWER], "kto_tag": False},
        *("trace", None, "kto_tag=False"),
    ),
    "llama-factory history": (
        {"messages": [USER], "history": [["a", "b"]]},
        *("prompt", None, "history is read beside a question only"),
    ),
    # OpenAI
    "openai functions": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
            ],
            "functions": [ADD],
        },
        *("trace", ASKED, None),
    ),
    # Columns beside a form
    "system and system": (
        {"messages": [SYSTEM, USER], "system": "Be brief. "},
        *("prompt", SYSTEM_ASKED, None),
    ),
    "system or system": (
        {"messages": [SYSTEM, USER], "system": "Be long."},
        *("prompt", None, "system and messages[0] are two system texts"),
    ),
    "system, question": ({**T, "system": "Be brief."}, "prompt", SYSTEM_ASKED, None),
    "system, solution": ({**T, "system": "Be brief.", "solution": A}, "trace", SYSTEM_ASKED, A),
    "system, text": (
        {"prompt": Q, "system": "Be brief."},
        *("prompt", None, "system and tools: not read beside prompt as plain text"),
    ),
    "system of turns": ({**T, "system": [SYSTEM]}, "prompt", None, "system is not a text"),
    "tools by name": ({**T, "tools": ["add"]}, "prompt", None, "tools[0] is no JSON schema"),
    "loss mask": ({**T, "response": A, "loss_mask": [1]}, "trace", None, "loss_mask: not read"),
    "two chats": (
        {"messages": [USER, ANSWER], "conversations": [{"from": "human", "value": "3+3?"}]},
        *("prompt", None, "messages and conversations are two prompts that differ"),
    ),
    "one chat twice": (
        {"messages": [USER, ANSWER], "conversations": [HUMAN, GPT]},
        *("trace", ASKED, A),
    ),
    "another prompt": (
        {"messages": [USER], "prompt": "3+3?"},
        *("prompt", None, "messages and prompt are two prompts that differ"),
    ),
    "a question in messages": (
        {"messages": [{"role": "user", "content": f"Q: {Q}\nA:"}], **T},
        *("prompt", [("user", f"Q: {Q}\nA:")], None),
    ),
    "two responses": (
        {"messages": [USER, ANSWER], "response": "5"},
        *("trace", None, "response and messages are two responses that differ"),
    ),
    "the response twice": ({"messages": [USER, ANSWER], "response": A}, "trace", ASKED, A),
    "two outputs": (
        {**T, "output": "5", "completion": A},
        *("trace", None, "completion and output are two responses that differ"),
    ),
    "text beside": ({"messages": [USER], "response": A, "text": "x"}, "trace", ASKED, A),
    "a count of tokens": ({"messages": [USER, ANSWER], "tokens": 12}, "prompt", ASKED, None),
    "ids": ({"messages": [USER, ANSWER], "tokens": [1, 2]}, "prompt", None, None),
    "null columns": (
        {"prompt": None, "messages": None, "conversations": None, **T, "response": A},
        *("trace", ASKED, A),
    ),
    "missing values of pandas": (
        {"prompt": math.nan, "system": math.nan, "tools": math.nan, **T, "response": A},
        *("trace", ASKED, A),
    ),
    "only an answer": (
        {"messages": [ANSWER]},
        *("prompt", None, "messages: nothing before the assistant's turn"),
    ),
    "messages as text": ({"messages": Q}, "prompt", None, "messages is not a list"),
    "a chat as JSON": (
        {"prompt": json.dumps([USER])},
        *("prompt", None, "prompt is the text of a chat"),
    ),
    "a chat as Python's text": (
        {"messages": str([USER, ANSWER])},
        *("trace", None, "messages is the text of a chat"),
    ),
    "a list of objects as lists": (
        {"conversations": {"from": ["human", "gpt"], "value": [Q, A]}},
        *("trace", ASKED, A),
    ),
    "reasoning": ({**T, "response": A, "reasoning": "hm"}, "trace", ASKED, THOUGHT),
    "reasoning, messages": (
        {"messages": [USER, ANSWER], "reasoning_content": "hm"},
        *("trace", ASKED, ("hm", A)),
    ),
    "other reasoning": (
        {**T, "response": THOUGHT, "reasoning": "well"},
        *("trace", None, "reasoning and the think block of the response differ"),
    ),
    "two modes": (
        {**T, "thinking": True, "enable_thinking": False},
        *("prompt", None, "thinking and enable_thinking are different modes"),
    ),
    "options": (
        {**T, "choices": ["3", "4"], "answer": 1},
        *("prompt", None, "choices: not in the question"),
    ),
    "options in the question": (
        {"question": "2+2? A) 3 B) 4", "options": {"A": "3", "B": "4"}},
        *("prompt", [("user", "2+2? A) 3 B) 4")], None),
    ),
    "nothing verified": (
        {"problem": Q, "generations": ["x"], "correctness_math_verify": [False]},
        *("trace", None, "generations: none is complete and verified correct"),
    ),
    "nothing verified, as prompt": (
        {"problem": Q, "generations": ["x"], "correctness_math_verify": None},
        *("prompt", ASKED, None),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_read_as_traces_and_as_prompts(name: str) -> None:
    row, prompt, response, answer = PUBLISHED[name]
    assert read(row, "prompt") == (prompt, None)
    if response is not None:
        assert read(row, "trace") == (prompt, response)
    for with_responses in (True, False) if response is not None else (False,):
        found = canonical.canonicalize_row(row, "", "row", with_responses)
        assert answers.to_text(found.get("answer")) == answer
        kept = row.keys() - {"messages", "prompt", "answer", "solution"}
        assert {name: found[name] for name in kept} == {name: row[name] for name in kept}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_other_libraries_are_read_or_refused(name: str) -> None:
    row, use, prompt, response = FORMS[name]
    if prompt is not None:
        assert read(row, use) == (prompt, response)
    elif response is None:
        assert read(row, use)[0] is not None
    else:
        with pytest.raises(UserError) as error:
            read(row, use)
        message = str(error.value)
        assert message.startswith("row: ") and response in message and "\n" not in message


def test_tools_become_a_list_of_schemas() -> None:
    function = {"name": "add", "description": "adds", "parameters": {}}
    wrapped = [{"type": "function", "function": function}]
    for value in (
        wrapped,
        [function],
        '[{"name": "add", "description": "adds", "parameters": {}}]',
    ):
        for name in ("tools", "functions"):
            row = {"messages": [USER, ANSWER], name: value}
            assert canonical.canonicalize_row(row, "", "row", True)["tools"] == wrapped
    flat = {"type": "function", **function}  # of OpenAI's Responses API
    row = {**T, "tools": [flat]}
    assert canonical.canonicalize_row(row, "", "row", False)["tools"] == wrapped
    for empty in ("", "[]", "null", [], None):
        assert "tools" not in canonical.canonicalize_row({**T, "tools": empty}, "", "row", False)


def test_function_calls_become_tool_calls() -> None:
    row, *_ = FORMS["llama-factory tools"]
    found = canonical.canonicalize_row(row, "", "row", True)
    assert found["messages"][2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert [tool["function"]["name"] for tool in found["tools"]] == ["add"]
    row, *_ = FORMS["openai functions"]
    assert canonical.canonicalize_row(row, "", "row", True)["tools"] == [TOOL]


@pytest.mark.parametrize("column", [{"weight": 0.5}, {"weight": 0}, {"train": False}])
def test_weights_of_rows_are_refused_in_training(column: dict) -> None:
    (name,) = column
    with pytest.raises(UserError, match=f"^row: {name}={column[name]}: "):
        canonical.refuse_weights({**T, **column}, "row")
    for value in (1, 1.0, True, None, math.nan, "heavy"):
        canonical.refuse_weights({**T, name: value}, "row")


def test_fields_of_a_turn_stay() -> None:
    turns = [{**USER, "name": "Ann", "tool_calls": None}, {**ANSWER, "weight": 0, "train": False}]
    found = canonical.canonicalize_row({"messages": turns}, "", "row", True)
    assert found["messages"] == [{**USER, "name": "Ann"}, turns[1]]


@pytest.mark.parametrize(
    ("column", "mode"),
    [
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": None, "reasoning": "off"}, False),
        ({"thinking": True, "reasoning": "on"}, True),
        ({"thinking": "hm"}, "hm"),
    ],
)
def test_a_row_may_set_its_mode(column: dict, mode: object) -> None:
    found = canonical.canonicalize_row({**T, **column}, "", "row", False)
    assert found["thinking"] == mode


@pytest.mark.parametrize(
    ("row", "columns", "use", "prompt", "response"),
    [
        ({"input": Q, "output": A}, "question=input, response=output", "trace", ASKED, A),
        ({"problem": "no", "q": Q, "x": A}, "question=q,response=x", "trace", ASKED, A),
        ({"q": Q}, "question=q,response=x", "prompt", ASKED, None),
        (
            {"problem": Q, "x": A, "messages": [{**USER, "content": "no"}, ANSWER]},
            *("question=problem,response=x", "trace", ASKED, A),
        ),
        (
            {"conversations": [HUMAN, GPT], "prompt": "no", "response": "no"},
            *("messages=conversations", "trace", ASKED, THOUGHT),
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "messages=chosen", "trace", ASKED, A),
        ({"prompt": [USER], "chosen": [ANSWER]}, "response=chosen", "trace", ASKED, A),
        ({"prompt": [USER], "chosen": GPT}, "response=chosen", "trace", ASKED, THOUGHT),
        ({**T, "answer": "It is 4."}, "response=answer", "trace", ASKED, "It is 4."),
        ({**T, "answer": "It is 4."}, "orca_math", "trace", ASKED, "It is 4."),
        ({**T, "about": "Be brief."}, "system=about", "prompt", SYSTEM_ASKED, None),
        ({**T, "prompt": "2+2="}, "prompt=prompt", "prompt", "2+2=", None),
        ({**T, "why": "hm", "response": A}, "reasoning_content=why", "trace", ASKED, THOUGHT),
    ],
)
def test_named_columns_win(
    row: dict, columns: str, use: str, prompt: Any, response: str | None
) -> None:
    assert read(row, use, columns) == (prompt, response)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("question=inputs", "question=inputs: its columns are ['input', 'output']"),
        ("deepmath", "'deepmath' is no ours=theirs with ours one of tokens, prompt"),
        ("questoin=input", "'questoin=input' is no ours=theirs"),
        ("question=input,response", "'response' is no ours=theirs"),
        ("response=none", "response=none: its columns"),
    ],
)
def test_wrong_names_are_refused(columns: str, words: str) -> None:
    with pytest.raises(UserError, match=r"row: config\.data\.columns: ") as error:
        canonical.canonicalize_row({"input": Q, "output": A}, columns, "row", True)
    assert words in str(error.value)


def test_a_named_response_must_be_one() -> None:
    with pytest.raises(UserError, match="row: response is not a text"):
        canonical.canonicalize_row(
            {"messages": [USER, ANSWER], "x": None}, "response=x", "row", True
        )


# Answers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(("4", "4"), (4, "4"), (4.0, "4"), (2.5, "2.5"), (-0.5, "-0.5"), (1e-7, "0.0000001")),
        *((1e22, "1" + "0" * 22), (10**30, "1" + "0" * 30), (Decimal("1.50"), "1.5")),
        *((Decimal("100"), "100"), ("0", "0"), (0, "0"), (r"\frac{1}{2}", r"\frac{1}{2}")),
        *((None, ""), (True, ""), (False, ""), (["4"], ""), ({"a": 4}, ""), ("", ""), (" ", "")),
        *(('["34"]', "34"), ('["1", "2"]', ""), ("[1, 2]", "[1, 2]"), ('["a', '["a')),
        *((math.nan, ""), (math.inf, ""), (-math.inf, ""), (Decimal("NaN"), "")),
    ],
)
def test_answers_are_texts_or_none(value: object, text: str) -> None:
    assert answers.to_text(value) == text
    row = {**T, "answer": value}
    found = canonical.canonicalize_row(row, "", "row", False)
    assert answers.to_text(found["answer"]) == text
    if text:
        assert answers.require_answer(found, "row") == text
    else:
        with pytest.raises(UserError, match=r"^row: no answer among its fields"):
            answers.require_answer(found, "row")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({**T, "answer": "2+2=<<2+2=4>>4\nFour."}, ""),
        ({**T, "answer": "First 2.\nThen 4."}, ""),
        ({**T, "answer": "First 2.\nThen 4.", "final_answer": 4.0}, "4"),
        ({**T, "answer": "\\begin{pmatrix}1\n\\\\2\\end{pmatrix}"}, None),
        ({**T, "answer": '{"prompt": "#### 2 << 3"}'}, None),
        ({**T, "answer": math.nan, "expected_answer": "4"}, "4"),
        ({**T, "ground_truth": "4"}, "4"),
        ({"messages": [USER], "answer": "so\n#### 4"}, "4"),
        ({"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": 4}}, "4"),
        ({"prompt": [USER], "reward_model": {"ground_truth": ["4", "5"]}}, ""),
        ({"prompt": [USER], "reward_model": "a model's name"}, ""),
        ({**T, "solution": r"\boxed{3}, no: \boxed{4}"}, "4"),
        ({**T, "solution": "four"}, ""),
    ],
)
def test_answers_are_found(row: dict, text: str | None) -> None:
    found = canonical.canonicalize_row(row, "", "row", False)
    assert answers.to_text(found.get("answer")) == (row["answer"] if text is None else text)


# Templates


def test_a_template_wraps_the_question_wherever_it_is() -> None:
    rows = [T, {**T, "system": "Be brief."}, {"problem": Q, "messages": [USER, ANSWER]}]
    rows += [{**T, "history": [["1+1?", "2"]]}, PUBLISHED["OpenR1-Math"][0]]
    for row in rows:
        found = canonical.canonicalize_row(row, "", "row", False)
        templated = canonical.apply_template(found, "Q {question} {x}")
        assert templated["question"] == "Q 2+2? {x}"
        if "messages" in found:
            assert templated["messages"][-1] == {"role": "user", "content": "Q 2+2? {x}"}
        assert canonical.canonicalize_row(templated, "", "row", False) == templated
    chat = {"messages": [USER]}
    assert canonical.apply_template(chat, "Q {question}") == chat
