"""python -m distill.chat --model=runs/x: talks with a model, line by line, in a terminal or a pipe.

Each line is a turn; the answer is shown while it is sampled, at --temperature with Qwen3's top_p
(0.95) and top_k (20). /think and /no_think, in a line of their own or within one, switch thinking
on and off; /reset begins anew. Ctrl-C stops an answer, Ctrl-D ends.
"""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from absl import flags

from distill.runtime import cli
from models.errors import UserError, suggest

if TYPE_CHECKING:
    from distill.policy.policy import Policy

OPTIONS = flags.FlagValues()
MODEL, DTYPE = cli.define_model_flags(OPTIONS)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.6, "Divides the logits; 0: greedy.", 0.0, flag_values=OPTIONS
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    1024,
    "Maximum length of an answer, in tokens; less where the model's positions leave less.",
    1,
    flag_values=OPTIONS,
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed of sampling.", 0, flag_values=OPTIONS)

SEGMENT_TOKENS = 8  # sampled between two looks at the text
MODES = {"/think": True, "/no_think": False}


def main() -> None:
    from distill.policy import policy
    from distill.runtime import xla

    xla.init_compilation_cache()
    subject = policy.make_abstract_for_inference(MODEL.value, DTYPE.value)
    if subject.tokenizer is None or subject.tokenizer.chat_template is None:
        raise UserError(f"--model={MODEL.value}: has no chat template")
    with policy.use(subject):
        subject = policy.load(subject)
        signal.set_wakeup_fd(-1)  # from here on Ctrl-C is Python's own: it stops an answer
        signal.signal(signal.SIGINT, signal.default_int_handler)
        converse(read_lines(), lambda *turn: sample_answer(subject, *turn))


def read_lines() -> Iterator[str]:
    """Yields the lines of stdin; on a terminal, with a prompt and a line editor."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline as readline  # `input` then has a history

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
        except EOFError:
            print()
            return


def converse(lines: Iterator[str], answer: Callable[[list[dict], bool, int], str]) -> None:
    """Answers each line with `answer`, a function of the conversation, the thinking mode and the
    number of the turn; it prints the answer and returns it."""
    from distill.data import examples

    messages, thinking, number = [], True, 0
    for line in map(str.strip, lines):
        if line in MODES:
            thinking = MODES[line]
            print(f"(thinking is {'on' if thinking else 'off'})", file=sys.stderr)
        elif line == "/reset":
            messages = []
            print("(a new conversation)", file=sys.stderr)
        elif re.fullmatch(r"/\w+", line):  # not /etc/fstab, nor a question that begins with /think
            known = (*MODES, "/reset")
            hint = suggest(line, known) or f"; commands are {', '.join(known)}"
            print(f"error: {line}: no such command{hint}", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            own_mode = examples.find_thinking_mode({"messages": messages[-1:]})
            thinking = thinking if own_mode is None else own_mode
            try:
                text = answer(messages, thinking, number)
            except UserError as error:  # the conversation is too long
                print(f"error: {error}; /reset begins anew", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": text})
            number += 1


def sample_answer(subject: "Policy", messages: list[dict], thinking: bool, number: int) -> str:
    """Samples an answer, prints it as it comes, and returns it; Ctrl-C cuts it short."""
    import jax

    from distill.data import chat
    from distill.rollout import completions, sampler
    from distill.rollout.options import RolloutOptions
    from distill.rollout.sampling import Sampling
    from distill.rollout.sequence import Sequence

    tokenizer = subject.tokenizer
    assert tokenizer is not None
    row = {"messages": messages}
    prompt = completions.encode_row_prompt(subject, row, "the conversation", thinking, 1)
    limit = completions.fit_limit(subject, prompt, MAX_NEW_TOKENS.value)
    key = sampler.make_row_keys(jax.random.key(SEED.value), [number], [0])[0]
    sequence, shown = Sequence(prompt, key, limit), 0

    def show(sequence: Sequence, is_last: bool = False) -> bool:
        """Prints what is new of the text, but for a character of which bytes are missing."""
        nonlocal shown
        text = chat.decode_response(tokenizer, prompt, sequence.tokens)
        text = text if is_last else text.rstrip("\ufffd")
        print(text[shown:], end="", flush=True)
        shown = max(shown, len(text))
        return False

    sampling = Sampling(TEMPERATURE.value, top_k=min(20, subject.config.vocab_size), top_p=0.95)
    max_length = sampler.bucket_length(len(prompt) + limit)
    options = RolloutOptions(1, max_length=max_length, segment=SEGMENT_TOKENS)
    model = sampler.SamplingModel(subject.model, subject.params, subject.stop_ids)
    with contextlib.suppress(KeyboardInterrupt):
        list(sampler.sample(model, [sequence], sampling=sampling, options=options, ended=show))
    show(sequence, is_last=True)
    print()
    return chat.decode_response(tokenizer, prompt, sequence.tokens)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
