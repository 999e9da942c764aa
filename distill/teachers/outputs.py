"""What a teacher that is not run here says of one response, and who can be asked for it.

A remote server (`remote`) and a directory of stored scores (`stored`) give the same: numpy arrays
over the n tokens of a response, which `data.collate` puts at the student's columns.

Letters: K likeliest tokens, E model dimension, V vocabulary.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from models.errors import UserError

# What a loss may ask for (Loss.teacher_output) → the fields of ResponseOutput that hold it.
OUTPUT_FIELDS = {"token": ("logp",), "top": ("top_ids", "top_logp"), "hidden": ("hidden",)}
FIELD_DTYPES = {
    "logp": (np.dtype(np.float32),),
    "top_ids": (np.dtype(np.int32),),
    "top_logp": (np.dtype(np.float32),),
    "hidden": (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)),
}
_ROUNDING = 1e-3  # by which a sum of probabilities may exceed 1, or a log-probability 0


class InvalidOutput(UserError):
    """An output that cannot be right; the message is one line without the name of its source."""


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseOutput:
    """A teacher's output for the n tokens of one response, on the host.

    Row i is about token i of the response: the teacher has read the prompt and the i tokens before.
    All log-probabilities are at temperature 1.

    Raises:
      InvalidOutput: if a field has another dtype or shape than it should.
    """

    logp: np.ndarray | None = None  # float32 [n]: log-probabilities of the response's own tokens
    top_ids: np.ndarray | None = None  # int32 [n, K]: likeliest tokens, likeliest first
    top_logp: np.ndarray | None = None  # float32 [n, K]: their log-probabilities
    # bfloat16 or float32 [n, E]: final hidden states. Row i is that of the token before token i
    # (the prompt's last for i = 0), from which the head computes the distribution of token i.
    hidden: np.ndarray | None = None

    def __post_init__(self) -> None:
        fields = self.get_fields()
        if not fields:
            raise InvalidOutput("has none of " + ", ".join(FIELD_DTYPES))
        for name, value in fields.items():
            ndim = 1 if name == "logp" else 2
            if value.ndim != ndim or value.dtype not in FIELD_DTYPES[name]:
                dtypes = " or ".join(dtype.name for dtype in FIELD_DTYPES[name])
                raise InvalidOutput(
                    f"{name} is {value.dtype.name} {list(value.shape)}, not {dtypes} of {ndim} "
                    f"dimension{'s' * (ndim - 1)}"
                )
        if (self.top_ids is None) != (self.top_logp is None):
            raise InvalidOutput("has one of top_ids and top_logp without the other")
        shapes = [list(value.shape) for name, value in fields.items() if name.startswith("top_")]
        if shapes and shapes[0] != shapes[1]:
            raise InvalidOutput(f"top_ids and top_logp differ in shape: {shapes[0]}, {shapes[1]}")
        counts = {name: len(value) for name, value in fields.items()}
        if len(set(counts.values())) > 1:
            raise InvalidOutput(f"has different numbers of tokens: {counts}")

    def get_fields(self) -> dict[str, np.ndarray]:
        """Returns the arrays that there are, by name."""
        pairs = ((name, getattr(self, name)) for name in FIELD_DTYPES)
        return {name: value for name, value in pairs if value is not None}

    @property
    def num_tokens(self) -> int:
        return len(next(iter(self.get_fields().values())))


@dataclasses.dataclass(frozen=True)
class ScorerInfo:
    """What is known of a teacher before it is asked for the first response."""

    model: str  # its name or path, for messages
    outputs: tuple[str, ...]  # keys of OUTPUT_FIELDS that it gives
    vocab_size: int
    top_k: int = 0  # most tokens of "top" at each position; 0: as many as are asked for
    context_length: int = 0  # most tokens of a prompt and its response; 0: not known
    hidden_size: int = 0  # of "hidden"
    hidden_dtype: str = "bfloat16"  # of "hidden"
    param_dtype: str = ""  # of the model's weights; "": not known
    model_hash: str = ""  # of its files (policy.identity); "": not known
    tokenizer_hash: str = ""  # policy.identity.hash_parts of its tokenizer's files
    head_hash: str = ""


class Scorer(Protocol):
    """A teacher that is not run here."""

    @property
    def info(self) -> ScorerInfo: ...

    @property
    def head_VE(self) -> np.ndarray | None:
        """The output head, if the scorer gives hidden states; in the dtype of the model."""
        ...

    def submit(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        where: str = "",
        limit: int | None = None,
    ) -> concurrent.futures.Future[ResponseOutput]:
        """Asks for the output of a response after the teacher's prompt.

        `where` names the row in errors, and `limit` cuts the response. The future raises UserError
        where the response cannot be scored, and SourceFailure where nothing answers any more.
        """
        ...

    def close(self) -> None: ...


def check_output(
    output: ResponseOutput,
    num_tokens: int,
    vocab_size: int,
    *,
    hidden_size: int = 0,
    top_k: int = 0,
) -> None:
    """Checks that an output can be that of a response of `num_tokens` tokens.

    Args:
      hidden_size: of the hidden states, if there should be some.
      top_k: likeliest tokens that there should be at least.

    Raises:
      InvalidOutput: saying what is wrong, and at which token of the response.
    """
    if output.num_tokens != num_tokens:
        raise InvalidOutput(f"is of {output.num_tokens} tokens, the response has {num_tokens}")
    if output.logp is not None:
        _check_logp(output.logp, "logp")
    if output.top_ids is not None and output.top_logp is not None:
        _check_top(output.top_ids, output.top_logp, vocab_size, top_k)
    elif top_k:
        raise InvalidOutput("has no top_ids")
    if output.hidden is not None:
        _require_all(np.isfinite(output.hidden), "hidden is not finite")
    if hidden_size and (output.hidden is None or output.hidden.shape[1] != hidden_size):
        shape = None if output.hidden is None else list(output.hidden.shape)
        raise InvalidOutput(f"hidden has the shape {shape}, not [{num_tokens}, {hidden_size}]")


def _check_top(ids: np.ndarray, logp: np.ndarray, vocab_size: int, top_k: int) -> None:
    if ids.shape[1] < max(1, top_k):
        raise InvalidOutput(f"has the {ids.shape[1]} likeliest tokens, not {top_k}")
    _check_logp(logp, "top_logp")
    inside = (ids >= 0) & (ids < vocab_size)
    _require_all(inside, f"top_ids has an id outside the vocabulary of {vocab_size}")
    _require_all(np.diff(np.sort(ids, axis=1), axis=1) > 0, "top_ids has an id twice")
    _require_all(np.diff(logp, axis=1) <= 0, "top_logp does not begin with the likeliest")
    sums = np.exp(logp, dtype=np.float64).sum(axis=1)
    _require_all(sums <= 1 + _ROUNDING, "top_logp has probabilities of a sum above 1")


def _check_logp(logp: np.ndarray, name: str) -> None:
    _require_all(np.isfinite(logp), f"{name} is not finite")
    _require_all(logp <= _ROUNDING, f"{name} is above 0")


def _require_all(good: np.ndarray, message: str) -> None:
    if not good.all():
        first = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
        raise InvalidOutput(f"{message} at token {first} of the response")
