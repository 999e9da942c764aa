"""What requests ask of the device: responses to generate, and sequences to score."""

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.serving.errors import ApiError
from distill.serving.text import TextStream
from distill.teachers.outputs import ResponseOutput


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How the responses of one request are drawn."""

    sampling: Sampling
    seed: int
    samples: int = 1  # of each prompt
    stops: tuple[str, ...] = ()
    wants_logprobs: bool = False  # of the model's own distribution
    is_stream: bool = False  # pieces come as they are drawn, not only at the end


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of a response: `text`, and the tokens start:end of its sequence."""

    index: int  # of the response in the request
    text: str
    start: int
    end: int
    finish_reason: str  # stop or length; "": more follows


class Response:
    """One response of a Generation, which the device's thread reads as its tokens come."""

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        tokenizer: PreTrainedTokenizerBase | None,
        options: GenerationOptions,
    ) -> None:
        self.index, self.sequence, self.options = index, sequence, options
        self._text = TextStream(tokenizer, options.stops)
        self._num_read = 0
        self.is_done = False

    def read_tokens(self) -> Piece | None:
        """Returns what is new, if anything is to be passed on now.

        Raises:
          ApiError: if the model's logits were no numbers.
        """
        if self.is_done:
            return None
        sequence, start = self.sequence, self._num_read
        reason, end = sequence.finish_reason, len(sequence.tokens)
        if reason == "error":
            raise ApiError(f"the model's logits are not finite after {end} tokens", 500)
        if not reason and (start == end or not (self.options.is_stream or self.options.stops)):
            return None
        text = self._text.feed(sequence.tokens[start:end], is_last=bool(reason))
        if self._text.stop_index is not None:
            reason, end = "stop", self._text.stop_index
        self._num_read, self.is_done = end, bool(reason)
        return Piece(self.index, text, start, end, reason)


class Generation:
    """The responses of one request. Its fields belong to the device's thread, once submitted.

    Args:
      prompts: token ids, none of them empty.
      limits: tokens at most of the responses to each prompt.
      deliver: called with each Piece, or with what has failed, in the order in which they come.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        limits: list[int],
        options: GenerationOptions,
        deliver: Callable[[Piece | Exception], Any],
    ) -> None:
        self.prompts, self.limits, self.options = prompts, limits, options
        self.deliver = deliver
        self.responses: list[Response] = []
        self.is_cancelled = False

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.options.samples


class Scoring:
    """Sequences of one request to score.

    Args:
      sequences: (prompt, response) as token ids, none of them empty.
      output: token, top or hidden (distill.teachers.outputs).
      top_k: likeliest tokens of "top".
      deliver: called once with the outputs, or with what has failed.
    """

    def __init__(
        self,
        sequences: list[tuple[list[int], list[int]]],
        output: str,
        top_k: int,
        deliver: Callable[[list[ResponseOutput] | Exception], Any],
    ) -> None:
        self.sequences, self.output, self.top_k, self.deliver = sequences, output, top_k, deliver
        self.outputs: list[ResponseOutput | None] = [None] * len(sequences)
        self.num_left = len(sequences)
        self.is_cancelled = False

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)


Job = Generation | Scoring
