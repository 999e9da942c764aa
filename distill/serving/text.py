"""The text of a response while its tokens come: in whole characters, and up to a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from distill.data import chat

# A character has four bytes at most, and a token at least one: what the last tokens leave
# unfinished does not depend on those before them.
_KEPT_TOKENS, _MAX_PENDING_TOKENS = 8, 16


class TextStream:
    """Turns the tokens of a response into text, piece by piece.

    The pieces, put together, are the text of all tokens, without special tokens and cut before the
    first stop string. A piece never ends within a character, nor with what may become a stop
    string. Without a tokenizer all pieces are empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._count = 0  # tokens read
        self._pending: list[int] = []  # the last of them, which may end within a character
        self._skipped = 0  # characters of their text that `_held` has
        self._held = ""  # text that may be the beginning of a stop string
        self.stop_index: int | None = None  # tokens up to the one that completes a stop string

    def feed(self, ids: Sequence[int], is_last: bool = False) -> str:
        """Reads further tokens and returns the text that is new, all of it after the last one."""
        if self.stop_index is not None or self._tokenizer is None:
            return ""
        # What completes a stop string is found token by token.
        for chunk in ([i] for i in ids) if self._stops else ([*ids],):
            self._count += len(chunk)
            self._held += self._decode(self._tokenizer, chunk)
            if (end := self._find_stop()) is not None:
                self.stop_index = self._count
                return self._take(end)
        if is_last:
            self._held += self._flush(self._tokenizer)
            if (end := self._find_stop()) is not None:
                self.stop_index = self._count
                return self._take(end)
            return self._take(len(self._held))
        return self._take(len(self._held) - self._count_partial_stop())

    def _decode(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
        """Returns the characters that `ids` complete."""
        self._pending += ids
        text = chat.decode(tokenizer, self._pending)
        if not text.endswith("\ufffd"):
            new, self._pending, self._skipped = text[self._skipped :], [], 0
            return new
        new = text[self._skipped : -1]
        self._skipped += len(new)
        if len(self._pending) > _MAX_PENDING_TOKENS:
            self._pending = self._pending[-_KEPT_TOKENS:]
            self._skipped = len(chat.decode(tokenizer, self._pending)) - 1
        return new

    def _flush(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the text of a character that remains unfinished."""
        return chat.decode(tokenizer, self._pending)[self._skipped :] if self._pending else ""

    def _find_stop(self) -> int | None:
        return min((i for s in self._stops if (i := self._held.find(s)) >= 0), default=None)

    def _count_partial_stop(self) -> int:
        """Returns the most characters at the end of the text that begin a stop string."""
        sizes = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:size])
        )
        return max(sizes, default=0)

    def _take(self, end: int) -> str:
        taken, self._held = self._held[:end], self._held[end:]
        return taken
