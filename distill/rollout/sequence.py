"""A response: what is asked for and, as far as it has come, what was sampled."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Sequence:
    """One response: what is asked for and, as far as it has come, what was drawn."""

    prompt: list[int]
    key: tuple[int, int]  # the data of its key
    limit: int  # tokens at most
    where: str = ""  # for messages
    teacher_prompt: list[int] | None = None  # the prompt that a teacher reads; None: the same
    source_id: int = 0  # which source of a mixture it is from
    thinking: bool = True  # the mode that it is asked in
    difficulty: float | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)  # the stop token included
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)  # of the weights, each token's
    finish_reason: str = ""  # stop, length or error (logits of NaN); "": not ended, can go on
    # Where asked for, of the model's own distribution: of each token, and the likeliest (id, logp).
    model_logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    # Where asked for, of a mixture: int16 [tokens, L, A], pieces of prompt and response in order.
    # Like a log-probability, a token's experts are those that it met when it was drawn.
    experts: list[np.ndarray] = dataclasses.field(default_factory=list, compare=False)

    @property
    def all_tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.limit
