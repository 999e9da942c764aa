"""The columns of rows that are read, and the order in which they win.

`canonical.canonicalize_row` makes a canonical row of a row of any form. It has these columns:

    tokens | prompt | messages | question   the prompt: token ids, plain text, a chat, or the only
                                            turn of one; a question may stand beside its messages
    response | solution | response_tokens   what a trace learns; without these, the last turn of
                                            messages
    direct                                  the response where the model is not to think
    tools                                   a list of JSON schemas, for the chat template
    thinking                                true or false: the row's own mode
    answer                                  the final answer, for graders

Where two columns differ and neither is the natural one, the row is refused, and
`config.data.columns` says which is meant: its pairs ours=theirs, with the names above on the left,
win over all that is recognised. A column that would change what is trained, but is not understood,
is refused by name. All others stay as they are.
"""

import difflib

from distill.data import messages

# Prompts: lists of turns win over questions, and these over plain text (`prompt`, if it is a text).
# `conversations` is ShareGPT's and OpenThoughts', `conversation` LMSYS's and WildChat's, `prompt`
# TRL's and verl's. `problem` is that of MATH, NuminaMath and OpenR1-Math, `instruction` Alpaca's;
# its `input`, or Dolly's `context`, follows it on a new line, as LLaMA-Factory has it.
CHATS = ("messages", "conversations", "conversation", "prompt")
QUESTIONS = ("question", "problem", "instruction")
PROMPTS = ("tokens", *CHATS, *QUESTIONS)
# Parts of a prompt: the first turn (`system_prompt` is OpenOrca's), earlier turns (Alpaca's in
# LLaMA-Factory), functions that the model may call (`functions` is OpenAI's older name).
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"
TOOLS = ("tools", "functions")

# Responses that win over the last turn of a chat: texts, or turns to add. `completion` is TRL's,
# `output` Alpaca's, `generated_solution` OpenMathReasoning's. `solution` comes after all.
RESPONSES = ("response", "completion", "output", "generated_solution")
# (thoughts, the text after them) of s1K-1.1, s1K and OpenThoughts, which win over `completion`.
# DeepMath's r1_solution_1 and OpenR1-Math's generations do as well.
THOUGHTS = (
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
    ("thinking_trajectories", "attempt"),
    ("deepseek_reasoning", "deepseek_solution"),
)
# The think block of a response, or of `content`. (`thinking: true` is a mode.)
REASONING = messages.REASONING_FIELDS

# Answers. verl's is reward_model.ground_truth; the last is the box in MATH's `solution`.
ANSWERS = ("answer", "final_answer", "expected_answer", "reward_model", "ground_truth")

# Names on the left of config.data.columns; prompts need none of the responses.
TRACES = ("response", "solution", "response_tokens", "direct")
SETS = {"orca_math": "response=answer"}  # a name for its pairs
PROMPT_FORMS = ("tokens", "prompt", "messages", "question")
CANONICAL = (
    *(*PROMPT_FORMS, *TRACES),
    *("system", "tools", "thinking", "reasoning_content", "answer"),
)

# Columns of numbers that say how much of a row is learned. Training reads 1 only.
WEIGHTS = {
    "weight": "rows have no weights; data.mixture weighs sources, messages[i].weight turns",
    "train": "remove the row; messages[i].train leaves out single turns",
}
LABELS = ("label", "kto_tag")  # TRL's and LLaMA-Factory's: false marks an unwanted response
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
OPTIONS = ("choices", "options")
VERIFIED = {"problem", "generations", "correctness_math_verify"}  # OpenR1-Math
SWITCHES = {"on": True, "off": False}  # Nemotron's `reasoning`
# Forms that are not read, by a column of theirs, and what to do.
UNREAD_FORMS = {
    "chosen": "a preference: config.data.columns=response=chosen learns a chosen text, "
    "messages=chosen a chosen chat",
    "completions": "several completions: write the one to learn as response",
    "segments": "Axolotl's input_output: write prompt and response",
    "input_ids": "tokenised: write tokens, the prompt, and response_tokens",
}


def explain_missing_prompt(row: dict, by_config: bool = False) -> str | None:
    """Returns what is wrong with a canonical row that has no prompt; None if it has one.

    Args:
      by_config: names the key of a config that says which column is the prompt.
    """
    if any(name in row for name in PROMPT_FORMS):
        return None
    fields = sorted(name for name in row if row[name] not in (None, ""))
    near = {name: difflib.get_close_matches(name, PROMPT_FORMS, 1) for name in fields}
    found = next(((name, forms[0]) for name, forms in near.items() if forms), None)
    texts = [name for name in fields if isinstance(row[name], str) and name not in ANSWERS]
    theirs, ours = found or (texts[0] if texts else "COLUMN", "question")
    hint = f"; did you mean {ours!r} by {theirs!r}?" if found else ""
    hint += f" config.data.columns={ours}={theirs} reads it as the {ours}" if by_config else ""
    hint = hint if found or not by_config else f";{hint}"
    return f"none of {', '.join(PROMPT_FORMS)} among its fields {fields}{hint}"
