"""One response: what is asked for and, as far as it has come, what was drawn."""

import dataclasses

import numpy as np

from distill.rollout.sampling import Sampling

_EXTENDED_FIELDS = ("tokens", "logprobs", "versions", "experts")  # by sampling, in place


@dataclasses.dataclass
class Sequence:
    """A prompt and its response, to which sampling appends.

    The optional records hold the model's own distribution (temperature 1, no truncation), where
    RolloutOptions.top_logprobs asks for it.
    """

    prompt: list[int]
    key: tuple[int, int]  # data of the random key that its tokens are drawn with
    limit: int  # response tokens at most
    where: str = ""  # file and row, for messages
    teacher_prompt: list[int] | None = None  # the prompt that a teacher reads; None: the same
    source_id: int = 0  # index of its source in a mixture
    thinking: bool = True  # the mode of its prompt
    difficulty: float | None = None
    sampling: Sampling | None = None  # its own, where the decoder samples by row
    wants_logprobs: bool = True  # the optional records, where the decoder makes them
    tokens: list[int] = dataclasses.field(default_factory=list)  # the stop token included
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)  # of the weights, for each token
    finish_reason: str = ""  # stop, length or error (logits are NaN); "": can go on
    model_logprobs: list[float] | None = None  # of each token
    top_logprobs: list[list[tuple[int, float]]] | None = None  # of the likeliest: (id, logp)
    # int16 [tokens, L, A] pieces of prompt and response, in order, where RolloutOptions.routing
    # asks for them: the experts that each token was sent to when it was drawn.
    experts: list[np.ndarray] = dataclasses.field(default_factory=list, compare=False)

    def copy(self) -> "Sequence":
        """Returns one that sampling goes on with, while this one stays as it is."""
        lists = {name: [*getattr(self, name)] for name in _EXTENDED_FIELDS}
        return dataclasses.replace(self, **lists)

    @property
    def all_tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.limit
