"""Replies in the form of OpenAI's API, with vLLM's additions."""

import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.serving.jobs import Piece, Response
from distill.teachers.outputs import ResponseOutput

LEAST_LOGPROB = -9999.0  # in place of -inf, which JSON does not have, as in vLLM
Top = Sequence[tuple[int, float]]  # (id, log-probability), likeliest first


class TokenNames:
    """Names tokens in replies: by their text, or as "token_id:ID"."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._decode = functools.lru_cache(maxsize=2**16)(self._decode_token)

    def _decode_token(self, token: int) -> str:
        assert self._tokenizer is not None
        return cast(str, self._tokenizer.decode([token]))

    def get_name(self, token: int, as_id: bool = False) -> str:
        return f"token_id:{token}" if as_id or self._tokenizer is None else self._decode(token)

    def decode_prompt(self, ids: list[int]) -> str:
        """Returns the text of a prompt with its special tokens; "" without a tokenizer."""
        return "" if self._tokenizer is None else cast(str, self._tokenizer.decode(ids))


class TokenLogprobs:
    """Log-probabilities of consecutive tokens and of the likeliest at each place."""

    def __init__(self, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]) -> None:
        self.ids, self.logprobs, self.tops = ids, [clip(x) for x in logprobs], tops

    @classmethod
    def of_prompt(
        cls, ids: Sequence[int], output: ResponseOutput | None, count: int
    ) -> "TokenLogprobs":
        """Returns those of all tokens of a prompt but the first, which has none."""
        if output is None:
            return cls([], [], [])
        assert output.logp is not None
        tops: list[Top] = [()] * len(output.logp)
        if output.top_ids is not None and output.top_logp is not None:
            pairs = zip(output.top_ids.tolist(), output.top_logp.tolist(), strict=True)
            tops = [list(zip(*pair, strict=True))[:count] for pair in pairs]
        return cls(ids[1:], output.logp.tolist(), tops)

    @classmethod
    def of_piece(cls, response: Response, piece: Piece, count: int) -> "TokenLogprobs":
        """Returns those of a piece of a response, with `count` likeliest tokens."""
        sequence, place = response.sequence, slice(piece.start, piece.end)
        logprobs, tops = sequence.model_logprobs or [], sequence.top_logprobs or []
        own = [top[:count] for top in tops[place]] or [()] * (piece.end - piece.start)
        return cls(sequence.tokens[place], logprobs[place], own)

    def list_tops(self, place: int) -> list[tuple[int, float]]:
        """Returns the likeliest tokens at a place, and its own if that is not among them."""
        top, own = list(self.tops[place]), self.ids[place]
        return top if any(i == own for i, _ in top) else [*top, (own, self.logprobs[place])]


def clip(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def describe_completion_logprobs(
    names: TokenNames, drawn: TokenLogprobs, as_id: bool, offset: int, first: int | None = None
) -> dict[str, Any]:
    """Returns `logprobs` of a choice of /v1/completions.

    offset: characters of the text before these tokens. first: the token before them, which has no
    log-probability (the prompt's first).
    """
    ids = [*([] if first is None else [first]), *drawn.ids]
    none: list[Any] = [] if first is None else [None]
    tops = []
    for place in range(len(drawn.ids)):
        top: dict[str, float] = {}
        for token, logprob in drawn.list_tops(place):  # two tokens may have one text: the likelier
            top.setdefault(names.get_name(token, as_id), clip(logprob))
        tops.append(top)
    texts = [names.get_name(token, as_id) for token in ids]
    sizes = [0, *(len(names.get_name(token)) for token in ids[:-1])]
    return {
        "tokens": texts,
        "token_logprobs": [*none, *drawn.logprobs],
        "top_logprobs": [*none, *tops],
        "text_offset": (offset + np.cumsum(sizes)).tolist() if ids else [],
    }


def describe_chat_logprobs(names: TokenNames, drawn: TokenLogprobs, as_id: bool) -> dict[str, Any]:
    """Returns `logprobs` of a choice of /v1/chat/completions."""

    def describe(token: int, logprob: float) -> dict[str, Any]:
        text = names.get_name(token)
        # The bytes of a part of a character are not known from its text.
        found = None if "\ufffd" in text else list(text.encode())
        name = names.get_name(token, as_id)
        return {"token": name, "logprob": clip(logprob), "bytes": found}

    content = []
    for place, (token, logprob) in enumerate(zip(drawn.ids, drawn.logprobs, strict=True)):
        tops = [describe(i, x) for i, x in drawn.tops[place]]
        content.append({**describe(token, logprob), "top_logprobs": tops})
    return {"content": content}


def describe_prompt_logprobs(
    names: TokenNames, ids: Sequence[int], output: ResponseOutput | None, count: int
) -> list[dict[str, Any] | None]:
    """Returns vLLM's `prompt_logprobs`: for each token but the first the likeliest and its own, by
    id as a text. The rank of one that is not among the likeliest is null."""
    prompt, described = TokenLogprobs.of_prompt(ids, output, count), []
    for place in range(len(prompt.ids)):
        entries: dict[str, Any] = {}
        for rank, (token, logprob) in enumerate(prompt.list_tops(place), start=1):
            known = rank <= len(prompt.tops[place])
            entries[str(token)] = {
                "logprob": clip(logprob),
                "rank": rank if known else None,
                "decoded_token": names.get_name(token),
            }
        described.append(entries)
    return [None, *described]


def count_usage(prompts: Sequence[list[int]], num_tokens: int) -> dict[str, int]:
    total = sum(map(len, prompts))
    counts = {"prompt_tokens": total, "completion_tokens": num_tokens}
    return {**counts, "total_tokens": total + num_tokens}


def make_envelope(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Returns the fields that a reply and all chunks of a stream have in common."""
    identifier = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": model}
