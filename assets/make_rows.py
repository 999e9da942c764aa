"""Makes assets/rows: a few rows of each kind that the recipes read, for their tiny variants.

    python assets/make_rows.py

Each file has the columns of the published set that it stands for, filled with problems of the
generated task, or with sentences of our own that the embedded tokenizer takes in few tokens.
"""

import json
import sys
from pathlib import Path

ROWS = Path(__file__).resolve().parent / "rows"
sys.path.insert(0, str(ROWS.parents[1]))

from distill.data import arithmetic, chat  # noqa: E402

SEED, COUNT = 60_000, 12
QUESTIONS = {
    "Who has the key?": "Ann has the key.",
    "When is the gate shut?": "At 9.",
    "How many lamps are on the wall?": "There are 6 lamps.",
    "What opens the gate?": "The key opens the gate.",
    "Who shuts the gate?": "Ben shuts the gate.",
    "Where is the key at 9?": "Ann has the key.",
}
CHATS = {
    "Say yes.": "Yes.",
    "How are you?": "I am well.",
    "Count to 3.": "1, 2, 3.",
    "Who are you?": "I am a model.",
    "Say no 2 times.": "No. No.",
    "Is 9 more than 3?": "Yes, 9 is more.",
}


def rows() -> dict[str, list[dict]]:
    """File name -> its rows."""
    problems = [arithmetic.make_problem(SEED, i, "train", (3, 3)) for i in range(COUNT)]
    tokenizer = chat.load_tokenizer(ROWS.parent / "teacher")
    assert tokenizer is not None
    made: dict[str, list[dict]] = {}

    def add(name: str, row: dict) -> None:
        made.setdefault(f"{name}.jsonl", []).append(row)

    def sampled(messages: list[dict], response: str, thinking: bool, **known: str) -> dict:
        """As `generate` writes it."""
        tokens = chat.encode_response(tokenizer, response)
        sample = {"tokens": tokens, "text": response, "finish_reason": "stop", "correct": True}
        prompt = chat.render_messages(tokenizer, messages, thinking=thinking)
        return {"messages": messages, **known, "prompt_tokens": prompt, "samples": [sample]}

    for number, problem in enumerate(problems):
        asked, working, answer = problem.question, problem.solution, problem.answer
        messages, trace = arithmetic.to_messages(problem), arithmetic.to_response(problem)
        unopened = f"{working}\n</think>\n\n{answer}"  # as DeepSeek-R1 goes on from its template
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": trace}]
        add("openthoughts3", {"source": "tiny", "domain": "math", "conversations": turns})
        traces = {f"r1_solution_{i}": unopened for i in (1, 2, 3)}
        add("deepmath", {"question": asked, "final_answer": answer, "difficulty": 1.0, **traces})
        add("gsm8k", {"question": asked, "answer": f"{working}\n#### {answer}"})
        add("orca_math", {"question": asked, "answer": f"The answer is {answer}."})
        found = {"deepseek_thinking_trajectory": working, "deepseek_attempt": answer}
        add("s1k", {"question": asked, "solution": answer, **found})
        verified = {"generations": [unopened, trace], "correctness_math_verify": [False, True]}
        add("openr1_math", {"problem": asked, "solution": working, "answer": answer, **verified})
        add("traces_think", sampled(messages, trace, True, answer=answer))
        add("traces_no_think", sampled(messages, answer, False, answer=answer))
        add("documents", {"text": f"Note {number}. {asked} It is {answer}."})
    for number, (asked, said) in enumerate(CHATS.items()):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        add("tulu3", {"id": f"tiny-{number}", "messages": messages, "source": "tiny"})
        add("chats", sampled(messages[:1], said, False))
    for asked, said in QUESTIONS.items():
        trace = f"<think>\n{said}\n</think>\n\n{said}"
        add("manual_questions", {"question": asked, "response": trace})
    return made


if __name__ == "__main__":
    ROWS.mkdir(exist_ok=True)
    for name, found in rows().items():
        (ROWS / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    (ROWS / "manual.md").write_text(
        "Ann has the key. It opens the gate. Ben shuts the gate at 9.\n"
    )
