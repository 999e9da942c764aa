"""Adapts rows of well-known sets to the columns that this project reads.

A canonical row has a prompt: `messages`, `question`, `prompt` (plain text) or `tokens`. A trace has
the response to learn too: `response`, `solution` or `response_tokens`, and perhaps `direct`, used
instead where the model is not to think. It may have its own mode, `thinking` (true or false), and
an `answer`, which graders compare with.

To add a set, write an adapter (row, with_responses) -> the columns to add, and its line in
ADAPTERS with the columns by which the set is recognised. Other columns stay as they are.
"""

from collections.abc import Callable

from distill.data import chat
from distill.rewards import graders
from models.errors import UserError

SPEAKER_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def _restore_think_tag(text: str) -> str:
    """Puts back the opening tag, which DeepSeek-R1's template writes and its responses lack."""
    opens = text.lstrip().startswith("<think>")
    return text if opens or "</think>" not in text else f"<think>\n{text.lstrip()}"


def _adapt_gsm8k(row: dict, with_responses: bool) -> dict:
    if not isinstance(row["answer"], str) or "####" not in row["answer"]:
        # A worked solution without GSM8K's ending is no answer to compare with.
        worked = isinstance(row["answer"], str) and ("\n" in row["answer"] or "<<" in row["answer"])
        return {"answer": ""} if worked else {}
    solution, answer = row["answer"], row["answer"].rpartition("####")[2]
    return {"solution": row.get("solution", solution), "answer": answer.strip().replace(",", "")}


def _adapt_math(row: dict, with_responses: bool) -> dict:
    adapted = {"question": row["problem"]}
    if "answer" not in row and isinstance(row.get("solution"), str):
        answer = graders.extract_boxed(row["solution"])
        adapted |= {} if answer is None else {"answer": answer}
    return adapted


def _adapt_deepmath(row: dict, with_responses: bool) -> dict:
    return {"answer": row["final_answer"], "response": _restore_think_tag(row["r1_solution_1"])}


def _adapt_s1k(row: dict, with_responses: bool) -> dict:
    """s1K has a list of Gemini's thoughts, s1K-1.1 columns with those of DeepSeek-R1."""
    if "deepseek_attempt" in row:
        reasoning, final = row["deepseek_thinking_trajectory"], row["deepseek_attempt"]
    else:
        reasoning, final = "\n".join(row["thinking_trajectories"]), row["attempt"]
    return {"response": chat.wrap_thinking(reasoning, final.strip())}


def _adapt_openr1(row: dict, with_responses: bool) -> dict:
    """Takes the first generation that is complete and that math-verify found correct."""
    if not with_responses:
        return {"question": row["problem"]}
    verified = zip(
        row["generations"],
        row["correctness_math_verify"],
        row.get("is_reasoning_complete") or [True] * len(row["generations"]),
        strict=True,
    )
    for text, correct, complete in verified:
        if correct and complete:
            return {"question": row["problem"], "response": _restore_think_tag(text)}
    raise UserError("generations: none is complete and verified correct")


def _adapt_conversations(row: dict, with_responses: bool) -> dict:
    turns = row["conversations"]
    if isinstance(turns, dict):  # TFDS and old `datasets` make a list of objects an object of lists
        pairs = zip(turns["from"], turns["value"], strict=True)
        turns = [{"from": speaker, "value": value} for speaker, value in pairs]
    messages = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else turn
        if speaker not in SPEAKER_ROLES:
            raise UserError(
                f"conversations[{number}].from {speaker!r} is none of {', '.join(SPEAKER_ROLES)}"
            )
        content = turn.get("value", turn.get("content"))
        messages.append({"role": SPEAKER_ROLES[speaker], "content": content})
    return {"messages": messages}


def _adapt_thinking(row: dict, with_responses: bool) -> dict:
    return {"response": chat.wrap_thinking(row["thinking"], row["content"].strip())}


def _adapt_verl(row: dict, with_responses: bool) -> dict:
    messages = {"messages": row["prompt"]} if isinstance(row["prompt"], list) else {}
    return messages | {"answer": row["reward_model"]["ground_truth"]}


def _adapt_tulu(row: dict, with_responses: bool) -> dict:
    """Tulu 3: a chat that ends with an answer. The prompt is the chat before it."""
    last = row["messages"][-1]
    drops_last = not with_responses and isinstance(last, dict) and last.get("role") == "assistant"
    return {"messages": row["messages"][:-1]} if drops_last else {}


def _adapt_completion(row: dict, with_responses: bool) -> dict:
    if isinstance(row["prompt"], str):
        return {"response": row["completion"]}
    return {"messages": row["prompt"] + row["completion"]}


# name -> (the columns that it needs, the adapter). A row is adapted by the first whose columns it
# has; orca_math's are those of any set of questions and answers, so it applies by name only.
# with_responses: the row is a trace to learn from; else only its prompt and answer matter.
ADAPTERS: dict[str, tuple[tuple[str, ...], Callable[[dict, bool], dict]]] = {
    "s1k-1.1": (("question", "deepseek_thinking_trajectory", "deepseek_attempt"), _adapt_s1k),
    "s1k": (("question", "thinking_trajectories", "attempt"), _adapt_s1k),
    "deepmath": (("question", "final_answer", "r1_solution_1"), _adapt_deepmath),
    "openr1_math": (("problem", "generations", "correctness_math_verify"), _adapt_openr1),
    "thinking": (("question", "thinking", "content"), _adapt_thinking),
    "conversations": (("conversations",), _adapt_conversations),  # OpenThoughts3, ShareGPT
    "verl": (("prompt", "reward_model"), _adapt_verl),  # DAPO-Math-17k and others in verl's form
    "tulu": (("id", "messages", "source"), _adapt_tulu),
    "completion": (("prompt", "completion"), _adapt_completion),
    "math": (("problem",), _adapt_math),
    "gsm8k": (("question", "answer"), _adapt_gsm8k),
    "orca_math": (("question", "answer"), lambda row, with_responses: {"response": row["answer"]}),
}


def canonicalize_row(row: dict, columns: str, where: str, with_responses: bool) -> dict:
    """Returns `row` with the canonical columns added.

    Args:
      columns: the name of an adapter; or pairs ours=theirs, "question=problem,response=output"; or
        "" to recognise the set by its columns.
      where: names the row in an error.
      with_responses: the row is a trace to learn from; else only its prompt and answer matter.

    Raises:
      UserError: naming the row, the column that is missing, and those that it has.
    """
    if "=" in columns:
        pairs = [pair.partition("=") for pair in columns.split(",")]
        for ours, _, theirs in pairs:
            if theirs.strip() not in row:
                raise UserError(
                    f"{where}: config.data.columns: {ours}={theirs}: its columns are {sorted(row)}"
                )
        return row | {ours.strip(): row[theirs.strip()] for ours, _, theirs in pairs}
    if columns and columns not in ADAPTERS:
        raise UserError(
            f"config.data.columns: {columns!r} is none of {', '.join(ADAPTERS)}, nor ours=theirs"
        )
    for name in [columns] if columns else ADAPTERS:
        needs, adapt = ADAPTERS[name]
        missing = [column for column in needs if column not in row]
        if columns and missing:
            raise UserError(f"{where}: no {missing[0]} among its columns {sorted(row)}")
        if missing:
            continue
        try:
            return row | adapt(row, with_responses)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
            raise UserError(
                f"{where}: {', '.join(needs)} are not as in the set {name}: {error!r}"
            ) from None
    return row


def apply_template(row: dict, template: str) -> dict:
    """Returns `row` with its question, if it has one, put into `template`; an answer of null
    becomes empty."""
    if row.get("answer", "") is None:
        row = {**row, "answer": ""}
    if not isinstance(row.get("question"), str):
        return row
    return row | {"question": template.replace("{question}", row["question"])}
