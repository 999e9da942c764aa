"""Makes assets/rows: a few rows of each set that README names, for tests and the tiny recipes.

    python assets/make_rows.py

Each file has all columns of the published set that it stands for, filled with problems of the
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


def make_chat(*texts: str) -> list[dict]:
    """Returns turns of the user and the assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def make_problem_rows(number: int, problem: arithmetic.Problem) -> dict[str, dict]:
    """Returns a problem as a row of each set without reasoning, by its file."""
    question, working, answer = problem.question, problem.solution, problem.answer
    boxed = f"{working}\nIt is $\\boxed{{{answer}}}$."
    return {
        "gsm8k": {"question": question, "answer": f"{working}\n#### {answer}"},
        "math": {
            "problem": question,
            "level": "Level 1",
            "type": "Arithmetic",
            "solution": boxed,
        },
        "numina_cot": {
            "source": "tiny",
            "problem": question,
            "solution": boxed,
            "messages": make_chat(question, boxed),
        },
        "orca_math": {"question": question, "answer": f"The answer is {answer}."},
        "dapo_math": {
            "data_source": "tiny",
            "prompt": make_chat(question),
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": f"tiny-{number}"},
        },
        "documents": {"text": f"Note {number}. {question} It is {answer}."},
    }


def make_reasoning_rows(number: int, problem: arithmetic.Problem) -> dict[str, dict]:
    """Returns a problem as a row of each set of DeepSeek-R1's or QwQ's reasoning, by its file."""
    question, working, answer = problem.question, problem.solution, problem.answer
    trace = arithmetic.to_response(problem)
    unopened = f"{working}\n</think>\n\n{answer}"  # DeepSeek-R1's template opens the block
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": trace}]
    grades = {f"{model}_grade": "Yes" for model in ("gemini", "deepseek")}
    return {
        "openthoughts3": {
            "difficulty": 1,
            "source": "tiny",
            "domain": "math",
            "conversations": turns,
        },
        "deepmath": {
            "question": question,
            "final_answer": answer,
            "difficulty": 1.0,
            "topic": "Arithmetic",
            **{f"r1_solution_{i}": unopened for i in (1, 2, 3)},
        },
        "s1k": {
            "solution": answer,
            "question": question,
            "cot_type": "math",
            "source_type": "tiny",
            "metadata": "{}",
            "gemini_thinking_trajectory": "It is small.",
            "gemini_attempt": answer,
            "deepseek_thinking_trajectory": working,
            "deepseek_attempt": answer,
            **grades,
            **{f"{name}_reason": "It is the same number." for name in grades},
        },
        "openr1_math": {
            "problem": question,
            "solution": working,
            "answer": answer,
            "problem_type": "Arithmetic",
            "question_type": "math-word-problem",
            "source": "tiny",
            "uuid": f"tiny-{number}",
            "is_reasoning_complete": [True, True],
            "generations": [unopened, trace],
            "correctness_math_verify": [False, True],
            "correctness_llama": None,
            "finish_reasons": ["stop", "stop"],
            "correctness_count": 1,
            "messages": make_chat(question, unopened),
        },
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
        sets = make_problem_rows(number, problem) | make_reasoning_rows(number, problem)
        for name, row in sets.items():
            add_row(name, row)
        messages, trace = arithmetic.to_messages(problem), arithmetic.to_response(problem)
        answer = problem.answer
        add_row("traces_think", make_sample(messages, trace, True, answer=answer))
        add_row("traces_no_think", make_sample(messages, answer, False, answer=answer))
    for number, (question, reply) in enumerate(CHATS.items()):
        messages = make_chat(question, reply)
        add_row("tulu3", {"id": f"tiny-{number}", "messages": messages, "source": "tiny"})
        add_row(
            "ultrachat",
            {
                "prompt": question,
                "prompt_id": f"tiny-{number}",
                "messages": messages + make_chat("Say yes.", "Yes."),
            },
        )
        add_row("chats", make_sample(messages[:1], reply, False))
    for question, reply in QUESTIONS.items():
        trace = f"<think>\n{reply}\n</think>\n\n{reply}"
        add_row("manual_questions", {"question": question, "response": trace})
        add_row("questions", {"question": question, "answers": [reply, reply.rstrip(".")]})
        others = [x for x in QUESTIONS.values() if x != reply][:3]
        options = [*others[:1], reply, *others[1:]]
        add_row("choice", {"question": question, "options": options, "answer": "B"})
    for number, prompt in enumerate(("Say yes. No commas.", "Count to 3. No commas.")):
        ids, kwargs = ["punctuation:no_comma"], [{}]
        row = {"key": number, "prompt": prompt, "instruction_id_list": ids, "kwargs": kwargs}
        add_row("ifeval", row)
    return files


if __name__ == "__main__":
    ROWS.mkdir(exist_ok=True)
    for name, rows in make_rows().items():
        (ROWS / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ROWS / "manual.md").write_text(
        "Ann has the key. It opens the gate. Ben shuts the gate at 9.\n"
    )
