"""Makes canonical rows of rows in any form that `columns` names: the same in every verb."""

import math
from typing import Any

from distill.data import answers, columns, turns
from distill.data import messages as chats
from distill.rewards import graders
from models.errors import UserError


def canonicalize_row(row: dict, column_spec: str, where: str, with_responses: bool) -> dict:
    """Returns `row` with the canonical columns, and without prompts that another one stands for.

    A canonical row stays as it is. NaN, which pandas writes for a missing value, becomes null.

    Args:
      column_spec: config.data.columns, pairs ours=theirs: "question=problem,response=output".
      where: names the row in an error.
      with_responses: the row is a trace to learn from. Else only its prompt and answer matter: a
        chat that ends with an assistant's turn is asked up to it.

    Raises:
      UserError: naming the row and a column that is missing, contradicts another or is not read.
    """
    row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
    try:
        row, named = _rename_columns(row, column_spec, with_responses)
        return _read_row(row, named, with_responses)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def apply_template(row: dict, template: str) -> dict:
    """Returns a canonical row with its question, if it has one, put into `template`: also where it
    is the last user's turn of messages."""
    question, messages = row.get("question"), row.get("messages")
    if not isinstance(question, str):
        return row
    text = template.replace("{question}", question)
    if isinstance(messages, list):
        row = {**row, "messages": turns.replace_last_user_text(messages, question, text)}
    return {**row, "question": text}


def refuse_weights(row: dict, where: str) -> None:
    """Raises UserError naming a row to train on that says how much of it is to be learned."""
    for name, remedy in columns.WEIGHTS.items():
        value = row.get(name)
        if isinstance(value, int | float) and value != 1 and not math.isnan(value):
            raise UserError(f"{where}: {name}={value}: {remedy}")


def find_answer(row: dict) -> str:
    """Returns the text of the answer of a row in any form; "" if it has none."""
    for name in columns.ANSWERS:
        value = row.get(name)
        if name == "reward_model":
            value = value.get("ground_truth") if isinstance(value, dict) else None
        if text := _cut_final_text(answers.to_text(value), row):
            return text
    solution = row.get("solution")
    return (graders.extract_boxed(solution) or "") if isinstance(solution, str) else ""


def _cut_final_text(answer: str, row: dict) -> str:
    """Returns the end of a solution in the form of GSM8K; "" for a worked solution to a question
    without that ending, which is no answer to compare with. Others stay: JSON, LaTeX in lines."""
    if answer.startswith("{"):
        return answer
    _, marker, final = answer.rpartition("####")
    if marker:
        return final.strip().replace(",", "")
    is_worked = "<<" in answer or ("\n" in answer.strip() and "\\begin" not in answer)
    return "" if is_worked and row.keys() & set(columns.QUESTIONS) else answer


def _rename_columns(row: dict, column_spec: str, with_responses: bool) -> tuple[dict, set[str]]:
    """Returns the row with the columns that config.data.columns names, and their names here."""
    renamed = {}
    column_spec = columns.SETS.get(column_spec, column_spec)
    for pair in column_spec.split(",") if column_spec else ():
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or ours not in columns.CANONICAL:
            raise UserError(
                f"config.data.columns: {pair.strip()!r} is no ours=theirs with ours one of "
                f"{', '.join(columns.CANONICAL)}"
            )
        if theirs in row:
            renamed[ours] = row[theirs]
        elif with_responses or ours not in columns.TRACES:
            raise UserError(f"config.data.columns: {ours}={theirs}: its columns are {sorted(row)}")
    return row | renamed, set(renamed)


def _read_row(row: dict, named: set[str], with_responses: bool) -> dict:
    answer = row.get("answer")
    if isinstance(answer, str) and "####" in answer and row.get("solution") is None:  # GSM8K
        row = {**row, "solution": answer}
    _refuse_columns(row, with_responses)
    final = find_answer({"answer": answer, "question": ""} if "answer" in named else row)
    tools = next((turns.read_tools(row[name], name) for name in columns.TOOLS if row.get(name)), [])
    others = {k: v for k, v in row.items() if k != "tools"}
    others |= _read_mode(row) | ({"answer": final} if final or isinstance(answer, str) else {})
    others |= {"tools": tools} if tools else {}
    if _is_tokenised(row, named, with_responses):
        return others
    prompt = _read_prompt(row, named)
    for name in columns.UNREAD_FORMS if not prompt and "text" not in row else ():
        if row.get(name) is not None:
            raise UserError(f"{name}: {columns.UNREAD_FORMS[name]}")
    if not prompt:
        return {k: v for k, v in others.items() if v is not None or k not in columns.PROMPT_FORMS}
    if "prompt" in prompt and (tools or _read_system(row)):
        raise UserError("system and tools: not read beside prompt as plain text; write messages")
    if with_responses:
        prompt |= _read_response(row, prompt, named)
    elif "messages" in prompt:
        prompt["messages"] = turns.drop_answer(prompt["messages"])
    stale = {*columns.PROMPT_FORMS, *(("text",) if with_responses else ())}
    stale |= {"response"} if with_responses and "messages" in prompt else set()
    return {k: v for k, v in others.items() if k not in stale} | prompt


def _refuse_columns(row: dict, with_responses: bool) -> None:
    for name in columns.MEDIA:
        if row.get(name):
            raise UserError(f"{name}: only text is read")
    for name in columns.LABELS if with_responses else ():
        if row.get(name) is False:
            raise UserError(f"{name}=False: a response that is not to be learned; remove the row")
    if with_responses and row.get("loss_mask") is not None:
        raise UserError("loss_mask: not read; response_tokens after tokens are what is learned")


def _read_mode(row: dict) -> dict:
    """Returns {"thinking": mode} if a column sets the chat template's switch: `enable_thinking` is
    verl's, `chat_template_kwargs` TRL's, `reasoning` "on" or "off" Nemotron's."""
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict) or options.keys() - {"enable_thinking"}:
        raise UserError("chat_template_kwargs: only enable_thinking is read")
    given = {
        "thinking": row.get("thinking"),
        "enable_thinking": row.get("enable_thinking"),
        "chat_template_kwargs": options.get("enable_thinking"),
        "reasoning": columns.SWITCHES.get(str(row.get("reasoning"))),
    }
    modes = {name: mode for name, mode in given.items() if isinstance(mode, bool)}
    if len(set(modes.values())) > 1:
        raise UserError(f"{' and '.join(modes)} are different modes")
    return dict([("thinking", mode) for mode in modes.values()][:1])


def _is_tokenised(row: dict, named: set[str], with_responses: bool) -> bool:
    """Returns True if token ids are the prompt. (`tokens` may be a count, too.)"""
    prompts = set(columns.PROMPTS) & named or set(columns.PROMPTS) & row.keys()
    if prompts == {"tokens"} or "tokens" not in prompts:
        return "tokens" in prompts
    has_response = bool({"response_tokens", "response", "solution"} & row.keys())
    return isinstance(row["tokens"], list) and (has_response or not with_responses)


def _read_system(row: dict) -> str:
    given = {name: row[name] for name in columns.SYSTEMS if row.get(name)}
    for name, text in given.items():
        if not isinstance(text, str):
            raise UserError(f"{name} is not a text")
    texts = {text.strip() for text in given.values()} - {""}
    if len(texts) > 1:
        raise UserError(f"{' and '.join(given)} are two system texts; leave one out")
    return next((text for text in given.values() if text.strip()), "")


def _read_prompt(row: dict, named: set[str]) -> dict:
    """Returns the prompt of a row: prompt, or messages (whole) or question, or these two."""
    names = [name for name in columns.PROMPTS if name in named] or columns.PROMPTS
    given = {name: row[name] for name in names if row.get(name) not in (None, [], "")}
    if names is columns.PROMPTS and row.keys() >= columns.VERIFIED:
        given.pop("messages", None)  # they may hold a wrong generation
    for name, value in given.items():
        if isinstance(value, str) and turns.is_written_chat(value):
            raise UserError(f"{name} is the text of a chat; write it as a list of messages")
    plain = {"prompt": given.pop("prompt")} if isinstance(given.get("prompt"), str) else {}
    questions = {name: given[name] for name in columns.QUESTIONS if name in given}
    if isinstance(questions.get("instruction"), str):
        parts = (row.get(name) for name in ("instruction", "input", "context"))
        questions["instruction"] = "\n".join(p for p in parts if isinstance(p, str) and p.strip())
    question = dict([("question", text) for text in questions.values()][:1])
    texts = {name: text for name, text in {**questions, **plain}.items() if isinstance(text, str)}
    system = _read_system(row)
    history = turns.read_history(row[columns.HISTORY]) if row.get(columns.HISTORY) else []
    chats = {name: turns.read_turns(given[name], name) for name in columns.CHATS if name in given}
    if history and not questions:
        raise UserError("history is read beside a question only; write it into the messages")
    if not chats and questions:
        _require_same_question(texts)
        _refuse_options(row, str(question["question"]))
    if history or (system and questions and not chats):
        last = {"role": "user", "content": question["question"]}
        chats[columns.HISTORY] = [*history, last]
    if not chats:
        return question or plain
    chats = {name: turns.add_system(chat_, system, name) for name, chat_ in chats.items()}
    _require_same_prompt(chats, texts)
    return {"messages": next(iter(chats.values())), **question}


def _require_same_prompt(chats: dict[str, list[dict]], texts: dict[str, str]) -> None:
    """Raises UserError unless all chats are one prompt, and each text is in a user's turn of it."""

    def list_turns(messages: list[dict]) -> list[tuple[str, str]]:
        prompt = turns.drop_answer(messages)
        return [(message["role"], turns.get_text(message).strip()) for message in prompt]

    first, messages = next(iter(chats.items()))
    users = [turns.get_text(message) for message in messages if message["role"] == "user"]
    for name, other in chats.items():
        if list_turns(other) != list_turns(messages):
            raise _make_conflict(first, name)
    for name, text in texts.items():
        if not any(turns.holds(user, text) for user in users):
            raise _make_conflict(first, name)


def _require_same_question(texts: dict[str, str]) -> None:
    """Raises UserError unless the first text holds the others, and `prompt` is no longer one."""
    for name, text in texts.items():
        first, question = next(iter(texts.items()))
        same = turns.holds(question, text) and (name != "prompt" or turns.holds(text, question))
        if not same:
            raise _make_conflict(first, name)


def _make_conflict(first: str, second: str) -> UserError:
    return UserError(
        f"{first} and {second} are two prompts that differ; leave one out, or choose by "
        "config.data.columns (ours=theirs)"
    )


def _refuse_options(row: dict, question: str) -> None:
    """Raises UserError if the question has options that its text does not list."""
    for name in columns.OPTIONS:
        value = row.get(name)
        value = value.get("text", [*value.values()]) if isinstance(value, dict) else value
        for option in value if isinstance(value, list) else [value] if value else []:
            if not turns.holds(question, str(option)):
                raise UserError(f"{name}: not in the question; write it as the model should see it")


def _read_response(row: dict, prompt: dict, named: set[str]) -> dict:
    """Returns what a trace learns: response, or messages that end with it, or nothing, where the
    row has `solution` or none. Messages end before a response of text."""
    if "response_tokens" in row:
        return {}
    messages = prompt.get("messages", [])
    name, value = _find_response(row, messages, named)
    if isinstance(value, list | dict):
        messages = _add_turns(prompt, turns.read_turns(value, name), name)
        value = None
    source, reasoning = next(
        ((n, row[n]) for n in columns.REASONING if _is_reasoning(row.get(n))), ("", "")
    )
    if value is None and messages and messages[-1]["role"] == "assistant":
        text = _get_answer_text(messages)
        if reasoning and chats.merge_reasoning(text, reasoning, source) != text:
            messages = [*messages[:-1], {**messages[-1], "reasoning_content": reasoning}]
        return {"messages": messages}
    if value is None and row.get("solution") is None:
        for form in columns.UNREAD_FORMS:
            if row.get(form) is not None:
                raise UserError(f"{form}: {columns.UNREAD_FORMS[form]}")
        return {}
    value = row["solution"] if value is None else value
    if not isinstance(value, str):
        raise UserError(f"{name} is not a text")
    value = chats.merge_reasoning(value, reasoning, source) if reasoning else value
    if name == "solution" and not messages and not reasoning and "solution" not in named:
        return {}
    return {
        "response": value,
        **({"messages": turns.drop_answer(messages)} if messages else {}),
    }


def _find_response(row: dict, messages: list[dict], named: set[str]) -> tuple[str, Any]:
    """Returns the column of the response and its value; None if that is the last turn of messages,
    or `solution`."""
    for name in ("response", "solution"):
        if name in named:
            if not isinstance(row[name], str | list | dict):
                raise UserError(f"{name} is not a text")
            return name, row[name]
    has_answer = bool(messages) and messages[-1]["role"] == "assistant"
    if named & {"messages", "prompt"} and has_answer:
        return "messages", None
    given = {name: row[name] for name in columns.RESPONSES if row.get(name) not in (None, "", [])}
    if "response" not in given and (composed := _compose_response(row)) is not None:
        return "response", composed
    if not given:
        return "solution", None
    name, value = next(iter(given.items()))
    texts = {k: v for k, v in given.items() if isinstance(v, str) and isinstance(value, str)}
    if has_answer and texts:
        texts["messages"] = _get_answer_text(messages)
    for other, text in texts.items():
        final = value.rpartition("</think>")[2]
        if text.strip() not in (value.strip(), final.strip()):
            raise UserError(
                f"{name} and {other} are two responses that differ; leave one out, or choose by "
                "config.data.columns=response=..."
            )
    return name, value


def _get_answer_text(messages: list[dict]) -> str:
    return chats.to_assistant_text({**messages[-1], "content": turns.get_text(messages[-1])})


def _compose_response(row: dict) -> str | None:
    """Returns the response of a set that stores it in several columns, or several of them."""
    for thoughts, final in columns.THOUGHTS:
        if thoughts in row and final in row:
            reasoning = row[thoughts]
            reasoning = "\n".join(reasoning) if _is_list_of_texts(reasoning) else reasoning
            if not isinstance(reasoning, str) or not isinstance(row[final], str):
                raise UserError(f"{thoughts} and {final} are not texts")
            return chats.wrap_thinking(reasoning, row[final].strip())
    if "r1_solution_1" in row:
        if not isinstance(row["r1_solution_1"], str):
            raise UserError("r1_solution_1 is not a text")
        return chats.restore_think_tag(row["r1_solution_1"])
    if row.keys() >= columns.VERIFIED:
        return _find_verified_generation(row)
    if isinstance(row.get("content"), str) and any(
        _is_reasoning(row.get(n)) for n in columns.REASONING
    ):
        return row["content"]
    return None


def _find_verified_generation(row: dict) -> str:
    """Returns the first generation of OpenR1-Math that is complete and that math-verify found
    correct."""
    texts, correct = row["generations"], row["correctness_math_verify"]
    if not _is_list_of_texts(texts):
        raise UserError("generations is not a list of texts")
    complete = row.get("is_reasoning_complete")
    complete = [True] * len(texts) if complete is None else complete
    if not all(isinstance(x, list) and len(x) == len(texts) for x in (correct, complete)):
        raise UserError("correctness_math_verify has no verdict on each of its generations")
    for text, verdicts in zip(texts, zip(correct, complete, strict=True), strict=True):
        if all(verdicts):
            return chats.restore_think_tag(text)
    raise UserError("generations: none is complete and verified correct")


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_reasoning(value: object) -> bool:
    return isinstance(value, str) and value.strip() not in ("", *columns.SWITCHES)


def _add_turns(prompt: dict, added: list[dict], name: str) -> list[dict]:
    if "prompt" in prompt:
        raise UserError(f"{name} is a chat and prompt a text; write both as chats")
    messages = prompt.get("messages") or [{"role": "user", "content": prompt["question"]}]
    if messages[-len(added) :] == added:
        return messages
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{name} beside a chat that ends with an assistant's turn; leave one out")
    return [*messages, *added]
