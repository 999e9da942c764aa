"""Makes assets/rows: a few rows of each kind that the recipes read, for their tiny variants.

    python assets/make_rows.py

Each file has the columns of the published set that it stands for, filled with problems of the
generated task, or with our own sentences of few tokens in the embedded tokenizer.
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


def make_rows() -> dict[str, list[dict]]:
    """Returns the rows of each file, by its name."""
    problems = [arithmetic.make_problem(SEED, i, "train", (3, 3)) for i in range(COUNT)]
    tokenizer = chat.load_tokenizer(ROWS.parent / "teacher")
    assert tokenizer is not None
    files: dict[str, list[dict]] = {}

    def add_row(name: str, row: dict) -> None:
        files.setdefault(f"{name}.jsonl", []).append(row)

    def make_sample(messages: list[dict], response: str, thinking: bool, **known: str) -> dict:
        """Makes a row as `generate` writes it."""
        tokens = chat.encode_response(tokenizer, response)
        sample = {"tokens": tokens, "text": response, "finish_reason": "stop", "correct": True}
        prompt = chat.render_messages(tokenizer, messages, thinking=thinking)
        return {"messages": messages, **known, "prompt_tokens": prompt, "samples": [sample]}

    for number, problem in enumerate(problems):
        question, working, answer = problem.question, problem.solution, problem.answer
        messages, trace = arithmetic.to_messages(problem), arithmetic.to_response(problem)
        unopened = f"{working}\n</think>\n\n{answer}"  # DeepSeek-R1's template opens the block
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": trace}]
        add_row("openthoughts3", {"source": "tiny", "domain": "math", "conversations": turns})
        traces = {f"r1_solution_{i}": unopened for i in (1, 2, 3)}
        add_row(
            "deepmath", {"question": question, "final_answer": answer, "difficulty": 1.0, **traces}
        )
        add_row("gsm8k", {"question": question, "answer": f"{working}\n#### {answer}"})
        add_row("orca_math", {"question": question, "answer": f"The answer is {answer}."})
        attempt = {"deepseek_thinking_trajectory": working, "deepseek_attempt": answer}
        add_row("s1k", {"question": question, "solution": answer, **attempt})
        verified = {"generations": [unopened, trace], "correctness_math_verify": [False, True]}
        add_row(
            "openr1_math", {"problem": question, "solution": working, "answer": answer, **verified}
        )
        add_row("traces_think", make_sample(messages, trace, True, answer=answer))
        add_row("traces_no_think", make_sample(messages, answer, False, answer=answer))
        add_row("documents", {"text": f"Note {number}. {question} It is {answer}."})
    for number, (question, reply) in enumerate(CHATS.items()):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
        add_row("tulu3", {"id": f"tiny-{number}", "messages": messages, "source": "tiny"})
        add_row("chats", make_sample(messages[:1], reply, False))
    for question, reply in QUESTIONS.items():
        trace = f"<think>\n{reply}\n</think>\n\n{reply}"
        add_row("manual_questions", {"question": question, "response": trace})
    return files


if __name__ == "__main__":
    ROWS.mkdir(exist_ok=True)
    for name, rows in make_rows().items():
        (ROWS / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ROWS / "manual.md").write_text(
        "Ann has the key. It opens the gate. Ben shuts the gate at 9.\n"
    )
